import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from fleet.commands import Commands
from tests.conftest import ROOT

PATIENT = "tests.fleet.patient"


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def until(path: Path, text: str) -> None:
    while not path.exists() or path.read_text() != text:
        time.sleep(0.01)


def test_exit_codes_and_what_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert Commands().run(PATIENT, str(tmp_path / "f"), "7") == 7
    assert Commands().ask(PATIENT, str(tmp_path / "f"), "0") == "asked\n"
    with pytest.raises(click.exceptions.Exit) as stop:
        Commands().ask(PATIENT, str(tmp_path / "f"), "2")
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
        Commands().run(PATIENT, str(tmp_path / "f"))
    thread.join()
    assert (tmp_path / "f").read_text() == "ended"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends children with their parents, if they ask for it")
def test_a_command_ends_with_the_job_that_is_killed(tmp_path: Path) -> None:
    program = f"from fleet.commands import Commands; Commands().run({PATIENT!r}, {str(tmp_path / 'f')!r})"
    parent = subprocess.Popen([sys.executable, "-c", program])
    until(tmp_path / "f", "at work")
    parent.kill()
    parent.wait()
    until(tmp_path / "f", "ended")
