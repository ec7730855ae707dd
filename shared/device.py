"""The device that a command runs on, and copies to it that the host does not wait for."""

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from residual_saes.shared.compile import keep_memory
from residual_saes.shared.errors import UserError
from residual_saes.shared.progress import say

_DRIVER = Path("/proc/driver/nvidia/version")
_HOST_MEMORY = 8 << 30  # bytes of a group of `fitting` on a CPU

T = TypeVar("T")


def pick_device(name: str | None) -> torch.device:
    """The named device; without a name CUDA where torch can use it, else the CPU.

    Raises UserError for a name that is no device, a device that is not there, and, without a name, for an NVIDIA driver that
    torch cannot use: hours on the CPU beside an idle GPU must not begin silently.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cuda = torch.cuda.is_available()  # torch warns of a driver that it cannot use
    if name is None and not cuda and (_DRIVER.exists() or shutil.which("nvidia-smi")):
        raise UserError(
            f"there is an NVIDIA driver here, but torch cannot use it ({_why_no_cuda(caught)}): update the driver, "
            "install the torch that fits it (https://pytorch.org), or pass --device cpu"
        )
    # torch has more devices, which this project does not know
    if name is not None and not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise UserError(f"{name!r} is not a device for this: write cpu, cuda or cuda:1")
    device = torch.device(name or ("cuda" if cuda else "cpu"))
    if device.type == "cuda" and not cuda:
        raise UserError(f"CUDA was asked for, but no CUDA device is available here ({_why_no_cuda(caught)}); use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{name} does not exist: there are {torch.cuda.device_count()} CUDA devices, counted from cuda:0")
    if device.type == "cuda":
        # read by cuBLAS at its start; without it two runs of the same products may differ in their last bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams and kernels are made on the current device
    if device.type == "cpu":
        keep_memory()
    return device


def _why_no_cuda(caught: list[warnings.WarningMessage]) -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    reasons = [re.split(r"\. | \(Triggered", str(warning.message))[0] for warning in caught]
    return reasons[0] if reasons else f"torch {torch.__version__} for CUDA {torch.version.cuda} finds no GPU"


def announce(device: torch.device) -> None:
    """Print the device. Called after everything that may be refused, so that a refusal is the only line."""
    say(f"device: {device}, {maker(device).removeprefix('cpu, ')}", err=True)


def bfloat16_is_slow(device: torch.device) -> bool:
    """Whether this is a CPU without instructions for bfloat16, so that its products are emulated, many times as slowly."""
    return device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def maker(device: torch.device) -> str:
    """The device and what else the last bits of a sum depend on: 'cpu, threads: 2', or the GPU's name."""
    return device_kind(device) if device.type == "cuda" else f"cpu, threads: {torch.get_num_threads()}"


def device_kind(device: torch.device) -> str:
    """The kind of device that a result depends on: 'cpu', or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def fitting(things: Iterable[T], size: Callable[[T], int], device: torch.device) -> Iterator[list[T]]:
    """Group things so that each group's bytes fit into memory, on a GPU into half of what is free; none is too large alone."""
    budget = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else _HOST_MEMORY
    group: list[T] = []
    used = 0
    for thing in things:
        if group and used + size(thing) > budget:
            yield group
            group, used = [], 0
        group.append(thing)
        used += size(thing)
    if group:
        yield group


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to the device, queued behind its work; from memory that is not pinned the copy would wait for all of it."""
    return (x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x).to(device, non_blocking=True)


def new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def new_event(*, timing: bool = False) -> torch.cuda.Event:
    """An event for which a host thread waits without occupying a core."""
    return torch.cuda.Event(enable_timing=timing, blocking=True)  # type: ignore[no-untyped-call]
