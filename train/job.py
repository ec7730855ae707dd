"""One SAE of one setting at one target: its schedule, its files, and its place in the stream."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch

from residual_saes.shared.cache import Cache
from residual_saes.shared.device import device_kind
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import refuse_links
from residual_saes.shared.progress import say
from residual_saes.shared.runs.curve import Point
from residual_saes.shared.runs.run import SNAPSHOTS, Run, snapshot_tokens
from residual_saes.shared.runs.sae import Damaged, Sae
from residual_saes.shared.runs.target import Target
from residual_saes.shared.typed import read
from residual_saes.train.config import REVIVED, Plan, RunOptions
from residual_saes.train.kernels.base import TorchKernels, Workspace
from residual_saes.train.loader import Clock
from residual_saes.train.look import Look
from residual_saes.train.saver import Saver
from residual_saes.train.step import Begun, StepResult, TrainingSae


def machine(device: torch.device) -> dict[str, Any]:
    """What the last bits of a sum depend on."""
    return {"device": device_kind(device), "threads": torch.get_num_threads(), "torch": str(torch.__version__)}


class SaeJob:
    """One SAE: its schedule, its files, and its place in the stream."""

    def __init__(
        self,
        run: Run,
        plan: Plan,
        cache: Cache,
        target: Target,
        due: list[str],
        look: Look,
        scales: Sequence[float],
        options: RunOptions,
        kernels: TorchKernels,
        saver: Saver,
    ) -> None:
        """`due` are the labels of the snapshots to be made; others are there already. Rows of each input come divided by its
        one of `scales`, where there are any; checkpoints are of rows as they are, but those that several sites share."""
        config = plan.config
        self._run, self._site, self._config, self._options, self._saver = run, target.place, config, options, saver
        self._look, self._target, self._scales = look, target, scales
        self.setting = plan.sparsity.name.removeprefix("l1-").removesuffix("-fixed")  # for the progress line
        d, wide = cache.spec.d_model, target.row_sites * cache.spec.d_model
        seed = config.seed * 1000 + target.place.layer
        self._sparsity = plan.sparsity
        self.sae = TrainingSae(
            wide, config.expansion * d, config.step, kernels, options.device, seed, plan.sparsity.OWN,
            transcodes=target.transcodes, skip=config.skip,
            wake_after=round(config.dead_after * config.steps) if config.revive else None,
        )  # fmt: skip
        self._control = plan.sparsity.control(config.hold_from, config.controller, hold=config.hold_from < config.steps)
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
        state, why = self._find_state()
        if state is not None:
            tensors, facts = state
            self.sae.load_state(tensors, facts["step"])
            self._control.state = read(type(self._control.state), facts["l1"])
        elif why:
            say(f"{self._run.name} layer {self._site}: {why}; trained again from its start", err=True)
        self._run.rewind_metrics(self._site, self.sae.step_count)

    def _find_state(self) -> tuple[tuple[dict[str, torch.Tensor], dict[str, Any]] | None, str]:
        """A state to go on from, or why there is none where that is worth saying. All that is due must come after it."""
        first, labels = min(self._snapshots), ", ".join(self._snapshots.values())
        try:
            state = self._run.load_state(self._site)
            if state is not None:
                self._require_own(*state)
        except Damaged as error:
            return None, str(error)
        if state is not None and first <= state[1]["step"]:
            return None, f"{labels} must be made again, and the state is of a later step"
        if state is None and len(self._snapshots) < SNAPSHOTS:
            return None, f"{labels} must be made, and there is no state"
        return state, ""

    def _require_own(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Raises `Damaged` for a state that cannot be this SAE's, though its checksum is right."""
        try:
            for name, own in self.sae.state().items():
                if name not in tensors or (tensors[name].shape, tensors[name].dtype) != (own.shape, own.dtype):
                    raise ValueError(f"its {name} is of another SAE, or missing")
            read(type(self._control.state), facts.get("l1"))
            if type(step := facts.get("step")) is not int or not 0 <= step <= self._config.steps:
                raise ValueError("its step is none of this training's")
        except ValueError as error:
            raise Damaged(f"{self._run.state_path(self._site)} is no state to go on from ({error})") from None

    @property
    def l0(self) -> float:
        return self._taken[1].l0 if self._taken else 0.0

    def begin(self, step: int, x: torch.Tensor, y: torch.Tensor | None, workspace: Workspace) -> None:
        """Unless this SAE has had this batch already, or stopped; y is what a transcoder is to make of x."""
        if self.stopped or step != self.sae.step_count:
            return
        if step == 0:
            self.sae.init_centre(x, y)
            if self._sparsity.OWN:
                self.sae.start_own(x, self._sparsity.own)
        hidden = self._control.hidden_at(step)
        if self._config.revive and step < REVIVED * self._config.steps:
            hidden = hidden.reviving()
        self._begun = self.sae.begin(x, workspace, hidden, y)

    def finish(self, workspace: Workspace, clock: Clock) -> None:
        """The step that was begun, if one was."""
        if self._begun is None:
            return
        begun, self._begun, step = self._begun, None, self.sae.step_count
        config, facts, l1 = self._config, self._facts(), self._control.value
        l1_now = self._control.l1_at(step)
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

    def _log(self, done: int, result: StepResult, l1: float, clock: Clock) -> None:
        point = Point(
            step=done,
            tokens=done * self._config.batch,
            loss=result.loss,
            mse=result.mse,
            l1=result.l1,
            l0=result.l0,
            l1_weight=l1,
            alive=self._alive(),
            grad_norm=result.grad_norm,
            sparse_step=result.sparse,
            tokens_per_second=round(clock.tokens_per_second, 1),
            wait_share=round(clock.wait_share, 4),
        )
        self._run.append_metrics(self._site, point)
        if self._board is not None:
            for key, value in point.to_dict().items():
                if key not in ("step", "tokens"):
                    self._board.add_scalar(key, value, point.tokens)

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
        } | ({"scales": list(self._scales)} if self._scales else {})
        # The machine, too: the run may have been begun on another one.
        about = self._target.fields() | {"layer": self._site.json, "snapshot": label, "machine": machine(self._options.device)}
        config = self._run.config.portable | about
        path = self._run.snapshot_path(self._site, label)
        sae = self.sae.snapshot(config, stats, self._control.thresholds(self.sae.own))
        tensors = (sae.of_scaled(self._scales) if self._scales and not self._target.shared else sae).tensors()

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
        self._run.append_metrics(self._site, Point(step=step, tokens=tokens, stopped="not finite"))
        say(
            f"\nwarning: {self._run.name} layer {self._site} stopped at {tokens:,} tokens: loss {result.loss}, gradient norm "
            f"{result.grad_norm}; its last good state is kept in {self._run.state_path(self._site)}. Check the cache with "
            "`rsae harvest verify`, or train with a lower --lr",
            err=True,
        )

    def _tensorboard(self) -> Any:
        """Points after this step, of a run that got further before it was killed, are taken back: they come again."""
        folder = self._run.path / "tensorboard" / f"layer{self._site.key}"
        refuse_links(folder.parent, folder)
        return summary_writer()(str(folder), purge_step=self.sae.step_count * self._config.batch + 1)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def summary_writer() -> Any:
    """TensorBoard's class. Raises UserError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package: pip install tensorboard") from None
    return SummaryWriter
