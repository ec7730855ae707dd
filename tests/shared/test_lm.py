import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from residual_saes.shared.errors import UserError
from residual_saes.shared.lm import Unembedding, find_blocks, load_config, load_model, require_model

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


def test_logits_of_more_than_the_last_block_are_refused() -> None:
    """Whose blocks are called in another way, and whose logits depend on what was embedded as well."""
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING["openai-gpt"](**SHAPE | special))
    with pytest.raises(UserError, match="how a OpenAIGPTLMHeadModel comes from its last block to logits is not known here"):
        Unembedding(lm)
    lm = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**SHAPE | special))
    embedded: list[Tensor] = []
    lm.get_input_embeddings().register_forward_hook(lambda _module, _args, output: embedded.append(output))
    lm.model.norm.register_forward_hook(lambda _module, _args, output: output + embedded[-1])
    with pytest.raises(UserError, match="LlamaForCausalLM comes from its last block"):
        Unembedding(lm)


def family(name: str) -> nn.Module:
    """A causal language model of three layers, 32 wide."""
    torch.manual_seed(0)
    if name == "gpt_neox":
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=50)
        )
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=50, n_positions=64))
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            vocab_size=50,
        )
    )


# --- weights that are not the configured model's ---

Weights = dict[str, Tensor]
BLOCKS = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h", "llama": "model.layers"}


@pytest.fixture(params=BLOCKS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family(request.param).save_pretrained(tmp_path / request.param)
    return tmp_path / str(request.param)


def change(saved: Path, how: Callable[[Weights], Weights]) -> None:
    save_file(how(load_file(saved / "model.safetensors")), saved / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("head", [False, True])
def test_a_whole_model_is_loaded_with_its_own_weights(saved: Path, head: bool) -> None:
    """Heads and what older versions stored of masks and rotations are no reason to refuse."""
    first = f"{BLOCKS[saved.name]}.0"
    names = (f"{first}.attention.bias", f"{first}.attn.masked_bias", f"{first}.self_attn.rotary_emb.inv_freq", "score.weight")
    change(saved, lambda w: {**w, **{name: torch.zeros(1) for name in names}})
    model = load_model(str(saved), None, "fp32", head=head)
    mine, theirs = model.state_dict(), family(saved.name).state_dict()
    assert len(mine) >= len(theirs) - 1
    for name, value in mine.items():
        assert torch.equal(value, theirs.get(name, theirs.get(f"{BLOCKS[saved.name].split('.')[0]}.{name}", torch.empty(0)))), (
            name
        )


WRONG: dict[str, tuple[Callable[[Weights, str], Weights], str]] = {
    "saved while compiled": (lambda w, _: {f"_orig_mod.{k}": v for k, v in w.items()}, "it lacks .* no part .* _orig_mod"),
    "in a module": (lambda w, _: {f"module.{k}": v for k, v in w.items()}, "it lacks"),
    "a layer missing": (lambda w, b: {k: v for k, v in w.items() if f"{b}.1." not in k}, r"it lacks \S+1\.\S+, .* more; save"),
    "one missing": (lambda w, b: {k: w[k] for k in sorted(w) if k != next(n for n in sorted(w) if b in n)}, "it lacks"),
    "a layer more": (
        lambda w, b: w | {k.replace(f"{b}.2.", f"{b}.3."): v.clone() for k, v in w.items()}, "no part of the model are"
    ),
    "of another shape": (
        lambda w, b: w | {k: v[:-1].clone() for k, v in w.items() if f"{b}.0." in k and v.ndim == 2}, "of another shape are"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("head", [False, True])
def test_other_weights_are_refused(saved: Path, what: str, head: bool) -> None:
    """transformers fills what it lacks with random numbers and goes on."""
    how, message = WRONG[what]
    change(saved, lambda w: how(w, BLOCKS[saved.name]))
    with pytest.raises(UserError, match=message) as error:
        load_model(str(saved), None, "fp32", head=head)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 20, 1000, -100])
def test_files_that_are_cut_or_only_point_to_weights(saved: Path, size: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(
        file.read_bytes()[:size] if size else b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    )
    with pytest.raises(UserError, match="cannot load the model"):
        require_model(str(saved), None, "fp32", 12)


def test_weights_that_an_adapter_changes_are_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where peft is installed transformers loads one that lies beside the weights, and says so by this mark."""
    load = AutoModel.from_pretrained

    def adapted(*args: Any, **options: Any) -> Any:
        model, report = load(*args, **options)
        model._hf_peft_config_loaded = True
        return model, report

    monkeypatch.setattr(AutoModel, "from_pretrained", adapted)
    with pytest.raises(UserError, match="has an adapter beside its weights: save it with them"):
        load_model(str(saved), None, "fp32", head=False)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantised"),
    "unknown quantisation": ({"quantization_config": {"quant_method": "new"}}, "is quantised|cannot load the model"),
    "another vocabulary": ({"vocab_size": 60}, "of another shape are"),
    "code of its own": (
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}},
        "cannot load the model",
    ),
    "nested": ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "is not a plain language model"),
    "no model type": ({"model_type": None}, "cannot load the model"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_configurations_that_are_of_no_use(saved: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Nothing is asked on the terminal, and no code of a model's is run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked something"))
    changes, message = CONFIGS[what]
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (saved / "own.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(UserError, match=message):
        require_model(str(saved), None, "fp32", 12)


def test_contexts_beyond_the_models_positions(saved: Path) -> None:
    positions = load_config(str(saved), None).max_position_embeddings
    require_model(str(saved), None, "fp32", positions)
    with pytest.raises(UserError, match=f"contexts of {positions + 1} tokens do not fit the {positions} positions"):
        require_model(str(saved), None, "fp32", positions + 1)
