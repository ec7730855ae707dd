"""`python -m bench gpu`: that it runs to its end, and that one failure does not take the rest along."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench import gpu, project, table
from bench.__main__ import main
from bench.lab import DRY, Lab
from bench.peers import ROOT
from shared.cli import UserError
from train.kernels import TorchKernels


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    cpu = torch.device("cpu")
    return Lab(device=cpu, sizes=DRY, kernels=TorchKernels(), scratch=tmp_path, memory=tmp_path, threads=2, dry=True)


def test_dry_run_goes_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    threads = torch.get_num_threads()
    done = CliRunner().invoke(main, ["gpu", "--dry", "--out", str(tmp_path), "--scratch", str(tmp_path)])
    torch.set_num_threads(threads)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [(part["title"], part["status"]) for part in found["parts"]] == [(part.title, "done") for part in gpu.PARTS], (
        done.output
    )
    assert set(project.FIGURES) <= set(found["figures"])
    assert table.found(tmp_path) == ([], []), "a dry run is no measurement"


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

    session = gpu.Session(lab=lab, path=tmp_path / "found.json", last_begin=60)
    wrong = ("two", lambda lab: lab.check("wrong", float("nan"), 1.0), 1)
    session.run(parts(("one", breaks, 1), wrong, ("three", lambda lab: lab.goal("fast", 2, "≥", 3), 1), ("late", breaks, 61)))
    assert [part.status for part in session.done] == ["FAILED", "FAILED", "done", "skipped"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["figures"] == {"before": 1.0, "fast": 2}
    assert [(goal["name"], goal["verdict"]) for goal in found["goals"]] == [("fast", "NOT met")]
    out, err = capsys.readouterr()
    assert "RuntimeError: no such kernel" in out and "Traceback" in err
    assert "1 done, 2 FAILED, 1 skipped" in session.summary()


def test_what_hangs_is_ended_with_what_there_is(tmp_path: Path) -> None:
    script = f"""
import time, torch
from pathlib import Path
from click.testing import CliRunner
from bench import gpu
gpu.PARTS = tuple(gpu.Part(title=t, run=r, seconds=0) for t, r in (
    ("one", lambda lab: lab.keep("found", 1.0)), ("two", lambda lab: (lab.keep("half", 2.0), time.sleep(99)))))
gpu.command(["--dry", "--hard-stop", "0.05", "--out", {str(tmp_path)!r}, "--scratch", {str(tmp_path / "scratch")!r}])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and "stopped at the hard limit" in done.stdout, done.stdout + done.stderr
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert [(part["title"], part["status"]) for part in found["parts"]] == [("one", "done"), ("two", "stopped")]
    assert found["figures"] == {"found": 1.0, "half": 2.0}
    assert not list((tmp_path / "scratch").iterdir())


def test_crossover_lies_between_the_points() -> None:
    assert gpu.crossover({20: 1.0, 100: 3.0}, 2.0) == pytest.approx(60)
    assert gpu.crossover({20: 1.0, 100: 3.0}, 4.0) == -1
    assert gpu.crossover({20: 1.0}, 0.5) == 0
