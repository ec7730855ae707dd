"""`python -m bench gpu`: that it runs to its end, and that one failure does not take the rest along."""

import json
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench import gpu, project
from bench.__main__ import main
from bench.lab import DRY, Lab
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
    assert [(part["title"], part["status"]) for part in found["parts"]] == [
        (title, "done") for title, _ in (*gpu.CHECKS, *gpu.TIMINGS, *gpu.LAST)
    ], done.output
    assert set(project.FIGURES) <= set(found["figures"])
    assert project.latest_gpu(tmp_path) is None, "a dry run is no measurement"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = CliRunner().invoke(main, ["gpu"])
    assert isinstance(done.exception, UserError)
    assert "needs an NVIDIA GPU" in str(done.exception)


def test_a_part_that_fails_is_marked_and_the_rest_goes_on(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(lab: Lab) -> None:
        lab.keep("before", 1.0, "s")
        raise RuntimeError("no such kernel")

    saved: list[int] = []
    parts = [("one", breaks), ("two", lambda lab: lab.check("wrong", float("nan"), 1.0)), ("three", lambda lab: None)]
    done = gpu.run_parts(lab, parts, time.monotonic() + 60, lambda done: saved.append(len(done)))
    assert [part.status for part in done] == ["FAILED", "FAILED", "done"]
    assert saved == [1, 2, 3] and lab.figures == {"before": 1.0}
    out, err = capsys.readouterr()
    assert "RuntimeError: no such kernel" in out and "Traceback" in err


def test_what_would_begin_too_late_is_skipped(lab: Lab) -> None:
    done = gpu.run_parts(lab, [("late", lambda lab: None)], time.monotonic() - 1, lambda done: None)
    assert [part.status for part in done] == ["skipped"]


def test_crossover_lies_between_the_points() -> None:
    assert gpu._crossover({20: 1.0, 100: 3.0}, 2.0) == pytest.approx(60)
    assert gpu._crossover({20: 1.0, 100: 3.0}, 4.0) == -1
    assert gpu._crossover({20: 1.0}, 0.5) == 0
