"""The tools we measure ourselves against, each in an environment of its own, each in a process that runs on
demand. `python -m bench.peers` sets all of them up and does nothing else.

An environment per peer, because their requirements contradict one another and ours. torch goes in first,
in the version that runs here: left to choose, pip would fetch another one and gigabytes of CUDA with it.

A peer that cannot be installed, started or timed raises `PeerFailed` with one line that says why; the
report shows that line in the peer's place.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / "build" / "peers"
LOGS = ROOT / "build" / "bench" / "logs"


class PeerFailed(Exception):
    """One line that says why a peer has no figure."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A peer, its environment (None means ours) and its worker, bench/workers/<name>.py."""

    name: str
    label: str
    environment: str | None = None
    requirements: tuple[str, ...] = ()
    uninstall: tuple[str, ...] = ()


SAE_LENS = ("sae-lens==6.54.12",)
STEPS = (
    Peer(name="autograd_bf16", label="all-bf16 autograd"),
    Peer(name="sparsify", label="sparsify TopK-128", environment="sparsify", requirements=("eai-sparsify==1.3.3",)),
    Peer(
        name="dictionary_learning",
        label="dictionary_learning Standard",
        environment="dictionary_learning",
        requirements=("dictionary-learning==0.1.0",),
        # The one that comes with it is built for another torch; its presence breaks transformers' import.
        uninstall=("torchvision",),
    ),
    Peer(name="sae_lens", label="SAELens standard", environment="sae_lens", requirements=SAE_LENS),
)
WRITERS = (Peer(name="sae_lens_cache", label="SAELens cache writer", environment="sae_lens", requirements=SAE_LENS),)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a worker is asked to do in a round."""

    d: int = 1024
    features: int = 32768
    tokens: int = 4096
    threads: int = os.cpu_count() or 1
    device: str = "cpu"
    directory: Path = ROOT / "build" / "bench" / "scratch"

    def arguments(self) -> list[str]:
        return [part for name, value in vars(self).items() for part in (f"--{name}", str(value))]


def environment(peer: Peer, *, torch_index: str | None = None) -> Path:
    """The peer's Python, its environment built first unless a fresh one is there."""
    if peer.environment is None:
        return Path(sys.executable)
    folder = ENVIRONMENTS / peer.environment
    python, stamp = folder / "bin" / "python", folder / "stamp.json"
    torch = f"torch=={version('torch')}"
    wanted = {"python": sys.version, "torch": torch, "uninstall": peer.uninstall, "pins": peer.requirements}
    wanted_text = json.dumps(wanted)
    if python.exists() and stamp.exists() and stamp.read_text() == wanted_text:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--extra-index-url", torch_index] if torch_index else []
    _run([sys.executable, "-m", "venv", str(folder)], peer)
    _run([*pip, torch], peer)
    _run([*pip, torch, *peer.requirements], peer)
    if peer.uninstall:
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *peer.uninstall], peer)
    stamp.write_text(wanted_text)
    return python


class Worker:
    """A peer's running process: `seconds` runs one timed round in it."""

    def __init__(self, peer: Peer, load: Load, *, timeout: float = 900.0, torch_index: str | None = None) -> None:
        self.peer, self.timeout = peer, timeout
        python = environment(peer, torch_index=torch_index)
        LOGS.mkdir(parents=True, exist_ok=True)
        self._log = LOGS / f"{peer.name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", f"bench.workers.{peer.name}", *load.arguments()],
                cwd=ROOT, env=_variables(load), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        try:
            self.about = self._answer()
        except PeerFailed:
            self.close()
            raise

    def seconds(self) -> float:
        """Of one round in it."""
        self._say("go")
        return float(str(self._answer()["seconds"]))

    def close(self) -> None:
        if self._process.poll() is None:
            try:
                self._say("quit")
                self._process.wait(timeout=30)
            except (PeerFailed, subprocess.TimeoutExpired):
                self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{word}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailed(f"{self.peer.name}: {_ending(self._process.wait())}") from None

    def _answer(self) -> dict[str, object]:
        assert self._process.stdout is not None
        # An answer is one short line written at once, so once there is something to read the line is whole.
        if not select.select([self._process.stdout], [], [], self.timeout)[0]:
            self._process.kill()
            raise PeerFailed(f"{self.peer.name}: no answer within {self.timeout:.0f} s")
        line = self._process.stdout.readline().decode()
        return _parsed(line, self.peer, None if line else self._process.wait())


def _variables(load: Load) -> dict[str, str]:
    """No network, no tracking, and every thread pool as wide as the load says."""
    count = str(load.threads)
    return os.environ | {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "PYTHONUNBUFFERED": "1",
    }


def _parsed(line: str, peer: Peer, code: int | None) -> dict[str, object]:
    try:
        answer: dict[str, object] = json.loads(line)
    except json.JSONDecodeError:
        raise PeerFailed(f"{peer.name}: {_ending(code)}") from None
    if "error" in answer:
        raise PeerFailed(f"{peer.name}: {answer['error']}")
    return answer


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    return f"ended with exit status {code} and no answer"


def _run(command: Sequence[str], peer: Peer) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        raise PeerFailed(f"{peer.name}: environment: {said}")


def set_up() -> int:
    """Every peer's environment, a line each; the exit status."""
    failed = 0
    for peer in STEPS:
        try:
            print(f"{peer.label}: {environment(peer)}", flush=True)
        except PeerFailed as error:
            failed = 2
            print(f"error: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(set_up())
