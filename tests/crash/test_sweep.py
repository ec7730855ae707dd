"""A spread of what `make crash` tries in whole, and the sweep's own parts."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.disk import Disk, read_log, read_tree
from tests.crash.sweep import FAULTS, SCENARIOS, Sweep, Trial, build_library, difference

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the preloaded library is glibc's")
QUICK = [name for name in SCENARIOS if name not in ("pictures", "pages", "distill-on")]  # these take a second a trial
POINTS = 2  # of each scenario and fault: one in the first half of the operations, one in the second


@pytest.mark.parametrize("fault", [FAULTS[0], *(pytest.param(fault, marks=pytest.mark.slow) for fault in FAULTS[1:])])
@pytest.mark.parametrize("scenario", QUICK)
def test_nothing_is_lost(sweep: Sweep, scenario: str, fault: str) -> None:
    points = sweep.scenario(scenario).points(fault)
    outcomes = [sweep.attempt(Trial(scenario=scenario, fault=fault, at=at)) for at in spread(points, scenario + fault)]
    assert [o for o in outcomes if o.lost or o.left] == []


def spread(points: list[int], key: str) -> list[int]:
    """Others for every scenario and fault, the same in every run."""
    offset = sum(key.encode()) % 100 / 100
    return sorted({points[int((i + offset) / POINTS * len(points))] for i in range(POINTS)})


def test_a_resumed_run_is_as_one_that_was_never_stopped(sweep: Sweep) -> None:
    assert difference(sweep.scenario("resume").wanted, sweep.scenario("train").wanted) == ""


PROGRAM = """
import os
def write(name, data, sync):
    with open(name, "wb") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())
def sync(name):
    fd = os.open(name, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
os.mkdir("folder")
write("folder/a", b"first", True)
write("folder/old", b"second", False)
sync("folder")
sync(".")
write("folder/a", b"third", False)
os.rename("folder/old", "folder/new")
os.mkdir("other")
write("other/b", b"fourth", True)
os.unlink("kept")
"""


@pytest.fixture
def program(tmp_path: Path) -> tuple[Path, Path, list[str], dict[str, str]]:
    """(where it starts, where it runs, the program, its environment but for the fault)."""
    start, root = tmp_path / "start", tmp_path / "root"
    for folder in (start, root):
        folder.mkdir()
        (folder / "kept").write_bytes(b"kept")
    env = {"LD_PRELOAD": str(build_library(tmp_path)), "CRASH_ROOT": str(root), "CRASH_LOG": str(tmp_path / "log")}
    return start, root, [sys.executable, "-c", PROGRAM], env


Program = tuple[Path, Path, list[str], dict[str, str]]


def test_what_a_power_cut_leaves(program: Program) -> None:
    start, root, argv, env = program
    subprocess.run(argv, cwd=root, env=env, check=True)
    disk = Disk(start)
    operations = read_log(Path(env["CRASH_LOG"]), root)
    disk.apply(operations)
    assert disk.after("all") == read_tree(root)
    whole = {"folder": None, "folder/a": b"third", "folder/new": b"second", "other": None, "other/b": b"fourth"}
    assert disk.after("all") == whole
    assert disk.after("kept") == whole | {"folder/a": b"", "folder/new": b""}
    assert disk.after("lost") == {"folder": None, "folder/a": b"first", "folder/old": b"", "kept": b"kept"}
    assert [str(o) for o in operations[:4]] == ["mkdir folder", "create folder/a", "write folder/a", "fsync folder/a"]


# Python writes again as it closes the file, and what is no lasting fault comes once.
@pytest.mark.parametrize(
    ("fault", "code", "content"),
    [("kill", -9, b""), ("tear", -9, b"fi"), ("enospc", 1, b""), ("eio", 1, b"first"), ("brief", 1, b"first")],
)
def test_the_fault_comes_at_its_operation(program: Program, fault: str, code: int, content: bytes) -> None:
    _, root, argv, env = program
    fault_at = env | {"CRASH_FAULT": fault, "CRASH_AT": "3"}
    ended = subprocess.run(argv, cwd=root, env=fault_at, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert "at operation 3: W " in ended.stderr
    assert read_tree(root) == {"folder": None, "folder/a": content, "kept": b"kept"}


def test_reads_and_writes_move_half(program: Program) -> None:
    _, root, (python, _, whole), env = program
    env["CRASH_FAULT"] = "short"
    moved = (
        "import os; fd = os.open('kept', os.O_RDWR); print(len(os.read(fd, 4)), os.write(fd, b'12'), len(os.pread(fd, 3, 0)))"
    )
    vector = "; print(os.preadv(fd, [bytearray(2)], 0), os.pwrite(fd, b'1234', 0), os.writev(fd, [b'1', b'23', b'4']))"
    for code, said in ((moved + vector, "2 1 1\n1 2 2\n"), (whole, "")):
        done = subprocess.run([python, "-c", code], cwd=root, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    assert read_tree(root)["folder/new"] == b"second"
