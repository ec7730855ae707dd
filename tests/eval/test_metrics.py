import numpy as np
import pytest
import torch

from eval.metrics import heldout_rows, heldout_tokens, reconstruction
from shared.cache import Cache
from train.sae import Sae

D, F = 16, 50


def random_sae() -> Sae:
    return Sae(
        w_enc=torch.randn(F, D),
        w_dec=torch.randn(F, D) / 8,
        b_enc=torch.randn(F) - 4,
        b_pre=torch.randn(D),
        b_dec=torch.randn(D),
        config={},
        stats={},
    )


def test_metrics_are_their_formulas_in_float64() -> None:
    torch.manual_seed(0)
    sae, x = random_sae(), (torch.randn(700, D) * torch.linspace(0.1, 3, D) + 2).half()
    sae.b_enc[:7] = -1e3
    xs = x.double().numpy()
    z = np.maximum((xs - sae.b_pre.double().numpy()) @ sae.w_enc.double().numpy().T + sae.b_enc.double().numpy(), 0)
    xhat = z @ sae.w_dec.double().numpy() + (sae.b_dec + sae.b_pre).double().numpy()
    got = reconstruction(sae, x)
    assert got.tokens == 700
    assert got.l0 == pytest.approx((z > 0).sum(1).mean())
    assert got.mse == pytest.approx(((xhat - xs) ** 2).mean(), rel=1e-5)
    assert got.fvu == pytest.approx(((xhat - xs) ** 2).sum() / ((xs - xs.mean(0)) ** 2).sum(), rel=1e-5)
    cosine = (xhat * xs).sum(1) / np.linalg.norm(xhat, axis=1) / np.linalg.norm(xs, axis=1)
    assert got.cosine == pytest.approx(cosine.mean(), rel=1e-5)
    assert got.dead_share == pytest.approx(1 - (z > 0).any(0).mean())
    assert 0.13 < got.dead_share < 1


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    sae, x = random_sae(), torch.randn(700, D).half()
    whole = reconstruction(sae, x)
    monkeypatch.setattr("eval.metrics._CHUNK_VALUES", 33 * F)
    parts = reconstruction(sae, x)
    assert parts.l0 == whole.l0
    assert parts.fvu == pytest.approx(whole.fvu, rel=1e-6)
    assert parts.dead_share == whole.dead_share


def test_the_mean_explains_nothing_and_the_truth_everything() -> None:
    x = torch.randn(500, D).half()
    sae = random_sae()
    sae.w_dec.zero_()
    sae.b_pre.zero_()
    sae.b_dec.copy_(x.float().mean(0))
    assert reconstruction(sae, x).fvu == pytest.approx(1.0, rel=1e-5)
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    exact = Sae(
        w_enc=both, w_dec=both, b_enc=torch.zeros(2 * D), b_pre=torch.zeros(D), b_dec=torch.zeros(D), config={}, stats={}
    )
    got = reconstruction(exact, x)
    assert got.fvu < 1e-12
    assert got.cosine == pytest.approx(1.0)


def test_only_held_out_rows_are_read(cache: Cache) -> None:
    spec, rows = cache.spec, heldout_rows(cache, 1, 10**9)
    assert len(rows) == spec.holdout_blocks * spec.block_rows
    block = np.empty((spec.block_rows, spec.d_model), dtype=np.float16)
    cache.read_block(1, spec.train_blocks, block)
    assert torch.equal(rows[: spec.block_rows], torch.from_numpy(block))
    assert len(heldout_rows(cache, 1, 100)) == 100
    tokens = heldout_tokens(cache, 10**9)
    assert torch.equal(tokens[: spec.block_sequences], torch.from_numpy(cache.block_tokens(spec.train_blocks)))
    assert len(tokens) == spec.holdout_blocks * spec.block_sequences
