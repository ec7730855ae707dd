"""The law of synthetic worlds: what fires, how often, with what, and how strongly."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from residual_saes.shared.synthetic.config import WorldConfig
from residual_saes.shared.synthetic.world import Firing, World, parents_of, spread_out, zipf

SMALL = WorldConfig(features=60, roots=4, branching=3, depth=2, most_frequent=0.5, least_frequent=0.05, rank=4, correlation=0.3)
INDEPENDENT = replace(SMALL, correlation=0.0)
ROWS = 4096
PINNED = (
    296,
    [139, 93, 73, 64, 139, 67, 0, 0],
    [4.93756, 5.0553, 5.60602, 4.04014],
)  # of what fires in 64 rows: how many, Σ of each row's numbers, magnitudes


def fired(world: World, sequences: int = 8) -> np.ndarray:
    """Magnitudes [rows, features], 0 where a feature does not fire."""
    z = np.zeros((sequences * ROWS, world.config.features), np.float32)
    for n in range(sequences):
        firing = world.fire(n, ROWS)
        z[n * ROWS + firing.row, firing.feature] = firing.magnitude
    return z


def near(shares: np.ndarray, expected: np.ndarray, n: int) -> bool:
    """Whether shares of n independent trials are within five standard errors of what is expected."""
    return bool((np.abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 5 / n).all())


def test_probabilities_fall_as_zipf_says() -> None:
    rates = zipf(WorldConfig())
    assert (rates[0], rates[-1]) == (pytest.approx(0.4), pytest.approx(5e-4))
    assert (np.diff(rates) < 0).all()
    power = np.arange(1, 16_385.0) ** -0.5
    assert np.corrcoef(rates, power)[0, 1] == pytest.approx(1)


def test_features_are_a_forest_whose_levels_follow_each_other() -> None:
    parents = parents_of(WorldConfig(features=20, roots=2, branching=3, depth=2))
    assert parents.tolist() == [-1, -1, 0, 0, 0, 1, 1, 1, *(p for p in range(2, 6) for _ in range(3))]
    parents = parents_of(WorldConfig())
    assert (parents < 0).sum() == 128 + 16_384 - 128 * (1 + 4 + 16 + 64)
    assert parents_of(WorldConfig(features=5, roots=9)).tolist() == [-1] * 5


def test_what_has_no_parent_fires_as_often_as_configured() -> None:
    for config in (SMALL, INDEPENDENT):  # whatever else fires
        world = World(config, 8, seed=1, number=0)
        z, alone = fired(world), world.parents < 0
        normal = torch.distributions.Normal(0, 1)
        positive = normal.cdf(torch.from_numpy(world.means / np.maximum(world.spreads, 1e-9))).numpy()
        assert near((z > 0).mean(0)[alone], (world.rates * positive)[alone], len(z))


def test_children_fire_with_their_parent_alone_and_siblings_exclude_each_other() -> None:
    world = World(replace(SMALL, exclusive=0.5), 8, seed=0, number=3)
    on, child = fired(world) > 0, np.flatnonzero(world.parents >= 0)
    assert len(child) == 48 and on[:, child].any()
    assert not (on[:, child] & ~on[:, world.parents[child]]).any()
    assert world.excluding.sum() == 8  # of 4 + 12 parents
    for parent in np.flatnonzero(np.bincount(world.parents[child], minlength=60)):
        together = on[:, world.parents == parent].sum(1).max()
        assert together == 1 if world.excluding[parent] else together > 1


def test_children_fire_as_often_as_the_draw_and_their_siblings_let_them() -> None:
    """Given that the parent fires: by all subsets of siblings, each of which gives its place to one of them by lot."""
    config = replace(INDEPENDENT, spread=0.0, spread_spread=0.0)  # no feature misses for its magnitude
    world = World(config, 8, seed=0, number=0)
    on, q = fired(world) > 0, world.probabilities
    for parent in range(4):
        children, fires = np.flatnonzero(world.parents == parent), on[:, parent]
        expected = np.zeros(3)
        for drawn in itertools.product((0, 1), repeat=3):
            chance = math.prod(q[c] if d else 1 - q[c] for c, d in zip(children, drawn, strict=True))
            expected += [chance * d / max(1, sum(drawn)) for d in drawn]
        assert near(on[fires][:, children].mean(0), expected, int(fires.sum()))


def test_probabilities_make_up_for_the_parent_and_about_for_siblings() -> None:
    config = WorldConfig(features=5, roots=1, branching=2, depth=1, most_frequent=0.5, least_frequent=0.01)
    world = World(config, 4, seed=0, number=0)
    p, q = world.rates, world.probabilities
    assert q[[0, 3, 4]] == pytest.approx(p[[0, 3, 4]])
    assert q[1] == pytest.approx(min(1, p[1] / p[0] * (1 + p[2] / p[0]))) and q[2] == pytest.approx(
        p[2] / p[0] * (1 + p[1] / p[0])
    )
    free = World(replace(config, exclusive=0.0), 4, seed=0, number=0)
    assert free.probabilities[1:3] == pytest.approx(p[1:3] / p[0])


def test_features_fire_together_as_their_factors_say() -> None:
    """The joint probability of two thresholded normal variables, by the integral over their correlation: Φ₂(a, b; r) =
    Φ(a) Φ(b) + ∫₀ʳ φ₂(a, b; t) dt."""
    world = World(replace(SMALL, roots=0, correlation=0.45, spread=0.0, spread_spread=0.0), 8, seed=2, number=0)
    on = fired(world) > 0
    correlations = world.factors @ world.factors.T
    i, j = np.triu_indices(60, 1)
    strongest = np.argsort(np.abs(correlations[i, j]))[-40:]
    a = torch.special.ndtri(torch.from_numpy(world.rates)).numpy()
    for n in strongest:
        first, second = int(i[n]), int(j[n])
        x, y, r = a[first], a[second], correlations[first, second]
        t = (np.arange(4000) + 0.5) / 4000 * r
        density = np.exp(-(x * x - 2 * t * x * y + y * y) / (2 * (1 - t * t))) / (2 * math.pi * np.sqrt(1 - t * t))
        both = world.rates[first] * world.rates[second] + density.mean() * r
        assert abs(r) > 0.3 and near((on[:, first] & on[:, second]).mean(), np.array(both), len(on))


def test_magnitudes_are_normal_and_above_zero() -> None:
    world = World(replace(INDEPENDENT, roots=0, last_magnitude=3.0, spread=0.4), 8, seed=0, number=0)
    assert world.means[[0, -1]].tolist() == [5, 3] and (world.spreads >= 0).all() and len(np.unique(world.spreads)) == 60
    z = fired(world)
    assert (z >= 0).all()
    for feature in range(0, 60, 7):
        mean, spread, of = world.means[feature], world.spreads[feature], z[z[:, feature] > 0, feature]
        if mean > 4 * spread:  # else cut off at 0
            assert abs(of.mean() - mean) < 5 * spread / math.sqrt(len(of)) and of.std() == pytest.approx(spread, rel=0.1)


def test_rows_are_the_bias_and_the_sum_of_what_fires() -> None:
    world = World(SMALL, 8, seed=0, number=0)
    firing = world.fire(5, 50)
    z = torch.zeros(50, 60)
    z[firing.row, firing.feature] = torch.from_numpy(firing.magnitude)
    torch.testing.assert_close(world.rows(5, 50), z @ world.directions + world.bias, rtol=1e-5, atol=1e-5)
    nothing = Firing(firing.row[:0], firing.feature[:0], firing.magnitude[:0])
    assert torch.equal(world.activations(nothing, 3), world.bias.expand(3, 8))


def test_directions_are_unit_rows_with_little_overlap() -> None:
    drawn = torch.randn(40, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(spread_out(drawn) @ spread_out(drawn).t(), torch.eye(40, dtype=torch.float64))
    drawn = torch.randn(300, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, least = spread_out(drawn), 300**2 / 16  # Welch's bound on Σ of squared cosines
    assert torch.allclose(rows.norm(dim=1), torch.ones(300, dtype=torch.float64))
    assert (rows @ rows.t()).square().sum() < 1.001 * least


def test_a_sequence_is_a_function_of_its_number_and_nothing_else() -> None:
    """In any order, again, and by an object of its own; another world, seed or number is another."""
    world, again = World(SMALL, 8, seed=0, number=1), World(SMALL, 8, seed=0, number=1)
    first = [world.rows(n, 100) for n in (0, 1, 2)]
    for n in (2, 0, 1):
        assert torch.equal(again.rows(n, 100), first[n])
    others = (World(SMALL, 8, seed=1, number=1), World(SMALL, 8, seed=0, number=2), World(INDEPENDENT, 8, seed=0, number=1))
    rows = [first[0], first[1], *(other.rows(0, 100) for other in others)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(rows, 2))


def test_what_fires_is_pinned() -> None:
    """Truth is made again wherever SAEs are evaluated, so it must not change with a library or a processor."""
    firing = World(SMALL, 8, seed=0, number=0).fire(0, 64)
    assert len(firing.row) == PINNED[0]
    assert [int(firing.feature[firing.row == row].sum()) for row in range(8)] == PINNED[1]
    assert firing.magnitude[:4].tolist() == pytest.approx(PINNED[2], rel=1e-5)
