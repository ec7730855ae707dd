"""The other packages' commands, as processes of their own: what they take is given back when they end, crashes included."""

import contextlib
import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import click

_LOOK = 0.5  # seconds between looks at whether it is to stop
_PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent dies


class Commands:
    """Runs `python -m …`. SIGTERM and Ctrl-C reach the command once, are waited for, and are raised then."""

    def run(self, *argv: str) -> int:
        """The exit code, as a shell says it; what the command prints is printed."""
        return start(argv)[0]

    def ask(self, *argv: str) -> str:
        """What the command prints to stdout. If it fails it has said why, and this command ends with its exit code."""
        code, said, _ = start(argv, stdout=subprocess.PIPE)
        if code:
            raise click.exceptions.Exit(code)
        return said


def start(argv: Sequence[str], **options: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m …`; the last two where `options` of the process ask for a pipe.

    The process is in a group of its own, or a terminal's Ctrl-C would reach it twice, and twice means at once.
    """
    program = [sys.executable, "-m", *argv]
    child = subprocess.Popen(program, text=True, process_group=0, preexec_fn=_end_with_parent, **options)
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
