"""Measured loss floors, as `python -m eval distill` leaves them beside the runs, for whoever shows them."""

import json
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.seal import sealed

FILE = "distilled.json"  # a list of experiments, the one asked for last first


def measured_floors(folder: Path, cache_digest: str) -> dict[str, Any] | None:
    """The latest experiment on this cache that has measured a student, or None. Raises UserError for a damaged file."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        experiments = json.loads(path.read_bytes())
    except ValueError:
        experiments = None
    if not isinstance(experiments, list) or not all(map(sealed, experiments)):
        raise UserError(f"{path} is damaged: restore it, or delete it to measure everything again")
    return next((e for e in experiments if e["cache"] == cache_digest and e["floors"]), None)
