"""Which rows of a layer are trained on, and so evaluated on: all of them, unless first positions or long rows are left out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.shared.errors import UserError


@dataclass(kw_only=True, frozen=True, slots=True)
class Rows:
    """The rows that count. A pure function of activation and position, the same in training and in evaluation."""

    skip_positions: int = 0  # of each context, from its start
    longest: float = math.inf  # Euclidean norm

    @classmethod
    def of(cls, train: Mapping[str, Any], activations: Mapping[str, Any]) -> Self:
        """From what a checkpoint says: its `config["train"]` and its `stats["activations"]`."""
        most = train.get("max_norm")
        longest = math.inf if most is None else most * activations["median_norm"]
        return cls(skip_positions=train.get("skip_positions", 0), longest=longest)

    @property
    def all(self) -> bool:
        return self.skip_positions == 0 and self.longest == math.inf

    def kept(self, x: Tensor, positions: Tensor) -> Tensor:
        """Of x [..., n, d] at these positions [n] of their contexts: bool, [..., n] or [n]."""
        kept = positions >= self.skip_positions
        return kept if self.longest == math.inf else kept & (norms(x) <= self.longest)


ALL = Rows()


def norms(x: Tensor) -> Tensor:
    """Euclidean, of [..., d]; float64, so that the order in which a processor adds does not matter."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    return lengths


def fill(order: NDArray[np.int64], kept: NDArray[np.bool_]) -> None:
    """In an order [n] of the rows of a window, put rows that are kept [n] in the places of those that are not, the earliest
    first: as many rows come out as went in, so that batches, resuming and the count of tokens are what they were."""
    is_kept = kept[order]
    good = order[is_kept]
    if not len(good):
        raise nothing_left()
    order[~is_kept] = np.resize(good, len(order) - len(good))


def nothing_left() -> UserError:
    return UserError("no row is left to train on: lower --skip-positions or raise --max-norm")
