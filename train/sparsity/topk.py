"""TopK (Makhzani & Frey 2013, arXiv:1312.5663; Gao et al. 2024, arXiv:2406.04093): no penalty; a token keeps its largest.

    z = the k largest entries of relu(W_enc (x − b_pre) + b_enc) of each token, 0 elsewhere

A token is chosen from alone, so that a trained SAE encodes as it was trained.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from residual_saes.shared.runs.sae import keep_top_k_
from residual_saes.shared.runs.sparsity import Reading
from residual_saes.train.sparsity.base import Sparsity, parse_k


@dataclass(kw_only=True, frozen=True, slots=True)
class TopK(Sparsity):
    FORMS: ClassVar[str] = "topk:64"
    KIND: ClassVar[str | None] = "topk"

    k: int

    @property
    def name(self) -> str:
        return f"topk-{self.k}"

    @property
    def target(self) -> float:
        return self.k

    @property
    def reading(self) -> Reading:
        return Reading(words=f"TopK, the {self.k} largest activations of each token", rule="topk", k=self.k)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        return cls(k=k) if (k := parse_k("topk", text)) else None

    def hidden(self, h: Tensor) -> Tensor:
        return keep_top_k_(h.relu_(), self.k)
