"""Which device a command runs on, and how tensors get there without anybody waiting."""

import functools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from shared.compile import keep_memory
from shared.errors import UserError
from shared.progress import say

_DRIVER = Path("/proc/driver/nvidia/version")
_HOST_MEMORY = 8 << 30  # bytes that work on a CPU may hold at once, for those who hold things by the group

T = TypeVar("T")


def pick_device(name: str | None) -> torch.device:
    """The named device; without a name CUDA where there is a driver for it, else the CPU.

    Raises UserError for a name that is no device, for a device that is not there, and where nothing is named and there is
    an NVIDIA driver that torch cannot use: hours on the CPU beside an idle GPU are nothing to begin silently.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()  # what is wrong with a driver torch says in a warning
    if name is None and not there and (_DRIVER.exists() or shutil.which("nvidia-smi")):
        raise UserError(
            f"there is an NVIDIA driver here, but torch cannot use it ({_why_no_cuda(said)}): update the driver, "
            "install the torch that fits it (https://pytorch.org), or pass --device cpu"
        )
    # torch knows more, and nothing here is written for those
    if name is not None and not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise UserError(f"{name!r} is not a device for this: write cpu, cuda or cuda:1")
    device = torch.device(name or ("cuda" if there else "cpu"))
    if device.type == "cuda" and not there:
        raise UserError(f"CUDA was asked for, but no CUDA device is available here ({_why_no_cuda(said)}); use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{name} does not exist: there are {torch.cuda.device_count()} CUDA devices, counted from cuda:0")
    if device.type == "cuda":
        # cuBLAS reads it when it starts; without it two runs of the same products may differ in their last bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams and kernels are made on the current device
    if device.type == "cpu":
        keep_memory()
    return device


def _why_no_cuda(said: list[warnings.WarningMessage]) -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    reasons = [re.split(r"\. | \(Triggered", str(warning.message))[0] for warning in said]
    return reasons[0] if reasons else f"torch {torch.__version__} for CUDA {torch.version.cuda} finds no GPU"


def announce(device: torch.device) -> None:
    """One line that says where the work is done. Called when nothing can be refused any more: a refusal stands alone."""
    say(f"device: {device}, {maker(device).removeprefix('cpu, ')}", err=True)


@functools.cache
def bfloat16_is_slow() -> bool:
    """Whether this processor has no instructions for it. Then products of it are emulated: torch's own are 30 times as slow
    as those of float32, and the demo's model runs a fifth as fast (two cores of an AMD EPYC)."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def maker(device: torch.device) -> str:
    """What the last bits of a sum depend on, in words: 'cpu, threads: 2', or the GPU's name."""
    return device_kind(device) if device.type == "cuda" else f"cpu, threads: {torch.get_num_threads()}"


def device_kind(device: torch.device) -> str:
    """What a result may depend on: 'cpu', or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def fitting(things: Iterable[T], size: Callable[[T], int], device: torch.device) -> Iterator[list[T]]:
    """The things in groups whose sizes in bytes fit into memory together: half of what is free on a GPU. At least one each."""
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
    """`x` on the device, queued behind what runs there. From memory that is not pinned a copy would wait for all of it."""
    return (x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x).to(device, non_blocking=True)


def new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def new_event(*, timing: bool = False) -> torch.cuda.Event:
    """A thread that waits for it on the host leaves the processor to others."""
    return torch.cuda.Event(enable_timing=timing, blocking=True)  # type: ignore[no-untyped-call]
