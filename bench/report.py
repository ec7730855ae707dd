"""Rounds and results: everything a comparison needs that is not itself a measurement.

What is kept is every round's raw seconds; medians and ratios are worked out when they are shown. A ratio is the median of
the rounds' own ratios: what slows a whole round cancels.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.clock import Run, Timing, take_turns
from fleet.hours import processor
from shared.compile import cpu_flags

RESULTS = Path(__file__).resolve().parent / "results"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


@dataclass(frozen=True, kw_only=True)
class Machine:
    slug: str
    cpu: str
    cores: int
    memory_gib: float
    flags: tuple[str, ...]
    gpu: str | None
    system: str
    python: str
    torch: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Who takes part: `work` is what one of its rounds does, in the comparison's unit."""

    name: str
    role: str  # "ours", "limit", "peer", or "base": the same work of ours done another way, whose cost is compared
    work: float
    run: Run
    key: str = ""  # which one, for programs; of ours also its label in the table
    against: tuple[str, ...] = ()  # the keys of ours it is compared with; all of them if empty
    note: str | Callable[[], str] = ""  # called after the rounds, for what only they can tell
    figures: Callable[[], Mapping[str, float]] = dict  # likewise: what is measured besides the time


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contender's line in the results; no seconds means that it failed, and `failure` says why."""

    name: str
    role: str
    work: float = 0.0
    seconds: tuple[float, ...] = ()
    key: str = ""
    against: tuple[str, ...] = ()
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None

    @property
    def rate(self) -> float | None:
        return self.work / statistics.median(self.seconds) if self.seconds else None

    def ratios(self, other: Entry) -> list[float]:
        """How often this one is as fast as the other, round by round."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return [self.work / mine / (other.work / theirs) for mine, theirs in pairs]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One hot path: ours, its limit and its peers, in one unit."""

    name: str
    unit: str  # what `work` counts: "tokens", "bytes"
    entries: tuple[Entry, ...]
    note: str = ""
    key: str = ""  # which path, for programs: "training", "writing", ...

    def find(self, role: str, key: str = "") -> Entry | None:
        """The measured entry of this role and key, if there is one."""
        return next((e for e in self.entries if (e.role, e.key) == (role, key) and e.seconds), None)

    def best(self, role: str) -> Entry | None:
        """The fastest measured entry of a role."""
        return max((e for e in self.entries if e.role == role and e.seconds), key=lambda e: e.rate or 0.0, default=None)

    def rivals(self, entry: Entry) -> list[Entry]:
        """Those of ours that this entry is compared with."""
        ours = [e for e in self.entries if e.role == "ours" and e.seconds]
        return [e for e in ours if not entry.against or e.key in entry.against]


@dataclass(frozen=True, kw_only=True)
class Results:
    machine: Machine
    settings: Mapping[str, object]
    comparisons: tuple[Comparison, ...]
    busy: float = 0.0  # share of the processors that other work held just before
    date: str = field(default_factory=lambda: today())
    format: int = 2

    def path(self, key: str) -> Comparison | None:
        return next((comparison for comparison in self.comparisons if comparison.key == key), None)


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def compare(
    *,
    name: str,
    unit: str,
    contenders: Sequence[Contender],
    rounds: int,
    absent: Sequence[Entry] = (),
    note: str = "",
    key: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Let the contenders take turns; `absent` are those that could not even start, with their reasons."""
    timings = take_turns({contender.name: contender.run for contender in contenders}, rounds, say)
    entries = tuple(
        Entry(
            name=contender.name,
            role=contender.role,
            work=contender.work,
            seconds=timings[contender.name].seconds,
            key=contender.key,
            against=contender.against,
            note=_note(contender, timings[contender.name]),
            figures=contender.figures() if timings[contender.name].seconds else {},
            failure=timings[contender.name].failure,
        )
        for contender in contenders
    )
    return Comparison(name=name, unit=unit, entries=(*entries, *absent), note=note, key=key)


def _note(contender: Contender, timing: Timing) -> str:
    if isinstance(contender.note, str):
        return contender.note
    return contender.note() if timing.seconds else ""


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles between which half of the rounds lie: how far noise reaches, without its outliers."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def busy_share(seconds: float = 2.0) -> float:
    """How much of the processors other work holds now: what would make every figure here too low."""
    before = _ticks()
    time.sleep(seconds)
    idle, total = (after - first for after, first in zip(_ticks(), before, strict=True))
    return 1 - idle / total if total else 0.0


def machine() -> Machine:
    cpu, flags = processor(), cpu_flags()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0))
    return Machine(
        slug=_slug(f"{cpu} {cores}c" if gpu is None else f"{gpu} {cores}c"),
        cpu=cpu,
        cores=cores,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        flags=tuple(flag for flag in FLAGS if flag in flags),
        gpu=gpu,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )


def write(results: Results, folder: Path = RESULTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results.machine.slug}.json"
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")
    return path


def read(folder: Path) -> tuple[list[Results], list[dict[str, Any]]]:
    """Results of `python -m bench`, and of `python -m bench gpu`, the latest last; dry runs are none."""
    raws = sorted((json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))), key=lambda raw: str(raw["date"]))
    gpus = [raw for raw in raws if raw.get("kind") == "gpu" and not raw["dry"]]
    return [parse(raw) for raw in raws if "comparisons" in raw], gpus


def parse(raw: Mapping[str, Any]) -> Results:
    """Results as they were before they were written."""
    machine = Machine(**raw["machine"] | {"flags": tuple(raw["machine"]["flags"])})
    comparisons = tuple(
        Comparison(**one | {"entries": tuple(_entry(entry) for entry in one["entries"])}) for one in raw["comparisons"]
    )
    return Results(**{**raw, "machine": machine, "comparisons": comparisons})


def _entry(raw: dict[str, Any]) -> Entry:
    return Entry(**raw | {name: tuple(raw[name]) for name in ("seconds", "against") if name in raw})


def _ticks() -> tuple[int, int]:
    """Idle and all processor time since boot."""
    try:
        counts = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0, 0
    return counts[3] + counts[4], sum(counts)


def _slug(text: str) -> str:
    text = re.sub(r"\((r|tm)\)|\b(cpu|processor|nvidia)\b|@.*?ghz", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")
