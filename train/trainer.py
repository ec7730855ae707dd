"""Layers, one after the other; for each, one stream of batches feeds the SAEs of all settings."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shared.cache import Cache
from shared.device import announce, device_kind
from shared.errors import UserError
from shared.files import free_bytes
from shared.progress import Progress, say
from shared.runs.rows import Rows
from shared.runs.run import SNAPSHOTS, Run, cache_identity, run_config, snapshot_tokens
from shared.runs.sae import Damaged, Sae
from shared.seal import SEAL
from shared.shuffle import epoch_slices
from shared.sites import Site, format_sites
from shared.stop import finishing
from shared.stores.mirror import Mirror
from shared.units import format_bytes
from train.kernels.base import TorchKernels, Workspace
from train.loader import FOLLOW_POLL, ActivationLoader, LoaderConfig
from train.look import Look
from train.recipes import PUBLISHED
from train.saver import Saver
from train.sparsity.l1 import ControllerConfig
from train.sparsity.settings import Setting, held_fields, hold_from
from train.step import Begun, StepConfig, StepResult, TrainingSae, pick_kernels


@dataclass(kw_only=True, frozen=True, slots=True)
class TrainConfig:
    """What a run's SAEs depend on, apart from its setting and the cache. Stored in config.json."""

    expansion: int = 32
    tokens: int
    batch: int = 32_768
    lr: float = 3e-4
    lr_warmup: int = 0  # steps
    lr_decay: float = 0.0  # share of the run, at its end or before L0 is held, over which lr falls to zero
    hold_l0: float = 0.0  # share of the run, at its end, without L1: L0 is held by keeping each batch's largest activations
    seed: int = 0
    window_blocks: int = 16
    skip_positions: int = 0  # first positions of each context that are not trained on
    max_norm: float | None = None  # rows longer than this many medians are not either
    order: str = "slices"  # of the batches, see the loader; a run that was begun in another order is not gone on with
    dead_after: float = 1 / 30  # a feature is alive if it fired within this share of the run
    step: StepConfig = field(default_factory=StepConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)

    @property
    def steps(self) -> int:
        return self.tokens // self.batch

    @property
    def hold_from(self) -> int:
        """The step from which L0 is held; the number of steps where it never is."""
        return hold_from(self.steps, self.hold_l0)

    def lr_at(self, step: int) -> float:
        """Up over `lr_warmup` steps, down over `lr_decay`; where L0 is held, from the whole lr down to zero."""
        lr, left = self.lr * min(1.0, (step + 1) / max(1, self.lr_warmup)), self.hold_from - step
        if left <= 0:
            return lr * (self.steps - step) / (self.steps - self.hold_from)
        return lr * min(1.0, left / max(1.0, self.lr_decay * self.steps))

    def fields(self) -> dict[str, Any]:
        """The configuration as config.json has it: under the names that earlier versions wrote, so that digests stay."""
        fields: dict[str, Any] = {}
        for name, value in dataclasses.asdict(self).items():
            fields |= held_fields(value) if name == "hold_l0" else {name: value}
        return fields


@dataclass(kw_only=True, frozen=True, slots=True)
class RunOptions:
    """How a run is carried out; nothing here changes its SAEs."""

    runs: Path
    mirror: Mirror | None = None  # the bucket that `runs` stands for
    device: torch.device
    threads: int = 16
    epochs: int = 1
    save_minutes: float = 5.0
    log_records: int = 300  # points of a training curve
    tensorboard: bool = False
    recipe: str = PUBLISHED  # for the runs' names: what it consists of is in the TrainConfig
    follow: bool = False  # wait for blocks that are not harvested yet


def train(
    cache: Cache, name: str, sites: tuple[Site, ...], settings: tuple[Setting, ...], config: TrainConfig, options: RunOptions
) -> bool:
    """Train every layer at every setting; continue what was begun. Returns whether all of them finished.

    Raises UserError for what cannot be done, before anything is written, and where the disk does not take a file.
    SIGTERM and Ctrl-C are raised when the step in hand is done and its state saved.
    """
    _require_trainable(cache, sites, settings, config, options)
    identity = cache_identity(cache)
    runs = run_folders(name, settings, config, options)
    plans = list(zip(runs, [_run_config(setting, config, identity) for setting in settings], strict=True))
    if options.mirror is not None:
        options.mirror.prepare()
    for run, wanted in plans:
        run.pull_config()
        run.require_same(wanted)
    _require_space(cache, runs, sites, config, options.runs)
    machine = _machine(options.device)
    try:
        with finishing() as asked, contextlib.ExitStack() as owned:
            for run, wanted in plans:
                owned.enter_context(run.claim(sites))
                run.pull(sites)
                run.create(wanted, machine)
            announce(options.device)
            _note_other_machine(runs, machine)
            kernels = pick_kernels(config.step.precision, options.device)
            pairs = list(zip(runs, settings, strict=True))
            return _train_layers(cache, sites, pairs, config, options, kernels, asked)
    except OSError as error:
        raise UserError(
            f"cannot write to {options.runs} ({error}): put that right and run the same command again to continue"
        ) from error


def _train_layers(
    cache: Cache,
    sites: tuple[Site, ...],
    runs: list[tuple[Run, Setting]],
    config: TrainConfig,
    options: RunOptions,
    kernels: TorchKernels,
    asked: Callable[[], bool],
) -> bool:
    whole = True
    with Saver(options.device, most=len(runs)) as saver:
        for site in sites:
            if asked():
                break
            whole &= _LayerJob(cache, site, runs, config, options, kernels, saver, asked).run()
    return whole


def _require_trainable(
    cache: Cache, sites: tuple[Site, ...], settings: tuple[Setting, ...], config: TrainConfig, options: RunOptions
) -> None:
    spec = cache.spec
    absent = [site for site in sites if site not in cache.sites]
    if absent:
        raise UserError(
            f"layers {format_sites(absent)} are not in {cache.path}, which has {format_sites(cache.sites)}: "
            f"add them with `python -m harvest --layers {format_sites(absent)}`"
        )
    if config.tokens > spec.train_tokens * options.epochs:
        raise UserError(
            f"{config.tokens:,} tokens are asked for, the cache has {spec.train_tokens:,} to train on: "
            f"lower --tokens, go over it {-(-config.tokens // spec.train_tokens)} times with --epochs, or harvest more"
        )
    if config.steps < SNAPSHOTS:
        raise UserError(f"{config.tokens:,} tokens are fewer than {SNAPSHOTS} batches of {config.batch:,}; lower --batch")
    if config.skip_positions >= spec.context:
        raise UserError(f"contexts have {spec.context} positions: lower --skip-positions, which leaves none of them")
    features = config.expansion * spec.d_model
    if beyond := [s.target for s in settings if s.target is not None and s.target > features]:
        raise UserError(
            f"an L0 of {beyond[0]:g} is more than the {features} features there are: lower it, or raise --expansion"
        )
    if options.tensorboard:
        _summary_writer()
    if freed := set(sites).intersection(cache.freed()):
        raise cache.freed_error(freed)
    for site in () if options.follow else sites:
        missing = sum(map(len, cache.missing((site,)).values()))
        if missing:
            raise UserError(f"layer {site} of {cache.path} lacks {missing} blocks: run `python -m harvest` again to finish it")


def run_folders(name: str, settings: tuple[Setting, ...], config: TrainConfig, options: RunOptions) -> list[Run]:
    """Where the SAEs of these settings go; the folders need not be there."""
    baseline = "" if config.step.decoder == "trained" else f"-{config.step.decoder}-decoder"
    recipe = "" if options.recipe == PUBLISHED else f"-{options.recipe}"
    names = [f"{name}-saes-x{config.expansion}-{setting.name}{baseline}{recipe}" for setting in settings]
    return [Run(options.runs / each, options.mirror) for each in names]


def _run_config(setting: Setting, config: TrainConfig, cache: dict[str, Any]) -> dict[str, Any]:
    return run_config(config.fields() | {"l1": dataclasses.asdict(setting)}, cache)


def _machine(device: torch.device) -> dict[str, Any]:
    """What the last bits of a sum depend on."""
    return {"device": device_kind(device), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}


def _note_other_machine(runs: list[Run], machine: dict[str, Any]) -> None:
    for before in {str(run.config()["machine"]): run.config()["machine"] for run in runs}.values():
        if different := [f"{k} {before[k]} then, {v} now" for k, v in machine.items() if before.get(k) != v]:
            say(f"note: begun elsewhere ({', '.join(different)}): the same training, but not bit for bit", err=True)


def _require_space(cache: Cache, runs: list[Run], sites: tuple[Site, ...], config: TrainConfig, where: Path) -> None:
    """Snapshots of all layers, the resume states of one, and the state that is written before it replaces another."""
    d = cache.spec.d_model
    weights = 2 * config.expansion * d * d * 4
    snapshots = [run.snapshot_path(site, label) for run in runs for site in sites for label in snapshot_tokens(config.tokens)]
    due = sum(not path.exists() for path in snapshots)
    states = [run.state_path(site) for run in runs for site in sites]
    there = min(sum(path.stat().st_size for path in states if path.exists()), len(runs) * 3 * weights)
    needed = due * weights + ((len(runs) + 1) * 3 * weights - there if due else 0)
    free = free_bytes(where)
    if needed > free:
        raise UserError(
            f"{due} snapshots and the resume state need {format_bytes(needed)} at {where}, "
            f"{format_bytes(free)} are free: train fewer --layers or settings, or choose another --runs folder"
        )


def queues(device: torch.device) -> bool:
    """Whether the host goes on while the device works."""
    return device.type == "cuda"


class _LayerJob:
    """One layer at several settings, from wherever the last run of it stopped."""

    def __init__(
        self,
        cache: Cache,
        site: Site,
        runs: list[tuple[Run, Setting]],
        config: TrainConfig,
        options: RunOptions,
        kernels: TorchKernels,
        saver: Saver,
        asked: Callable[[], bool],
    ) -> None:
        """`asked` says whether to stop."""
        self._cache, self._site, self._config, self._options, self._saver = cache, site, config, options, saver
        self._asked = asked
        due = [(run, setting, run.due(site)) for run, setting in runs]
        for run, _, labels in due:
            if not labels:
                run.drop_state(site)  # left over if the last run was killed right at its end
        self._jobs: list[_SaeJob] = []
        if not any(labels for _, _, labels in due):
            return
        if options.follow and not self._first_window():
            return
        look = Look.at(cache, site, config.seed, skip_positions=config.skip_positions, max_norm=config.max_norm)
        self._rows = Rows.of(dataclasses.asdict(config), dataclasses.asdict(look))
        say(f"layer {site}: {look}", err=True)
        for run, setting, labels in due:
            if labels:
                self._jobs.append(_SaeJob(run, setting, cache, site, labels, look, config, options, kernels, saver))

    def _first_window(self) -> bool:
        """Wait for the blocks with which training begins; False if it was asked to stop meanwhile."""
        spec, window = self._cache.spec, self._config.window_blocks * self._cache.spec.slices
        first = epoch_slices(spec.train_blocks, spec.slices, seed=self._config.seed, epoch=0)[:window] // spec.slices
        say(f"layer {self._site}: following the harvest", err=True)
        for block in first.tolist():
            while not self._cache.has_block((self._site,), block):
                if self._asked():
                    return False
                time.sleep(FOLLOW_POLL)
        return True

    def run(self) -> bool:
        """Train to the end, or until it is asked to stop. Returns whether no SAE stopped by itself."""
        if not self._jobs:
            return True
        config = self._config
        device = self._options.device
        first = min(job.sae.step_count for job in self._jobs)
        loader = ActivationLoader(
            self._cache,
            self._site,
            LoaderConfig(
                batch=config.batch,
                window_blocks=config.window_blocks,
                threads=self._options.threads,
                seed=config.seed,
                rows=self._rows,
            ),
            device,
            first=first,
            last=config.steps,
            asked=self._asked if self._options.follow else None,
        )
        features = config.expansion * self._cache.spec.d_model
        # Where work is queued, an SAE's forward half is so a batch ahead: while the host reads what it has counted, the device
        # has the other SAEs' steps to do, which hides whatever holds the host up.
        ahead = queues(device)
        slots = len(self._jobs) if ahead else 1
        workspace = Workspace(config.batch, self._cache.spec.d_model, features, config.step.precision, device, slots=slots)
        clock = _Clock(loader)
        title = f"training layer {self._site}"
        with (
            contextlib.ExitStack() as open_,
            Progress(title, config.steps * config.batch, "tokens", start=first * config.batch) as progress,
        ):
            for job in self._jobs:
                open_.callback(job.close)
            for step, half in enumerate(loader, first):
                self._saver.check()
                clock.tick(step, config.batch)
                x = half.float() if device.type == "cpu" else half  # once for all settings; a GPU widens as it reads
                for job in self._jobs:
                    job.finish(workspace, clock)
                    job.begin(step, x, workspace)
                    if not ahead:
                        job.finish(workspace, clock)
                if all(job.stopped for job in self._jobs):
                    break
                progress.update((step + 1) * config.batch, self._note(clock))
                if self._asked():
                    break
            for job in self._jobs:
                job.finish(workspace, clock)
                if self._asked():
                    job.keep()
        return not any(job.stopped for job in self._jobs)

    def _note(self, clock: "_Clock") -> str:
        l0 = " ".join(f"{job.l0:.0f}" for job in self._jobs)
        return f"L0 {l0} · waiting for data {clock.wait_share:.0%}"


class _Clock:
    """Speed since a little while ago, and the share of all time spent waiting for the loader."""

    def __init__(self, loader: ActivationLoader) -> None:
        self._loader = loader
        self._began = self._mark = time.perf_counter()
        self._mark_step: int | None = None
        self.tokens_per_second = 0.0

    def tick(self, step: int, batch: int) -> None:
        now = time.perf_counter()
        if self._mark_step is None:
            self._mark_step = step
        elif now - self._mark >= 1.0:
            self.tokens_per_second = (step - self._mark_step) * batch / (now - self._mark)
            self._mark, self._mark_step = now, step

    @property
    def wait_share(self) -> float:
        return self._loader.waited / max(time.perf_counter() - self._began, 1e-9)


class _SaeJob:
    """One SAE: its schedule, its files, and its place in the stream."""

    def __init__(
        self,
        run: Run,
        setting: Setting,
        cache: Cache,
        site: Site,
        due: list[str],
        look: Look,
        config: TrainConfig,
        options: RunOptions,
        kernels: TorchKernels,
        saver: Saver,
    ) -> None:
        """`due` are the labels of the snapshots to be made; others are there already."""
        self._run, self._site, self._config, self._options, self._saver = run, site, config, options, saver
        self._look = look
        d = cache.spec.d_model
        seed = config.seed * 1000 + site.layer
        self.sae = TrainingSae(d, config.expansion * d, config.step, kernels, options.device, seed)
        self._control = setting.control(config.hold_from, config.controller, hold=config.hold_from < config.steps)
        # Rounded down, so that no two of them fall on one step however short the run.
        marks = snapshot_tokens(config.tokens).items()
        self._snapshots = {tokens // config.batch: label for label, tokens in marks if label in due}
        self._log_every = max(1, config.steps // options.log_records)
        self._saved = time.monotonic()
        self._begun: Begun | None = None
        self._taken: tuple[dict[str, Any], StepResult] | None = None  # the last step, and the facts before it
        self.stopped = False
        self._resume()
        self._board = self._tensorboard() if options.tensorboard else None

    def _resume(self) -> None:
        found, why = self._find_state()
        if found is not None:
            tensors, facts = found
            self.sae.load_state(tensors, facts["step"])
            self._control.state = type(self._control.state)(**facts["l1"])
        elif why:
            say(f"{self._run.name} layer {self._site}: {why}; trained again from its start", err=True)
        self._run.rewind_metrics(self._site, self.sae.step_count)

    def _find_state(self) -> tuple[tuple[dict[str, torch.Tensor], dict[str, Any]] | None, str]:
        """A state to go on from, or why there is none where that is worth saying. All that is due must come after it."""
        first, labels = min(self._snapshots), ", ".join(self._snapshots.values())
        try:
            found = self._run.load_state(self._site)
        except Damaged as error:
            return None, str(error)
        if found is not None and first <= found[1]["step"]:
            return None, f"{labels} must be made again, and the state is of a later step"
        if found is None and len(self._snapshots) < SNAPSHOTS:
            return None, f"{labels} must be made, and there is no state"
        return found, ""

    @property
    def l0(self) -> float:
        return self._taken[1].l0 if self._taken else 0.0

    def begin(self, step: int, x: torch.Tensor, workspace: Workspace) -> None:
        """Unless this SAE has had this batch already, or stopped."""
        if self.stopped or step != self.sae.step_count:
            return
        if step == 0:
            self.sae.init_centre(x)
        self._begun = self.sae.begin(x, workspace, self._control.keep_at(step))

    def finish(self, workspace: Workspace, clock: _Clock) -> None:
        """The step that was begun, if one was."""
        if self._begun is None:
            return
        begun, self._begun, step = self._begun, None, self.sae.step_count
        config, facts, l1 = self._config, self._facts(), self._control.value
        l1_now = l1 if step < config.hold_from else 0.0
        result = self.sae.finish(begun, lr=config.lr_at(step), l1=l1_now, workspace=workspace)
        self._control.update(step, result.l0, result.least)
        done = step + 1
        log = done % self._log_every == 0 or done == self._config.steps
        save = time.monotonic() - self._saved > 60 * self._options.save_minutes and self._saver.has_room()
        taken, self._taken = self._taken, (facts, result)
        # A step late, or the GPU would wait for its next step; what goes into a file is looked at before.
        for earlier in (taken, self._taken if log or save or done in self._snapshots else None):
            if earlier is not None and not earlier[1].finite:
                self._stop(*earlier)
                return
        if log:
            self._log(done, result, l1_now, clock)
        if done in self._snapshots:
            self._snapshot(self._snapshots[done], result, l1)
        if done == self._config.steps:
            self._saver.submit({}, lambda _: self._run.drop_state(self._site))
        elif save:
            self._save(self._facts())

    def _facts(self) -> dict[str, Any]:
        """Everything of the state that is no tensor."""
        return {"step": self.sae.step_count, "l1": dataclasses.asdict(self._control.state)}

    def _alive(self) -> int:
        horizon = self.sae.step_count - max(1, round(self._config.dead_after * self._config.steps))
        return int(((self.sae.last_active > horizon) & (self.sae.last_active > 0)).sum())

    def _log(self, done: int, result: StepResult, l1: float, clock: _Clock) -> None:
        record: dict[str, Any] = {
            "step": done,
            "tokens": done * self._config.batch,
            "loss": result.loss,
            "mse": result.mse,
            "l1": result.l1,
            "l0": result.l0,
            "lambda": l1,
            "alive": self._alive(),
            "grad_norm": result.grad_norm,
            "sparse_step": result.sparse,
            "tokens_per_second": round(clock.tokens_per_second, 1),
            "wait_share": round(clock.wait_share, 4),
        }
        self._run.append_metrics(self._site, record)
        if self._board is not None:
            for key in record.keys() - {"step", "tokens"}:
                self._board.add_scalar(key, record[key], record["tokens"])

    def _snapshot(self, label: str, result: StepResult, l1: float) -> None:
        stats = {
            "tokens": self.sae.step_count * self._config.batch,
            "step": self.sae.step_count,
            "loss": result.loss,
            "mse": result.mse,
            "l0": result.l0,
            "lambda": l1,
            "alive": self._alive(),
            "activations": dataclasses.asdict(self._look),
        }
        # The machine, too: the run may have been begun on another one.
        about = {"layer": self._site.json, "snapshot": label, "machine": _machine(self._options.device)}
        config = {k: v for k, v in self._run.config().items() if k != SEAL} | about
        path = self._run.snapshot_path(self._site, label)
        tensors = self.sae.snapshot(config, stats, self._control.threshold).tensors()

        def write(host: dict[str, torch.Tensor]) -> None:
            self._run.sync_metrics(self._site)  # before `final`, with which the layer counts as finished
            Sae(**host, config=config, stats=stats).save(path)
            self._run.push(path)

        self._saver.submit(tensors, write)

    def keep(self) -> None:
        """Save the state as it is now, for a run that is to stop here."""
        if self.stopped or self._taken is None or self.sae.step_count == self._config.steps:
            return
        if not self._taken[1].finite:
            self._stop(*self._taken)
        else:
            self._save(self._facts())

    def _save(self, facts: dict[str, Any]) -> None:
        self._saver.submit(self.sae.state(), lambda host: self._run.save_state(self._site, host, facts))
        self._saved = time.monotonic()

    def _stop(self, facts: dict[str, Any], result: StepResult) -> None:
        """The weights are those before the step that failed; keep them, and let the other settings go on."""
        self.stopped = True
        self._save(facts)
        step = result.step + 1
        tokens = step * self._config.batch
        self._run.append_metrics(self._site, {"step": step, "tokens": tokens, "stopped": "not finite"})
        say(
            f"\nwarning: {self._run.name} layer {self._site} stopped at {tokens:,} tokens: loss {result.loss}, gradient norm "
            f"{result.grad_norm}; its last good state is kept in {self._run.state_path(self._site)}. Check the cache with "
            "`python -m harvest verify`, or train with a lower --lr",
            err=True,
        )

    def _tensorboard(self) -> Any:
        """Points after this step, of a run that got further before it was killed, are taken back: they come again."""
        folder = self._run.path / "tensorboard" / f"layer{self._site.key}"
        return _summary_writer()(str(folder), purge_step=self.sae.step_count * self._config.batch + 1)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _summary_writer() -> Any:
    """TensorBoard's class. Raises UserError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package: pip install tensorboard") from None
    return SummaryWriter
