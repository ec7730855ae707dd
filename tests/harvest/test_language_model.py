from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from residual_saes.harvest.language_model import LanguageModel
from residual_saes.shared.errors import UserError
from residual_saes.shared.sites import parse_sites
from tests.shared.test_lm import family

CPU = torch.device("cpu")
TOKENS = torch.arange(24).reshape(2, 12) % 50


def collect(model: LanguageModel) -> dict[int, Tensor]:
    outputs: dict[int, Tensor] = {}
    model.run(TOKENS, lambda site, output: outputs.__setitem__(site.layer, output.clone()))
    return outputs


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama"])
@torch.no_grad()
def test_activations_are_the_blocks_outputs(name: str) -> None:
    lm = family(name).eval()
    reference = lm(input_ids=TOKENS, output_hidden_states=True)
    got = collect(LanguageModel(lm.base_model, parse_sites("0,1,2"), CPU))
    assert list(got) == [0, 1, 2]
    for layer in (0, 1):
        torch.testing.assert_close(got[layer], reference.hidden_states[layer + 1])


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama"])
@torch.no_grad()
def test_the_last_layer_is_taken_before_the_final_norm(name: str) -> None:
    """hidden_states[-1] is after the final norm, so the block's own output is checked through the rest of the model."""
    lm = family(name).eval()
    norm = {"gpt_neox": "final_layer_norm", "gpt2": "ln_f", "llama": "norm"}[name]
    final_norm: nn.Module = getattr(lm.base_model, norm)
    nn.init.normal_(final_norm.weight)  # a fresh norm is nearly the identity, and would hide the mistake
    reference = lm(input_ids=TOKENS, output_hidden_states=True)
    last = collect(LanguageModel(lm.base_model, parse_sites("2"), CPU))[2]
    assert not torch.allclose(last, reference.hidden_states[-1], atol=1e-2)
    torch.testing.assert_close(final_norm(last), reference.hidden_states[-1])
    torch.testing.assert_close(lm.get_output_embeddings()(final_norm(last)), reference.logits)


def test_stops_after_the_last_wanted_layer() -> None:
    lm = family("gpt_neox")
    ran = []
    for index, block in enumerate(lm.base_model.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    got = collect(LanguageModel(lm.base_model, parse_sites("1"), CPU))
    assert list(got) == [1]
    assert ran == [0, 1]


def test_other_families_and_layers_are_refused() -> None:
    with pytest.raises(UserError, match="layer 3 does not exist: the model has layers 0-2"):
        LanguageModel(family("gpt_neox").base_model, parse_sites("3"), CPU)
    with pytest.raises(UserError, match="Linear is not of the NeoX, GPT-2 or Llama families"):
        LanguageModel(nn.Linear(2, 2), parse_sites("0"), CPU)


class NoQuestions(TorchDispatchMode):
    """Refuses whatever makes the host wait for a value from the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(word in str(function) for word in ("is_nonzero", "item", "_local_scalar_dense", "nonzero", "equal"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "llama"])
def test_a_pass_never_waits_for_the_device(name: str) -> None:
    base: Any = family(name)
    model = LanguageModel(base.base_model, parse_sites("0,2"), CPU)
    model.fast = None
    with NoQuestions():
        model.run(TOKENS, lambda layer, output: None)
