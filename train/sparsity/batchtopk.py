"""BatchTopK (Bussmann, Leask & Nanda 2024, arXiv:2412.06410): no penalty; of a batch, only its largest activations are kept.

    z = the k · B largest entries of relu(W_enc (x − b_pre) + b_enc) over a batch of B tokens, 0 elsewhere

Alone, a token has no batch to compete with: then z keeps what is above a threshold, the mean over the last batches of training
of the least activation that was kept, so that L0 is about k on other text.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from residual_saes.train.kernels.base import TorchKernels, Workspace
from residual_saes.train.sparsity.base import Control, ControllerConfig, Encoded, Own, Revivable, Sparsity, parse_k

SPAN = 0.02  # share of the run over which the threshold is averaged


@dataclass(frozen=True, slots=True)
class LargestOfBatch(Revivable):
    """A hidden layer that leaves a batch of B tokens its per_token · B largest activations."""

    per_token: float

    def encode(self, kernels: TorchKernels, xc: Tensor, w_enc: Tensor, bias: Tensor, own: Own, out: Workspace) -> Encoded:
        z, _ = kernels.encode(xc, w_enc, bias, out)
        largest = self.largest(z)
        activation, least = kernels.keep_largest_(z, max(1, round(self.per_token * len(xc))))
        return self.revived(kernels, Encoded(z=z, activation=activation, least=least), largest)


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
