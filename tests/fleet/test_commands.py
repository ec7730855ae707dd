import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pytest

from residual_saes.fleet.commands import Commands, JobConfig, Stage
from residual_saes.shared.errors import UserError
from tests.conftest import ROOT


class Patient(JobConfig):
    """A command that takes its time in the place of every stage: its file, and the exit codes of stages."""

    def command(self, stage: Stage, layers: Sequence[int] = ()) -> tuple[str, ...]:
        return ("tests.fleet.patient", str(self.cache), *map(str, layers))


def patient(tmp_path: Path) -> Commands:
    return Commands(Patient(disk=0, cache=tmp_path / "f", runs=tmp_path, preset="", l1="", expansion=1))


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def until(path: Path, text: str) -> None:
    while not path.exists() or path.read_text() != text:
        time.sleep(0.01)


def test_windows_of_layers_are_of_saes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train what has a --target with `rsae train`"):
        JobConfig(disk=0, cache=tmp_path, runs=tmp_path, preset="", l1="", expansion=1, train=("--target", "all"))


def test_exit_codes_and_what_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commands = patient(tmp_path)
    assert commands.run("train", [7]) == 7
    assert commands.ask("train", [0]) == "asked\n"
    with pytest.raises(click.exceptions.Exit) as stop:
        commands.ask("train", [2])
    assert stop.value.exit_code == 2
    assert capfd.readouterr().out == "asked\n"  # of the first alone


@pytest.mark.parametrize("by", [lambda: os.kill(os.getpid(), signal.SIGINT), _thread.interrupt_main], ids=["Ctrl-C", "Ray"])
def test_ctrl_c_waits_for_the_command(tmp_path: Path, by: Callable[[], None]) -> None:
    """Ray's way to interrupt a task wakes nobody who waits."""

    def interrupt() -> None:
        until(tmp_path / "f", "at work")
        by()

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        patient(tmp_path).run("train")
    thread.join()
    assert (tmp_path / "f").read_text() == "ended"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends children with their parents, if they ask for it")
@pytest.mark.slow
def test_a_command_ends_with_the_job_that_is_killed(tmp_path: Path) -> None:
    program = f"from pathlib import Path; from {__name__} import patient; patient(Path({str(tmp_path)!r})).run('train')"
    parent = subprocess.Popen([sys.executable, "-c", program])
    until(tmp_path / "f", "at work")
    parent.kill()
    parent.wait()
    until(tmp_path / "f", "ended")
