"""What a run's SAEs depend on, how a run is carried out, and recipes: defaults of some options by name."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from residual_saes.shared.cli import COUNT, COUNT_OR_NONE, MINUTES, SEED, THREADS, Number, option
from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.sparsity import held_fields, hold_from
from residual_saes.shared.stores.mirror import Mirror
from residual_saes.shared.units import parse_count
from residual_saes.train.sparsity.base import ControllerConfig, Recipe, Sparsity
from residual_saes.train.sparsity.settings import parse_setting
from residual_saes.train.step import StepConfig

# Values of options that are not given. What each of them gains: docs/findings/training.md.
PUBLISHED = "published"

RECIPES: dict[str, Callable[[Sparsity], Recipe]] = {
    PUBLISHED: lambda kind: Recipe(),
    "decay": lambda kind: Recipe(lr_decay=0.2),
    "best": lambda kind: kind.BEST,
}
REVIVED = 0.5  # share of the run over which features that a batch would leave out are kept in it


@dataclass(kw_only=True, frozen=True, slots=True)
class TrainConfig:
    """What a run's SAEs depend on, apart from its setting and the cache. Stored in config.json."""

    expansion: int = option("Features per dimension.", 32, preset=True, type=click.IntRange(1, 1 << 16))
    tokens: int = option(
        "Tokens to train on, such as 300M [default: the preset's, or the whole cache if it is smaller].", type=parse_count
    )
    batch: int = option("Tokens in a step.", 32_768, preset=True, type=click.IntRange(1, 1 << 30))
    lr: float = option("Adam's learning rate.", 3e-4, preset=True, type=Number(0, 1, min_open=True))
    lr_warmup: int = option("Steps over which lr rises.", 0, preset=True, type=COUNT_OR_NONE)
    lr_decay: float = option("Share of the run, at its end, over which lr falls to zero.", 0.0, preset=True, type=Number(0, 1))
    hold_l0: float = option(
        "Share of the run, at its end, without L1: L0 is held by keeping each batch's largest activations.",
        0.0,
        preset=True,
        type=Number(0, 0.5),
    )
    revive: bool = option(
        "Wake features that fall silent; for half the run one that has none of a batch's largest keeps its own largest.",
        False,
        preset=True,
        is_flag=True,
    )
    seed: int = option("", 0, type=SEED)
    window_blocks: int = option("Blocks shuffled together.", 16, preset=True, type=COUNT)
    skip_positions: int = option("Of each context, not trained on.", 0, type=COUNT_OR_NONE)
    max_norm: float | None = option(
        "Rows longer than this many medians are not trained on [default: all are].", None, type=Number(1, 1e9)
    )
    target: str = option(
        "What is read and written: mlp_in>mlp_out, resid_post@l-1>resid_post@l, layers of a crosscoder (all, 0,6,12), or "
        "layers that share one dictionary (shared:all) [default: SAEs of one layer].",
        "",
    )
    skip: bool = option("A transcoder has an affine map from input to output beside its features.", False, is_flag=True)
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
class Plan:
    """A run that is asked for. Plans of one call are trained on the same batches: their configs differ in what recipes say."""

    sparsity: Sparsity
    config: TrainConfig
    recipe: str = PUBLISHED  # for the run's name


def parse_plans(text: str, recipe: str, config: Callable[[str, Sparsity], TrainConfig]) -> tuple[Plan, ...]:
    """Read settings such as '3e-4,batchtopk:64/decay': with the recipe behind the slash, or else `recipe`. Raises UserError.

    `config` makes the config of a recipe and a setting.
    """
    plans = []
    for part in text.split(","):
        setting, slash, own = map(str.strip, part.partition("/"))
        if slash and own not in RECIPES:
            raise UserError(f"{part!r} is of no recipe: write one of {', '.join(RECIPES)} behind the slash")
        kind, own = parse_setting(setting), own or recipe
        plans.append(Plan(sparsity=kind, config=config(own, kind), recipe=own))
    if len({(plan.sparsity, plan.recipe) for plan in plans}) < len(plans):
        raise UserError(f"{text!r} names a setting twice; name each once")
    return tuple(plans)


@dataclass(kw_only=True, frozen=True, slots=True)
class RunOptions:
    """How a run is carried out; nothing here changes its SAEs."""

    runs: Path
    mirror: Mirror | None = None  # the bucket that `runs` stands for
    device: torch.device
    threads: int = option("Reader threads.", 16, type=THREADS)
    epochs: int = option("How often the cache may be gone over.", 1, type=COUNT)
    save_minutes: float = option("Between resume states.", 5.0, type=MINUTES)
    log_records: int = 300  # points of a training curve
    tensorboard: bool = option("Write TensorBoard curves as well.", False, is_flag=True)
    verbose: bool = option("Say what each layer's activations are like.", False, is_flag=True)
    follow: bool = option("Begin beside the harvest, and wait for what is not there yet.", False, is_flag=True)
