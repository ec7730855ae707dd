"""The stages of a job as the other packages' commands, in processes of their own: what they take is given back when they end,
crashes included."""

import contextlib
import ctypes
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import click

from residual_saes.shared.cli import option
from residual_saes.shared.errors import UserError
from residual_saes.shared.sites import Site, format_sites
from residual_saes.shared.stores import Location
from residual_saes.shared.units import parse_bytes

Stage = Literal["plan", "harvest", "free", "train", "runs", "eval", "report"]
_LOOK = 0.5  # seconds between looks at whether it is to stop
_PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent dies


def _words(text: str) -> tuple[str, ...]:
    """Options as a shell would part them. Raises UserError."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"{text!r} are no options: {error}") from None


@dataclass(kw_only=True, frozen=True, slots=True)
class JobConfig:
    """What is wanted, and what is passed on to the commands."""

    disk: int = option("What cache and runs may take together, such as 4TB.", type=parse_bytes, required=True)
    cache: Location
    runs: Location
    preset: str
    l1: str = option("Settings, as `rsae train` takes them.")
    expansion: int = option("Features per dimension.", type=click.IntRange(1, 1 << 16))
    layers: str | None = option("Layers, such as 0-23 or 3,7 [default: all].", None)
    device: str | None = None
    harvest: tuple[str, ...] = option('More options of a command, as "--tokens 100M".', (), type=_words)
    train: tuple[str, ...] = option("More options of `rsae train`.", (), type=_words)
    eval: tuple[str, ...] = option("More options of `rsae eval`.", (), type=_words)

    def __post_init__(self) -> None:
        if any(word.partition("=")[0] == "--target" for word in self.train):
            raise UserError("windows of layers are of SAEs: train what has a --target with `rsae train`, on a cache that stays")

    def command(self, stage: Stage, layers: Sequence[Site] = ()) -> tuple[str, ...]:
        """A stage of these layers, as `python -m` takes it. The plan, which names them, is of those that the user wants."""
        wanted = ("--layers", self.layers) if self.layers is not None else ()
        named = ("--layers", format_sites(layers)) if layers else ()
        where = ("--preset", self.preset, "--cache", str(self.cache))
        device = ("--device", self.device) if self.device is not None else ()
        trained = ("--runs", str(self.runs), "--l1", self.l1, "--expansion", str(self.expansion))
        stages: dict[Stage, tuple[str, ...]] = {
            "plan": ("harvest", "plan", "--json", *where, *wanted, *self.harvest),
            "harvest": ("harvest", "run", *where, *named, *device, *self.harvest, *("--sites", "resid_post") * bool(named)),
            "free": ("harvest", "free", *where, *named, "--yes"),
            "train": ("train", *where, *named, *device, *trained, *self.train),
            "runs": ("train", *where, *named, *device, *trained, *self.train, "--list"),
            "eval": ("eval", "run", *where, "--runs", str(self.runs), "--numbers-only", *device, *self.eval),
            "report": ("eval", "run", *where, "--runs", str(self.runs), *device, *self.eval),
        }
        return ("residual_saes", *stages[stage])


class Commands:
    """Runs a job's stages here. SIGTERM and Ctrl-C reach the command once, are waited for, and are raised then."""

    def __init__(self, config: JobConfig) -> None:
        self.config = config

    def run(self, stage: Stage, layers: Sequence[Site] = ()) -> int:
        """The exit code, as a shell says it; what the command prints is printed."""
        return start(self.config.command(stage, layers))[0]

    def ask(self, stage: Stage, layers: Sequence[Site] = ()) -> str:
        """What the command prints to stdout. If it fails it has said why, and this command ends with its exit code."""
        code, said, _ = start(self.config.command(stage, layers), stdout=subprocess.PIPE)
        if code:
            raise click.exceptions.Exit(code)
        return said


def start(argv: Sequence[str], **options: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m …`; the last two where `options` of the process ask for a pipe.

    The process is in a group of its own, or a terminal's Ctrl-C would reach it twice, and twice means at once.
    """
    program = [sys.executable, "-m", *argv]
    child = subprocess.Popen(program, text=True, errors="replace", process_group=0, preexec_fn=_end_with_parent, **options)
    try:
        said, complained = _outcome(child)
    except KeyboardInterrupt:
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    return child.returncode if child.returncode >= 0 else 128 - child.returncode, said or "", complained or ""


def _outcome(child: subprocess.Popen[str]) -> tuple[str, str]:
    """What it has printed, when it has ended. Looks up now and then: Ray interrupts a task without waking it."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.communicate(timeout=_LOOK)


def _end_with_parent() -> None:
    """In the child: who starts it again after a kill shall not meet it still at work."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
