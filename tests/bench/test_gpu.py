"""`python -m bench gpu`: that it runs to its end, and that one failure does not take the rest along."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench import gpu, project, report
from bench.__main__ import main
from bench.lab import DRY, Lab
from shared.errors import UserError
from train.kernels.base import TorchKernels


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    cpu = torch.device("cpu")
    return Lab(device=cpu, sizes=DRY, kernels=TorchKernels(), scratch=tmp_path, memory=tmp_path, threads=2, dry=True)


def test_dry_run_goes_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    threads = torch.get_num_threads()
    done = CliRunner().invoke(
        main, ["gpu", "--dry", "--minutes", "30", "--hard-stop", "40", "--out", str(tmp_path), "--scratch", str(tmp_path)]
    )
    torch.set_num_threads(threads)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [(part["title"], part["status"]) for part in found["parts"]] == [(part.title, "done") for part in gpu.PARTS], (
        done.output
    )
    assert set(project.FIGURES) <= set(found["figures"])
    assert report.read(tmp_path) == ([], []), "a dry run is no measurement"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = CliRunner().invoke(main, ["gpu"])
    assert isinstance(done.exception, UserError)
    assert "needs an NVIDIA GPU" in str(done.exception)


def parts(*found: tuple[str, Callable[[Lab], None], float]) -> list[gpu.Part]:
    return [gpu.Part(title=title, run=run, seconds=seconds) for title, run, seconds in found]


def test_a_part_that_fails_is_marked_and_the_rest_goes_on(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(lab: Lab) -> None:
        lab.keep("before", 1.0, "s")
        raise RuntimeError("no such kernel")

    session = gpu.Session.load(tmp_path / "found.json")
    wrong = ("two", lambda lab: lab.check("wrong", float("nan"), 1.0), 1)
    found = parts(("one", breaks, 1), wrong, ("three", lambda lab: lab.goal("fast", 2, "≥", 3), 1), ("late", breaks, 61))
    assert session.run(lab, found, lambda: 60)
    assert [part.status for part in session.parts] == ["FAILED", "FAILED", "done", "skipped"]
    again = gpu.Session.load(tmp_path / "found.json")
    assert (again.figures, again.parts[0].rows) == ({"before": 1.0, "fast": 2}, session.parts[0].rows)
    assert [(goal.name, goal.verdict) for goal in again.goals] == [("fast", "NOT met")]
    assert again.run(lab, found, lambda: 60) and len(again.parts) == 4, "nothing is done twice"
    out, err = capsys.readouterr()
    assert "RuntimeError: no such kernel" in out and "Traceback" in err
    assert "1 done, 2 FAILED, 1 skipped" in str(session)


def test_a_lost_device_is_left_to_another_process(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(lab: Lab) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Lab, "free", free)
    session = gpu.Session.load(tmp_path / "found.json")
    assert not session.run(lab, parts(("one", lambda lab: None, 1), ("two", lambda lab: None, 1)), lambda: 60)
    assert [part.status for part in session.parts] == ["FAILED"]


CHILD_SCRIPT = """
import json, os, sys, time
def save(*parts):
    with open(sys.argv[1] + "~", "w") as file:
        json.dump({"parts": [dict(title=t, status=s, limit=n, rows=[]) for t, s, n in parts]}, file)
    os.replace(sys.argv[1] + "~", sys.argv[1])
done = len(json.load(open(sys.argv[1]))["parts"]) if os.path.exists(sys.argv[1]) else 0
parts = ("good", "done", 1), ("hangs", "running", 0.5), ("dies", "running", 99), ("late", "running", 99)
stopped = [(title, "stopped", 0) for title, *_ in parts]
if done == 0:
    save(*parts[:2])
    time.sleep(99)
if done == 2:
    save(parts[0], stopped[1], parts[2])
    os.abort()
save(parts[0], *stopped[1:3], parts[3])
time.sleep(99)
"""


def test_what_hangs_or_dies_is_given_up_and_another_process_does_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    session = gpu.watch([sys.executable, "-c", CHILD_SCRIPT, str(path)], path, time.monotonic(), hard_stop=8)
    assert [(part.title, part.status) for part in session.parts] == [
        ("good", "done"), ("hangs", "stopped"), ("dies", "stopped"), ("late", "stopped")
    ]  # fmt: skip
