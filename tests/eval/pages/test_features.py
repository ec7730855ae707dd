"""Against dense computations in float64 and in whole numbers, which are exact in both."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.eval.pages import features
from residual_saes.eval.pages.features import (
    AFTER,
    BEFORE,
    BINS,
    LOGIT_BINS,
    NEAREST,
    SAMPLES,
    TOP,
    Tally,
    heldout_text,
    largest,
    look,
    scatter,
    similar,
    words,
)
from residual_saes.shared.cache import Cache
from residual_saes.shared.lm import Unembedding, load_model
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site

F, D, CONTEXT, TOKENS, WORDS = 40, 8, 100, 3000, 30
ALWAYS, NEVER, ONCE = 3, 5, 7  # features


def mixed(feature: int, row: int) -> int:
    """splitmix64 in Python's own integers, as signed."""
    mask = (1 << 64) - 1
    x = ((feature << 32 | row) + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x


@pytest.fixture(scope="module")
def whole_numbers() -> tuple[Sae, Tensor]:
    """An SAE and activations [TOKENS, D] for which every sum is exact, with ties everywhere."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-2, 3, (F, D), generator=generator).float()
    bias = torch.randint(-9, -2, (F,), generator=generator).float()
    x = torch.randint(-2, 3, (TOKENS, D), generator=generator).float()
    bias[ALWAYS], bias[NEVER] = 100, -1000
    w[ONCE], bias[ONCE] = torch.tensor([0.0] * (D - 1) + [1]), -7
    x[1234, -1] = 8
    w_dec = torch.randint(-2, 3, (F, D), generator=generator).float()
    w_dec[10:13] = w_dec[20]
    zero = torch.zeros(D)
    return Sae(w_enc=w, w_dec=w_dec, b_enc=bias, b_pre=zero, b_dec=zero, config={}, stats={}), x


def looked(sae: Sae, x: Tensor, block: int = 1000) -> tuple[dict[str, Any], int]:
    blocks = ((first, x[first : first + block].half()) for first in range(0, len(x), block))
    (tally,) = look(blocks, [sae], CONTEXT, len(x))
    columns, together = tally.columns(torch.nn.Linear(D, WORDS), WORDS)
    return {name: column.numpy() for name, column in columns.items()}, together


def dense(sae: Sae, x: Tensor) -> NDArray[np.float64]:
    pre = (x.double() - sae.b_pre.double()) @ sae.w_enc.double().t() + sae.b_enc.double()
    return pre.clamp(min=0).numpy()


def windows(columns: dict[str, Any], feature: int, n: int) -> NDArray[np.float64]:
    place = feature * (TOP + SAMPLES) + n
    near = slice(*columns["near_start"][place : place + 2])
    out = np.zeros(BEFORE + 1 + AFTER)
    out[columns["near_at"][near] + BEFORE] = columns["near_value"][near]
    return out


def around(z: NDArray[np.float64], row: int) -> NDArray[np.float64]:
    out = np.zeros(BEFORE + 1 + AFTER)
    for i, r in enumerate(range(row - BEFORE, row + AFTER + 1)):
        if r // CONTEXT == row // CONTEXT:
            out[i] = z[r]
    return out


def test_every_column_is_that_of_a_dense_computation(whole_numbers: tuple[Sae, Tensor]) -> None:
    sae, x = whole_numbers
    columns, together = looked(sae, x)
    z = dense(sae, x)
    assert together == TOKENS
    assert columns["count"].tolist() == (z > 0).sum(0).tolist()
    assert (columns["count"][NEVER], columns["count"][ONCE], columns["count"][ALWAYS]) == (0, 1, TOKENS)
    assert columns["maximum"].tolist() == z.max(0).tolist()
    np.testing.assert_allclose(columns["mean"], z.sum(0) / np.maximum((z > 0).sum(0), 1), rtol=1e-6)
    for i in range(F):
        highest = z[:, i].reshape(-1, CONTEXT).max(1)
        firsts = z[:, i].reshape(-1, CONTEXT).argmax(1) + np.arange(len(highest)) * CONTEXT
        top = sorted((-v, r) for v, r in zip(highest.tolist(), firsts.tolist(), strict=True) if v > 0)[:TOP]
        on = np.flatnonzero(z[:, i]).tolist()
        sample = sorted((-z[r, i], r) for r in sorted(on, key=lambda r: mixed(i, r))[:SAMPLES])
        for expected, size, start in ((top, TOP, 0), (sample, SAMPLES, TOP)):
            rows = [r for _, r in expected]
            assert columns["row"][i, start : start + size].tolist() == rows + [-1] * (size - len(rows))
            for n, row in enumerate(rows):
                assert windows(columns, i, start + n).tolist() == around(z[:, i], row).tolist()
        width = columns["bin_width"][i]
        if on:
            assert np.log2(width) % 1 == 0 and BINS / 2 <= z[:, i].max() / width < BINS
            exact = np.bincount((z[on, i] / width).astype(int), minlength=BINS)
            assert columns["bins"][i].tolist() == exact.tolist()
        else:
            assert columns["bins"][i].sum() == 0


def jaccard(z: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(index, tokens with both) of every two features; −1 on the diagonal."""
    on = (z > 0).astype(np.int64)
    both, n = on.T @ on, on.sum(0)
    index = both / np.maximum(n[:, None] + n - both, 1)
    index[both < features.TOGETHER_AT_LEAST] = 0
    np.fill_diagonal(index, -1)
    return index, both


def check_together(columns: dict[str, Any], z: NDArray[np.float64]) -> None:
    index, both = jaccard(z)
    for i in range(F):
        best = [j for j in sorted(range(F), key=lambda j: (-index[i, j], j)) if index[i, j] > 0][:NEAREST]
        rest = NEAREST - len(best)
        assert columns["together"][i].tolist() == best + [-1] * rest
        assert columns["together_count"][i].tolist() == both[i, best].tolist() + [0] * rest
        np.testing.assert_allclose(columns["together_jaccard"][i], index[i, best].tolist() + [0] * rest, rtol=1e-6)


def test_features_that_fire_together_are_found_in_portions_and_from_some_tokens(
    whole_numbers: tuple[Sae, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, x = whole_numbers
    z = dense(sae, x)
    columns, _ = looked(sae, x)
    check_together(columns, z)
    monkeypatch.setattr(features, "_PAIRS", 5000)
    portions, _ = looked(sae, x)
    check_together(portions, z)
    order = sorted(range(TOKENS), key=lambda r: mixed(0, r))
    monkeypatch.setattr(features, "_TOGETHER_TOKENS", 700)
    some, n = looked(sae, x)
    assert n == 700
    check_together(some, z[order[:700]])
    pairs = ((z[order] > 0).sum(1) ** 2).cumsum()
    monkeypatch.setattr(features, "_TOGETHER_PAIRS", int(pairs[99]))
    fewer, n = looked(sae, x)
    assert n == 100
    check_together(fewer, z[order[:100]])


def test_where_nothing_fires_nothing_fires_together(whole_numbers: tuple[Sae, Tensor]) -> None:
    sae, x = whole_numbers
    columns, _ = looked(Sae(**sae.tensors() | {"b_enc": sae.b_enc - 1e6}, config={}, stats={}), x)
    assert columns["count"].max() == 0
    assert (columns["together"] == -1).all() and (columns["together_jaccard"] == 0).all()


def test_columns_do_not_depend_on_how_the_text_is_cut(
    whole_numbers: tuple[Sae, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, x = whole_numbers
    torch.manual_seed(0)
    whole, _ = looked(sae, x)
    for values, block in ((1, 500), (F * CONTEXT * 7, 3000)):
        monkeypatch.setitem(features._TILE_VALUES, "cpu", values)
        torch.manual_seed(0)
        cut, _ = looked(sae, x, block)
        for name, column in whole.items():
            np.testing.assert_array_equal(cut[name], column, err_msg=name)


def test_several_saes_are_looked_at_in_one_read(whole_numbers: tuple[Sae, Tensor]) -> None:
    sae, x = whole_numbers
    other = Sae(**sae.tensors() | {"b_enc": sae.b_enc + 2}, config={}, stats={})
    reads = 0

    def blocks() -> Any:
        nonlocal reads
        reads += 1
        yield 0, x.half()

    tallies = look(blocks(), [sae, other], CONTEXT, TOKENS)
    assert reads == 1
    for tally, one in zip(tallies, (sae, other), strict=True):
        assert tally.histograms.counts.sum(1).tolist() == (dense(one, x) > 0).sum(0).tolist()


def test_a_trained_sae_on_held_out_text_is_that_of_float64(cache: Cache, runs_path: Path) -> None:
    """Activations that round differently may swap places: values are compared, and rows by what is true of them."""
    spec, layer = cache.spec, 1
    sae = Sae.load(sorted(runs_path.glob("*-fixed"))[0] / "sae_layer01_final.pt")
    sequences = spec.holdout_blocks * spec.block_sequences
    tokens = sequences * spec.context
    (tally,) = look(heldout_text(cache, (Site(layer),), sequences), [sae], spec.context, tokens)
    columns, _ = tally.columns(torch.nn.Linear(spec.d_model, 400), 400)
    x = torch.from_numpy(cache.layer(layer)[spec.train_tokens :])
    pre = (x.double() - sae.b_pre.double()) @ sae.w_enc.double().t() + sae.b_enc.double()
    z, unsure = pre.clamp(min=0).numpy(), (pre.abs() < 1e-5).sum(0).numpy()
    assert (np.abs(columns["count"].numpy() - (z > 0).sum(0)) <= unsure).all()
    np.testing.assert_allclose(columns["maximum"], z.max(0), rtol=1e-5)
    highest = z.reshape(sequences, spec.context, -1).max(1)
    expected = -np.sort(-highest, axis=0)[:TOP].T
    rows = columns["row"][:, :TOP].numpy()
    of_rows = np.where(rows >= 0, np.take_along_axis(z.T, rows.clip(0), 1), 0)
    np.testing.assert_allclose(of_rows, expected, atol=1e-5)
    checked = 0
    for i in np.flatnonzero(unsure == 0).tolist():
        on = sorted(np.flatnonzero(z[:, i]).tolist(), key=lambda r: mixed(i, r))[:SAMPLES]
        assert sorted(r for r in columns["row"][i, TOP:].tolist() if r >= 0) == sorted(on)
        checked += len(on)
    assert checked > 1000


def test_only_the_first_contexts_are_read_if_so_asked(cache: Cache) -> None:
    spec = cache.spec
    for sequences in (1, spec.block_sequences, spec.block_sequences + 3):
        blocks = list(heldout_text(cache, (Site(2),), sequences))
        assert [first for first, _ in blocks] == list(range(0, sequences * spec.context, spec.block_rows))
        x = torch.cat([block for _, block in blocks]).numpy()
        np.testing.assert_array_equal(x, cache.layer(2)[spec.train_tokens : spec.train_tokens + sequences * spec.context])


def test_the_hash_is_splitmix64_and_meets_each_number_once() -> None:
    assert mixed(0, 0) & ((1 << 64) - 1) == 0xE220A8397B1DCDAF  # the first output of the published code for seed 0
    feature, row = torch.arange(300).repeat_interleave(500), torch.arange(500).repeat(300) * 8_589_934
    assert scatter(feature, row).tolist() == [mixed(f, r) for f, r in zip(feature.tolist(), row.tolist(), strict=True)]
    assert len(scatter(feature, row).unique()) == 150_000


def test_the_largest_are_in_order_and_of_equal_ones_the_first() -> None:
    scores = torch.randint(-3, 4, (50, 30), generator=torch.Generator().manual_seed(1)).float()
    for k in (1, 7, 30):
        value, index = largest(scores, k)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        assert index.tolist() == order.tolist()
        assert value.tolist() == scores.gather(1, order).tolist()


def test_decoder_rows_find_their_nearest(whole_numbers: tuple[Sae, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    w = whole_numbers[0].w_dec
    unit = torch.nn.functional.normalize(w.double(), dim=1)
    cosines = (unit @ unit.t()).fill_diagonal_(-2)
    for rows in (1, 7, F):
        monkeypatch.setattr(features, "_SCORES", rows * F)
        index, value = similar(w)
        torch.testing.assert_close(value.double(), cosines.topk(NEAREST, dim=1).values, atol=1e-6, rtol=0)
        torch.testing.assert_close(cosines.gather(1, index), value.double(), atol=1e-6, rtol=0)
    assert index[10, :3].tolist() == [11, 12, 20]  # equal rows, in the order of their numbers
    few, _ = similar(w[:4])
    assert few.shape == (4, 3)


def test_promoted_and_suppressed_tokens_are_those_of_the_direct_path(lm: Path) -> None:
    model: Any = load_model(str(lm), None, "fp32", head=True)
    norm = model.gpt_neox.final_layer_norm
    with torch.no_grad():
        norm.weight.copy_(torch.rand(32) + 0.5)
        norm.bias.copy_(torch.randn(32))  # which is the same for every feature, and left out
    d = torch.nn.functional.normalize(torch.randn(20, 32, generator=torch.Generator().manual_seed(2)), dim=1)
    with torch.inference_mode():
        promoted, up, suppressed, down, bins = words(d, Unembedding(model), 390)
    x = d.double()
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    logits = x @ model.get_output_embeddings().weight.double()[:390].t()
    for index, value, sign in ((promoted, up, 1), (suppressed, down, -1)):
        torch.testing.assert_close(value.double(), sign * (sign * logits).topk(10, dim=1).values, atol=1e-4, rtol=0)
        torch.testing.assert_close(logits.gather(1, index), value.double(), atol=1e-4, rtol=0)
    most = logits.abs().amax(1)
    for counted, row, m in zip(bins.tolist(), logits, most.tolist(), strict=True):
        exact = torch.histc(row, LOGIT_BINS, -m, m).tolist()
        assert sum(counted) == 390
        assert sum(abs(a - b) for a, b in zip(counted, exact, strict=True)) <= 8  # on the edges they round differently


def test_memory_is_what_it_is_said_to_be(whole_numbers: tuple[Sae, Tensor]) -> None:
    sae, x = whole_numbers
    tally = Tally(sae, TOKENS)
    held = [*vars(tally.top).values(), *vars(tally.sample).values(), tally.histograms.counts]
    small = 64 * F  # a few numbers a feature
    assert 0 <= sum(t.nbytes for t in held) - features.kept_bytes() * F < small
    before = {name: t.data_ptr() for name, t in vars(tally.top).items() if name != "_bound"}
    tally.add(x, 0, CONTEXT)
    assert {name: t.data_ptr() for name, t in vars(tally.top).items() if name != "_bound"} == before
