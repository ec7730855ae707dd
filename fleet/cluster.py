"""A fleet on Ray: the shards of a harvest and the layers of a training as long tasks on the nodes of a cluster.

Ray starts tasks, keeps their GPUs apart, and starts them again elsewhere when a node dies. Nothing else goes through it: a task
is the command that would be typed on the node; cache and runs lie where all nodes reach them by the same path. How far it is
comes from the ledger and the checkpoints, as everywhere.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from residual_saes.fleet.commands import Commands, JobConfig, Stage, start
from residual_saes.shared.cache import Cache
from residual_saes.shared.cli import COUNT, Number, option
from residual_saes.shared.errors import Busy, UserError
from residual_saes.shared.progress import Progress, say
from residual_saes.shared.runs.run import SNAPSHOTS, made
from residual_saes.shared.sites import Site
from residual_saes.shared.stores import Location

LOCAL = "local"
Reached = tuple[int, int, str]  # how many are there, of how many, of what
_LOOK = 5.0  # seconds between looks at how far it is
_TRIES, _PAUSE = 15, 2.0  # for a layer whose owner was on a node that was lost, and lives on there for a moment


@dataclass(kw_only=True, frozen=True, slots=True)
class Fleet:
    address: str  # of a cluster, auto for the one that this machine is in, or "local" for one of this machine alone
    workers: int = option("Shards of a harvest.", 1, type=COUNT)
    # Ray would set a task's threads otherwise, and sums depend on them
    cpus: int = option("Of a task: its threads.", 1, type=COUNT)
    gpus: float = option("Of a task.", 1.0, type=Number(0, 1024))


class RayCommands(Commands):
    """Harvests and trains on a cluster; all else runs here."""

    def __init__(self, config: JobConfig, fleet: Fleet) -> None:
        super().__init__(config)
        self._fleet = fleet
        self._ray: Any = None

    def run(self, stage: Stage, layers: Sequence[Site] = ()) -> int:
        config, n = self.config, self._fleet.workers
        if stage == "harvest":
            shards = [(*config.command(stage, layers), "--shard", f"{i}/{n}") for i in range(n)]
            return self._all(shards, partial(_blocks, config.cache, layers))
        if stage == "train":
            runs = [config.runs / Path(line).name for line in self.ask("runs", layers).splitlines()]
            return self._all([config.command(stage, (layer,)) for layer in layers], partial(_checkpoints, runs, layers))
        return super().run(stage, layers)

    def _all(self, tasks: list[tuple[str, ...]], reached: Callable[[], Reached]) -> int:
        """Every task on whatever node has room for it; the largest exit code."""
        ray, fleet, code = self._connect(), self._fleet, 0
        task = ray.remote(num_cpus=fleet.cpus, num_gpus=fleet.gpus, max_retries=-1)(_task)
        left = [task.remote(argv, fleet.cpus, os.getcwd()) for argv in tasks]
        done, total, unit = reached()
        try:
            with Progress(f"{tasks[0][0]} by {len(tasks)} tasks", total, unit, start=done) as progress:
                while left:
                    ended, left = ray.wait(left, timeout=_LOOK)
                    for one in ended:
                        ended_with, why = ray.get(one)
                        code = max(code, ended_with)
                        if why:
                            say(why, err=True)
                    done, progress.total, unit = reached()  # before the cache exists nobody knows how many blocks there are
                    progress.update(done)
        except KeyboardInterrupt:
            for one in left:
                ray.cancel(one)
            ray.wait(left, num_returns=len(left), timeout=60)
            raise
        return code

    def _connect(self) -> Any:
        if self._ray is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            try:
                import ray
            except ImportError:
                raise UserError("--ray needs the ray package: pip install ray") from None
            local = {"num_cpus": os.cpu_count(), "include_dashboard": False} if self._fleet.address == LOCAL else {}
            ours = signal.getsignal(signal.SIGTERM)
            try:
                _knock(self._fleet.address)
                ray.init(self._fleet.address, log_to_driver=False, logging_level="error", **local)
                signal.signal(signal.SIGTERM, ours)  # Ray's would end this process with its tasks still at work
            except Exception as error:  # of Ray, gRPC or the system
                raise UserError(
                    f"there is no Ray cluster at {self._fleet.address} ({str(error).splitlines()[0]}): start one, name its "
                    "address, or say --ray local"
                ) from None
            self._ray = ray
            self._require_node(ray.nodes())
        return self._ray

    def _require_node(self, nodes: list[dict[str, Any]]) -> None:
        """Raises UserError where no single node can take a task, which would wait for ever."""
        wanted = {"CPU": float(self._fleet.cpus), "GPU": self._fleet.gpus}
        has = [[node["Resources"].get(what, 0.0) for what in wanted] for node in nodes if node["Alive"]]
        if not any(all(n >= need for n, need in zip(node, wanted.values(), strict=True)) for node in has):
            cpus, gpus = max(has, key=lambda node: node[::-1], default=[0.0, 0.0])
            raise UserError(
                f"no node of the cluster can take a task of {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs, the largest has "
                f"{cpus:g} CPUs and {gpus:g} GPUs: lower --cpus or --gpus"
            )


def _knock(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_LOOK).close()


def _task(argv: tuple[str, ...], threads: int, folder: str) -> tuple[int, str]:
    """On a node: run a command; its exit code, and its last line where it failed."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    for _ in range(_TRIES):
        try:
            code, _, errors = start(argv, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        except OSError as error:
            return (
                2,
                f"error: {socket.gethostname()} cannot run {argv[1]} in {folder}: {error.strerror}; put that right there",
            )
        if code != Busy.exit_code:
            break
        time.sleep(_PAUSE)
    return code, errors.strip().rpartition("\n")[2] if code else ""


def _blocks(path: Location, layers: Sequence[Site]) -> Reached:
    if not Cache.exists(path):
        return 0, 1, "blocks"
    cache = Cache.open(path)
    total = cache.spec.n_blocks * len(layers)
    return total - sum(len(some) * len(blocks) for some, blocks in cache.missing(tuple(layers)).items()), total, "blocks"


def _checkpoints(runs: list[Location], layers: Sequence[Site]) -> Reached:
    return sum(made(run, layers) for run in runs), SNAPSHOTS * len(runs) * len(layers), "checkpoints"
