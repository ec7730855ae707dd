"""What a run says of its kind of sparsity to those who read its SAEs and do not train them.

A kind that is told by its name writes a `Reading` of itself into config.json, and so into every checkpoint, under "sparsity".
The L1 penalty and BatchTopK are older than that: they are known by the fields of their setting, of which digests are made.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from residual_saes.shared.runs.sae import Rule


@dataclass(kw_only=True, frozen=True, slots=True)
class Reading:
    words: str  # the setting, in a card
    rule: Rule  # of finished SAEs; earlier snapshots may have no thresholds yet
    k: int | None = None  # of the rule "topk"
    prefixes: tuple[float, ...] | None = None  # of the dictionary, that were trained to reconstruct by themselves

    def fields(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def prefix_ends(prefixes: Sequence[float], n_features: int) -> tuple[int, ...]:
    """Where prefixes end that are given as widths, or below 1 as shares, the whole dictionary added; without empty groups."""
    ends = {round(width * n_features) if width < 1 else round(width) for width in prefixes}
    return (*sorted(ends - {0, n_features}), n_features)


def hold_from(steps: int, share: float) -> int:
    """The step at which L1 has done its work: λ is steered until then, and L0 is held for the rest of the run."""
    return steps - round(share * steps)


def held_fields(share: float) -> dict[str, Any]:
    """How config.json says that L0 is held at the end: as one kind of refit, from when there was another."""
    return {"l1_warmup": 0, "refit": share, "refit_kind": "topk" if share else "decoder"}
