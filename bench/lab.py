"""What the parts of `python -m bench gpu` share: sizes, the table they write into, timing."""

from __future__ import annotations

import gc
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import clock
from train.kernels.base import TorchKernels
from train.step import TrainingSae


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of everything; FULL is the published job's shape, DRY proves on a CPU that the script runs to its end."""

    d: int
    features: int
    tokens: int  # of a step
    layers: int
    vocab: int
    context: int
    sequences: int  # of a forward pass and of a block
    blocks: int  # of the cache that the harvest fills
    layer_blocks: int  # of the cache that the loader reads
    window_blocks: int
    l0s: tuple[int, ...]
    common_l0: int
    open_l0: int  # of a trained SAE whose steps are dense; the other dense steps here are as active as an SAE at its start
    rounds: int
    ready_steps: int  # on a batch that is there, to know what a step takes
    side: int  # of the square product
    copy_bytes: int
    check_context: int
    check_steps: tuple[tuple[int, int, int], ...]  # tokens, features, d; the first also trains and resumes
    odd_steps: tuple[tuple[int, int, int], ...]
    resume_steps: int


FULL = Sizes(
    d=1024, features=32_768, tokens=32_768, layers=24, vocab=50_304, context=1024, sequences=32, blocks=5,
    layer_blocks=64, window_blocks=16, l0s=(20, 50, 150, 300, 400), common_l0=150, open_l0=1000, rounds=7, ready_steps=16,
    side=8192, copy_bytes=1 << 30, check_context=256, check_steps=((512, 4096, 512), (2048, 32_768, 1024)),
    odd_steps=((33, 70, 50), (300, 1003, 200)), resume_steps=60,
)  # fmt: skip
DRY = Sizes(
    d=64, features=256, tokens=64, layers=3, vocab=97, context=16, sequences=2, blocks=3, layer_blocks=6, window_blocks=2,
    l0s=(3, 12), common_l0=12, open_l0=40, rounds=1, ready_steps=1, side=64, copy_bytes=1 << 12, check_context=16,
    check_steps=((32, 128, 24),), odd_steps=((19, 75, 24),), resume_steps=20,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A line of the table. `verdict` is "" for a measurement, else "ok", "FAILED", "skipped", "absent", "met" or "NOT met"."""

    name: str
    value: float | None = None
    unit: str = ""
    verdict: str = ""
    note: str = ""

    @property
    def figure(self) -> str:
        return "" if self.value is None else f"{shown(self.value)} {self.unit}".strip()

    def __str__(self) -> str:
        return f"  {self.name:<58} {self.figure:>22} {self.verdict:<8}{self.note}".rstrip()


@dataclass(kw_only=True, slots=True)
class Lab:
    """The device, the sizes, and what has been found so far."""

    device: torch.device
    sizes: Sizes
    kernels: TorchKernels
    scratch: Path  # on the disk that a harvest would fill
    memory: Path  # memory-backed
    threads: int
    dry: bool
    rows: list[Row] = field(default_factory=list)  # of the part that runs
    figures: dict[str, float] = field(default_factory=dict)
    goals: list[Row] = field(default_factory=list)
    save: Callable[[], None] = lambda: None  # called after every row
    model: Any = None  # the language model, once a part has made it
    moved: Counter[str] = field(default_factory=Counter)  # bytes counted so far, by how
    saes: list[TrainingSae] = field(default_factory=list)  # likewise: drawing one takes a second

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def say(self, name: str, value: float | None = None, unit: str = "", note: str = "", *, verdict: str = "") -> None:
        self.rows.append(Row(name=name, value=value, unit=unit, note=note, verdict=verdict))
        self.save()

    def keep(self, name: str, value: float, unit: str = "", note: str = "") -> None:
        """A measurement that later parts and the projection use by its name."""
        self.figures[name] = value
        self.say(name, value, unit, note)

    def goal(self, name: str, value: float, sign: str, bound: float, unit: str = "", note: str = "") -> None:
        """A measurement that is to reach a bound."""
        met = value >= bound if sign == "≥" else value <= bound if sign == "≤" else value < bound
        said = f"goal {sign} {shown(bound)} {unit}".rstrip() + (f"; {note}" if note else "")
        self.figures[name] = value
        self.say(name, value, unit, said, verdict="met" if met else "NOT met")
        self.goals.append(self.rows[-1])

    def check(self, name: str, value: float, bound: float, note: str = "") -> None:
        """Right if value ≤ bound; NaN is wrong."""
        self.say(
            name, value, "", f"{note + ', ' if note else ''}bound {bound:.3g}", verdict="ok" if value <= bound else "FAILED"
        )

    def require(self, name: str, right: bool, note: str = "") -> None:
        self.say(name, note=note, verdict="ok" if right else "FAILED")

    def attempt(self, name: str, what: Callable[[], object]) -> None:
        """One of several things a part does: if it raises, that is a line of the table and the part goes on."""
        try:
            what()
        except Exception as failure:
            traceback.print_exc(file=sys.stderr)
            self.say(name, verdict="FAILED", note=clock.reason(failure))

    def median(self, run: clock.Run, *, warm: int = 1, rounds: int | None = None) -> float:
        return clock.median(run, rounds=rounds or self.sizes.rounds, warm=warm)

    def reset_peak(self) -> None:
        self.free()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        return float(torch.cuda.max_memory_allocated()) if self.cuda else 0.0

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            clock.synchronize(self.device)
            torch.cuda.empty_cache()


def shown(value: float) -> str:
    """Three or four digits that can be read: 1,234,567 and 0.0123 and 1.2e-07."""
    if value != value or value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4g}"
