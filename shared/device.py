"""Which device a command runs on."""

import torch

from shared.cli import UserError
from shared.native import keep_memory


def pick_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one. Raises UserError for a name that is no device, or is not there."""
    try:
        device = torch.device(name) if name else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        raise UserError(f"{name!r} is not a device: write cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("CUDA was asked for, but no CUDA device is available here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{name} does not exist: there are {torch.cuda.device_count()} CUDA devices, counted from cuda:0")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams and kernels are made on the current device
    if device.type == "cpu":
        keep_memory()
    return device
