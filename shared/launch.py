"""What every launch of a Triton kernel needs."""

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: Any, **meta: Any) -> None:
    """Launch on the device that holds the tensors, which need not be the current one."""
    with torch.cuda.device(first.get_device()):  # -1 for the CPU: no device at all
        kernel[grid](first, *args, **meta)


def row_stride(x: Tensor) -> int:
    """Of a matrix whose columns lie side by side. Raises ValueError for any other."""
    if x.stride(1) != 1:
        raise ValueError(f"the columns must be contiguous, the strides are {x.stride()}")
    return x.stride(0)
