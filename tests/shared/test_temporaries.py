"""What a kill left is told from what is at work by its lock, wherever the one at work runs."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from residual_saes.shared import temporaries
from residual_saes.shared.temporaries import _release, discard, leftovers, place, remove_leftovers, temporary
from tests.conftest import ROOT

MAKE = """
import sys, pathlib
from residual_saes.shared.temporaries import temporary
for folder in (False, True):
    temporary(pathlib.Path(sys.argv[1]), folder=folder)
print("made", flush=True)
sys.stdin.read()
"""


def left(path: Path, *, hours: float = 0.0, machine: str = "") -> Path:
    """What a killed process left, so long ago, on this machine or another."""
    new = temporary(path)
    _release(new)
    if machine:
        new = new.rename(new.with_name(new.name.replace(temporaries._machine(), machine)))
    os.utime(new, (new.stat().st_atime, new.stat().st_mtime - 3600 * hours))
    return new


def test_what_another_process_writes_stays_until_it_is_dead(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", MAKE, str(tmp_path / "c.0.0")]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"made\n"
        assert len(leftovers(tmp_path)) == 2
        remove_leftovers(tmp_path)
        assert len(leftovers(tmp_path)) == 2
        process.kill()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []
    remove_leftovers(tmp_path / "none")


def test_our_own_stays_until_it_is_placed_or_discarded(tmp_path: Path) -> None:
    one, other = temporary(tmp_path / "a"), temporary(tmp_path / "b", folder=True)
    remove_leftovers(tmp_path)
    place(one, tmp_path / "a")
    (other / "content").touch()
    discard(other)
    assert list(tmp_path.iterdir()) == [tmp_path / "a"] and not temporaries._held


def test_of_another_machine_an_hour_counts_as_well_as_the_lock(tmp_path: Path) -> None:
    fresh = left(tmp_path / "a", machine="00000000")
    left(tmp_path / "b", machine="00000000", hours=2)
    held = left(tmp_path / "c", machine="00000000", hours=2)
    with held.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {fresh, held}


def test_where_there_are_no_locks_an_hour_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "none")

    monkeypatch.setattr(fcntl, "flock", none)
    left(tmp_path / "a", hours=2)
    fresh, ours = left(tmp_path / "b"), temporary(tmp_path / "c")
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {fresh, ours}
    discard(ours)


def test_what_is_named_otherwise_stays_and_names_of_earlier_versions_are_known(tmp_path: Path) -> None:
    earlier, old = tmp_path / ".c.0.0.host.123.456.0.tmp", tmp_path / ".c.0.0.host.123.456.1.tmp"
    stay = {earlier, tmp_path / ".x.tmp", tmp_path / "notes.tmp", tmp_path / ".c.0.0.00000000.0000000g.tmp"}
    for path in (*stay, old):
        path.touch()
    for path in stay - {earlier} | {old}:
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == stay
