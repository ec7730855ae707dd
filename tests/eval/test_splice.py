from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from eval.metrics import heldout_rows, heldout_tokens, reconstruction
from eval.splice import SplicedModel, through
from shared.cache import Cache
from train.runs import Run
from train.sae import Sae

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


def test_clean_loss_is_transformers_own(spliced: SplicedModel, reference: Any, tokens: torch.Tensor) -> None:
    with torch.no_grad():
        wanted = float(reference(input_ids=tokens, labels=tokens).loss)
    assert spliced.cross_entropy() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_replacing_by_itself_changes_nothing(spliced: SplicedModel, layer: int) -> None:
    assert spliced.cross_entropy(layer, lambda x: x.clone()) == pytest.approx(spliced.cross_entropy(), rel=1e-6)


def test_zeros_after_the_last_block_leave_the_head_alone(spliced: SplicedModel, reference: Any, tokens: torch.Tensor) -> None:
    """A second way: what the model says when its last block gives zeros is head(final norm(0)), at every position."""
    with torch.no_grad():
        logits = reference.get_output_embeddings()(reference.base_model.final_layer_norm(torch.zeros(32)))
        wanted = float(nn.functional.cross_entropy(logits.expand(tokens[:, 1:].numel(), -1), tokens[:, 1:].flatten()))
    assert spliced.cross_entropy(2, torch.zeros_like) == pytest.approx(wanted, rel=1e-5)


def test_hooks_are_taken_away(spliced: SplicedModel) -> None:
    before = spliced.cross_entropy()
    with pytest.raises(ZeroDivisionError):
        spliced.cross_entropy(1, lambda x: x / (1 // 0))
    spliced.cross_entropy(1, torch.zeros_like)
    assert spliced.cross_entropy() == before


def test_what_is_spliced_is_what_the_cache_measures(lm: Path, cache: Cache, runs_path: Path) -> None:
    """The error seen by a hook in the running model, over all held-out text, is the MSE over the cached rows."""
    run = Run(next(p for p in runs_path.iterdir() if p.is_dir()))
    sae = Sae.load(run.snapshot_path(1, "final"))
    model = SplicedModel(str(lm), None, cache.spec.precision, CPU, heldout_tokens(cache, 10**9))
    errors, replace = [], through(sae)

    def watch(x: torch.Tensor) -> torch.Tensor:
        errors.append((sae.decode(sae.encode(x.float())) - x.float()).square().flatten())
        return replace(x)

    model.cross_entropy(1, watch)
    live = float(torch.cat(errors).mean())
    assert live == pytest.approx(reconstruction(sae, heldout_rows(cache, 1, 10**9)).mse, rel=0.01)
