"""The forms in which people write numbers: counts, layers, bytes, durations, shards."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from residual_saes.shared.errors import UserError

_MOST = 10**15  # tokens, layers or blocks: beyond it is a slip of the keyboard
_MOST_LISTED = 10**7


@dataclass(kw_only=True, frozen=True, slots=True)
class Shard:
    """One of several equal processes that share work by nothing but its number among them."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


ALONE = Shard(index=0, count=1)


def parse_shard(text: str | Shard) -> Shard:
    """'2/8' → the third of eight. Raises UserError."""
    if isinstance(text, Shard):  # an option's default
        return text
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
