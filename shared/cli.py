"""What the three command lines share: one-line errors, and the forms in which people write numbers.

Exit codes: 0 done, 1 a check failed (verify found damage), 2 bad input or a refused request. A traceback is a bug.
"""

import re
import sys
from collections.abc import Iterable
from typing import NoReturn

import click


class UserError(Exception):
    """Something the user can put right; the message is one line and says how."""


class DefaultRun(click.Group):
    """A group whose command `run` may be left out: `python -m harvest --tokens 1M` is `python -m harvest run --tokens 1M`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if named else ["run", *args])


def run(command: click.Command) -> NoReturn:
    """Run a click command as a program: every expected failure is one line on stderr and exit code 2."""
    try:
        result = command.main(standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except UserError as error:
        _fail(str(error), 2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted; run the same command again to continue", 130)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)


_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_count(text: str) -> int:
    """'300M', '1.5k', '2_000' or '4096' → an integer ≥ 1. Raises UserError."""
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)([KMB]?)", text.strip().upper())
    value = float(match[1].replace("_", "")) * _SUFFIX[match[2]] if match else 0.0
    if value < 1 or value != int(value):
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
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"{text!r} does not name layers: write them as 0-23 or 3,7,11")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if n_layers is not None and max(layers) >= n_layers:
        raise UserError(f"layer {max(layers)} does not exist: the model has layers 0-{n_layers - 1}")
    return tuple(sorted(layers))


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


def format_seconds(seconds: float) -> str:
    """75 → '1m15s', 7300 → '2h02m'."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    return f"{s // 3600}h{s % 3600 // 60:02d}m"
