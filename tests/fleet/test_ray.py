"""A fleet on a real cluster of three nodes that are processes of this machine, in a network of their own."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.cluster import Fleet, RayCommands, _task
from shared.errors import UserError
from tests.conftest import ROOT, TRAIN_ARGS, Cli
from tests.crash.sweep import contents, difference

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
ALONE = ("unshare", "-n", "-u", "-p", "--fork", "--mount-proc", "--kill-child")
L1 = ("--l1", "3e-3")


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*ALONE, "true"]).returncode != 0,
    reason="no network of its own to be had",
)
def test_a_fleet_that_is_stopped_and_nodes_that_are_lost_cost_time_and_nothing_else(
    cache_path: Path, cli: Cli, harvest_args: tuple[object, ...], tmp_path: Path
) -> None:
    (tmp_path / "f").mkdir()
    where = ("--cache", str(tmp_path / "f" / "c"), "--layers", "0-2")
    harvest = ("harvest", "run", *map(str, harvest_args), *where)
    train = ("train", *map(str, TRAIN_ARGS), *where, *L1, "--runs", str(tmp_path / "f" / "r"), "--save-minutes", "0")
    inside = [sys.executable, "-m", "tests.fleet.on_ray", str(tmp_path / "f"), json.dumps(harvest), json.dumps(train)]
    env = os.environ | {"OMP_NUM_THREADS": "7", "RAY_TMPDIR": "/tmp"}
    program = [*ALONE, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *inside]
    ended = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("a node is lost") == 2
    assert "stopped with 143 []\n" in ended.stdout
    line = "error: terminated; run the same command again to continue\n"
    assert ended.stderr.count("error:") == ended.stderr.count(line) == 1

    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # as a task has it
    for argv in (harvest, train):
        again = [sys.executable, "-m", *(a.replace(str(tmp_path / "f"), str(tmp_path / "one")) for a in argv)]
        subprocess.run(again, cwd=ROOT, env=alone, check=True, capture_output=True)
    assert difference(contents(tmp_path / "f"), contents(tmp_path / "one")) == ""


def test_a_node_without_the_folder_says_so() -> None:
    code, said = _task(("harvest",), 1, "/nowhere")
    assert code == 2 and said.endswith("cannot run harvest in /nowhere: No such file or directory; put that right there")


def test_a_cluster_that_is_not_there() -> None:
    with pytest.raises(UserError, match="there is no Ray cluster at 127.0.0.1:1 .*: start one, name its address"):
        RayCommands(Fleet(address="127.0.0.1:1", workers=1)).run("harvest", "run", "--cache", "c", "--layers", "0")
