import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import residual_saes.shared.lm
from residual_saes.eval.measure.heldout import heldout_blocks, heldout_tokens
from residual_saes.eval.measure.metrics import losses
from residual_saes.eval.measure.splice import Loss, Replacement, SplicedModel, constant, through, zeros
from residual_saes.shared.cache import Cache
from residual_saes.shared.runs.run import Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site
from tests.conftest import measure_site

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokens(cache: Cache) -> torch.Tensor:
    return heldout_tokens(cache, 640)


@pytest.fixture(scope="module")
def spliced(lm: Path, tokens: torch.Tensor) -> SplicedModel:
    return SplicedModel(str(lm), None, "fp32", CPU, tokens)


@pytest.fixture(scope="module")
def reference(lm: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32).eval()


def hooked(model: Any, block: nn.Module, tokens: Tensor, replace: Replacement) -> tuple[float, float]:
    """The other way: the whole model under a hook; (cross-entropy, KL from the model as it is), by SAEBench's formulas."""

    def hook(_module: nn.Module, _args: object, output: Any) -> Any:
        return replace(output, output) if isinstance(output, Tensor) else (replace(output[0], output[0]), *output[1:])

    with torch.no_grad():
        clean = model(input_ids=tokens).logits
        handle = block.register_forward_hook(hook)
        out = model(input_ids=tokens, labels=tokens)
        handle.remove()
    p, q = torch.softmax(clean.double(), dim=-1), torch.softmax(out.logits.double(), dim=-1)
    return float(out.loss), float((p * (torch.log(p) - torch.log(q))).sum(dim=-1).mean())


def random_replacements() -> Sequence[Replacement]:
    torch.manual_seed(0)
    shift = torch.randn(32)
    return [lambda _, y: y + shift, zeros, lambda x, _: x.clone(), constant(shift)]


def test_clean_loss_is_transformers_own(spliced: SplicedModel, reference: Any, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        wanted = float(reference(input_ids=tokens, labels=tokens).loss)
    for layer in range(3):
        clean, losses = spliced.losses(Site(layer), [])
        assert clean == pytest.approx(wanted, rel=1e-5)
        assert losses == []


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_losses_are_those_of_the_model_under_hooks(
    spliced: SplicedModel, reference: Any, tokens: Tensor, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = reference.base_model.layers[layer]
    _, losses = spliced.losses(Site(layer), random_replacements())
    for replace, got in zip(random_replacements(), losses, strict=True):
        ce, kl = hooked(reference, block, tokens, replace)
        assert got.ce == pytest.approx(ce, rel=1e-5)
        assert got.kl == pytest.approx(kl, rel=1e-4, abs=1e-7)
    assert losses[0].kl > 0.01
    assert abs(losses[2].kl) < 1e-9
    assert losses[2].ce == pytest.approx(spliced.losses(Site(layer), [])[0], rel=1e-6)
    monkeypatch.setattr("residual_saes.eval.measure.splice._LOGITS", 1)  # a sequence at a time
    for one, got in zip(spliced.losses(Site(layer), random_replacements())[1], losses, strict=True):
        assert (one.ce, one.kl) == (pytest.approx(got.ce, rel=1e-6), pytest.approx(got.kl, rel=1e-5, abs=1e-9))


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=400, n_positions=64)),
        LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=64,
                vocab_size=400,
                max_position_embeddings=64,
            )
        ),
    ],
    ids=["gpt2", "llama"],
)
def test_other_families(model: Any, tokens: Tensor, tmp_path: Path) -> None:
    model.eval().save_pretrained(tmp_path)
    spliced = SplicedModel(str(tmp_path), None, "fp32", CPU, tokens)
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for layer in range(3):
        (shift, zero, *_) = spliced.losses(Site(layer), random_replacements())[1]
        for got, replace in ((shift, random_replacements()[0]), (zero, zeros)):
            ce, kl = hooked(model, blocks[layer], tokens, replace)
            assert got.ce == pytest.approx(ce, rel=1e-5)
            assert got.kl == pytest.approx(kl, rel=1e-3, abs=1e-7)


def test_zeros_after_the_last_block_leave_the_head_alone(spliced: SplicedModel, reference: Any, tokens: torch.Tensor) -> None:
    """A second way: what the model says when its last block gives zeros is head(final norm(0)), at every position."""
    with torch.no_grad():
        logits = reference.get_output_embeddings()(reference.base_model.final_layer_norm(torch.zeros(32)))
        wanted = float(nn.functional.cross_entropy(logits.expand(tokens[:, 1:].numel(), -1), tokens[:, 1:].flatten()))
    assert spliced.losses(Site(2), [zeros])[1][0].ce == pytest.approx(wanted, rel=1e-5)


def test_the_model_is_left_as_it_was(spliced: SplicedModel) -> None:
    before = spliced.losses(Site(1), [])
    with pytest.raises(ZeroDivisionError):
        spliced.losses(Site(1), [zeros, lambda x, _: x / (1 // 0)])
    assert spliced.losses(Site(1), []) == before
    assert not any("forward" in vars(block) or block._forward_hooks for block in spliced._blocks)


def test_what_is_spliced_is_what_the_cache_measures(lm: Path, cache: Cache, runs_path: Path) -> None:
    """The error seen by a hook in the running model, over all held-out text, is the MSE over the cached rows."""
    run = Run(next(p for p in runs_path.iterdir() if p.is_dir()))
    sae = Sae.load(run.snapshot_path(Site(1), "final"))
    model = SplicedModel(str(lm), None, cache.spec.precision, CPU, heldout_tokens(cache, 10**9))
    errors, replace = [], through(sae)

    def watch(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        errors.append((sae.decode(sae.encode(x.float())) - x.float()).square().flatten())
        return replace(x, y)

    model.losses(Site(1), [watch])
    live = float(torch.cat(errors).mean())
    activations, (tally,) = measure_site(heldout_blocks(cache, Site(1), 10**9), [sae], cache.spec.context)
    assert live == pytest.approx(tally.reconstruction(activations).mse, rel=0.01)


def test_scores_of_losses() -> None:
    zero, mean, spliced = Loss(ce=9, kl=6), Loss(ce=7, kl=4), Loss(ce=4, kl=1.5)
    got = losses(3.0, zero, mean, spliced, "zero")
    assert got.ce_recovered == got.ce_loss_score == 5 / 6
    assert (got.kl_div_with_sae, got.kl_div_with_ablation, got.kl_div_score) == (1.5, 6, 0.75)
    assert (got.ce, got.ce_spliced, got.ce_zero, got.ce_mean_ablation) == (3, 4, 9, 7)
    against_mean = losses(3.0, zero, mean, spliced, "mean")
    assert against_mean.ce_recovered == 3 / 4
    assert dataclasses.replace(against_mean, ce_recovered=got.ce_recovered) == got
    broken = losses(3.0, Loss(ce=3, kl=0), mean, Loss(ce=math.nan, kl=math.nan), "zero")
    assert broken.ce_recovered is broken.kl_div_score is broken.ce_spliced is broken.kl_div_with_sae is None


def test_products_in_float32_are_no_further_from_float64(lm: Path, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bfloat16 weights in three ways: in float64, in bfloat16, and with products in float32."""
    exact = SplicedModel(str(lm), None, "bf16", CPU, tokens)
    exact._lm.double()
    torch.manual_seed(0)
    shift = torch.randn(32)
    replacements: list[Replacement] = [lambda _, y: y + shift.to(y), zeros]
    found = []
    for slow in (False, True):
        monkeypatch.setattr(residual_saes.shared.lm, "bfloat16_is_slow", lambda _, slow=slow: slow)
        found.append(SplicedModel(str(lm), None, "bf16", CPU, tokens).losses(Site(1), replacements))
    _, wanted = exact.losses(Site(1), replacements)
    assert found[0] != found[1]
    apart = [max(abs(loss.kl / want.kl - 1) for loss, want in zip(losses, wanted, strict=True)) for _, losses in found]
    assert apart[1] < 1.5 * apart[0], apart
