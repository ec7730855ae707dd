"""What the command lines share: one-line errors, stopping, what is said, and the forms in which people write numbers.

Exit codes: 0 done, 1 a check failed (verify found damage), 2 bad input, a refused request or something left out, 130 and 143
stopped by Ctrl-C and SIGTERM. A traceback is a bug.

A signal to stop waits for the step in hand where work says so (`finishing`), and acts at once everywhere else; what is
interrupted there leaves nothing half-written, for every file is put in its place whole. A second one acts at once everywhere;
but Slurm says SIGTERM twice to what it preempts or cancels, so those that come within seconds are one.
"""

import contextlib
import io
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click


class UserError(Exception):
    """Something the user can put right; the message is one line and says how."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it before they take a machine back. Whatever handles Ctrl-C handles it as well."""


class DefaultRun(click.Group):
    """A group whose command `run` may be left out: `python -m harvest --tokens 1M` is `python -m harvest run --tokens 1M`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if named else ["run", *args])


def run(command: click.Command) -> NoReturn:
    """Run a click command as a program: every expected failure is one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an alphabet without λ is no reason to stop
    with _signals.handled():
        try:
            code = _invoke(command)
        except UserError as error:
            _fail(str(error), 2)
        except click.ClickException as error:
            _fail(error.format_message(), 2)
        except KeyboardInterrupt as error:
            asked = _signals.asked or type(error)  # a library in between may have made a plain one of it
            how, code = ("terminated", 143) if issubclass(asked, Terminated) else ("interrupted", 130)
            _fail(f"{how}; run the same command again to continue", code)
        except BrokenPipeError:
            _mute(sys.stdout)
            code = 128 + signal.SIGPIPE
        except (OSError, EOFError) as error:
            _fail(f"{error or type(error).__name__}: put that right and run the same command again to continue", 2)
    sys.exit(code)


def _invoke(command: click.Command) -> int:
    """Not through `command.main`, which takes a file that ends too early (EOFError) for Ctrl-C."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.stem == "__main__" else program.name
    try:
        with command.make_context(f"python -m {name}", sys.argv[1:]) as context:
            result = command.invoke(context)
    except click.exceptions.Exit as done:  # --help
        return done.exit_code
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> NoReturn:
    say(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)


# --- stopping ---

_ONE_REQUEST = 10.0  # seconds: seen were up to one between the two of Slurm 22.05, to a step and then to its job


class _Signals:
    """SIGTERM and Ctrl-C of this process, which has one of each."""

    def __init__(self) -> None:
        self.asked: type[KeyboardInterrupt] | None = None
        self.patient = False
        self.since = 0.0  # when it was asked

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        self.asked, self.patient = None, False
        before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # whoever started us may have decided that
                before[number] = signal.signal(number, self._take)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.asked = None

    def _take(self, number: int, frame: FrameType | None) -> None:
        error = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        second, now = self.asked is not None, time.monotonic()
        if second and number == signal.SIGTERM and now - self.since < _ONE_REQUEST:
            return
        self.asked, self.since = error, now
        if not self.patient or second:  # a second one means now
            raise error


_signals = _Signals()


def stopping() -> bool:
    """Whether somebody has asked this process to stop: for threads that would wait for something otherwise."""
    return _signals.asked is not None


@contextlib.contextmanager
def finishing() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGTERM or Ctrl-C only makes the function this gives return True: finish the step in hand, save, and
    leave; it is raised on leaving. A second one (SIGTERM: after ten seconds) is raised where it comes. For the main thread, and
    not nested."""
    _signals.patient = True
    try:
        yield lambda: _signals.asked is not None
    finally:
        _signals.patient = False
    if _signals.asked is not None:
        raise _signals.asked


# --- saying ---


def say(text: str, *, err: bool = False, end: str = "\n") -> None:
    """Print. That nobody listens any more (`| head`, a full disk behind `>`) stops no work and changes no exit code."""
    stream = sys.stderr if err else sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except (OSError, ValueError):
        _mute(stream)


def _mute(stream: Any) -> None:
    """Let the rest go nowhere, what Python flushes at its end included."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


# --- numbers ---

SEED = click.IntRange(0, (1 << 31) - 1)  # what every generator takes
THREADS = click.IntRange(1, 1024)
_MOST = 10**15  # tokens, layers or blocks: beyond it is a slip of the keyboard
_MOST_LISTED = 10**7


class Number(click.FloatRange):
    """A float within bounds. NaN, which lies outside of none, and infinity are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


@dataclass(kw_only=True, frozen=True, slots=True)
class Shard:
    """One of several equal processes that share work by nothing but its number among them."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


ALONE = Shard(index=0, count=1)


def parse_shard(text: str) -> Shard:
    """'2/8' → the third of eight. Raises UserError."""
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"{text!r} is not a shard: they are counted from 0, so that eight of them are 0/8 to 7/8")
    return Shard(index=int(match[1]), count=int(match[2]))


_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_count(text: str) -> int:
    """'300M', '1.5k', '2_000' or '4096' → an integer of 1 to 10¹⁵, exactly. Raises UserError."""
    match = re.fullmatch(r"([0-9][0-9_]{,40}(?:\.[0-9]{1,40})?)([KMB]?)", text.strip().upper())
    value = Fraction(match[1].replace("_", "")) * _SUFFIX[match[2]] if match else Fraction(0)
    if not 1 <= value <= _MOST or value.denominator != 1:
        raise UserError(f"{text!r} is not a count: write a whole number such as 4096, 50k or 300M")
    return int(value)


def format_count(n: int) -> str:
    """The shortest exact form of a count: 50000000 → '50M', 1500 → '1500', 400000 → '400K'."""
    for suffix in ("B", "M", "K"):
        if n >= _SUFFIX[suffix] and n % _SUFFIX[suffix] == 0:
            return f"{n // _SUFFIX[suffix]}{suffix}"
    return str(n)


def parse_layers(text: str, n_layers: int | None = None) -> tuple[int, ...]:
    """'0-23', '3,7' or '0-3,8' → sorted distinct layers. Raises UserError, also for layers the model has not."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,20})(?:-([0-9]{1,20}))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"{text!r} does not name layers: write them as 0-23 or 3,7,11")
        ranges.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    last = max(r[-1] for r in ranges)  # before anything is listed, which may be too long for any memory
    if n_layers is not None and last >= n_layers:
        raise UserError(f"layer {last} does not exist: the model has layers 0-{n_layers - 1}")
    if last > _MOST_LISTED:
        raise UserError(f"{text!r} names {last}, and nothing has so many: write them as 0-23 or 3,7,11")
    return tuple(sorted({layer for r in ranges for layer in r}))


def format_layers(layers: Iterable[int]) -> str:
    """(0, 1, 2, 5) → '0-2,5'; the inverse of `parse_layers`."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def format_bytes(n: float) -> str:
    """Decimal units, as disks are sold: 14.7e12 → '14.7 TB'."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def parse_bytes(text: str) -> int:
    """'4TB', '1.5 GB' or '4096' → bytes, at least 1, in the units of `format_bytes`. Raises UserError."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,12})?)\s*([KMGT]?)B?", text.strip().upper())
    value = int(Fraction(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if not 1 <= value <= _MOST * 1000:
        raise UserError(f"{text!r} is not an amount of bytes: write it as 4TB, 500GB or 1.5TB")
    return value


def format_seconds(seconds: float) -> str:
    """75 → '1m15s', 7300 → '2h02m'."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    return f"{s // 3600}h{s % 3600 // 60:02d}m"
