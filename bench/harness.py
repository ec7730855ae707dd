"""The one way to time here: contenders take turns, and a run returns its own seconds, from idle device to idle device.

Runs that are compared take turns (A B C, A B C, ...), so that a machine that slows down slows all of them, and each one's
first turn is thrown away. What is kept is every round's raw seconds; medians and ratios are worked out when they are shown. A
ratio is the median of the rounds' own ratios: what slows a whole round cancels.

Needs torch alone, because the peers' own environments time with it too.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

Run = Callable[[], float]


def synchronize(device: torch.device | str) -> None:
    if str(device).startswith("cuda"):
        torch.cuda.synchronize(device)


def free(device: torch.device | str) -> None:
    """Give memory back that nothing refers to any more."""
    gc.collect()
    if str(device).startswith("cuda"):
        torch.cuda.empty_cache()


def timed(call: Callable[[], object], device: torch.device | str) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


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
    seconds: tuple[float, ...] = ()  # of each round after the first
    key: str = ""
    against: tuple[str, ...] = ()
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float | None:
        return self.work / self.median if self.seconds else None

    @property
    def spread(self) -> float:
        """Slowest less fastest, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def ratios(self, other: Self) -> list[float]:
        """How often this one is as fast as the other, round by round."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return [self.work / own / (other.work / others) for own, others in pairs]


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

    @property
    def measured(self) -> bool:
        """Whether all that is not a peer has figures."""
        return all(e.seconds for e in self.entries if e.role != "peer")

    def rivals(self, entry: Entry) -> list[Entry]:
        """Those of ours that this entry is compared with."""
        ours = [e for e in self.entries if e.role == "ours" and e.seconds]
        return [e for e in ours if not entry.against or e.key in entry.against]


def compare(
    *, key: str = "", name: str, unit: str, contenders: Sequence[Contender], rounds: int, absent: Sequence[Entry] = (),
    note: str = "",
) -> Comparison:  # fmt: skip
    """Let the contenders take turns; `absent` are those that could not even start, with their reasons."""
    seconds, failures = take_turns({contender.name: contender.run for contender in contenders}, rounds)
    entries = (_entry(contender, seconds[contender.name], failures.get(contender.name)) for contender in contenders)
    return Comparison(name=name, unit=unit, entries=(*entries, *absent), note=note, key=key)


def take_turns(runs: Mapping[str, Run], rounds: int) -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    """Seconds of every run's rounds after the first, and why runs failed. One that raises is out; the others go on."""
    seconds: dict[str, tuple[float, ...]] = dict.fromkeys(runs, ())
    failures: dict[str, str] = {}
    for index in range(rounds + 1):
        for name in [name for name in runs if name not in failures]:
            try:
                taken = runs[name]()
            except Exception as error:
                failures[name], seconds[name] = reason(error), ()  # half of its rounds have no comparable median
                print(f"{name}: {failures[name]}", flush=True)
                continue
            print(f"{name}: {f'round {index}/{rounds}' if index else 'warm-up'} {taken:.4g} s", flush=True)
            seconds[name] += (taken,) * (index > 0)
    return seconds, failures


def _entry(contender: Contender, seconds: tuple[float, ...], failure: str | None) -> Entry:
    note = contender.note if isinstance(contender.note, str) else contender.note() if seconds else ""
    return Entry(
        name=contender.name, role=contender.role, work=contender.work, seconds=seconds, key=contender.key,
        against=contender.against, note=note, figures=contender.figures() if seconds else {}, failure=failure,
    )  # fmt: skip


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
