"""Windows of layers: as many as fit on a disk are harvested, trained and evaluated; then they make room for the next.

What is done follows from the ledger, the checkpoints and the results. The job itself keeps nothing but a log of how long its
stages took (job.jsonl beside the runs), so it can be stopped anywhere, and what was begun by hand goes on here.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from residual_saes.eval.measure.store import measured
from residual_saes.fleet.commands import Commands, Stage
from residual_saes.fleet.plan import Plan
from residual_saes.fleet.room import Room, Window, room, used_bytes, windows
from residual_saes.shared.cache import Cache, CacheSpec
from residual_saes.shared.errors import Busy, UserError
from residual_saes.shared.files import make_dir, owned
from residual_saes.shared.progress import say
from residual_saes.shared.records import JsonLines, Record
from residual_saes.shared.runs.run import SNAPSHOTS, Run, made
from residual_saes.shared.sites import Site, format_sites
from residual_saes.shared.typed import Bounds, read
from residual_saes.shared.units import format_bytes, format_seconds

STAGES: tuple[Stage, ...] = ("harvest", "train", "eval")


@dataclass(kw_only=True, frozen=True, slots=True)
class LayerState:
    """How far a layer is, from what is on the disk."""

    blocks: float  # share of its blocks that are there
    freed: bool
    saes: int  # checkpoints that are wanted,
    made: int  # that are there,
    measured: int  # and that were evaluated

    @property
    def done(self) -> bool:
        return self.measured == self.saes

    def __str__(self) -> str:
        if self.done:
            return "done, freed" if self.freed else "done"
        if not self.made and not self.blocks:
            return "to come"
        activations = "freed" if self.freed else f"{self.blocks:.0%} harvested"
        return f"{activations}, {self.made} of {self.saes} checkpoints, {self.measured} measured"


@dataclass(kw_only=True, frozen=True)
class Ended(Record):
    """A stage that ended: a line of the log."""

    stage: Stage
    layers: tuple[Site, ...]
    began: float  # seconds since 1970
    seconds: Annotated[float, Bounds(0, 1e12)]
    code: int | None


class Job:
    """Call `run`; again after whatever stopped it."""

    def __init__(self, commands: Commands) -> None:
        """Raises UserError for a bucket: nobody says how much it may take, so there is nothing to make windows for."""
        config = commands.config
        if not (isinstance(config.cache, Path) and isinstance(config.runs, Path)):
            raise UserError(
                "a job makes room on a disk, and a bucket needs none: run harvest, train and eval in turn, which take "
                "s3://bucket/prefix, or keep --cache and --runs in folders"
            )
        self._config, self._commands, self._cache_path, self._runs_path = config, commands, config.cache, config.runs
        self._log = JsonLines(config.runs / "job.jsonl", Ended)
        self._folders: list[Run] = []
        self._layers, shape = wanted(commands)
        self._spec = read(CacheSpec, shape)

    def run(self) -> int:
        """0, or the exit code of the stage that failed and has said why. Raises UserError if not even one layer fits, or
        another job is at work there."""
        self._windows(self._look())  # refuses before anything is written
        with contextlib.ExitStack() as stack:
            for folder in (self._cache_path, self._runs_path):
                make_dir(folder)
                stack.callback(_remove_empty, folder)
                if owner := stack.enter_context(owned(folder / "job.owner")):
                    raise Busy(f"{owner} is at work on a job in {folder}: wait until it ends, or choose another folder")
            return self._run()

    def _run(self) -> int:
        tried: tuple[Site, ...] = ()
        while True:
            states = self._look()
            say(self._table(states))
            left = _left(states)
            if stuck := set(tried).intersection(left):
                raise UserError(f"every stage of layers {format_sites(stuck)} ended well, but not all is there: look above")
            if not left:
                return self._commands.run("report")
            if code := self._make_room([layer for layer, state in states.items() if state.done]):
                return code
            tried = self._windows(states)[0].layers
            harvested = all(states[layer].blocks == 1 for layer in tried)
            for stage in STAGES[harvested:]:
                if code := self._stage(stage, tried):
                    return code

    def _make_room(self, done: list[Site]) -> int:
        """Free these layers' training blocks, those whose checkpoints are all whole as they lie on the disk now."""
        cache = self._cache()
        loaded = [layer for layer in done if cache is not None and cache.freeable(layer)]
        whole = [layer for layer in loaded if not any(run.due(layer) for run in self._runs())]
        if whole != loaded:
            raise UserError(
                "checkpoints are damaged, as said above: remove them and run the same command again to make them anew"
            )
        return self._commands.run("free", whole) if whole else 0

    def _stage(self, stage: Stage, layers: tuple[Site, ...]) -> int:
        say(f"\n{stage}: layers {format_sites(layers)}")
        began, clock, code = time.time(), time.monotonic(), None
        try:
            code = self._commands.run(stage, layers)
            return code
        finally:
            self._log.append(Ended(stage=stage, layers=layers, began=began, seconds=time.monotonic() - clock, code=code))

    # --- what there is ---

    def _cache(self) -> Cache | None:
        return Cache.open(self._cache_path) if Cache.exists(self._cache_path) else None

    def _runs(self) -> list[Run]:
        """The run folders, which the cache's model names. As many as there are settings, in any case."""
        if not self._folders:
            if self._cache() is None:
                return [Run(self._runs_path / f"not begun {i}") for i in range(self._config.l1.count(",") + 1)]
            named = self._commands.ask("runs", self._layers)
            self._folders = [Run(Path(line)) for line in named.splitlines()]
        return self._folders

    def _look(self) -> dict[Site, LayerState]:
        cache, runs, spec = self._cache(), self._runs(), self._spec
        if cache is not None:
            cache.remove_leftovers()
        for run in runs:
            run.remove_leftovers()
        evaluated = [measured(run) if run.config_path.exists() else {} for run in runs]
        states = {}
        for layer in self._layers:
            missing = spec.n_blocks if cache is None else sum(map(len, cache.missing((layer,), freed=True).values()))
            states[layer] = LayerState(
                blocks=1 - missing / spec.n_blocks,
                freed=cache is not None and layer in cache.freed(),
                saes=SNAPSHOTS * len(runs),
                made=sum(made(run.path, (layer,)) for run in runs),
                measured=sum(len(labels.get(layer, ())) for labels in evaluated),
            )
        return states

    def _need(self, layers: Sequence[Site]) -> Room:
        features = self._config.expansion * self._spec.d_model
        return room(self._spec, self._cache(), [run.path for run in self._runs()], layers, features)

    def _windows(self, states: dict[Site, LayerState]) -> list[Window]:
        """How layers that are not done are parted, as if those that are had been freed."""
        need = self._need(_left(states))
        used = used_bytes(self._cache_path, self._runs_path) - sum(self._need(tuple(states)).present.values())
        return windows(used, need, self._config.disk)

    def plan(self) -> Plan:
        """What is still to be done. Raises UserError where a layer does not fit."""
        states, features = self._look(), self._config.expansion * self._spec.d_model
        windows = self._windows(states)
        need = self._need(_left(states))
        written = need.tokens + sum(need.stays[n] + need.passes[n] - need.present[n] for n in need.stays)
        return Plan(
            windows=tuple(windows), written=written, spec=self._spec, settings=len(self._runs()), features=features,
            so_far=self._outlook(states),
        )  # fmt: skip

    # --- what is said ---

    def _ended(self) -> list[Ended]:
        """The stages that ended, by the whole lines of the log."""
        return [ended for _, ended in self._log.lines() if ended is not None and ended.layers]

    def _table(self, states: dict[Site, LayerState]) -> str:
        """A line for each run of layers that are equally far, what it took, and what is left."""
        took = {(stage, layer): 0.0 for stage in STAGES for layer in states}
        for ended in self._ended():
            for layer in ended.layers:
                if (ended.stage, layer) in took:
                    took[ended.stage, layer] += ended.seconds / len(ended.layers)
        groups: list[list[Site]] = []
        for layer, state in states.items():
            if groups and str(states[groups[-1][-1]]) == str(state):
                groups[-1].append(layer)
            else:
                groups.append([layer])
        rows: list[tuple[str, ...]] = [("layers", "", *STAGES)]
        for group in groups:
            seconds = [sum(took[stage, layer] for layer in group) for stage in STAGES]
            times = [format_seconds(s) if s else "" for s in seconds]
            rows.append((format_sites(group), str(states[group[0]]), *times))
        rows.append((f"left: {self._outlook(states)}",))
        sizes = [max(len(row[i]) for row in rows[:-1]) for i in range(len(rows[0]))]
        return "\n".join("  ".join(f"{cell:<{n}}" for cell, n in zip(row, sizes, strict=False)).rstrip() for row in rows)

    def _outlook(self, states: dict[Site, LayerState]) -> str:
        left = _left(states)
        if not left:
            return "nothing"
        n = len(self._windows(states))
        text = f"{len(left)} layers in {n} window{'s' * (n > 1)}, up to {format_bytes(self._config.disk)}"
        well = [ended for ended in self._ended() if ended.code == 0]
        if {ended.stage for ended in well} >= set(STAGES):
            harvests = [ended.seconds for ended in well if ended.stage == "harvest"]
            others = [ended for ended in well if ended.stage != "harvest"]
            layers = sum(len(ended.layers) for ended in others) / (len(STAGES) - 1)
            seconds = n * sum(harvests) / len(harvests) + len(left) * sum(ended.seconds for ended in others) / layers
            text += f", about {format_seconds(seconds)} as it went so far"
        return text


def wanted(commands: Commands) -> tuple[tuple[Site, ...], dict[str, Any]]:
    """The layers of the job, and the shape of their cache as far as it is known by now."""
    plan = json.loads(commands.ask("plan"))
    return tuple(map(Site.of, plan["layers"])), plan["shape"]


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _left(states: dict[Site, LayerState]) -> list[Site]:
    """The layers of which something is still to be made."""
    return [layer for layer, state in states.items() if not state.done]
