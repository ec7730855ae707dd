import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from harvest.language_model import LanguageModel
from shared.errors import UserError
from shared.lm import load_config, load_model, require_model
from shared.sites import parse_sites

CPU = torch.device("cpu")
TOKENS = torch.arange(24).reshape(2, 12) % 50


def family(name: str) -> nn.Module:
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


def collect(model: LanguageModel) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    model.run(TOKENS, lambda site, output: found.__setitem__(site.layer, output.clone()))
    return found


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
