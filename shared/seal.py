"""Checksums that travel inside what they are of, so that nothing on disk is taken for what it is not.

A dictionary of our own JSON, and one of a file of tensors, carries a CRC-32C of itself: of its canonical JSON, to which a file
of tensors adds name, type, shape and CRC-32C of each.
"""

import json
from typing import Any

import numpy as np
from torch import Tensor

from shared.cache import crc32c

SEAL = "crc32c"


def canonical(value: Any) -> bytes:
    """One form for equal values, before and after they went through JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def seal(value: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """`value` with its checksum. Its keys must be strings; `tensors` must be on the CPU."""
    return _without(value) | {SEAL: _checksum(value, tensors)}


def sealed(value: Any, tensors: dict[str, Tensor] | None = None) -> bool:
    """Whether this is a dictionary with the right checksum."""
    return isinstance(value, dict) and value.get(SEAL) == _checksum(value, tensors)


def _checksum(value: dict[str, Any], tensors: dict[str, Tensor] | None) -> str:
    of_tensors = [[name, str(t.dtype), list(t.shape), _tensor_crc(t)] for name, t in sorted((tensors or {}).items())]
    return crc32c(np.frombuffer(canonical([_without(value), of_tensors]), np.uint8))


def _tensor_crc(tensor: Tensor) -> str:
    return crc32c(tensor.detach().contiguous().numpy()) if tensor.numel() else ""


def _without(value: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in value.items() if k != SEAL}
