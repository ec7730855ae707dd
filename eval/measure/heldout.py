"""The held-out activations and tokens of a cache, which training never reads, and the moments of activations."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from residual_saes.eval.measure.truth import Fires
from residual_saes.shared.cache import Cache
from residual_saes.shared.runs.rows import ALL, Rows
from residual_saes.shared.runs.target import Target
from residual_saes.shared.sites import Site
from residual_saes.shared.synthetic.world import World

_TOP = 3  # principal directions


class Block(NamedTuple):
    """Some activations of a block, on the CPU."""

    x: Tensor  # what is read, float16 [n, d]; of several sites beside each other
    positions: Tensor  # of each in its context, int64 [n]
    fires: Fires | None = None  # the true features, where they are wanted
    outputs: tuple[Tensor, ...] = ()  # what is written, float16 [n, d] of each site, where that is not what is read


def heldout_blocks(
    cache: Cache, of: Site | Target, tokens: int, rows: Rows = ALL, world: World | None = None
) -> Iterator[Block]:
    """The held-out activations of a site or target, a block at a time: of the first `tokens` those among `rows`, and what fires
    in them in a `world`. A block's rows are permuted, so its first are a fair sample. Raises UserError for blocks that are
    missing or damaged."""
    spec, target = cache.spec, of if isinstance(of, Target) else Target.itself(of)
    for block in range(spec.train_blocks, spec.n_blocks):
        n = min(spec.block_rows, tokens - (block - spec.train_blocks) * spec.block_rows)
        if n <= 0:
            return
        read = {site: torch.from_numpy(cache.whole_block(site, block))[:n] for site in target.sites}
        inputs = [read[site] for site in target.inputs]
        x = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)
        order = torch.from_numpy(cache.block_order(block))[:n]
        kept = slice(None) if rows.all else rows.kept(x, order % spec.context)
        outputs = () if target.outputs == target.inputs[:1] else tuple(read[site][kept] for site in target.outputs)
        x, order, first = x[kept], order[kept], block * spec.block_sequences
        fires = None if world is None else Fires.of(world, first, spec.block_sequences, spec.context, order)
        yield Block(x, order % spec.context, fires, outputs)


def heldout_tokens(cache: Cache, tokens: int) -> Tensor:
    """Held-out sequences with at least one and about `tokens` tokens, int64 [n, context]."""
    spec = cache.spec
    first = spec.train_blocks * spec.block_sequences
    n = min(spec.sequences - first, max(1, tokens // spec.context))
    return torch.from_numpy(cache.read_tokens(first, first + n))


@dataclass(slots=True)
class Moments:
    """Count, mean [d] and sum of outer products about the mean [d, d] of activations, float64."""

    n: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """Moments of x [n, d] float64; of nothing, zeros."""
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        return cls(len(x), mean, (x - mean).t() @ (x - mean))

    def plus(self, other: "Moments") -> "Moments":
        """Moments of both together: Chan, Golub & LeVeque (1979)."""
        n = self.n + other.n
        delta, weight = other.mean - self.mean, other.n / max(n, 1)
        scatter = self.scatter + other.scatter + torch.outer(delta, delta) * (self.n * weight)
        return Moments(n, self.mean + delta * weight, scatter)

    @property
    def variance(self) -> float:
        """Σ ‖x − mean‖² over all rows."""
        return float(self.scatter.trace())

    @property
    def square(self) -> float:
        """Σ ‖x‖² over all rows."""
        return self.variance + self.n * float(self.mean.square().sum())


class Activations:
    """What the metrics of every SAE need to know of a layer's activations."""

    def __init__(self, d_model: int, device: torch.device) -> None:
        nothing = Moments.of(torch.zeros(0, d_model, dtype=torch.float64, device=device))
        self._first, self.without_first = nothing, nothing  # by whether the position in the context is the first
        self._lesser: tuple[Tensor, Tensor] | None = None

    def add(self, x: Tensor, positions: Tensor) -> Moments:
        """Moments of these activations [n, d] alone; they are added to those of all."""
        first, rest = Moments.of(x[positions == 0].double()), Moments.of(x[positions != 0].double())
        self._first, self.without_first = self._first.plus(first), self.without_first.plus(rest)
        self._lesser = None
        return first.plus(rest)

    @property
    def all(self) -> Moments:
        return self._first.plus(self.without_first)

    def lesser_directions(self) -> tuple[Tensor, Tensor]:
        """All but the three largest principal directions: Σ of squares along each, and the directions as columns [d, d − 3]."""
        if self._lesser is None:  # the same for every SAE
            self._lesser = _all_but_largest(self.all.scatter)
        return self._lesser


def _all_but_largest(scatter: Tensor) -> tuple[Tensor, Tensor]:
    if not scatter.isfinite().all():
        return scatter.new_full((1,), math.nan), scatter.new_zeros(len(scatter), 0)
    values, directions = torch.linalg.eigh(scatter)
    keep = max(0, len(values) - _TOP)
    return values[:keep].clamp(min=0), directions[:, :keep]
