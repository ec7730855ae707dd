"""One target at several settings: one stream of batches feeds the SAEs of all of them."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from residual_saes.shared.cache import Cache
from residual_saes.shared.progress import Progress, say
from residual_saes.shared.runs.rows import Rows
from residual_saes.shared.runs.run import Run
from residual_saes.shared.runs.target import Target
from residual_saes.shared.shuffle import epoch_slices
from residual_saes.shared.sites import Site
from residual_saes.train.config import Plan, RunOptions
from residual_saes.train.job import SaeJob
from residual_saes.train.kernels.base import TorchKernels, Workspace
from residual_saes.train.loader import FOLLOW_POLL, AlignedLoader, Clock, LoaderConfig
from residual_saes.train.look import Look, deviation, read_rows
from residual_saes.train.saver import Saver


def queues(device: torch.device) -> bool:
    """Whether the host goes on while the device works."""
    return device.type == "cuda"


class LayerJob:
    """One layer at several settings, from wherever the last run of it stopped."""

    def __init__(
        self,
        cache: Cache,
        target: Target,
        runs: list[tuple[Run, Plan]],
        options: RunOptions,
        kernels: TorchKernels,
        saver: Saver,
        asked: Callable[[], bool],
    ) -> None:
        """`asked` says whether to stop."""
        config = runs[0][1].config  # for what is the same in all plans
        self._cache, self._target, self._config, self._options, self._saver = cache, target, config, options, saver
        self._asked, site = asked, target.place
        self._window_blocks = max(1, config.window_blocks // len(target.sites))  # so that all sites' take the memory of one's
        due = [(run, plan, run.due(site)) for run, plan in runs]
        for run, _, labels in due:
            if not labels:
                run.drop_state(site)  # left over if the last run was killed right at its end
        self._jobs: list[SaeJob] = []
        if not any(labels for _, _, labels in due):
            return
        if options.follow and not self._first_window():
            return
        looks, self._scales = self._look()
        self._rows = Rows.of(dataclasses.asdict(config), dataclasses.asdict(looks[0]))
        for run, plan, labels in due:
            if labels:
                self._jobs.append(SaeJob(run, plan, cache, target, labels, looks[0], self._scales, options, kernels, saver))

    def _look(self) -> tuple[list[Look], list[float]]:
        """At what is read: that of each site, and where there are several how far each one's rows are from their mean, over the
        root mean square of all of them."""
        looks, deviations, config, several = [], [], self._config, len(self._target.inputs) > 1
        for site in self._target.inputs:
            rows = read_rows(self._cache, site, config.seed)
            looks.append(look := Look.of(*rows, config.skip_positions, config.max_norm))
            if several:
                deviations.append(deviation(*rows, config.skip_positions))
            if self._options.verbose or look.left_out:
                say(f"layer {site}: {look}", err=True)
            if look.warning:
                say(f"layer {site}: warning: {look.warning}", err=True)
        usual = math.sqrt(math.fsum(d * d for d in deviations) / len(looks))
        return looks, [d / usual or 1.0 for d in deviations] if usual else []

    def _first_window(self) -> bool:
        """Wait for the blocks with which training begins; False if it was asked to stop meanwhile."""
        spec, window = self._cache.spec, self._window_blocks * self._cache.spec.slices
        first = epoch_slices(spec.train_blocks, spec.slices, seed=self._config.seed, epoch=0)[:window] // spec.slices
        say(f"layer {self._target}: following the harvest", err=True)
        for block in first.tolist():
            while not self._cache.has_block(self._target.sites, block):
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
        loader = AlignedLoader(
            self._cache,
            tuple(dict.fromkeys((*self._target.inputs, *self._target.outputs))),
            LoaderConfig(
                batch=config.batch,
                window_blocks=self._window_blocks,
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
        wide, rows = self._target.row_sites * self._cache.spec.d_model, self._target.token_rows * config.batch
        workspace = Workspace(rows, wide, features, config.step.precision, device, slots=slots)
        clock = Clock(loader)
        title = f"training layer {self._target}"
        with (
            contextlib.ExitStack() as open_,
            Progress(title, config.steps * config.batch, "tokens", start=first * config.batch) as progress,
        ):
            for job in self._jobs:
                open_.callback(job.close)
            for step, batch in enumerate(loader, first):
                self._saver.check()
                clock.tick(step, config.batch)
                x, y = self._rows_of(batch)
                for job in self._jobs:
                    job.finish(workspace, clock)
                    job.begin(step, x, y, workspace)
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

    def _rows_of(self, batch: dict[Site, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What is read of a batch, and what is written if that is something else; once for all settings."""
        target = self._target
        if self._scales:
            parts = zip(target.inputs, self._scales, strict=True)
            return torch.cat([batch[site].float() / scale for site, scale in parts], dim=int(not target.shared)), None
        cpu = self._options.device.type == "cpu"  # a GPU widens as it reads
        x, y = (batch[site].float() if cpu else batch[site] for site in (target.inputs[0], target.outputs[0]))
        return x, y if target.transcodes else None

    def _note(self, clock: "Clock") -> str:
        l0 = " · ".join(f"{job.l0:.0f} ({job.setting})" for job in self._jobs)
        return f"L0 {l0} · waiting for data {clock.wait_share:.0%}"
