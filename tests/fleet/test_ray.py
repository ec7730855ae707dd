"""A fleet on a real cluster of three nodes that are processes of this machine, in a network of their own."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from residual_saes.fleet import cluster
from residual_saes.fleet.cluster import Fleet, RayCommands, _task
from residual_saes.fleet.commands import JobConfig
from residual_saes.shared.errors import Busy, UserError
from residual_saes.shared.sites import parse_sites
from tests.conftest import ROOT, TRAIN_ARGS, Cli
from tests.crash.sweep import contents, difference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
ALONE = ("unshare", "-n", "-u", "-p", "--fork", "--mount-proc", "--kill-child")


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*ALONE, "true"]).returncode != 0,
    reason="no network of its own to be had",
)
@pytest.mark.slow
def test_a_fleet_that_is_stopped_and_nodes_that_are_lost_cost_time_and_nothing_else(
    cache_path: Path, cli: Cli, harvest_args: tuple[object, ...], tmp_path: Path
) -> None:
    (tmp_path / "f").mkdir()
    options = tuple(map(str, harvest_args[2:-2])), (*map(str, (*TRAIN_ARGS[2:4], *TRAIN_ARGS[6:8])), "--save-minutes", "0")
    here = JobConfig(
        disk=0, cache=tmp_path / "f" / "c", runs=tmp_path / "f" / "r", preset="demo", l1="3e-3", expansion=4, device="cpu",
        harvest=options[0], train=options[1],
    )  # fmt: skip
    inside = [sys.executable, "-m", "tests.fleet.on_ray", str(tmp_path / "f"), json.dumps(asdict(here), default=str)]
    env = os.environ | {"OMP_NUM_THREADS": "7", "RAY_TMPDIR": "/tmp"}
    program = [*ALONE, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *inside]
    ended = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("a node is lost") == 2
    assert "stopped with 143 []\n" in ended.stdout
    line = "error: terminated; run the same command again to continue\n"
    assert ended.stderr.count("error:") == ended.stderr.count(line) == 1

    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # as a task has it
    one = replace(here, cache=tmp_path / "one" / "c", runs=tmp_path / "one" / "r")
    for argv in (one.command("harvest", parse_sites("0-2")), one.command("train", parse_sites("0-2"))):
        subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, env=alone, check=True, capture_output=True)
    assert difference(contents(tmp_path / "f"), contents(tmp_path / "one")) == ""


def test_a_node_without_the_folder_says_so() -> None:
    code, said = _task(("residual_saes", "harvest"), 1, "/nowhere")
    assert code == 2 and said.endswith("cannot run harvest in /nowhere: No such file or directory; put that right there")


def test_a_task_waits_for_the_owner_of_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One on a node that was lost may live on there for a moment. Whatever else a command ends with ends the task."""
    ends = iter([(Busy.exit_code, "", "error: held"), (Busy.exit_code, "", "error: held"), (2, "", "a line\nerror: bad\n")])
    monkeypatch.setattr(cluster, "start", lambda argv, **options: next(ends))
    monkeypatch.setattr(cluster, "_PAUSE", 0.0)
    assert _task(("residual_saes", "train"), 1, ".") == (2, "error: bad") and next(ends, None) is None


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    config = JobConfig(disk=0, cache=tmp_path / "c", runs=tmp_path, preset="demo", l1="1", expansion=1)
    with pytest.raises(UserError, match="there is no Ray cluster at 127.0.0.1:1 .*: start one, name its address"):
        RayCommands(config, Fleet(address="127.0.0.1:1", gpus=0)).run("harvest", parse_sites("0"))


def test_a_task_that_no_single_node_can_take_is_refused() -> None:
    config = JobConfig(disk=0, cache=Path("c"), runs=Path("r"), preset="demo", l1="1", expansion=1)
    nodes = [
        {"Alive": True, "Resources": {"CPU": 16.0}},
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    for cpus, gpus in ((16, 0.0), (8, 4.0), (1, 0.5)):
        RayCommands(config, Fleet(address="local", workers=1, cpus=cpus, gpus=gpus))._require_node(nodes)
    for cpus, gpus in ((17, 0.0), (16, 1.0), (1, 8.0)):
        with pytest.raises(UserError, match="no node .* the largest has 8 CPUs and 4 GPUs: lower --cpus or --gpus"):
            RayCommands(config, Fleet(address="local", workers=1, cpus=cpus, gpus=gpus))._require_node(nodes)
