"""BatchTopK (Bussmann, Leask & Nanda 2024, arXiv:2412.06410): no penalty; of a batch, only its largest activations are kept.

    z = the k · B largest entries of relu(W_enc (x − b_pre) + b_enc) over a batch of B tokens, 0 elsewhere

Alone, a token has no batch to compete with: then z keeps what is above a threshold, the mean over the last batches of training
of the least activation that was kept, so that L0 is about k on other text.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from residual_saes.train.kernels.base import TorchKernels, Workspace
from residual_saes.train.sparsity.base import Control, ControllerConfig, Encoded, Hidden, Own, Sparsity, parse_k

SPAN = 0.02  # share of the run over which the threshold is averaged


@dataclass(frozen=True, slots=True)
class LargestOfBatch(Hidden):
    """A hidden layer that leaves a batch of B tokens its per_token · B largest activations, and with `revive` each feature that
    has none of them its own largest."""

    per_token: float
    revive: bool = field(default=False, kw_only=True)

    def encode(self, kernels: TorchKernels, xc: Tensor, w_enc: Tensor, bias: Tensor, own: Own, out: Workspace) -> Encoded:
        z, _ = kernels.encode(xc, w_enc, bias, out)
        largest = z.max(0) if self.revive else None
        activation, least = kernels.keep_largest_(z, max(1, round(self.per_token * len(xc))))
        natural = activation.feature_count
        if largest is not None:
            at = largest.indices[None]
            z.scatter_(0, at, torch.where(natural == 0, largest.values, z.gather(0, at)))
            activation = kernels.count(z)
        return Encoded(z=z, activation=activation, least=least, natural=natural)

    def reviving(self) -> Self:
        return dataclasses.replace(self, revive=True)


@dataclass(kw_only=True, frozen=True, slots=True)
class BatchTopK(Sparsity):
    FORMS: ClassVar[str] = "batchtopk:64"

    k: int

    @property
    def name(self) -> str:
        return f"batchtopk-{self.k}"

    @property
    def target(self) -> float:
        return self.k

    @classmethod
    def parse(cls, text: str) -> Self | None:
        return cls(k=k) if (k := parse_k("batchtopk", text)) else None

    def control(self, steps: int, config: ControllerConfig, hold: bool = False) -> "BatchTopKControl":
        return BatchTopKControl(LargestOfBatch(self.k), steps)


@dataclass(slots=True)
class BatchTopKState:
    threshold: float = 0.0


class BatchTopKControl(Control):
    def __init__(self, hidden: LargestOfBatch, steps: int) -> None:
        super().__init__(hidden, BatchTopKState())
        self._span = max(1.0, SPAN * steps)

    @property
    def threshold(self) -> float:
        return float(self.state.threshold)

    def update(self, step: int, l0: float, least: float) -> None:
        self.state.threshold += (least - self.state.threshold) / min(step + 1, self._span)
