"""Activations in a byte a value: int8, with a mean and a scale for each dimension of a site and a scale for each row.

    x[j] ≈ mean[k, j] + scale[k, j] · |s| · q[j]        q int8 in −127 … 127        s float16        k = 1 where s < 0, else 0

A row is stored as its d values q and then the two bytes of s, little-endian: int8 [rows, d + 2]. mean and scale, float32
[2, d], are the mean and standard deviation of the first block of the site that was harvested: k = 0 of its ordinary rows,
k = 1 of those more than LONG times as long as the median, such as first positions, which are alike and a hundred times as
long. A row takes the k with which its error is the smaller, and the smallest s with which no q is beyond 127; q is rounded
to nearest.
Figures for this and for other forms: docs/findings/int8.md.
"""

import base64
import ctypes
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.shared.compile import arguments, load

LONG = 10.0
_FEW = 8  # long rows: of fewer no standard deviation is taken
_FLOOR = 0.01  # of a dimension's scale, of the root mean square of all: one that hardly varies must not decide a row's scale
_LEAST, _MOST = 2.0**-14, 65504.0  # of s: the smallest normal float16 and the largest


@dataclass(frozen=True)
class Reference:
    """What a site's values are stored relative to."""

    mean: Tensor  # float32 [2, d]
    scale: Tensor  # float32 [2, d], > 0

    @classmethod
    def of(cls, block: Tensor) -> Self:
        """Of a block, float16 [rows, d]."""
        x = block.float()
        norm = x.norm(dim=1)
        long = norm > LONG * norm.median()
        ordinary = _moments(x[~long])
        mean, scale = zip(ordinary, _moments(x[long]) if int(long.sum()) >= _FEW else ordinary, strict=True)
        return cls(torch.stack(mean), torch.stack(scale))

    def to_json(self) -> dict[str, str]:
        return {name: base64.b64encode(getattr(self, name).numpy().tobytes()).decode() for name in ("mean", "scale")}

    @classmethod
    def from_json(cls, value: Any, d_model: int) -> Self:
        """Raises ValueError for anything else than `to_json` gave."""
        try:
            parts = [np.frombuffer(base64.b64decode(value[name]), "<f4").reshape(2, d_model) for name in ("mean", "scale")]
        except (KeyError, TypeError) as error:
            raise ValueError(f"it has no {error}") from None
        if not (np.isfinite(parts).all() and (parts[1] > 0).all()):
            raise ValueError("scales are finite, and above 0")
        return cls(*(torch.from_numpy(part.copy()) for part in parts))

    @cached_property
    def inverse(self) -> Tensor:
        return 1 / self.scale

    @cached_property
    def size(self) -> Tensor:
        """By which the errors of both k compare at the same s, float32 [2]."""
        size: Tensor = self.scale.norm(dim=1)
        return size

    def to(self, device: torch.device) -> "Reference":
        return Reference(self.mean.to(device), self.scale.to(device))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(0)
    deviation = (x - mean).square().mean(0).sqrt()
    typical = float(deviation.square().mean().sqrt()) or 1.0
    return mean, deviation.clamp(min=_FLOOR * typical)


def narrow_(x: Tensor, reference: Reference) -> tuple[NDArray[np.int8], int]:
    """Store x, float16 [rows, d] on the CPU, in its own memory: int8 [rows, d + 2] where it began, and how many values had no
    place since their row's scale would not be finite; they become the largest that has one."""
    rows, d = x.shape
    stored = torch.from_numpy(x.numpy().reshape(-1).view(np.int8)[: rows * (d + 2)].reshape(rows, d + 2))
    if (library := _library()) is not None:
        room = torch.empty(2, d)
        parts = arguments(x, stored, reference.mean, reference.inverse, reference.size, room, rows, d)
        return stored.numpy(), int(library.narrow(*parts))
    values, lost = narrow(x, reference)
    stored.copy_(values)
    return stored.numpy(), lost


def narrow(x: Tensor, reference: Reference) -> tuple[Tensor, int]:
    """The same in torch, on any device: int8 [rows, d + 2], and how many values had no place."""
    y = (x.float() - reference.mean[:, None]) * reference.inverse[:, None]
    largest = y.abs().amax(2)
    k = (largest[1] * reference.size[1] < largest[0] * reference.size[0]).long()
    y, largest = y[k, torch.arange(len(x), device=x.device)], largest.gather(0, k[None])[0]
    half = _rounded_up(largest / 127).clamp(_LEAST, _MOST)
    steps = y / half.float()[:, None]
    lost = int((steps.abs() > 127.5).sum())
    sign = torch.where(k > 0, -half, half)
    return torch.cat([steps.round().clamp(-127, 127).to(torch.int8), sign[:, None].view(torch.int8)], 1), lost


def _rounded_up(scale: Tensor) -> Tensor:
    """Positive float32 rounded up to float16; infinite where it is too large."""
    half = scale.half()
    return torch.where(half.float() < scale, (half.view(torch.int16) + 1).view(torch.float16), half)


def widen(stored: Tensor, reference: Reference) -> Tensor:
    """Stored rows, int8 [n, d + 2], as float16 [n, d] on the same device."""
    q, s = stored[:, :-2].float(), stored[:, -2:].contiguous().view(torch.float16)
    k = torch.signbit(s[:, 0]).long()
    x = q.mul_(s.abs().float()).mul_(reference.scale[k]).add_(reference.mean[k])
    return x.clamp_(-_MOST, _MOST).half()


def take(stored: Tensor, order: Tensor, reference: Reference, out: Tensor) -> None:
    """Rows `order`, int64 [n], of stored int8 [any, d + 2] to out, float16 [n, d]."""
    if stored.device.type == "cpu" and (library := _library()) is not None:
        library.widen(*arguments(stored, order, out, reference.mean, reference.scale, *out.shape))
    else:
        out.copy_(widen(stored.index_select(0, order), reference))


def _library() -> ctypes.CDLL | None:
    library = load(Path(__file__).with_name("int8.c"), exact=True)
    if library is not None:
        library.narrow.restype = ctypes.c_int64
    return library
