"""Seals: checksums inside JSON objects and files of tensors, so that damage is noticed where a file is read.

A sealed dictionary holds the CRC-32C of its canonical JSON without the seal; that of a file of tensors covers name, type, shape
and CRC-32C of each tensor as well.
"""

import ctypes
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from residual_saes.shared.compile import load
from residual_saes.shared.files import sync_dir, writing
from residual_saes.shared.temporaries import discard, temporary

SEAL = "checksum"
_SOURCE = Path(__file__).with_name("crc32c.c")
_CRC_PIECE = 4 << 20  # google_crc32c holds the interpreter's lock for a piece


def crc32c(data: NDArray[Any]) -> str:
    """CRC-32C of an array's bytes, eight hexadecimal digits."""
    raw = data.reshape(-1).view(np.uint8)
    library = load(_SOURCE)
    if library is None:
        return f"{_google_crc32c(raw):08x}"
    library.crc32c.restype = ctypes.c_uint32
    return f"{library.crc32c(ctypes.c_void_p(raw.ctypes.data), ctypes.c_int64(raw.size)):08x}"


def _google_crc32c(raw: NDArray[np.uint8]) -> int:
    import google_crc32c  # here, because only machines without a C compiler need it

    value = 0
    for start in range(0, raw.size, _CRC_PIECE):
        value = google_crc32c.extend(value, raw[start : start + _CRC_PIECE])
    return value


def parse_json(data: bytes | str) -> Any:
    """Parse JSON. Raises ValueError for anything else, and for what is nested too deep."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def canonical(value: Any) -> bytes:
    """Canonical JSON: equal values give equal bytes, before and after a round trip through JSON. Raises ValueError for what is
    nested too deep."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def seal(value: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Add the seal to a dictionary, whose keys must be strings; `tensors` must be on the CPU."""
    return unsealed(value) | {SEAL: _checksum(value, tensors)}


def sealed(value: Any, tensors: dict[str, Tensor] | None = None) -> bool:
    """Whether `value` is a dictionary with the right seal, which nothing has that is no JSON or is nested too deep."""
    try:
        return isinstance(value, dict) and value.get(SEAL) == _checksum(value, tensors)
    except (TypeError, ValueError):
        return False


def to_bytes(value: dict[str, Any]) -> bytes:
    """A sealed JSON object as the bytes of a file."""
    return canonical(seal(json.loads(json.dumps(value)))) + b"\n"  # sealed as it will be read: with strings for keys


def from_bytes(data: bytes) -> dict[str, Any]:
    """The dictionary that `to_bytes` was given. Raises ValueError for bytes that are damaged or no sealed JSON."""
    value = parse_json(data)
    if not sealed(value):
        raise ValueError("its checksum does not match")
    return unsealed(value)


def parse_sealed(data: bytes) -> dict[str, Any] | None:
    """A sealed JSON object, its seal included; None for bytes that are damaged or none."""
    try:
        value = parse_json(data)
    except ValueError:
        return None
    return value if sealed(value) else None


def save_sealed(path: Path, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Replace a safetensors file by tensors on the CPU and a dictionary for JSON, sealed, in one move. Raises UserError."""
    with writing(path):
        # safetensors begins with a name of its own beside the file; after a kill nobody would know it for a leftover
        folder = temporary(path, folder=True)
        try:
            save_file(tensors, folder / path.name, metadata={"facts": json.dumps(seal(facts, tensors))})
            os.chmod(folder / path.name, folder.stat().st_mode & 0o666)  # as the umask says
            with (folder / path.name).open("rb") as file:
                os.fsync(file.fileno())
            os.replace(folder / path.name, path)
        except SafetensorError as error:
            raise OSError(str(error)) from None
        finally:
            discard(folder)
        sync_dir(path.parent)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises the library's own errors, OSError, ValueError and KeyError."""
    data = path.read_bytes()  # not mapped: a bad block, or a file that is cut meanwhile, would end the process
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load_tensors(data), header.get("__metadata__", {})


def load_sealed(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the dictionary that `save_sealed` was given. Raises ValueError, which says why, for a damaged file, and
    OSError for one that cannot be read, but for a bad block, which is damage."""
    try:
        tensors, metadata = read_tensors(path)
        facts = parse_json(metadata["facts"])
        if not sealed(facts, tensors):
            raise ValueError("its checksum does not match")
    except Exception as error:  # safetensors raises its own type, and KeyError
        if isinstance(error, OSError) and error.errno != errno.EIO:
            raise
        raise ValueError(str(error)) from None
    return tensors, unsealed(facts)


def _checksum(value: dict[str, Any], tensors: dict[str, Tensor] | None) -> str:
    of_tensors = [[name, str(t.dtype), list(t.shape), _tensor_crc(t)] for name, t in sorted((tensors or {}).items())]
    return crc32c(np.frombuffer(canonical([unsealed(value), of_tensors]), np.uint8))


def _tensor_crc(tensor: Tensor) -> str:
    return crc32c(tensor.detach().contiguous().numpy()) if tensor.numel() else ""


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
    """`value` without its checksum."""
    return {k: v for k, v in value.items() if k != SEAL}
