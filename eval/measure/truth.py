"""How an SAE's features stand to the true ones of a synthetic world, as SynthSAEBench has it (arXiv:2602.14687; SAELens 6.54).

A feature of the SAE stands for the true one whose direction its decoder row is nearest to, by |cosine|, and is a classifier of
it: it should fire where that fires. Several may stand for the same one, which `uniqueness` tells.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.eval.measure.result import Truth
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.synthetic.world import World


@dataclass(frozen=True, slots=True)
class Fires:
    """Which true features fire in the rows of a block, of which a few at a time are made dense."""

    features: int
    order: Tensor  # int64 [n]: of each row its place among the block's sequences
    starts: Tensor  # int64 [rows + 1]: where each of those places begins in
    feature: Tensor  # int64: what fires, place by place

    @classmethod
    def of(cls, world: World, first: int, sequences: int, context: int, order: Tensor) -> "Fires":
        """Those of a block whose sequences are `sequences` from number `first` on."""
        firing = [world.fire(first + i, context) for i in range(sequences)]
        row = np.concatenate([f.row + i * context for i, f in enumerate(firing)])
        starts = np.searchsorted(row, np.arange(sequences * context + 1))
        feature = np.concatenate([f.feature for f in firing])
        return cls(world.config.features, order, torch.from_numpy(starts), torch.from_numpy(feature))

    def dense(self, begin: int, end: int, device: torch.device) -> Tensor:
        """Rows begin … end, bool [end − begin, features]."""
        places = self.order[begin:end]
        n = self.starts[places + 1] - self.starts[places]
        row = torch.repeat_interleave(n)
        at = torch.arange(len(row)) + (self.starts[places] - n.cumsum(0) + n)[row]
        on = torch.zeros(len(places), self.features, dtype=torch.bool)
        on[row, self.feature[at]] = True
        return on.to(device)


class Classified:
    """Of each feature of an SAE the rows in which it fires rightly, and in which it should."""

    def __init__(self, sae: Sae, world: World) -> None:
        self._cosines = cosines(sae.w_dec.cpu(), world.directions)
        self._stands_for = self._cosines.argmax(1).to(sae.w_dec.device)
        self._right, self._true = (torch.zeros(len(self._cosines), dtype=torch.float64) for _ in range(2))
        self._all = 0  # true firings

    def add(self, row: Tensor, feature: Tensor, fires: Tensor) -> None:
        """Row and feature of each active entry; fires bool [n, true features]."""
        right = feature[fires[row, self._stands_for[feature]]]
        self._right += torch.bincount(right, minlength=len(self._right)).cpu()
        self._true += fires.sum(0)[self._stands_for].cpu()
        self._all += int(fires.sum())

    def finish(self, fired: Tensor, rows: int) -> Truth:
        """fired float64 [F]: in how many of the rows each feature fires."""
        precision, recall = _shares(self._right, fired), _shares(self._right, self._true)
        return Truth(
            f1=float(_shares(2 * precision * recall, precision + recall).mean()),
            precision=float(precision.mean()),
            recall=float(recall.mean()),
            mcc=mean_correlation(self._cosines),
            uniqueness=len(set(self._stands_for.tolist())) / len(self._stands_for),
            true_l0=self._all / rows,
        )


def _shares(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where that is nothing: a feature that never fires counts as one that is never right."""
    return torch.where(whole > 0, part / whole, 0.0)


def cosines(rows: Tensor, others: Tensor) -> Tensor:
    """|cosine| of every row [n, d] to every other [m, d], float32 [n, m]; 0 of a row of zeros."""
    normalize = torch.nn.functional.normalize
    return (normalize(rows.float(), eps=1e-8) @ normalize(others.float(), eps=1e-8).t()).abs()


def mean_correlation(cosines: Tensor) -> float:
    """Mean of the entries of a matrix that a one-to-one matching of its rows to its columns takes, at its largest: MCC (Song et
    al., arXiv:2505.20254). Of more rows than columns, or fewer, the rest has no partner."""
    matrix = (cosines if cosines.shape[0] <= cosines.shape[1] else cosines.t()).double().numpy()
    return float(matrix[np.arange(len(matrix)), matching(-matrix)].mean())


def matching(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each row of a matrix [n, m], n ≤ m, a column of its own, so that the sum of their entries is least.

    Shortest augmenting paths (Jonker & Volgenant, 1987), after every row whose best column nobody else has had first.
    """
    n, m = cost.shape
    rows, columns = cost.min(1), np.zeros(m)  # the dual solution: cost ≥ rows + columns everywhere, = where matched
    column_of, row_of = np.full(n, -1), np.full(m, -1)
    for row, column in enumerate(cost.argmin(1)):
        if row_of[column] < 0:
            row_of[column], column_of[row] = row, column
    for start in np.flatnonzero(column_of < 0):
        distance, before, seen = np.full(m, np.inf), np.full(m, -1), np.zeros(m, bool)
        row, least = int(start), 0.0
        while True:
            reached = least + cost[row] - rows[row] - columns
            nearer = ~seen & (reached < distance)
            distance[nearer], before[nearer] = reached[nearer], row
            column = int(np.where(seen, np.inf, distance).argmin())
            least = float(distance[column])
            if row_of[column] < 0:
                break
            seen[column] = True
            row = int(row_of[column])
        rows[start] += least
        rows[row_of[seen]] += least - distance[seen]
        columns[seen] -= least - distance[seen]
        while column >= 0:  # along the path, back to where it began
            row = int(before[column])
            row_of[column] = row
            column, column_of[row] = int(column_of[row]), column
    return column_of
