"""Rows that are left out: never seen in training, not measured in evaluation, and nothing else is different."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from residual_saes.eval.measure.heldout import heldout_blocks
from residual_saes.eval.measure.splice import only, zeros
from residual_saes.eval.pages.features import look
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.rows import ALL, Rows, fill, norms
from residual_saes.shared.runs.run import Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.shuffle import window_rows
from residual_saes.shared.sites import Site
from residual_saes.train.loader import ActivationLoader, LoaderConfig
from tests.conftest import TRAIN_ARGS, Cli, curve_of

CPU = torch.device("cpu")
LAYER, BATCH = 1, 160  # an epoch is 128 batches


def stream(cache: Cache, rows: Rows, *, first: int = 0, last: int = 128, threads: int = 2, batch: int = BATCH) -> torch.Tensor:
    config = LoaderConfig(batch=batch, window_blocks=3, threads=threads, rows=rows)
    return torch.cat([x.clone() for x in ActivationLoader(cache, Site(LAYER), config, CPU, first=first, last=last)])


def text_rows(cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """All that is trained on in reading order, and positions."""
    n = cache.spec.train_tokens
    return torch.from_numpy(cache.layer(LAYER)[:n]), torch.arange(n) % cache.spec.context


def some(cache: Cache) -> Rows:
    """Without three positions of 32 and the longest tenth."""
    return Rows(skip_positions=3, longest=float(norms(text_rows(cache)[0]).quantile(0.9)))


def counted(x: torch.Tensor) -> Counter[bytes]:
    return Counter(row.tobytes() for row in x.numpy())


def test_others_of_the_window_take_the_places_of_rows_left_out() -> None:
    drawn = window_rows(1000, seed=0, epoch=0, window=0)
    kept = np.random.default_rng(0).random(1000) < 0.8
    order = drawn.copy()
    fill(order, kept)
    assert kept[order].all() and set(order) == set(np.flatnonzero(kept))
    assert (order[kept[drawn]] == drawn[kept[drawn]]).all()
    assert max(Counter(order.tolist()).values()) == 2
    few = np.arange(1000) < 3
    fill(order := drawn.copy(), few)
    assert sorted(Counter(order.tolist())) == [0, 1, 2] and max(Counter(order.tolist()).values()) == 334
    with pytest.raises(UserError, match="no row is left"):
        fill(drawn, np.zeros(1000, np.bool_))


def test_what_is_left_out_is_never_seen_and_all_else_is(cache: Cache) -> None:
    x, positions = text_rows(cache)
    rows = some(cache)
    exact = np.sqrt((x.numpy().astype(np.float64) ** 2).sum(1))
    kept = torch.from_numpy((positions.numpy() >= 3) & (exact <= rows.longest))
    assert 0.75 < kept.double().mean() < 0.9
    seen, wanted = counted(stream(cache, rows)), counted(x[kept])
    assert seen.keys() == wanted.keys()
    assert sum(seen.values()) == cache.spec.train_tokens
    assert all(seen[row] <= 2 * n for row, n in wanted.items())


def test_rows_that_are_kept_keep_their_places(cache: Cache) -> None:
    before, after = stream(cache, ALL), stream(cache, some(cache))
    same = (before == after).all(1)
    assert 0.75 < same.double().mean() < 0.9
    left_out = counted(before[~same])
    assert not left_out.keys() & counted(after).keys()


@pytest.mark.parametrize("first", [1, 9, 10, 77, 213])
def test_resumes_at_any_batch_with_any_number_of_threads(cache: Cache, first: int) -> None:
    """Batches straddle windows (1,440 rows and more) and epochs here."""
    whole = stream(cache, some(cache), last=240, batch=96)
    assert torch.equal(stream(cache, some(cache), first=first, last=240, threads=1, batch=96), whole[first * 96 :])


def test_a_run_trains_and_is_measured_without_them(cli: Cli, cache_path: Path, cache: Cache, tmp_path: Path) -> None:
    args = ("--cache", cache_path, "--runs", tmp_path)
    train = ("train", *TRAIN_ARGS, *args, "--l1", "3e-3", "--layers", LAYER, "--skip-positions", 3)
    result = cli(*train, "--max-norm", 1.2)
    assert result.code == 0, result.err
    assert "of rows are not trained on; in the others mean over deviation" in result.err
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert {"skip_positions": 3, "max_norm": 1.2}.items() <= Run(folder).config.stored["train"].items()
    assert curve_of(Run(folder), Site(LAYER))[-1]["tokens"] == 20_480
    assert "skip_positions is 3 there, 0 here" in cli(*train[:-2], "--max-norm", 1.2).err
    assert "max_norm is 1.2 there, None here" in cli(*train).err

    result = cli("eval", "--preset", "demo", *args, "--ce-tokens", 640)
    assert result.code == 0, result.err
    final = json.loads((folder / "results" / "metrics.json").read_bytes())[f"layer{LAYER:02d}_final"]
    sae = Sae.load(folder / f"sae_layer{LAYER:02d}_final.pt")
    longest = 1.2 * sae.stats["activations"]["median_norm"]
    blocks = list(heldout_blocks(cache, Site(LAYER), 10**9))
    x, positions = torch.cat([b.x for b in blocks]), torch.cat([b.positions for b in blocks])
    wide = x.double()
    wide = wide[(positions >= 3) & (wide.square().sum(1).sqrt() <= longest)]
    assert 1000 < len(wide) == final["tokens"] < 1856
    error = (sae.decode(sae.encode(wide.float())).double() - wide).square().sum()
    assert final["fvu"] == pytest.approx(float(error / (wide - wide.mean(0)).square().sum()), rel=1e-5)
    said = "without the first 3 positions of each context and rows longer than 1.2 × the median norm"
    assert said in (folder / "README.md").read_text() and said in (tmp_path / "report.html").read_text()


def test_a_splice_leaves_them_as_the_model_has_them() -> None:
    x = torch.ones(2, 5, 4)
    x[1, 3] = 100
    spliced = only(Rows(skip_positions=2, longest=9.0), zeros)(x, x)
    assert spliced[:, :2].eq(1).all() and spliced[1, 3].eq(100).all()
    assert spliced.sum() == 2 * 2 * 4 + 400
    assert only(Rows(skip_positions=2), zeros)(x, x)[:, 2:].eq(0).all()
    assert only(ALL, zeros) is zeros


def test_pages_do_not_show_them() -> None:
    """Every feature fires everywhere; on the pages of this one from the third position of each context on."""
    context, x = 8, torch.rand(4 * 8, 3)
    sae = Sae(
        w_enc=torch.ones(5, 3), w_dec=torch.ones(5, 3), b_enc=torch.ones(5), b_pre=torch.zeros(3), b_dec=torch.zeros(3),
        config={"train": {"skip_positions": 2}}, stats={},
    )  # fmt: skip
    (tally,) = look([(0, x.half())], [sae], context, len(x))
    shown = tally.top.row[tally.top.row >= 0]
    assert set((shown % context).tolist()) <= set(range(2, 8)) and tally.histograms.counts.sum(1).eq(4 * 6).all()


def test_what_a_checkpoint_says_is_what_it_was_trained_on() -> None:
    assert Rows.of({}, {}) == ALL
    assert Rows.of({"skip_positions": 1, "max_norm": None}, {}) == Rows(skip_positions=1, longest=math.inf)
    assert Rows.of({"max_norm": 10}, {"median_norm": 1.5}) == Rows(longest=15.0)
