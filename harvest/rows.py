"""Rows on their way into a block: float16 with nothing infinite in it, each at its place, and how many values did not fit."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from residual_saes.shared.compile import arguments, load

FP16_MAX = 65504.0


def put_rows(x: Tensor, rows: Tensor, data: Tensor) -> Tensor:
    """x float [n, d] as float16 to data[rows], float16 [≥ n, d]; how many values did not fit (see `to_float16`)."""
    if x.device.type == "cuda":
        from residual_saes.harvest.cuda import put_rows as in_one_pass

        return in_one_pass(x, rows, data)
    if x.dtype == torch.bfloat16 and x.shape[1] % 8 == 0 and x.is_contiguous() and (library := _library()) is not None:
        return torch.tensor(library.store(*arguments(x, rows, data, *x.shape)))
    half, bad = to_float16(x)
    data.index_copy_(0, rows, half)
    return bad


def _library() -> ctypes.CDLL | None:
    library = load(Path(__file__).with_name("rows.c"))
    if library is not None:
        library.store.restype = ctypes.c_int64
    return library


def to_float16(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float16 with nothing infinite in it, how many values did not fit): NaN becomes 0, too large becomes ±65504."""
    half = x.to(torch.float16)
    # On a CPU one pass shows that everything fits; on CUDA asking would mean waiting for the device.
    if half.device.type == "cpu" and bool(torch.isfinite(half.abs().amax())):
        return half, torch.zeros((), dtype=torch.int64)
    bad = (~torch.isfinite(half)).sum()
    return half.nan_to_num_(nan=0.0, posinf=FP16_MAX, neginf=-FP16_MAX), bad
