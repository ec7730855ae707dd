"""The tools we measure ourselves against, each in an environment of its own, each in a process that runs on
demand. `python -m bench.peers` sets all of them up and does nothing else.

An environment per peer, because their requirements contradict one another and ours. Each stands on ours: what it asks for
and is here already, torch above all, is neither fetched nor installed again, and another version goes in front of it. Where a
peer can be imported as it is, as on a machine without an index (bench/wheels.txt), it runs here.
"""

import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from bench.workers.worker import Job

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / "build" / "peers"
LOGS = ROOT / "build" / "bench" / "logs"


class PeerFailed(Exception):
    """One line that says why a peer has no figure: it could not be installed, started or timed."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A peer, its environment (None means ours) and its worker, bench/workers/<name>.py."""

    name: str
    label: str
    environment: str | None = None
    package: str = "torch"  # what it imports
    requirements: tuple[str, ...] = ()
    uninstall: tuple[str, ...] = ()


SAE_LENS = Peer(
    name="sae_lens", label="SAELens standard", environment="sae_lens", package="sae_lens", requirements=("sae-lens==6.54.12",)
)  # fmt: skip
STEPS = (
    Peer(name="autograd_bf16", label="plain autograd"),
    Peer(
        name="sparsify", label="sparsify TopK-128", environment="sparsify", package="sparsify",
        requirements=("eai-sparsify==1.3.3",),
    ),
    Peer(
        name="dictionary_learning", label="dictionary_learning Standard", environment="dictionary_learning",
        package="dictionary_learning", requirements=("dictionary-learning==0.1.0",),
        # The one that comes with it is built for another torch; its presence breaks transformers' import.
        uninstall=("torchvision",),
    ),
    SAE_LENS,
)  # fmt: skip
READERS = (  # of exports, which nobody times
    Peer(
        name="circuit_tracer", label="circuit-tracer", environment="circuit_tracer", package="circuit_tracer",
        requirements=("circuit-tracer==0.5.0",),
    ),
)  # fmt: skip
WRITERS = (replace(SAE_LENS, name="sae_lens_cache", label="SAELens cache writer"),)


def environment(peer: Peer, *, build: bool = True) -> Path:
    """The Python that runs a peer, its environment built first unless a fresh one is there or none shall be."""
    if peer.environment is None or importlib.util.find_spec(peer.package) is not None:
        return Path(sys.executable)
    folder = ENVIRONMENTS / peer.environment
    python, stamp = folder / "bin" / "python", folder / "stamp.json"
    torch = f"torch=={version('torch')}"
    wanted = json.dumps({"python": sys.version, "torch": torch, "uninstall": peer.uninstall, "pins": peer.requirements})
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    if not build:
        raise PeerFailed(f"{peer.name}: {peer.package} is not installed")
    shutil.rmtree(folder, ignore_errors=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    packages.mkdir(parents=True)
    ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "ours.pth").write_text("".join(f"{path}\n" for path in ours))
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], peer)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, torch, *peer.requirements], peer)
    if peer.uninstall:
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *peer.uninstall], peer)
    stamp.write_text(wanted)
    return python


class Worker:
    """A peer's running process: `seconds` runs one timed round in it."""

    def __init__(self, peer: Peer, job: Job, python: Path | None = None, *, timeout: float = 900.0) -> None:
        self.peer, self.timeout = peer, timeout
        LOGS.mkdir(parents=True, exist_ok=True)
        with (LOGS / f"{peer.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                [str(python or environment(peer)), "-m", "bench.workers.worker", peer.name, json.dumps(asdict(job))],
                cwd=ROOT, env=os.environ | variables(job.threads), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
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
        line = self._process.stdout.readline()
        try:
            answer: dict[str, object] = json.loads(line)
        except json.JSONDecodeError:
            raise PeerFailed(f"{self.peer.name}: {_ending(None if line else self._process.wait())}") from None
        if "error" in answer:
            raise PeerFailed(f"{self.peer.name}: {answer['error']}")
        return answer


def variables(threads: int | None = None) -> dict[str, str]:
    """No network, no tracking, and every thread pool as wide as the job says."""
    pools = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return pools | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1"}


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    return f"ended with exit status {code} and no answer"


def _run(command: Sequence[str], peer: Peer) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}"
        raise PeerFailed(f"{peer.name}: environment: {last}")


def set_up() -> int:
    """Every peer's environment, a line each; the exit status."""
    failed = 0
    for peer in (*STEPS, *READERS):
        try:
            print(f"{peer.label}: {environment(peer)}", flush=True)
        except PeerFailed as error:
            failed = 2
            print(f"error: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(set_up())
