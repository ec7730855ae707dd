"""The one way to time here: a run returns its own seconds, from when everything is ready until the device is done.

Runs that are compared take turns (A B C, A B C, ...), so that a machine that slows down slows all of them, and each one's
first turn is thrown away. Needs torch alone, because the peers' own environments time with it too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of the rounds after the first; none if the run failed, for the reason given."""

    seconds: tuple[float, ...]
    failure: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Slowest less fastest, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def synchronize(device: torch.device | str) -> None:
    if str(device).startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device | str) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def median(run: Run, *, rounds: int, warm: int = 1) -> float:
    return statistics.median([run() for _ in range(warm + rounds)][warm:])


def take_turns(runs: Mapping[str, Run], rounds: int, say: Callable[[str], None] = lambda line: None) -> dict[str, Timing]:
    """Every run's rounds. One that raises is out, with the reason; the others go on."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    failures: dict[str, str] = {}
    for index in range(rounds + 1):
        for name, run in runs.items():
            if name in failures:
                continue
            try:
                taken = run()
            except Exception as error:
                failures[name] = reason(error)
                say(f"{name}: {failures[name]}")
                continue
            say(f"{name}: {'warm-up' if index == 0 else f'round {index}/{rounds}'} {taken:.4g} s")
            if index:
                seconds[name].append(taken)
    # One that failed half way has no comparable median: its rounds are not shown as one.
    return {
        name: Timing(seconds=() if name in failures else tuple(taken), failure=failures.get(name))
        for name, taken in seconds.items()
    }


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
