"""The workloads and their peers at small sizes, and the commands that run them. Nothing here asserts a time."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from bench import __main__ as commands
from bench import caches, limits, peers, report, steps
from bench.harness import Comparison, Entry
from bench.peers import READERS, STEPS, WRITERS, Peer, PeerFailed, Worker
from bench.setup import GPU, Measure, Setup, small
from bench.steps import Steps
from bench.workers.worker import Job
from residual_saes.shared import files
from residual_saes.shared.errors import UserError
from tests.conftest import ROOT

SMALL = replace(small(Setup()), threads=2)
JOB = Job(d=16, features=32, tokens=64, threads=1, device="cpu", directory="")


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return replace(SMALL, folders=(("disk", tmp_path),))


# ---------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Measure]:
    """Two comparisons in the place of all, one of which fails, and no place to publish to but this."""

    def breaks(setup: Setup) -> Comparison:
        raise RuntimeError("no such kernel")

    entry = Entry(name="ours", role="ours", work=3.0, seconds=(1.0,))
    measures = {
        "reading": lambda setup: Comparison(key="reading", name="reads", unit="bytes", entries=(entry,)),
        "writing": breaks,
    }
    monkeypatch.setattr(commands, "COMPARISONS", measures)
    monkeypatch.setattr(commands.table, "publish", lambda: (tmp_path / "README.md").touch())
    monkeypatch.setattr(report, "RESULTS", tmp_path / "published")
    monkeypatch.setattr(report, "busy_share", lambda: 0.0)
    (tmp_path / "published").mkdir()
    return measures


def call(tmp_path: Path, *args: str) -> Result:
    threads = torch.get_num_threads()
    where = ["--out", str(tmp_path / "out"), "--scratch", str(tmp_path), "--threads", "1"]
    done = CliRunner().invoke(commands.main, [*args, *where], standalone_mode=False)
    torch.set_num_threads(threads)
    return done


def found(folder: Path) -> dict[str, tuple[float, ...] | str]:
    """{path: seconds of ours, or why there are none} of the one file of results there."""
    [path] = folder.glob("*.json")
    results = report.parse(json.loads(path.read_text()))
    return {c.key: c.entries[0].seconds or str(c.entries[0].failure) for c in results.comparisons}


def test_one_that_fails_is_shown_and_the_rest_goes_on_and_nothing_is_published(few: Any, tmp_path: Path) -> None:
    done = call(tmp_path, "run", "--publish")
    assert isinstance(done.exception, UserError) and "not whole" in str(done.exception)
    assert found(tmp_path / "out") == {"reading": (1.0,), "writing": "RuntimeError: no such kernel"}
    assert "no figure: RuntimeError: no such kernel" in done.output
    assert not list((tmp_path / "published").iterdir()) and not (tmp_path / "README.md").exists()


def test_only_what_is_asked_for_takes_a_place_in_the_repository(few: dict[str, Any], tmp_path: Path) -> None:
    few.pop("writing")
    assert call(tmp_path, "run").return_value == 0
    assert not list((tmp_path / "published").iterdir()) and not (tmp_path / "README.md").exists()
    assert call(tmp_path, "run", "--publish").return_value == 0
    assert found(tmp_path / "published") == {"reading": (1.0,)} and (tmp_path / "README.md").exists()


def test_a_part_has_another_name_than_the_whole(few: dict[str, Any], tmp_path: Path) -> None:
    assert call(tmp_path, "run", "--only", "reading").return_value == 0
    assert [path.name.endswith("-part.json") for path in (tmp_path / "out").iterdir()] == [True]


def test_nothing_is_begun_when_the_time_is_over(few: Any, tmp_path: Path) -> None:
    assert call(tmp_path, "gpu", "--dry", "--minutes", "0").return_value == 1
    assert set(found(tmp_path / "out").values()) == {"TimeoutError: the time was over before it was begun"}


@pytest.mark.slow
def test_a_dry_run_measures_everything_that_a_gpu_is_measured_with(tmp_path: Path) -> None:
    done = call(tmp_path, "gpu", "--dry")
    assert done.return_value == 0, done.output
    results = found(tmp_path / "out")
    assert list(results) == list(commands.COMPARISONS) and all(isinstance(one, tuple) for one in results.values())
    for name in ("uneven", "BatchTopK", "two sparse", "from memory", "batches that are there", "harvest to memory"):
        assert name in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = call(tmp_path, "gpu")
    assert isinstance(done.exception, UserError)
    assert "needs an NVIDIA GPU" in str(done.exception)


# --------------------------------------------------------------------------------------------------------- workloads


def test_raw_writes_leave_the_same_files_behind(tmp_path: Path) -> None:
    spec = caches.cache_spec(d=64, n_layers=3, context=16, sequences=32, blocks=2)
    cache = caches.new_cache(tmp_path / "cache", spec)
    caches.write_cache(cache, 2)
    sizes = {path: path.stat().st_size for path in caches.block_files(cache)}
    assert len(sizes) == 6 and set(sizes.values()) == {spec.block_bytes} and spec.block_bytes % files.PAGE == 0
    for direct in (False, True):
        limits.raw(list(sizes), spec.block_bytes, 2, direct=direct, write=True)
        assert {path: path.stat().st_size for path in caches.block_files(cache)} == sizes
    caches.evict_blocks(cache)
    assert not any(limits.resident_share(path) for path in sizes)
    caches.empty(cache)
    assert not any(path.exists() for path in sizes) and len(cache.missing(cache.sites)) == 1


def test_l0_is_as_asked() -> None:
    setup = replace(SMALL, features=1024, tokens=256, l0=51)
    dense, sparse = (Steps(saes=steps.new_saes(setup, way), workspace=steps.workspace(setup), tokens=256) for way in steps.WAYS)
    dense.run(), sparse.run()
    assert all(one.note().startswith(f"{way} backward at L0 ") for way, one in zip(steps.WAYS, (dense, sparse), strict=True))
    assert dense.result is not None and 480 < dense.result.l0 < 544  # half of 1,024: the mean of 256 random rows
    assert sparse.result is not None and 40 < sparse.result.l0 < 64


def test_each_setting_steps_as_often_together_as_alone() -> None:
    saes = steps.new_saes(SMALL, "sparse", 3)
    three = Steps(saes=saes, workspace=steps.workspace(SMALL, 3), tokens=16)
    three.run()
    assert [sae.step_count for sae in saes] == [1, 1, 1]
    replace(three, saes=saes[:1], batches=3).run()
    assert saes[0].step_count == 4


@pytest.mark.parametrize("gpu", [False, True])
def test_training_from_a_cold_cache_takes_every_batch(setup: Setup, gpu: bool) -> None:
    """On a CPU all of its time is counted; on a GPU those before the clock starts are trained on as well."""
    setup = replace(setup, gpu=gpu)
    cache = caches.one_layer(setup, setup.disk, sequences=setup.stream_block, blocks=setup.stream_blocks)
    trained = Steps(saes=steps.new_saes(setup, "dense"), workspace=steps.workspace(setup), tokens=setup.tokens)
    training = caches.Training(setup=setup, cache=cache, steps=trained, cold=True)
    training.run(), training.run()
    assert (training.first, training.batches) == ((4, 8) if gpu else (0, 12))
    assert trained.saes[0].step_count == 2 * 12
    training.ready()
    assert trained.saes[0].step_count == 2 * 12 + training.batches
    shares = training.figures()
    assert (
        not shares
        if gpu
        else 0 < shares.pop("idle") < 1 and len(shares) == 2 and all(0 < share < 1 for share in shares.values())
    )


def test_a_small_setup_is_smaller_in_everything() -> None:
    for full in (Setup(), GPU):
        assert all(
            value < getattr(full, name)
            for name, value in small(full).figures().items()
            if isinstance(value, int) and name not in ("threads", "whole", "gpu", "stream_saes", "stream_window")
            and getattr(full, name) > 8
        )  # fmt: skip


def test_wheels_are_those_of_the_requirements() -> None:
    def pins(path: str) -> set[str]:
        return {line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")}

    wheels, ours = pins("bench/wheels.txt"), pins("requirements.txt") | pins("requirements-dev.txt")
    names = {pin.partition("==")[0]: pin for pin in ours}
    assert all(names.get(pin.partition("==")[0], pin) == pin for pin in wheels)
    peers = {pin for peer in (*STEPS, *WRITERS) for pin in peer.requirements}
    assert {"sae-lens==6.54.12", "eai-sparsify==1.3.3"} <= peers & wheels, "as they are timed elsewhere"


# -------------------------------------------------------------------------------------------------------------- peers


@pytest.mark.slow
def test_a_peer_that_cannot_start_says_why_in_one_line() -> None:
    with pytest.raises(PeerFailed, match="^nobody: ModuleNotFoundError: No module named 'bench.workers.nobody'$"):
        Worker(Peer(name="nobody", label="nobody"), JOB)


@pytest.mark.slow
def test_a_peer_that_fails_inside_says_why(tmp_path: Path) -> None:
    # Our own environment has no SAELens: the worker starts and then fails on its import.
    peer = Peer(name="sae_lens", label="SAELens")
    with pytest.raises(PeerFailed, match="sae_lens: ModuleNotFoundError: No module named"):
        Worker(peer, JOB)


def test_a_peer_that_does_not_install_is_shown_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = SimpleNamespace(returncode=1, stderr="lots of text\nERROR: no matching distribution\n")
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(peers.subprocess, "run", lambda *command, **options: said)
    peer = Peer(name="far", label="Far away", environment="far", package="far")
    for setup, why in ((SMALL, "far is not installed"), (Setup(), "environment: ERROR: no matching distribution")):
        with ExitStack() as stack:
            ready, absent = steps.start_peers(stack, (peer,), setup, tokens=8, work=8)
        assert ready == []
        assert absent == [Entry(name="Far away", role="peer", key="far", failure=f"far: {why}")]


def test_an_environment_stands_on_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is here already is fetched for it: no index is asked."""
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    python = peers.environment(Peer(name="far", label="Far away", environment="far", package="far", requirements=("numpy",)))
    said = subprocess.check_output([python, "-c", "import importlib.util as u; print(u.find_spec('torch').origin)"], text=True)
    assert python.is_relative_to(tmp_path) and said.strip() == torch.__file__


def test_environments_are_set_up_one_by_one_whatever_becomes_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_sparsify(command: list[str], **options: Any) -> SimpleNamespace:
        return SimpleNamespace(returncode="eai-sparsify==1.3.3" in command, stderr="ERROR: not today\n")

    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(peers.subprocess, "run", no_sparsify)
    assert peers.set_up() == 2
    said = capsys.readouterr()
    assert said.err == "error: sparsify: environment: ERROR: not today\n"
    assert [line.rpartition("/peers/")[2] or line for line in said.out.splitlines()][1:] == [
        f"{peer.label}: {tmp_path / str(peer.environment) / 'bin' / 'python'}" for peer in (*STEPS[2:], *READERS)
    ]


@pytest.mark.slow
def test_the_plain_step_trains_in_a_process_of_its_own() -> None:
    with closing(Worker(STEPS[0], JOB)) as worker:
        assert worker.seconds() > 0
        assert worker.about["version"] == torch.__version__


# ------------------------------------------------------------------------------------------------------------- limits


def test_a_layouts_first_call_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling and page faults must not drop a layout; one that is slow once it is warm is not timed again."""
    after_warm_up = [[1.0, 1.0, 0.9], [0.5] * 3, [1.0] * 3, [3.0], *[[1.0] * 3] * 4]
    turns: dict[object, Iterator[float]] = {}

    def seconds(call: object, device: str) -> float:
        if call not in turns:
            turns[call] = iter([9.0, *after_warm_up[len(turns)]])
        return next(turns[call])

    monkeypatch.setattr(limits, "timed", seconds)
    found = limits._search(4, 4, 4, device="cpu", dtype=torch.float32, rounds=2)
    assert list(found.values()) == [0.9, 0.5, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0]
    assert all(next(left, None) is None for left in turns.values())


def test_the_limit_is_each_product_in_its_faster_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    five = limits.five_products(tokens=16, d=8, features=32, dtype=torch.float32, rounds=1)
    assert five.flop == 5 * 2 * 16 * 8 * 32
    turns = iter([2.0, 1.0, 3.0, 4.0, 5.0, 5.0, 1.0, 9.0, 2.0, 2.5])
    monkeypatch.setattr(limits, "timed", lambda call, device: call() is None or next(turns))
    assert five.run() == 1 + 3 + 5 + 1 + 2
