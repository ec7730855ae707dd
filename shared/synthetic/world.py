"""A synthetic world: its features, and the rows of a sequence with the features that fire in each.

Random numbers are raw Philox bits (as in shared/shuffle.py) and sums that decide are in float64, so that the same features fire
whatever machine draws them. The copula is drawn through its factors: given these, features fire independently, so that children
are drawn for parents that fire and for no others.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.shared.sites import Site
from residual_saes.shared.synthetic.config import WorldConfig

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]
_FEATURES, _SEQUENCE = 0, 1  # in the keys of random numbers
_LEAST_OWN = 0.01  # variance that each feature keeps to itself in the copula
_ROUNDS = 3  # of `spread_out`


@dataclass(frozen=True, slots=True)
class Firing:
    """The features that fire in some rows, by row and then by feature."""

    row: _Ints  # [n]
    feature: _Ints  # [n]
    magnitude: NDArray[np.float32]  # [n], above 0


class World:
    """The features of a world, and what fires in each of its rows."""

    def __init__(self, config: WorldConfig, d_model: int, *, seed: int, number: int) -> None:
        """`number` tells apart the worlds of one seed."""
        self.config, self.d_model, self._key = config, d_model, (seed, number)
        self.parents = parents_of(config)
        self.rates = zipf(config)  # firing probabilities that are aimed at

    @cached_property
    def directions(self) -> Tensor:
        """Unit rows, float32 [features, d_model]."""
        drawn = torch.from_numpy(self._static(0).normal(self.config.features, self.d_model))
        return spread_out(drawn).float()

    @cached_property
    def bias(self) -> Tensor:
        """What every row has, float32 [d_model]."""
        drawn = torch.from_numpy(self._static(1).normal(self.d_model))
        return self.config.bias * torch.nn.functional.normalize(drawn, dim=0).float()

    @cached_property
    def means(self) -> _Floats:
        """Mean magnitudes [features]."""
        c = self.config
        return np.linspace(c.magnitude, c.last_magnitude, c.features)

    @cached_property
    def spreads(self) -> _Floats:
        """Standard deviations of magnitudes [features]: a folded normal."""
        c = self.config
        return np.abs(c.spread + c.spread_spread * self._static(2).normal(c.features))

    @cached_property
    def factors(self) -> _Floats:
        """What features share in the copula [features, rank]: off the diagonal its correlations are factors · factorsᵀ."""
        c = self.config
        drawn = c.correlation * self._static(3).normal(c.features, c.rank)
        shared = np.square(drawn).sum(1, keepdims=True)
        scaled: _Floats = drawn * np.sqrt(np.minimum(1, (1 - _LEAST_OWN) / np.maximum(shared, 1e-300)))
        return scaled

    @cached_property
    def _own(self) -> _Floats:
        """Standard deviation in the copula that each feature has to itself [features]."""
        own: _Floats = np.sqrt(1 - np.square(self.factors).sum(1))
        return own

    @cached_property
    def excluding(self) -> NDArray[np.bool_]:
        """Whether a feature's children exclude each other [features]."""
        c, (_, children) = self.config, self._children
        able = np.flatnonzero(children > 1)
        chosen = np.zeros(c.features, bool)
        order = np.argsort(self._static(4).raw(len(able)), kind="stable")
        chosen[able[order[: int(len(able) * c.exclusive)]]] = True
        return chosen

    @cached_property
    def _children(self) -> tuple[_Ints, _Ints]:
        """(first child, number of children) of each feature: those of one parent follow each other."""
        n = self.config.features
        children = np.bincount(self.parents[self.parents >= 0], minlength=n)
        first = np.zeros(n, np.int64)
        child = np.flatnonzero(self.parents >= 0)
        first[self.parents[child[::-1]]] = child[::-1]
        return first, children

    @cached_property
    def probabilities(self) -> _Floats:
        """With which a feature is drawn in a row where its parent fires [features]: as much above its rate as makes up for
        that, and about for siblings that take its place, so far as 1 lets it."""
        parent, rate = self.parents, self.rates
        child = parent >= 0
        drawn = rate.copy()
        drawn[child] = rate[child] / rate[parent[child]]
        siblings = np.zeros(len(rate))
        np.add.at(siblings, parent[child], drawn[child])
        taken = child & self.excluding[parent]
        drawn[taken] *= 1 + siblings[parent[taken]] - drawn[taken]
        return np.minimum(drawn, 1.0)

    @cached_property
    def _thresholds(self) -> _Floats:
        return -_ndtri(self.probabilities)

    def fire(self, sequence: int, rows: int) -> Firing:
        """What fires in the rows of a sequence."""
        random = _Random(*self._key, _SEQUENCE, sequence)
        common = random.normal(rows, self.config.rank)
        alone = np.flatnonzero(self.parents < 0)
        above = (common @ self.factors[alone].T - self._thresholds[alone]) / self._own[alone]
        drawn = random.uniform(rows, len(alone))
        row, at = np.nonzero(drawn < _ndtr(above.max(0)))  # those that can fire at all: few, and `_ndtr` is slow
        fires = drawn[row, at] < _ndtr(above[row, at])
        level = self._with_magnitudes(random, row[fires], alone[at[fires]])
        levels = [level]
        while len(level.row):
            level = self._children_of(level, common, random)
            levels.append(level)
        row, feature, magnitude = (np.concatenate([getattr(x, name) for x in levels]) for name in Firing.__slots__)
        order = np.lexsort((feature, row))
        return Firing(row[order], feature[order], magnitude[order])

    def _children_of(self, parents: Firing, common: _Floats, random: "_Random") -> Firing:
        """Which children of features fire, in the rows in which these do."""
        first, children = self._children
        n = children[parents.feature]
        row = np.repeat(parents.row, n)
        feature = np.repeat(first[parents.feature] - np.cumsum(n) + n, n) + np.arange(len(row))
        shared = (common[row] * self.factors[feature]).sum(1)
        chances = _ndtr((shared - self._thresholds[feature]) / self._own[feature])
        fires = random.uniform(len(row)) < chances
        firing = self._with_magnitudes(random, row[fires], feature[fires])
        group = firing.row * self.config.features + self.parents[firing.feature]
        order = np.lexsort((random.raw(len(group)), group))
        last = np.append(group[order][1:] != group[order][:-1], True)[: len(order)]
        stays = ~self.excluding[self.parents[firing.feature]]
        stays[order[last]] = True
        return Firing(firing.row[stays], firing.feature[stays], firing.magnitude[stays])

    def _with_magnitudes(self, random: "_Random", row: _Ints, feature: _Ints) -> Firing:
        """A feature whose magnitude would be negative does not fire."""
        magnitude = (self.means[feature] + self.spreads[feature] * random.normal(len(row))).astype(np.float32)
        positive = magnitude > 0
        return Firing(row[positive], feature[positive], magnitude[positive])

    def rows(self, sequence: int, rows: int) -> Tensor:
        """The activations of a sequence, float32 [rows, d_model]."""
        return self.activations(self.fire(sequence, rows), rows)

    def activations(self, firing: Firing, rows: int) -> Tensor:
        """The bias and Σ magnitude · direction over the features that fire, summed in their order: float32 [rows, d_model]."""
        starts = torch.from_numpy(np.searchsorted(firing.row, np.arange(rows)))
        feature, weight = torch.from_numpy(firing.feature), torch.from_numpy(firing.magnitude)
        bag = torch.nn.functional.embedding_bag
        summed: Tensor = bag(feature, self.directions, starts, mode="sum", per_sample_weights=weight)
        return self.bias + summed

    def _static(self, what: int) -> "_Random":
        return _Random(*self._key, _FEATURES, what)


class _Random:
    """A stream of random numbers that depends on nothing but the integers of its key."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.Philox(key=np.random.SeedSequence(key).generate_state(2, np.uint64))

    def raw(self, n: int) -> NDArray[np.uint64]:
        drawn: NDArray[np.uint64] = self._bits.random_raw(n)
        return drawn

    def uniform(self, *shape: int) -> _Floats:
        """Between 0 and 1, neither of which comes."""
        drawn: _Floats = ((self.raw(int(np.prod(shape))) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        return drawn.reshape(shape)

    def normal(self, *shape: int) -> _Floats:
        return _ndtri(self.uniform(*shape))


def _ndtr(x: _Floats) -> _Floats:
    """The normal distribution's cumulative probability."""
    value: _Floats = torch.special.ndtr(torch.from_numpy(x)).numpy()
    return value


def _ndtri(p: _Floats) -> _Floats:
    """The inverse of `_ndtr`."""
    value: _Floats = torch.special.ndtri(torch.from_numpy(p)).numpy()
    return value


def zipf(config: WorldConfig) -> _Floats:
    """Firing probabilities by rank [features]: rank^-exponent, stretched to lie between the two that are given."""
    power = np.arange(1, config.features + 1, dtype=np.float64) ** -config.zipf
    share = (power - power[-1]) / (power[0] - power[-1])
    rates: _Floats = config.least_frequent + (config.most_frequent - config.least_frequent) * share
    return rates


def parents_of(config: WorldConfig) -> _Ints:
    """The parent of each feature [features], −1 of those that have none. Levels follow each other, most frequent first."""
    parents = np.full(config.features, -1, np.int64)
    begin, end = 0, min(config.roots, config.features)
    for _ in range(config.depth):
        children = np.arange(end, min(end + (end - begin) * config.branching, config.features))
        parents[children] = begin + (children - end) // config.branching
        begin, end = end, end + len(children)
    return parents


def spread_out(rows: Tensor) -> Tensor:
    """Unit rows [n, d] near these with little overlap: Σ of squared cosines at its least, which n ≤ d lets be 0.

    Alternates between unit rows and the nearest matrix with orthogonal columns, or rows if these are fewer.
    """
    for _ in range(_ROUNDS):
        rows = torch.nn.functional.normalize(rows, dim=1)
        rows = (_whitened(rows.t()).t() if len(rows) > rows.shape[1] else _whitened(rows)).contiguous()
    return torch.nn.functional.normalize(rows, dim=1)


def _whitened(rows: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows: (R Rᵀ)^-½ R."""
    values, vectors = torch.linalg.eigh(rows @ rows.t())
    nearest: Tensor = (vectors * values.clamp(min=1e-12).rsqrt()) @ (vectors.t() @ rows)
    return nearest


class Spec(Protocol):
    """What worlds ask of a cache's spec."""

    @property
    def world(self) -> WorldConfig | None: ...
    @property
    def d_model(self) -> int: ...
    @property
    def seed(self) -> int: ...


def world_of(spec: Spec, site: Site) -> World:
    """The world that is a layer of a cache."""
    assert spec.world is not None
    return World(spec.world, spec.d_model, seed=spec.seed, number=site.layer)
