"""What the hot paths are meant to reach, and whether one run's results reach it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

from bench.report import Comparison, Entry, Results, middle_half

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
    training, writing = results.path("training"), results.path("writing")
    reading, forward = results.path("reading"), results.path("forward")
    return [
        _faster("dense step, of five products", 0.8, training, "dense", "limit", percent=True),
        _faster("dense step, of the best peer", 1.9, training, "dense", "peer"),
        _faster("dense step, of SAELens", 5, training, "dense", "peer", "sae_lens"),
        _faster("sparse step, of five products", 1, training, "sparse", "limit", percent=True),
        *(_settings(results.path("settings"), way) for way in ("dense", "sparse")),
        _faster("loader, of raw read", 0.9, reading, "", "limit", percent=True),
        *(_idle(results.path("stream"), way) for way in ("dense", "sparse")),
        _faster("writer, of raw write", 0.9, writing, "", "limit", percent=True),
        _faster("writer, of SAELens' cache writer", 8, writing, "", "peer", "sae_lens_cache"),
        _faster("forward, of plain transformers", 1, forward, "", "peer", sign=">"),
    ]


def _faster(
    name: str,
    bound: float,
    comparison: Comparison | None,
    key: str,
    role: str,
    other_key: str | None = None,
    *,
    sign: Sign = "≥",
    percent: bool = False,
) -> Goal:
    """Our speed over that of the entry named, or over the fastest of its role."""
    value, note = None, ""
    if comparison is not None:
        ours = comparison.find("ours", key)
        other = comparison.best(role) if other_key is None else comparison.find(role, other_key)
        if ours is not None and other is not None:
            value = statistics.median(ours.ratios(other))
            note = other.name + _without(comparison, role) if other_key is None else ""
    return Goal(name=name, sign=sign, bound=bound, percent=percent, value=value, note=note)


def _without(comparison: Comparison, role: str) -> str:
    """Who could not be measured, and might have been the fastest."""
    absent = [entry.name for entry in comparison.entries if entry.role == role and not entry.seconds]
    return f"; without {', '.join(absent)}" if absent else ""


def _settings(comparison: Comparison | None, way: str) -> Goal:
    value, note = None, ""
    ours, base = (comparison.find(role, way) if comparison is not None else None for role in ("ours", "base"))
    if ours is not None and base is not None:
        costs = base.ratios(ours)
        low, high = middle_half(costs)
        value, note = statistics.median(costs), f"half of the rounds {low:.3f}–{high:.3f}"
    name = f"three {way} settings, cost over three times one"
    return Goal(name=name, sign="≤", bound=1.02, percent=False, value=value, note=note)


def _idle(comparison: Comparison | None, way: str) -> Goal:
    entry: Entry | None = comparison.find("ours", way) if comparison is not None else None
    value = entry.figures.get("idle") if entry is not None else None
    return Goal(name=f"{way} training, time outside steps (waiting for data)", sign="<", bound=0.02, percent=True, value=value)
