"""Run by test_ray.py in a network of its own: a head and three nodes. One is lost while it harvests, another while it trains,
after a training that was stopped by SIGTERM.

python -m tests.fleet.on_ray FOLDER JOB      (the fields of its JobConfig, as JSON)
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}

import ray
from ray.cluster_utils import Cluster

from residual_saes.fleet.cluster import Fleet, RayCommands
from residual_saes.fleet.commands import JobConfig, Stage
from residual_saes.shared.cli import run
from residual_saes.shared.sites import parse_sites

LAYERS = parse_sites("0-2")


def read_config(text: str) -> JobConfig:
    fields: dict[str, Any] = json.loads(text)
    folders = {name: Path(fields[name]) for name in ("cache", "runs")}
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return JobConfig(**fields | folders | lists)


def once(when: Callable[[], bool], then: Callable[[], None]) -> threading.Thread:
    def work() -> None:
        while not when():
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def stop(commands: RayCommands, stage: Stage, when: Callable[[], bool]) -> None:
    """As a program is stopped; its tasks have ended then, and in their own time: no layer has an owner."""
    runs = Path(str(commands.config.runs))
    asked = once(when, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        run(click.Command(stage, callback=lambda: commands.run(stage, LAYERS)))
    except SystemExit as ended:
        print("stopped with", ended.code, list(runs.glob("*/state/*/owner")), flush=True)
    asked.join()
    shutil.rmtree(runs)  # all may be there by now: then nothing would be left to be lost


def lose(cluster: Cluster, when: Callable[[], bool]) -> threading.Thread:
    """Kill a node, with all that runs on it, as soon as `when`."""

    def work() -> None:
        mine = ray._private.worker.global_worker.node  # through which this process speaks to the others
        others = [node for node in cluster.worker_nodes if node._raylet_socket_name != mine._raylet_socket_name]
        cluster.remove_node(others[0], allow_graceful=False)
        print("a node is lost", flush=True)

    return once(when, work)


def main() -> None:
    folder, config = Path(sys.argv[1]), read_config(sys.argv[2])
    sys.argv[1:] = []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(3):
        cluster.add_node(num_cpus=1)
    commands = RayCommands(config, Fleet(address=cluster.address, workers=3, gpus=0))
    first_files: dict[Stage, str] = {"harvest": "c/ledger/0-2/*.json", "train": "r/*/metrics/*.jsonl"}
    for stage, first in first_files.items():
        begun = partial(lambda first: any(folder.glob(first)), first)
        if stage == "train":
            stop(commands, stage, begun)
        lost = lose(cluster, begun)
        code = commands.run(stage, LAYERS)
        lost.join()
        print(stage, "ended with", code, flush=True)
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
