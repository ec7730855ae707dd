import dataclasses

import numpy as np
import pytest
import torch

from residual_saes.shared.cache import Cache
from residual_saes.shared.shuffle import epoch_slices
from residual_saes.shared.sites import Site
from residual_saes.train.look import Look, read_rows


def of(x: np.ndarray, positions: np.ndarray, **without: int) -> Look:  # type: ignore[type-arg]
    return Look.of(torch.from_numpy(x.astype(np.float16)), torch.from_numpy(positions), **without)


def test_shares_are_those_of_a_second_way_in_float64() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4000, 16)) * np.linspace(1, 3, 16) + 5).astype(np.float16)
    positions = rng.integers(0, 8, 4000)
    x[positions == 0] *= 4
    x[:3] = 900
    wide = x.astype(np.float64)
    centred = wide - wide.mean(0)
    energy = (centred**2).sum(1)
    norms = np.linalg.norm(wide, axis=1)
    long = norms > 10 * np.median(norms)
    expected = Look(
        mean_over_std=np.linalg.norm(wide.mean(0)) / energy.mean() ** 0.5,
        top_direction=np.linalg.svd(centred, compute_uv=False)[0] ** 2 / energy.sum(),
        first_positions=energy[positions == 0].sum() / energy.sum(),
        long_rows=long.mean(),
        long_rows_variance=energy[long].sum() / energy.sum(),
        float16_used=900 / 65504,
        median_norm=np.median(norms),
        left_out=0,
    )
    assert dataclasses.asdict(of(x, positions)) == pytest.approx(dataclasses.asdict(expected), rel=1e-4)
    assert long.sum() == 3


def test_first_positions_that_own_the_variance_are_warned_of() -> None:
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2560, 32)), np.arange(2560) % 256
    quiet = of(x, positions)
    assert quiet.warning == ""
    x[positions == 0, 7] += 500
    loud = of(x, positions)
    assert loud.first_positions > 0.9 and loud.long_rows == pytest.approx(1 / 256)
    assert "of the variance lies in first positions" in loud.warning and "fvu_without_first" in loud.warning
    assert "without those rows (--skip-positions 1 or --max-norm 10)" in loud.warning
    for without in ({"skip_positions": 1}, {"max_norm": 10}):
        rest = of(x, positions, **without)
        assert rest.left_out == pytest.approx(1 / 256) and rest.median_norm == loud.median_norm
        assert rest.top_direction == pytest.approx(quiet.top_direction, rel=0.05) and not rest.warning
        assert str(rest).startswith("0.39% of rows are not trained on; in the others mean over deviation")
    x[:, 7] = 60_000
    assert of(x, positions).float16_used == pytest.approx(0.916, abs=1e-3)


def test_a_layer_is_looked_at_where_training_begins(cache: Cache) -> None:
    """As many rows as a block has, of sixteen blocks, each with its own place in its context."""
    spec, size = cache.spec, cache.spec.slice_rows
    rows, positions = [], []
    for number in epoch_slices(spec.train_blocks, spec.slices, seed=3, epoch=0)[: spec.slices]:
        block, index = divmod(int(number), spec.slices)
        whole = cache.layer(1)[block * spec.block_rows : (block + 1) * spec.block_rows]
        order = cache.block_order(block)[index * size : (index + 1) * size]
        rows.append(np.asarray(whole)[order])
        positions.append(order % spec.context)
    assert Look.of(*read_rows(cache, Site(1), 3)) == of(np.concatenate(rows), np.concatenate(positions))
