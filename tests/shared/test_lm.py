from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from shared.lm import Unembedding, find_blocks

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 120}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": {}, "gpt2": {}, "llama": {}, "phi": {}, "persimmon": {}, "qwen2": {"num_key_value_heads": 2}, "qwen3": GROUPED,
    "mistral": {"num_key_value_heads": 2}, "gemma2": GROUPED, "olmo2": {}, "mamba": {"state_size": 4}, "bloom": {},
    "lfm2": {"num_key_value_heads": 2}, "modernbert-decoder": {}, "cohere": {"num_key_value_heads": 4}, "falcon": {},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_last_blocks_output_are_the_models_own(family: str) -> None:
    """Whatever the final norm is called, with caps, scales and biases where a family has them."""
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = CONFIG_MAPPING[family](**SHAPE | FAMILIES[family] | special)
    lm: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for weight in lm.parameters():
        weight.add_(0.3 * torch.randn_like(weight))
    outputs: list[Tensor] = []
    with find_blocks(lm.base_model)[1][-1].register_forward_hook(
        lambda _block, _args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    ):
        logits = lm(input_ids=torch.randint(0, 120, (2, 7)), use_cache=False).logits
    assert torch.equal(Unembedding(lm)(outputs[0].flatten(0, 1)), logits.flatten(0, 1))
    assert sum(weight.numel() for weight in find_blocks(lm.base_model)[1].parameters()) == 0
