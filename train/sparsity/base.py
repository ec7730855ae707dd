"""What a kind of sparsity says of itself, and what it asks of each step.

To add one, put a subclass of `Sparsity` into a file beside this one, and a line into `settings.KINDS`. It trains on every
device at once: `hidden` is torch, between products and gradients that all kinds share. Where a kernel makes its hidden layer
in one pass with the product, its `Control` hands out a `Hidden` that calls the kernel.
"""

import dataclasses
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from residual_saes.shared.runs.sparsity import Reading
from residual_saes.train.kernels.base import Activation, TorchKernels, Workspace

RISE = 0.005  # a step

Own = dict[str, Tensor]  # parameters [F] that a kind has beside the weights, by name, or their gradients; of the masters' type


@dataclass(kw_only=True, frozen=True, slots=True)
class Encoded:
    """The hidden layer of a batch, and what was counted of it."""

    z: Tensor  # [B, F]
    activation: Activation
    least: Tensor | None = None  # scalar: the least activation that was kept, where a batch's were chosen among
    near: Any = None  # what its own parameters have a gradient from
    natural: Tensor | None = None  # int32 [F]: the activation's counts without what is there only to keep a feature from dying

    @property
    def kept(self) -> Tensor:
        return self.activation.feature_count if self.natural is None else self.natural


class Hidden:
    """How a step comes from a batch to its hidden layer. Gradients go back through what is above zero there."""

    __slots__ = ()

    def prefixes(self, n_features: int) -> tuple[int, ...]:
        """Where prefixes of the dictionary end, the last of them with it: the squared error is the mean of those of what each
        prefix reconstructs."""
        return (n_features,)

    def encode(self, kernels: TorchKernels, xc: Tensor, w_enc: Tensor, bias: Tensor, own: Own, out: Workspace) -> Encoded:
        """xc [B, d], w_enc [F, d] in the products' precision, bias [F] → z [B, F] ≥ 0 in a slot of the workspace."""
        raise NotImplementedError

    def reviving(self) -> Self:
        """The same, that keeps features from dying, if its kind knows how."""
        return self

    def wake_(self, silent: Tensor, activation: Activation, b_enc: Tensor, own: Own, norms: Tensor) -> None:
        """Change b_enc [F] or own parameters in place, so that features that have been `silent` [F] for long come to fire
        again: here the bias rises by a share of the batch's mean activation, for decoder rows of these norms [F]."""
        rise = RISE * activation.total / activation.feature_count.sum().clamp(min=1)
        b_enc.copy_(torch.where(silent, b_enc + rise / norms, b_enc))

    def own_grads(self, kernels: TorchKernels, encoded: Encoded, own: Own, g: Tensor, w_dec: Tensor) -> Own:
        """Gradients of the own parameters, by that of x̂, g [B, d]."""
        return {}


@dataclass(frozen=True, slots=True)
class Revivable(Hidden):
    """A hidden layer that, with `revive`, leaves each feature that has nothing left of a batch its own largest activation."""

    revive: bool = field(default=False, kw_only=True)

    def reviving(self) -> Self:
        return dataclasses.replace(self, revive=True)

    def largest(self, z: Tensor) -> tuple[Tensor, Tensor] | None:
        """Each feature's largest of z [B, F] before the choice, [F], and the tokens that have it; None where none is kept."""
        return z.max(0) if self.revive else None

    def revived(self, kernels: TorchKernels, chosen: Encoded, largest: tuple[Tensor, Tensor] | None) -> Encoded:
        """What the choice has left, and the `largest` of the features that it has left nothing."""
        if largest is None:
            return chosen
        (values, tokens), z, natural = largest, chosen.z, chosen.kept
        # Not by scatter_, which takes longer than a whole step where z is transposed.
        place = tokens, torch.arange(len(tokens), device=tokens.device)
        z[place] = torch.where(natural == 0, values, z[place])
        return dataclasses.replace(chosen, activation=kernels.count(z), natural=natural)


class Relu(Hidden):
    __slots__ = ()

    def encode(self, kernels: TorchKernels, xc: Tensor, w_enc: Tensor, bias: Tensor, own: Own, out: Workspace) -> Encoded:
        z, activation = kernels.encode(xc, w_enc, bias, out)
        return Encoded(z=z, activation=activation)


RELU = Relu()


@dataclass(frozen=True, slots=True)
class Unfused(Hidden):
    """The hidden layer as its kind defines it, in a pass of its own."""

    kind: "Sparsity"

    def encode(self, kernels: TorchKernels, xc: Tensor, w_enc: Tensor, bias: Tensor, own: Own, out: Workspace) -> Encoded:
        h = kernels.project(xc, w_enc, bias, out)
        z = h.copy_(self.kind.hidden(h))  # into the slot, and the order in which kernels read it
        return Encoded(z=z, activation=kernels.count(z))


@dataclass(slots=True)
class Stateless:
    """Of a control that learns nothing."""


class Control:
    """What a kind asks of each step of one SAE, and what it learns from it: here one hidden layer, no penalty, and nothing."""

    def __init__(self, hidden: Hidden, state: Any = None) -> None:
        """`state` is a dataclass of numbers: what a resumed run needs to go on as if it had not stopped."""
        self._hidden = hidden
        self.state: Any = state or Stateless()

    @property
    def value(self) -> float:
        """λ as it stands."""
        return 0.0

    @property
    def threshold(self) -> float | None:
        """Activations up to this one are left out where there is no batch to choose from; None: none are."""
        return None

    def thresholds(self, own: Own) -> Tensor | float | None:
        """The same, of each feature where they differ."""
        return self.threshold

    def l1_at(self, step: int) -> float:
        """λ in force at step `step` (from 0)."""
        return 0.0

    def hidden_at(self, step: int) -> Hidden:
        return self._hidden

    def update(self, step: int, l0: float, least: float) -> None:
        """Take step `step` (from 0) into account: its L0, and the least activation that was kept of a batch."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ControllerConfig:
    """How λ is steered. Times are shares of the run, so that a short run is steered as far as a long one."""

    shortest: int = 400  # steps: a run that has fewer is steered as slowly as one of so many, for L0 needs time to answer
    gain: float = 25.0  # e-folds of λ over a whole run spent at e = 1
    most: float = 0.5  # of |e|: how fast λ may run towards a target that is far
    lead: float = 0.06  # how far ahead L0 is predicted: it answers late to λ, in short runs by a twentieth of the run
    smoothing: float = 0.01  # horizon of the mean of L0, as a share like `lead`
    slope: float = 0.45  # of the second integrator, over the square of the first's
    near: float = 0.2  # |ln(L0 / target)| from which on the second integrator is at work
    begin: float = 0.2  # λ stays at its start until then: L0 of a fresh SAE falls by itself
    above: float = 4.0  # times the target, if the rest of the run holds L0 at that: further down, λ kills features


@dataclass(kw_only=True, frozen=True, slots=True)
class Recipe:
    """Values of options that are not given. What each of them gains: docs/findings/training.md."""

    decoder_norm: str = "unit"
    lr_decay: float = 0.0
    hold_l0: float = 0.0
    revive: bool = False


class Sparsity(ABC):
    """A kind of sparsity with its numbers: a frozen dataclass, whose fields go into config.json."""

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Any]]
    FORMS: ClassVar[str]  # how people write it
    OWN: ClassVar[tuple[str, ...]] = ()  # names of parameters that it has beside the weights
    BETA2: ClassVar[float] = 0.999  # Adam's
    BEST: ClassVar[Recipe] = Recipe(lr_decay=0.2, revive=True)  # what measured best
    KIND: ClassVar[str | None] = None  # its name in config.json; None for the two that came before names

    @property
    @abstractmethod
    def name(self) -> str:
        """In the name of a run: no other setting has it."""

    @property
    @abstractmethod
    def target(self) -> float | None:
        """The L0 that is asked for, if one is."""

    @property
    def widest(self) -> float:
        """How many features there must be, at least."""
        return self.target or 1

    @property
    def reading(self) -> Reading | None:
        """What config.json says of it to readers: every kind with a name says something."""
        return None

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self | None:
        """None for what is not of this kind."""

    def own(self, h: Tensor) -> Own:
        """Those parameters as training begins, from a part of the first batch's h [rows, F] ≥ 0."""
        return {}

    def hidden(self, h: Tensor) -> Tensor:
        """h [B, F], bias included → z [B, F] ≥ 0. h may be used up; it may lie either way round in memory."""
        raise NotImplementedError(f"the hidden layer of {self.name} is its control's")

    def control(self, steps: int, config: ControllerConfig, hold: bool = False) -> Control:
        """For an SAE that is to be right after so many steps. `hold` keeps L0 from there on, if λ was what made it."""
        return Control(Unfused(self))

    def fields(self) -> dict[str, Any]:
        """As config.json has them."""
        return ({"kind": self.KIND} if self.KIND else {}) | dataclasses.asdict(self)


def parse_k(word: str, text: str) -> int | None:
    """'topk:64', with this word in front → 64."""
    match = re.fullmatch(rf"{word}:([1-9][0-9]{{0,8}})", text, re.IGNORECASE)
    return int(match[1]) if match else None
