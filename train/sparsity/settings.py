"""The kinds of sparsity that `--l1` names, any number of them side by side on one stream.

A kind is a small file: a frozen dataclass that says what the setting is, and a `Control` that steers one SAE through its steps.
Fields go into config.json, by which `restored` knows the kind again; a control's `state` goes into the resume state.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

from shared.errors import UserError
from train.sparsity.batchtopk import BatchTopK
from train.sparsity.l1 import ControllerConfig, L1Setting


class Control(Protocol):
    """What a setting asks of each step, and what it learns from it."""

    state: Any  # a dataclass of numbers: what a resumed run needs to go on as if it had not stopped

    @property
    def value(self) -> float:
        """λ of the next step."""

    @property
    def threshold(self) -> float | None:
        """Activations up to this one are left out where there is no batch to choose from; None: none are."""

    def keep_at(self, step: int) -> float | None:
        """Active entries a token, on average over a batch, that are left at step `step` (from 0); None leaves all."""

    def update(self, step: int, l0: float, least: float) -> None:
        """Take step `step` (from 0) into account: its L0, and the least activation that was kept."""


class Setting(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]
    FORMS: ClassVar[str]  # how people write it
    thresholds: ClassVar[bool]  # whether its SAEs have them

    @property
    def name(self) -> str:
        """In the name of a run: no other setting has it."""

    @property
    def words(self) -> str:
        """In a model card."""

    @property
    def target(self) -> float | None:
        """The L0 that is asked for, if one is."""

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None for what is not of this kind."""

    def control(self, steps: int, config: ControllerConfig, hold: bool = False) -> Control:
        """For an SAE that is to be right after so many steps. `hold` keeps L0 from there on by what it leaves of a batch."""


KINDS: tuple[type[Setting], ...] = (L1Setting, BatchTopK)


def parse_settings(text: str) -> tuple[Setting, ...]:
    """'3e-4,adaptive:1e-3@64,batchtopk:64' → settings. Raises UserError."""
    settings = tuple(_parse(part.strip()) for part in text.split(","))
    if len(set(settings)) < len(settings):
        raise UserError(f"{text!r} names a setting twice; name each once")
    return settings


def _parse(text: str) -> Setting:
    for kind in KINDS:
        if (setting := kind.parse(text)) is not None:
            return setting
    raise UserError(f"{text!r} is not a setting: write {', '.join(kind.FORMS for kind in KINDS)}")


def restored(fields: dict[str, Any]) -> Setting:
    """A setting from its fields, as config.json has them."""
    for kind in KINDS:
        if {field.name for field in dataclasses.fields(kind)} == set(fields):
            return kind(**fields)
    raise UserError(f"a setting of {', '.join(fields)} is not known here: use the version that trained it")


def hold_from(steps: int, share: float) -> int:
    """The step at which L1 has done its work: λ is steered until then, and L0 is held for the rest of the run."""
    return steps - round(share * steps)


def held_fields(share: float) -> dict[str, Any]:
    """How config.json says that L0 is held at the end: as one kind of refit, from when there was another."""
    return {"l1_warmup": 0, "refit": share, "refit_kind": "topk" if share else "decoder"}


def holds_l0(train: Mapping[str, Any]) -> bool:
    """Whether training by a run's `config["train"]` ends with steps that hold L0 by a choice among each batch."""
    steps = train["tokens"] // train["batch"]
    return train.get("refit_kind") == "topk" and hold_from(steps, train.get("refit", 0.0)) < steps


def has_thresholds(train: Mapping[str, Any]) -> bool:
    """Whether it leaves SAEs with thresholds: those that a batch was chosen from at the end."""
    return restored(train["l1"]).thresholds or holds_l0(train)
