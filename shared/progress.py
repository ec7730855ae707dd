"""Output of commands: lines, and a progress line for long work (done, share, rate, time left).

On a terminal and in a notebook the progress line rewrites itself several times a second; elsewhere (logs, CI) a plain line
appears now and then.
"""

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import Any, Self

from residual_saes.shared.units import format_seconds


def say(text: str, *, err: bool = False, start: str = "", end: str = "\n", asked: bool = False) -> None:
    """Print a line; what a terminal would take for a command, in a name, is shown.

    A closed output (`| head`, a full disk behind `>`) stops no work and changes no exit code, except where the text is all that
    was `asked` for: that raises OSError.
    """
    stream = sys.stderr if err else sys.stdout
    try:
        shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
        print(start + shown, end=end, file=stream, flush=True)
    except (OSError, ValueError):
        mute(stream)
        if asked:
            raise


def mute(stream: Any) -> None:
    """Send further output of a stream nowhere, what Python flushes at its end included."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class Progress:
    """The progress line of a task: `with Progress("training layer 3", total, "tokens") as p: p.update(done, "L0 150")`.

    `start` units were done by an earlier run: they count as done but not towards the rate.
    """

    def __init__(self, title: str, total: int, unit: str, *, start: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self._first, self._done = float(start), float(start)
        self._began = time.monotonic()
        self._shown = float("-inf")
        self._rewrites = _rewrites()
        self._interval = 0.2 if self._rewrites else 15.0
        self._width = 0  # of the line that stands there, of which nothing may stay

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._show(self._line("", final=True))
        if self._rewrites:
            say("", err=True)

    def update(self, done: float, note: str = "") -> None:
        self._done = done
        now = time.monotonic()
        if now - self._shown >= self._interval and now - self._began >= min(self._interval, 5.0):
            self._shown = now
            self._show(self._line(note))

    def advance(self, by: float, note: str = "") -> None:
        self.update(self._done + by, note)

    @property
    def rate(self) -> float:
        """Units per second since this run began."""
        return (self._done - self._first) / max(time.monotonic() - self._began, 1e-9)

    def _line(self, note: str, *, final: bool = False) -> str:
        share = self._done / self.total if self.total else 1.0
        elapsed = time.monotonic() - self._began
        if final:
            tail = f"in {format_seconds(elapsed)}"
        else:
            tail = f"ETA {format_seconds((self.total - self._done) / self.rate)}" if self.rate > 0 else "ETA ?"
        parts = [
            f"{self.title}: {_si(self._done)}/{_si(self.total)} {self.unit} {share:4.0%}",
            f"{_si(self.rate)}/s",
            tail,
        ]
        return " · ".join(parts + ([note] if note else []))

    def _show(self, line: str) -> None:
        start, end = ("\r", "") if self._rewrites else ("", "\n")
        say(f"{line:<{self._width}}" if self._rewrites else line, err=True, start=start, end=end)
        self._width = len(line)


def _rewrites() -> bool:
    """Whether a carriage return goes back to the line's beginning: a terminal, or a notebook, whose kernel's stream is none."""
    return sys.stderr is not None and (sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel"))


def _si(n: float) -> str:
    for suffix in ("", "k", "M", "G"):
        if abs(n) < 1000:
            return f"{n:.4g}{suffix}" if n < 100 or n == int(n) else f"{n:.0f}{suffix}"
        n /= 1000
    return f"{n:.3g}T"
