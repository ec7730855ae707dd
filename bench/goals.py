"""What the hot paths are meant to reach, and whether one run's results reach it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

from bench.report import Entry, Results, middle_half

Sign = Literal["≥", ">", "≤", "<"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """`value` is None where the run has no figure for it."""

    name: str
    sign: Sign
    bound: float
    percent: bool
    value: float | None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return {
            "≥": self.value >= self.bound,
            ">": self.value > self.bound,
            "≤": self.value <= self.bound,
            "<": self.value < self.bound,
        }[self.sign]

    @property
    def wanted(self) -> str:
        return f"{self.sign} {self.bound:.0%}" if self.percent else f"{self.sign} {self.bound:g} ×"

    @property
    def measured(self) -> str:
        """As finely as the goal tells apart; the verdict is taken from the value itself."""
        if self.value is None:
            return "none"
        figure = f"{self.value:.1%}" if self.percent else f"{self.value:.3f} ×"
        return f"{figure} ({self.note})" if self.note else figure

    @property
    def verdict(self) -> str:
        return {True: "met", False: "**not met**", None: "not measured"}[self.met]


def goals(results: Results) -> list[Goal]:
    """Comparison, key of ours, role and key of the other (the fastest of its role if none), sign, bound, percent."""
    ratios: list[tuple[str, str, str, str, str | None, Sign, float, bool]] = [
        ("dense step, of five products", "training", "dense", "limit", None, "≥", 0.8, True),
        ("dense step, of the best peer", "training", "dense", "peer", None, "≥", 1.9, False),
        ("dense step, of SAELens", "training", "dense", "peer", "sae_lens", "≥", 5, False),
        ("sparse step, of five products", "training", "sparse", "limit", None, "≥", 1, True),
        ("three dense settings, cost over three times one", "settings", "dense", "base", "dense", "≤", 1.02, False),
        ("three sparse settings, cost over three times one", "settings", "sparse", "base", "sparse", "≤", 1.02, False),
        ("loader, of raw read", "reading", "", "limit", None, "≥", 0.9, True),
        ("writer, of raw write", "writing", "", "limit", None, "≥", 0.9, True),
        ("writer, of SAELens' cache writer", "writing", "", "peer", "sae_lens_cache", "≥", 8, False),
        ("forward, of plain transformers", "forward", "", "peer", None, ">", 1, False),
    ]
    found = [_ratio(results, *spec) for spec in ratios]
    for way in ("dense", "sparse"):
        entry = _find(results, "stream", "ours", way)
        name = f"{way} training, time outside steps (waiting for data)"
        value = entry.figures.get("idle") if entry is not None else None
        found.append(Goal(name=name, sign="<", bound=0.02, percent=True, value=value))
    return found


def _find(results: Results, path: str, role: str, key: str | None) -> Entry | None:
    comparison = results.path(path)
    if comparison is None:
        return None
    return comparison.best(role) if key is None else comparison.find(role, key)


def _ratio(
    results: Results, name: str, path: str, key: str, role: str, other_key: str | None, sign: Sign, bound: float, percent: bool
) -> Goal:
    """Our speed over the other's; over a base, which does the same work, what ours costs."""
    ours, other = _find(results, path, "ours", key), _find(results, path, role, other_key)
    value, note = None, ""
    if ours is not None and other is not None:
        values = other.ratios(ours) if role == "base" else ours.ratios(other)
        low, high = middle_half(values)
        value = statistics.median(values)
        if role == "base":
            note = f"half of the rounds {low:.3f}–{high:.3f}"
        elif other_key is None:
            note = other.name + _without(results, path, role)
    return Goal(name=name, sign=sign, bound=bound, percent=percent, value=value, note=note)


def _without(results: Results, path: str, role: str) -> str:
    """Who could not be measured, and might have been the fastest."""
    comparison = results.path(path)
    absent = [one.name for one in comparison.entries if one.role == role and not one.seconds] if comparison else []
    return f"; without {', '.join(absent)}" if absent else ""
