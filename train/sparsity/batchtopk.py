"""BatchTopK (Bussmann, Leask & Nanda 2024, arXiv:2412.06410): no penalty; of a batch, only its largest activations are kept.

    z = the k · B largest entries of relu(W_enc (x − b_pre) + b_enc) over a batch of B tokens, 0 elsewhere

Alone, a token has no batch to compete with: then z keeps what is above a threshold, the mean over the last batches of training
of the least activation that was kept, so that L0 is about k on other text.
"""

import re
from dataclasses import dataclass
from typing import ClassVar, Self

from train.sparsity.l1 import ControllerConfig

SPAN = 0.02  # share of the run over which the threshold is averaged


@dataclass(kw_only=True, frozen=True, slots=True)
class BatchTopK:
    thresholds: ClassVar[bool] = True
    FORMS: ClassVar[str] = "batchtopk:64"

    k: int

    @property
    def name(self) -> str:
        return f"batchtopk-{self.k}"

    @property
    def words(self) -> str:
        return f"BatchTopK, the {self.k} largest activations a token"

    @property
    def target(self) -> float:
        return self.k

    @classmethod
    def parse(cls, text: str) -> Self | None:
        match = re.fullmatch(r"batchtopk:([1-9][0-9]{0,8})", text, re.IGNORECASE)
        return cls(k=int(match[1])) if match else None

    def control(self, steps: int, config: ControllerConfig, hold: bool = False) -> "BatchTopKControl":
        return BatchTopKControl(self.k, steps)


@dataclass(slots=True)
class BatchTopKState:
    threshold: float = 0.0


class BatchTopKControl:
    value = 0.0

    def __init__(self, k: int, steps: int) -> None:
        self._k, self._span = k, max(1.0, SPAN * steps)
        self.state = BatchTopKState()

    @property
    def threshold(self) -> float:
        return self.state.threshold

    def keep_at(self, step: int) -> float:
        return self._k

    def update(self, step: int, l0: float, least: float) -> None:
        self.state.threshold += (least - self.state.threshold) / min(step + 1, self._span)
