"""The pipeline as people run it: three commands in processes of their own, killed in the middle, run again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from residual_saes.shared.cache import Cache
from tests.conftest import ROOT, TRAIN_ARGS


def command(*args: object) -> list[str]:
    return [sys.executable, "-W", "error", "-m", *map(str, args)]


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True, timeout=300)


def kill_when(reached: Callable[[], bool], *args: object) -> None:
    """Start a command, and end it with SIGKILL as soon as it got so far."""
    with subprocess.Popen(command(*args), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 240
        while not reached():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_harvest_train_eval_with_a_kill_in_each(
    harvest_args: tuple[object, ...], cache_path: Path, runs_path: Path, tmp_path: Path
) -> None:
    path, runs = tmp_path / "cache", tmp_path / "runs"
    whole = Cache.open(cache_path)

    harvest = ("harvest", *harvest_args, "--cache", path, "--forward-sequences", 1)
    kill_when(lambda: len(list(path.glob("ledger/0-2/*.json"))) >= 5, *harvest)
    done = len(list(path.glob("ledger/0-2/*.json")))
    assert 5 <= done < whole.spec.n_blocks
    finished = run("harvest", *harvest_args, "--cache", path)
    assert finished.returncode == 0, finished.stderr
    for file in cache_path.rglob("c.*"):
        assert (path / file.relative_to(cache_path)).read_bytes() == file.read_bytes()
    assert run("harvest", "verify", "--cache", path).returncode == 0

    train = ("train", *TRAIN_ARGS, "--cache", path, "--runs", runs, "--l1", "3e-3,8e-4,adaptive:5e-3@12")
    kill_when(lambda: len(list(runs.glob("*/sae_layer01_*.pt"))) >= 4, *train)
    assert not list(runs.glob("*/sae_layer02_final.pt"))
    again = run(*train)
    assert again.returncode == 0, again.stderr
    expected = sorted(p.relative_to(runs_path) for p in runs_path.glob("*/*.pt"))
    assert sorted(p.relative_to(runs) for p in runs.glob("*/*.pt")) == expected
    assert len(expected) == 3 * 3 * 6
    for name in expected:
        mine, theirs = (torch.load(base / name, weights_only=True)["model_state"] for base in (runs, runs_path))
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs), name

    evaluated = run("eval", "--preset", "demo", "--cache", path, "--runs", runs, "--ce-tokens", 640)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "CE recovered" in evaluated.stdout
    assert (runs / "report.html").exists()
