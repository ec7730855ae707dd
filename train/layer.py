"""One target at several settings: one stream of batches feeds the SAEs of all of them."""

import contextlib
import dataclasses
import time
from collections.abc import Callable

import torch

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
from residual_saes.train.look import Look
from residual_saes.train.saver import Saver


def queues(device: torch.device) -> bool:
    """Whether the host goes on while the device works."""
    return device.type == "cuda"


class LayerJob:
    """One layer at several settings, from wherever the last run of it stopped."""

    def __init__(
        self,
        cache: Cache,
        site: Site,
        runs: list[tuple[Run, Plan]],
        options: RunOptions,
        kernels: TorchKernels,
        saver: Saver,
        asked: Callable[[], bool],
    ) -> None:
        """`asked` says whether to stop."""
        config = runs[0][1].config  # for what is the same in all plans
        self._cache, self._site, self._config, self._options, self._saver = cache, site, config, options, saver
        self._asked, self._target = asked, Target.itself(site)
        due = [(run, plan, run.due(site)) for run, plan in runs]
        for run, _, labels in due:
            if not labels:
                run.drop_state(site)  # left over if the last run was killed right at its end
        self._jobs: list[SaeJob] = []
        if not any(labels for _, _, labels in due):
            return
        if options.follow and not self._first_window():
            return
        look = Look.at(cache, site, config.seed, skip_positions=config.skip_positions, max_norm=config.max_norm)
        self._rows = Rows.of(dataclasses.asdict(config), dataclasses.asdict(look))
        if options.verbose or look.left_out:
            say(f"layer {site}: {look}", err=True)
        if look.warning:
            say(f"layer {site}: warning: {look.warning}", err=True)
        for run, plan, labels in due:
            if labels:
                self._jobs.append(SaeJob(run, plan, cache, self._target, labels, look, options, kernels, saver))

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
        loader = AlignedLoader(
            self._cache,
            self._target.sites,
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
        clock = Clock(loader)
        title = f"training layer {self._site}"
        with (
            contextlib.ExitStack() as open_,
            Progress(title, config.steps * config.batch, "tokens", start=first * config.batch) as progress,
        ):
            for job in self._jobs:
                open_.callback(job.close)
            for step, batch in enumerate(loader, first):
                self._saver.check()
                clock.tick(step, config.batch)
                (half,) = (batch[site] for site in self._target.inputs)
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

    def _note(self, clock: "Clock") -> str:
        l0 = " · ".join(f"{job.l0:.0f} ({job.setting})" for job in self._jobs)
        return f"L0 {l0} · waiting for data {clock.wait_share:.0%}"
