"""The runs to be evaluated, and what is left out of an evaluation."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.progress import say
from residual_saes.shared.runs.run import Run
from residual_saes.shared.stores import Location


class Skipped:
    """What was left out of an evaluation. `with skipped.leaving_out(): …` says a UserError in one line and goes on."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    @property
    def count(self) -> int:
        return len(self.reasons)

    @contextlib.contextmanager
    def leaving_out(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            self.reasons.append(str(error))
            say(f"left out: {error}", err=True)


def runs_in(folder: Path) -> list[Run]:
    """The runs in `folder` (or `folder` itself, if it is one), none of them opened. Raises UserError if there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.listdir(folder)  # what cannot be read is not empty
    folders = [folder] if (folder / "config.json").exists() else sorted(p.parent for p in folder.glob("*/config.json"))
    if not folders:
        raise UserError(f"no runs in {folder}: train one with `make train` or `rsae train`")
    return list(map(Run, folders))


def cache_places(folder: Path) -> list[Location]:
    """Where the caches of these runs lie: of those that the runs name, the ones that are there. A run that cannot be read names
    none; `find_runs` says why."""
    places: set[Location | None] = set()
    for run in runs_in(folder):
        with contextlib.suppress(UserError):
            places.add(run.cache_place)
    return sorted((place for place in places if place is not None and Cache.exists(place)), key=str)


def find_runs(folder: Path, cache: Cache, skipped: Skipped) -> list[Run]:
    """Those of `runs_in` that were trained on this cache. Raises UserError if none was."""
    runs = []
    for run in runs_in(folder):
        with skipped.leaving_out():
            if run.config.cache.digest == cache.digest:
                runs.append(run)
    if not runs:
        raise UserError(f"no run in {folder} was trained on the cache {cache.path}; name theirs with --cache")
    return runs
