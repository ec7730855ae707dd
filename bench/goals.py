"""What the hot paths are meant to reach, and whether one run's results reach it."""

import operator
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bench.harness import Entry
from bench.project import Job
from bench.report import Results, middle_half

SIGNS: dict[str, Callable[[float, float], bool]] = {"≥": operator.ge, ">": operator.gt, "≤": operator.le, "<": operator.lt}
Sign = Literal["≥", ">", "≤", "<"]
Unit = Literal["%", "×", "ms", "min", "h"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """`value` is None where the run has no figure for it."""

    name: str
    sign: Sign
    bound: float
    unit: Unit
    value: float | None
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.value is None else SIGNS[self.sign](self.value, self.bound)

    @property
    def wanted(self) -> str:
        return f"{self.sign} {self.bound:.0%}" if self.unit == "%" else f"{self.sign} {self.bound:g} {self.unit}"

    @property
    def measured(self) -> str:
        """As finely as the goal tells apart; the verdict is taken from the value itself."""
        if self.value is None:
            return "none"
        figure = f"{self.value:.1%}" if self.unit == "%" else f"{self.value:.3f} {self.unit}"
        return f"{figure} ({self.note})" if self.note else figure

    @property
    def verdict(self) -> str:
        return {True: "met", False: "**not met**", None: "not measured"}[self.met]


class Ratio(NamedTuple):
    """Our speed over the other's; over a base, which does the same work, what ours costs."""

    name: str
    path: str
    key: str  # of ours
    role: str  # of the other
    other: str | None  # its key; None: the fastest of that role
    sign: Sign
    bound: float
    unit: Unit


THREE = tuple(
    Ratio(f"three {way} settings, cost over three times one", "settings", way, "base", way, "≤", 1.02, "×")
    for way in ("dense", "sparse")
)
KINDS = tuple(
    Ratio(f"{kind} step, {way}, cost over BatchTopK's", "kinds", f"{kind}, {way}", "base", way, "≤", bound, "×")
    for kind, bound in (("matryoshka", 1.15), ("jumprelu", 1.25))
    for way in ("dense", "sparse")
)
CROSSCODER = tuple(
    Ratio(f"crosscoder's {way} step, cost over SAEs' of its layers", "crosscoder", way, "base", way, "≤", 1.1, "×")
    for way in ("dense", "sparse")
)
CPU = (
    Ratio("dense step, of five products", "training", "dense", "limit", "", "≥", 0.8, "%"),
    Ratio("dense step, of the best peer", "training", "dense", "peer", None, "≥", 1.9, "×"),
    Ratio("dense step, of SAELens", "training", "dense", "peer", "sae_lens", "≥", 5, "×"),
    Ratio("sparse step, of five products", "training", "sparse", "limit", "", "≥", 1, "%"),
    *THREE,
    *KINDS,
    *CROSSCODER,
    Ratio("loader, of raw read", "reading", "", "limit", None, "≥", 0.9, "%"),
    Ratio("writer, of raw write", "writing", "", "limit", None, "≥", 0.9, "%"),
    Ratio("writer, of SAELens' cache writer", "writing", "", "peer", "sae_lens_cache", "≥", 8, "×"),
    Ratio("int8 loader, tokens of float16's", "reading", "int8", "ours", "", "≥", 1.8, "×"),
    Ratio("int8 writer, tokens of float16's", "writing", "int8", "ours", "", "≥", 1.8, "×"),
    Ratio("forward, of plain transformers", "forward", "", "peer", None, ">", 1, "×"),
)
GPU = (
    Ratio("dense step, of the rate of a square product", "training", "dense", "limit", "square", "≥", 0.75, "%"),
    *THREE,
    *KINDS,
    *CROSSCODER,
    *(
        Ratio(f"three SAEs, {key}, cost over batches that are there", "stream", key, "base", key, "<", 1.01, "×")
        for key in ("dense", "sparse", "dense from memory", "sparse from memory")
    ),
)


def goals(results: Results) -> list[Goal]:
    gpu = results.machine.gpu is not None
    return [*(_ratio(results, each) for each in (GPU if gpu else CPU)), *(_times(results) if gpu else _outside_steps(results))]


def _outside_steps(results: Results) -> Iterator[Goal]:
    for way in ("dense", "sparse"):
        entry = _find(results, "stream", "ours", way)
        value = entry.figures.get("idle") if entry is not None else None
        name = f"{way} training, time outside steps (waiting for data)"
        yield Goal(name=name, sign="<", bound=0.02, unit="%", value=value)


def _times(results: Results) -> Iterator[Goal]:
    """Of a step, and of the published job's training."""
    sparse, three = _find(results, "training", "ours", "sparse"), _find(results, "settings", "ours", "dense")
    yield Goal(name="sparse step", sign="≤", bound=11, unit="ms", value=1e3 * sparse.median if sparse else None)
    layer = Job(layers=1).work.training / (three.rate or 1.0) if three else None
    name = "three settings, 300M tokens, every step dense"
    yield Goal(name=f"one layer, {name}", sign="≤", bound=8, unit="min", value=layer / 60 if layer else None)
    yield Goal(name=f"24 layers, {name}", sign="≤", bound=3, unit="h", value=24 * layer / 3600 if layer else None)


def _find(results: Results, path: str, role: str, key: str | None) -> Entry | None:
    comparison = results.path(path)
    if comparison is None:
        return None
    return comparison.best(role) if key is None else comparison.find(role, key)


def _ratio(results: Results, goal: Ratio) -> Goal:
    ours, other = _find(results, goal.path, "ours", goal.key), _find(results, goal.path, goal.role, goal.other)
    value, note = None, ""
    if ours is not None and other is not None:
        values = other.ratios(ours) if goal.role == "base" else ours.ratios(other)
        low, high = middle_half(values)
        value = statistics.median(values)
        if goal.role == "base":
            note = f"half of the rounds {low:.3f}–{high:.3f}"
        elif not goal.other:
            note = other.name + _without(results, goal.path, goal.role)
    return Goal(name=goal.name, sign=goal.sign, bound=goal.bound, unit=goal.unit, value=value, note=note)


def _without(results: Results, path: str, role: str) -> str:
    """Who could not be measured, and might have been the fastest."""
    comparison = results.path(path)
    absent = [one.name for one in comparison.entries if one.role == role and not one.seconds] if comparison else []
    return f"; without {', '.join(absent)}" if absent else ""
