"""A job on a disk that takes two of its three layers: never more than that, wherever it is stopped, and the same SAEs."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from residual_saes.fleet.commands import Commands, JobConfig, Stage
from residual_saes.fleet.job import STAGES, Job
from residual_saes.fleet.room import Room, Window, used_bytes, windows
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import Busy, UserError
from residual_saes.shared.runs.run import Run
from residual_saes.shared.seal import seal
from residual_saes.shared.sites import Site, format_sites, parse_sites
from tests.conftest import TRAIN_ARGS, invoke

L1 = "3e-3"


class Here(Commands):
    """The commands in this process, for they take seconds to start; only the pictures at the end are left out."""

    def __init__(self, config: JobConfig, most: int = 1000) -> None:
        super().__init__(config)
        self.ran: list[Stage] = []
        self._most = most

    def run(self, stage: Stage, layers: Sequence[int] = ()) -> int:
        if len(self.ran) == self._most:
            raise Stopped
        self.ran.append(stage)
        return 0 if stage == "report" else invoke(*self.config.command(stage, layers)[1:])

    def ask(self, stage: Stage, layers: Sequence[int] = ()) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert invoke(*self.config.command(stage, layers)[1:]) == 0
        return out.getvalue()


class Stopped(BaseException):
    """Stands for a kill between two commands."""


@pytest.fixture
def config(harvest_args: tuple[object, ...], tmp_path: Path) -> JobConfig:
    return JobConfig(
        disk=5_200_000,
        cache=tmp_path / "c",
        runs=tmp_path / "r",
        preset="demo",
        l1=L1,
        expansion=4,
        device="cpu",
        harvest=tuple(map(str, harvest_args[2:-2])),
        train=tuple(map(str, (*TRAIN_ARGS[2:4], *TRAIN_ARGS[6:8], *TRAIN_ARGS[10:]))),
        eval=("--eval-tokens", "512", "--ce-tokens", "64"),
    )


def test_a_window_harvests_its_own_sites_alone(config: JobConfig) -> None:
    """Where the user wants several hooks, a layer that is named without one is the stream, not all of them again."""
    more = dataclasses.replace(config, harvest=(*config.harvest, "--sites", "resid_post,mlp_out"))
    with contextlib.redirect_stdout(io.StringIO()) as asked:
        assert invoke(*more.command("plan")[1:]) == 0
    assert json.loads(asked.getvalue())["layers"] == [site.json for site in parse_sites("0-2,0-2.mlp_out")]
    assert invoke(*more.command("harvest", parse_sites("0,1.mlp_out"))[1:]) == 0
    assert Cache.open(config.cache).sites == parse_sites("0,1.mlp_out")


@contextlib.contextmanager
def watched(config: JobConfig) -> Iterator[list[int]]:
    """What is on the disk, resume states and files half-written included, over and over."""
    seen, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            states = sum(p.lstat().st_blocks * 512 for p in config.runs.glob("*/state/*/*") if p.exists())
            seen.append(used_bytes(config.cache, config.runs) + states)
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def weights(runs: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name} {key}": tensor
        for path in sorted(runs.glob(f"*x4-l1-{L1}-fixed/*.pt"))
        for key, tensor in torch.load(path, weights_only=True)["model_state"].items()
    }


@pytest.mark.slow
def test_a_job_in_windows_stopped_between_commands(config: JobConfig, runs_path: Path) -> None:
    """What comes of it are the SAEs of the undivided cache, and the disk has never held more than it was allowed."""
    ran = []
    with watched(config) as seen:
        for most in range(1, 9):
            commands = Here(config, most)
            try:
                assert Job(commands).run() == 0
                break
            except Stopped:
                ran.append(commands.ran)
    assert ran == [["harvest"], ["train", "eval"], ["free", "harvest", "train"]]
    assert commands.ran == ["train", "eval", "report"]
    assert 0.5 * config.disk < max(seen) <= config.disk
    cache = Cache.open(config.cache)
    assert cache.freed() == parse_sites("0,1")
    assert [len(cache.freeable(Site(layer))) for layer in range(3)] == [0, 0, 40]
    ours, wanted = weights(config.runs), weights(runs_path)
    assert len(ours) == 3 * 6 * 5 and ours.keys() == wanted.keys()
    assert all(torch.equal(ours[k], wanted[k]) for k in ours)


@pytest.fixture
def trained(config: JobConfig, cache_path: Path, runs_path: Path) -> JobConfig:
    """Everything is made and measured, and nothing freed."""
    shutil.copytree(cache_path, config.cache)
    config.runs.mkdir()
    for folder in runs_path.glob("*-fixed"):
        shutil.copytree(folder, config.runs / folder.name)
    both = dataclasses.replace(config, l1="3e-3,8e-4", disk=10_000_000)
    assert Here(both).run("eval") == 0
    return both


def test_what_was_done_by_hand_goes_on(trained: JobConfig, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is left to be made; so there is nobody to make room for, and only the report is missing."""
    commands = Here(trained)
    assert Job(commands).run() == 0
    assert commands.ran == ["report"]
    assert "0-2     done\nleft: nothing" in capfd.readouterr().out


def test_a_layer_is_freed_only_when_its_checkpoints_are_whole_and_measured(trained: JobConfig) -> None:
    runs = [Run(path) for path in sorted(trained.runs.iterdir())]
    missing, damaged = runs[0].snapshot_path(Site(2), "final"), runs[1].snapshot_path(Site(0), "final")
    missing.unlink()  # layer 2 is wanted again
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:20_000] + bytes([whole[20_000] ^ 1]) + whole[20_001:])
    commands = Here(trained)
    with pytest.raises(UserError, match="checkpoints are damaged, as said above: remove them"):
        Job(commands).run()
    assert commands.ran == [] and Cache.open(trained.cache).freed() == ()
    damaged.write_bytes(whole)
    (runs[0].path / "results" / "metrics.json").unlink()  # of one setting nothing is measured any more
    commands = Here(trained, most=2)
    with pytest.raises(Stopped):
        Job(commands).run()
    assert commands.ran == ["train", "eval"]  # for all blocks are there
    assert Cache.open(trained.cache).freed() == ()


def test_a_stage_that_fails_ends_the_job_with_its_line_and_code(
    config: JobConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gone = dataclasses.replace(config, harvest=(*config.harvest, "--dataset", str(tmp_path / "none.jsonl")))
    commands = Here(gone)
    assert Job(commands).run() == 2
    assert commands.ran == ["harvest"]
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: cannot load the dataset")


@pytest.mark.parametrize("shared", ["cache", "runs"])
def test_a_second_job_in_the_same_folders_is_refused(config: JobConfig, shared: str, tmp_path: Path) -> None:
    elsewhere = dataclasses.replace(config, **{"runs" if shared == "cache" else "cache": tmp_path / "other"})

    class Begun(Here):
        """Whoever runs the first command of a job finds that another cannot begin."""

        def run(self, stage: Stage, layers: Sequence[int] = ()) -> int:
            said = rf"process {os.getpid()} on .* is at work on a job in {tmp_path / shared[0]}: wait until it ends"
            for second in (config, elsewhere):
                with pytest.raises(Busy, match=said if second == elsewhere else "is at work on a job"):
                    Job(Here(second)).run()
            raise Stopped

    for _ in range(2):  # nothing is left of an owner that ended
        with pytest.raises(Stopped):
            Job(Begun(config)).run()
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["job.jsonl", "r"]


def test_a_disk_too_small_for_one_layer_is_refused_at_once(config: JobConfig) -> None:
    with pytest.raises(UserError, match=r"layer 0 needs .* more than the 2 MB of --disk") as refused:
        Job(Here(dataclasses.replace(config, disk=2_000_000))).run()
    assert "\n" not in str(refused.value)
    assert not config.cache.exists() and not config.runs.exists()


def test_a_plan_says_windows_bytes_and_passes(config: JobConfig) -> None:
    lines = str(Job(Here(config)).plan()).splitlines()
    assert lines[0].startswith("window 1: layers 0-1, up to 4.") and lines[1].startswith("window 2: layers 2, up to ")
    assert lines[3] == "forward passes: 2, cut off after 2, 3 of 3 layers: 1.67 whole ones"
    assert not config.cache.exists() and not config.runs.exists()


def test_a_log_that_another_hand_wrote_is_passed_over(config: JobConfig) -> None:
    """Whatever is under a right checksum there: it is of times alone."""
    config.runs.mkdir()
    right = [{"stage": stage, "layers": [0], "began": 1.0, "seconds": 60, "code": 0} for stage in STAGES]
    odd = ({"layers": []}, {"layers": 3}, {"layers": ["x"]}, {"seconds": "x"}, {"seconds": float("nan")}, {"stage": None})
    lines = [json.dumps(seal(record)).encode() for record in (*right, *(right[0] | each for each in odd), {})]
    (config.runs / "job.jsonl").write_bytes(b"\n".join([*lines, b"\xff", b""]))
    left = str(Job(Here(config)).plan()).splitlines()[4]
    assert left == "left: 3 layers in 2 windows, up to 5.2 MB, about 8m00s as it went so far"


def test_windows_fit_beside_all_that_stays() -> None:
    layers = parse_sites("0-5")
    need = Room(
        tokens=10,
        states=5,
        stays=dict.fromkeys(layers, 4),
        passes=dict.fromkeys(layers, 20),
        present=dict.fromkeys(layers, 0),
    )
    found = windows(0, need, 70)
    # 10 + 5 + 2 · 24 = 63; then 18 stays: 18 + 5 + 24 = 47 beside which a second has no room; and so on
    assert [(format_sites(w.layers), w.peak) for w in found] == [("0-1", 63), ("2", 47), ("3", 51), ("4", 55), ("5", 59)]
    with pytest.raises(UserError, match="layer 5 needs 59 B"):
        windows(0, need, 58)
    # after a kill: what is there of layers 0 and 1 has its place in them, and in the way of none that come later
    begun = dataclasses.replace(need, present=need.present | {Site(0): 15, Site(1): 3})
    assert windows(0, begun, 70) == found
    assert windows(0, dataclasses.replace(begun, present=begun.present | {Site(5): 8}), 70)[0] == Window(
        layers=parse_sites("0"), peak=10 + 5 + 24 + 3 + 8
    )
