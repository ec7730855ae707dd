"""Small C files compiled on first use with the machine's own C compiler, and kept for the next time.

They speed things up on CPUs and are never needed: without a compiler the callers use torch, which computes the same.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

_HEADERS = Path(__file__).parent
_FLAGS = (
    "-O3", "-march=native", "-mprefer-vector-width=512", "-std=c11", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno",
    # sums may be reordered (they are vectors), but NaN and infinity must keep their meaning
    "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math",
)  # fmt: skip


@functools.cache
def load(source: Path) -> ctypes.CDLL | None:
    """The compiled library of a C file, or None where it cannot be compiled (said once on stderr)."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64", "aarch64", "arm64"):
        print(f"note: no C compiler found; {source.name} is replaced by something slower", file=sys.stderr)
        return None
    flags = [f for f in _FLAGS if platform.machine() in ("x86_64", "AMD64") or "prefer-vector" not in f]
    target = _folder() / f"{source.stem}-{_fingerprint(source, compiler, flags)}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            done = subprocess.run(
                [compiler, *flags, f"-I{_HEADERS}", str(source), "-o", str(made), "-lm"], capture_output=True, text=True
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"note: {source.name} did not compile ({reason}); something slower is used", file=sys.stderr)
                return None
            made.replace(target)
    return ctypes.CDLL(str(target))


def arguments(*values: Tensor | int | float) -> list[Any]:
    """Values as C functions take them: a pointer to a contiguous CPU tensor's numbers, int64_t, float."""
    return [_argument(value) for value in values]


def _argument(value: Tensor | int | float) -> Any:
    if isinstance(value, Tensor):
        assert value.device.type == "cpu"
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


def cpu_flags() -> list[str]:
    """The processor's features as Linux names them ("amx_bf16"); none where it does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith("flags")), "").split()[2:]


def _folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (root / "residual-saes", Path(tempfile.gettempdir()) / f"residual-saes-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    raise OSError("no folder to compile into")


def _fingerprint(source: Path, compiler: str, flags: list[str]) -> str:
    """Changes with the code, the compiler and the processor, for which -march=native compiles."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    texts = [file.read_text() for file in (source, *sorted(_HEADERS.glob("*.h")))]
    parts = [*texts, version, " ".join(flags), " ".join(cpu_flags()), platform.machine()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def keep_memory() -> None:
    """Have glibc keep freed memory instead of giving it back to the system and faulting it in again at the next operation.

    Worth 15 to 20 % of a small model's forward pass on a CPU; changes no result.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(option, value)
