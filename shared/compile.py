"""Small C files compiled on first use with the machine's own C compiler, and kept for the next time.

They speed things up on CPUs and are never needed: without a compiler, or a folder to keep and run its work in, the callers
use torch, which computes the same. What is kept is named by its own checksum (a library cut short kills whoever maps it), in a
folder that nobody else can write to.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from residual_saes.shared.progress import say

_HEADERS = Path(__file__).parent
_X86 = ("x86_64", "AMD64")
_FLAGS = (
    "-O3", "-march=native", "-mprefer-vector-width=512", "-std=c11", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno",
    "-ffp-contract=off",  # a product and a sum are rounded each, as in torch; ISO C means the same to gcc, not to clang
)  # fmt: skip
# Sums are vectors in any order, and products associate, but NaN and infinity keep their meaning.
_REORDERED = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")


@functools.cache
def load(source: Path, *, exact: bool = False) -> ctypes.CDLL | None:
    """The compiled library of a C file, or None where there is no way to one (said once on stderr). `exact`: sums and products
    are in the order in which they are written, for what promises torch's own bits."""
    why = "no C compiler found"
    compiler = _compiler() if platform.machine() in (*_X86, "aarch64", "arm64") else None
    if compiler is not None:
        flags = [f for f in (*_FLAGS, *(() if exact else _REORDERED)) if platform.machine() in _X86 or "prefer-vector" not in f]
        name = f"{source.stem}-{_fingerprint(source, compiler, flags)}"
        why = "there is no folder of one's own to compile into"
        for folder in _folders():
            try:
                return ctypes.CDLL(str(_kept(folder, name) or _compile([*compiler, *flags], source, folder, name)))
            except OSError as error:  # full, read-only, or mounted so that nothing in it can be run
                why = str(error)
    say(f"note: {source.name} cannot be used ({why}); something slower is", err=True)
    return None


def _compiler() -> list[str] | None:
    """The command of the first C compiler that can be run; $CC may hold several words ("ccache gcc", "gcc -m64")."""
    with contextlib.suppress(ValueError):  # a quotation without an end
        if (words := shlex.split(os.environ.get("CC", ""))) and shutil.which(words[0]):
            return words
    return next(([compiler] for name in ("cc", "gcc", "clang") if (compiler := shutil.which(name))), None)


def _kept(folder: Path, name: str) -> Path | None:
    """The library compiled earlier, if it is still what was compiled; one that is not is taken away."""
    for path in folder.glob(f"{name}-*.so"):
        if path.name == _named(path, name):
            return path
        path.unlink(missing_ok=True)
    return None


def _named(library: Path, name: str) -> str:
    return f"{name}-{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def _compile(command: list[str], source: Path, folder: Path, name: str) -> Path:
    """Raises OSError with what the compiler says."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / "made.so"
        words = [*command, f"-I{_HEADERS}", str(source), "-o", str(made), "-lm"]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace")
        if done.returncode or not made.exists():
            raise OSError(f"it did not compile: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        return made.replace(folder / _named(made, name))


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
    """The processor's features as Linux names them ("amx_bf16", on ARM "asimd"); none where it does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    return next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])


def _folders() -> Iterator[Path]:
    """Where libraries are kept, the best place first: folders that are ours and that nobody else can put a library into."""
    homes = [os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")]  # '~' stays where nobody knows a home
    places = [Path(home) / "residual-saes" for home in homes if Path(home).is_absolute()]
    with contextlib.suppress(OSError):  # nowhere to put temporary files
        places.append(Path(tempfile.gettempdir()) / f"residual-saes-{os.geteuid()}")
    for folder in places:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022:
                yield folder


def _fingerprint(source: Path, compiler: list[str], flags: list[str]) -> str:
    """Changes with the code, the compiler and the processor, for which -march=native compiles."""
    version = ""
    with contextlib.suppress(OSError):
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace").stdout
    texts = [file.read_text(encoding="utf-8") for file in (source, *sorted(_HEADERS.glob("*.h")))]
    parts = [*texts, version, *compiler, " ".join(flags), " ".join(cpu_flags()), platform.machine()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def keep_memory() -> None:
    """Have glibc keep freed memory instead of giving it back to the system and faulting it in again at the next operation.

    Worth 15 to 20 % of a small model's forward pass on a CPU; changes no result.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(option, value)
