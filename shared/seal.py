"""Checksums that travel inside what they are of, so that nothing on disk is taken for what it is not.

A dictionary of our own JSON, and one of a file of tensors, carries a CRC-32C of itself: of its canonical JSON, to which a file
of tensors adds name, type, shape and CRC-32C of each.
"""

import ctypes
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.compile import load
from shared.files import replacing, temporary

SEAL = "checksum"
_SOURCE = Path(__file__).with_name("crc32c.c")
_CRC_PIECE = 4 << 20  # google_crc32c holds the interpreter lock, so it gets pieces of about a millisecond


def crc32c(data: NDArray[Any]) -> str:
    """CRC-32C of an array's bytes, eight hexadecimal digits."""
    raw = data.reshape(-1).view(np.uint8)
    library = load(_SOURCE)
    if library is None:
        return f"{_google_crc32c(raw):08x}"
    library.crc32c.restype = ctypes.c_uint32
    return f"{library.crc32c(ctypes.c_void_p(raw.ctypes.data), ctypes.c_int64(raw.size)):08x}"


def _google_crc32c(raw: NDArray[np.uint8]) -> int:
    import google_crc32c  # here, because most machines have a compiler and need none of it

    value = 0
    for start in range(0, raw.size, _CRC_PIECE):
        value = google_crc32c.extend(value, raw[start : start + _CRC_PIECE])
    return value


def canonical(value: Any) -> bytes:
    """One form for equal values, before and after they went through JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def seal(value: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """`value` with its checksum. Its keys must be strings; `tensors` must be on the CPU."""
    return unsealed(value) | {SEAL: _checksum(value, tensors)}


def sealed(value: Any, tensors: dict[str, Tensor] | None = None) -> bool:
    """Whether this is a dictionary with the right checksum."""
    return isinstance(value, dict) and value.get(SEAL) == _checksum(value, tensors)


def to_bytes(value: dict[str, Any]) -> bytes:
    """A JSON object with its checksum, as the bytes of a file."""
    return canonical(seal(json.loads(json.dumps(value)))) + b"\n"  # as whoever reads it will see it: keys are strings there


def from_bytes(data: bytes) -> dict[str, Any]:
    """What `to_bytes` was given. Raises ValueError for anything else, damaged or not JSON."""
    value = json.loads(data)
    if not sealed(value):
        raise ValueError("its checksum does not match")
    return unsealed(value)


def save_sealed(path: Path, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Replace a safetensors file by these tensors, on the CPU, and facts that JSON can say, in one move. Raises UserError where
    the disk does not take it."""
    said, folder = seal(facts, tensors), temporary(path)
    with replacing(path) as mine:
        try:
            # safetensors begins with a name of its own beside the file; after a kill nobody would know it for a leftover
            folder.mkdir()
            save_file(tensors, folder / path.name, metadata={"facts": json.dumps(said)})
            os.replace(folder / path.name, mine)
        except SafetensorError as error:
            raise OSError(str(error)) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def load_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What was saved. Raises ValueError, which says why, for a file that is not as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if not sealed(said, tensors):
            raise ValueError("its checksum does not match")
    except Exception as error:  # safetensors raises its own type, and OSError, and KeyError
        raise ValueError(str(error)) from None
    return tensors, unsealed(said)


def _checksum(value: dict[str, Any], tensors: dict[str, Tensor] | None) -> str:
    of_tensors = [[name, str(t.dtype), list(t.shape), _tensor_crc(t)] for name, t in sorted((tensors or {}).items())]
    return crc32c(np.frombuffer(canonical([unsealed(value), of_tensors]), np.uint8))


def _tensor_crc(tensor: Tensor) -> str:
    return crc32c(tensor.detach().contiguous().numpy()) if tensor.numel() else ""


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
    """`value` without its checksum."""
    return {k: v for k, v in value.items() if k != SEAL}
