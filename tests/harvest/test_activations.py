"""Activations of a model of the published shape, at a few layers, against float32 on the CPU."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, GPTNeoXConfig

from residual_saes.harvest.language_model import LanguageModel
from residual_saes.shared.sites import Site
from tests.devices import DEVICES

SITES = tuple(map(Site, range(4)))


def base_model(d: int, vocab: int) -> nn.Module:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=d, num_hidden_layers=len(SITES), num_attention_heads=d // 64, intermediate_size=4 * d, vocab_size=vocab
    )  # fmt: skip
    model: nn.Module = AutoModel.from_config(config, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def activations(base: nn.Module, device: torch.device, tokens: Tensor) -> list[Tensor]:
    taken: dict[Site, Tensor] = {}
    model = LanguageModel(base.to(device), SITES, device)
    model.run(tokens, lambda site, output: taken.update({site: output.double().cpu()}))
    return [taken[site] for site in SITES]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_every_layer_is_as_near_to_float32_as_its_type(device: str, dtype: torch.dtype, bound: float) -> None:
    d, vocab, context = (1024, 50_304, 256) if device == "cuda" else (128, 512, 64)
    base, tokens = base_model(d, vocab), torch.randint(0, vocab, (2, context))
    wanted = activations(copy.deepcopy(base), torch.device("cpu"), tokens)
    for got, want in zip(activations(base.to(dtype), torch.device(device), tokens), wanted, strict=True):
        assert (got - want).norm() <= bound * want.norm()
