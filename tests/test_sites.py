"""Hooks beside the residual stream, from the harvest to the loss: what an MLP adds to it, in each family of language models."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
)

from residual_saes.eval.measure.splice import SplicedModel
from residual_saes.harvest.language_model import LanguageModel
from residual_saes.shared.cache import Cache
from residual_saes.shared.sites import Site, parse_sites
from tests.conftest import Cli, invoke
from tests.harvest.conftest import content, flip

_LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 400}
FAMILIES: dict[str, tuple[PretrainedConfig, str]] = {  # and where its decoder blocks are
    "gpt_neox": (GPTNeoXConfig(**_LLAMA), "layers"),
    "gpt2": (GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=400, n_positions=32), "h"),
    "llama": (LlamaConfig(**_LLAMA), "layers"),
}
# model_type: what its configuration needs beside the sizes, and the module of a block whose output is added to the stream
OTHERS: dict[str, tuple[dict[str, object], str | None]] = {
    "bloom": ({"n_layer": 3, "n_head": 2}, None),
    "gemma": ({"head_dim": 8, "num_key_value_heads": 1}, "mlp"),
    "gemma2": ({"head_dim": 8, "num_key_value_heads": 1, "sliding_window": 8}, "post_feedforward_layernorm"),
    "gemma3_text": ({"head_dim": 8, "num_key_value_heads": 1, "sliding_window": 8}, "post_feedforward_layernorm"),
    "gptj": ({"n_embd": 16, "n_layer": 3, "n_head": 2, "rotary_dim": 4}, "mlp"),
    "mistral": ({"num_key_value_heads": 1, "sliding_window": 8}, "mlp"),
    "olmo2": ({}, "post_feedforward_layernorm"),
    "phi": ({}, "mlp"),
    "qwen2": ({"num_key_value_heads": 1}, "mlp"),
    "qwen3": ({"head_dim": 8, "num_key_value_heads": 1}, "mlp"),
}
SITES = parse_sites("0-2,0-2.mlp_out")
SITE = Site(2, "mlp_out")
SHAPE = ("--context", 32, "--block-sequences", 8, "--tokens", 2048, "--holdout-tokens", 512, "--precision", "fp32")
DEMO = ("--preset", "demo", "--device", "cpu")


@dataclass(kw_only=True, frozen=True, slots=True)
class Harvested:
    """A model and the cache of all its layers at both hooks, harvested in one pass."""

    blocks: str
    model: Path
    args: tuple[object, ...]  # for another cache of it
    cache: Cache


def saved(config: PretrainedConfig, lm: Path, folder: Path) -> Path:
    """A model with random weights and the tokenizer of `lm`."""
    shutil.copytree(lm, folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def harvested(request: pytest.FixtureRequest, lm: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Harvested:
    (config, blocks), folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    model = saved(config, lm, folder / "lm")
    args = (*DEMO, "--model", model, "--dataset", text, *SHAPE)
    assert invoke("harvest", *args, "--cache", folder / "cache", "--layers", "0-2,0-2.mlp_out") == 0
    return Harvested(blocks=blocks, model=model, args=args, cache=Cache.open(folder / "cache"))


def hooked(harvested: Harvested, tokens: Tensor) -> dict[Site, Tensor]:
    """The same activations, as anyone would take them: float32 [sequences, context, d_model]."""
    model, outputs = AutoModel.from_pretrained(harvested.model, dtype=torch.float32).eval(), dict[Site, Tensor]()
    for layer, block in enumerate(getattr(model, harvested.blocks)):
        for site, module in ((Site(layer), block), (Site(layer, "mlp_out"), block.mlp)):

            def take(_module: object, _args: object, output: Tensor | tuple[Tensor], site: Site = site) -> None:
                outputs[site] = output if isinstance(output, Tensor) else output[0]

            module.register_forward_hook(take)
    with torch.no_grad():
        model(input_ids=tokens)
    return outputs


def test_both_hooks_are_what_plain_hooks_see(harvested: Harvested) -> None:
    """Up to the rounding of float16, in which a cache stores values."""
    cache = harvested.cache
    assert cache.sites == SITES and cache.missing(SITES) == {}
    wanted = hooked(harvested, torch.from_numpy(cache.tokens.read(0, cache.spec.sequences)))
    assert set(wanted) == set(SITES)
    for site, values in wanted.items():
        flat = values.reshape(-1, cache.spec.d_model).numpy()
        np.testing.assert_allclose(cache.layer(site)[:].astype(np.float32), flat, rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_is_harvested_as_its_whole_model_computes_it(family: str) -> None:
    """The model without its head and last norm, beside the one that transformers has, in float32 with random weights."""
    more, added = OTHERS[family]
    sizes = _LLAMA if "n_layer" not in more else {"hidden_size": 16, "vocab_size": 400}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(family, initializer_range=0.2, **sizes | more)).eval()
    blocks = model.h if hasattr(model, "h") else model.layers
    wanted: dict[Site, Tensor] = {}

    def keep(site: Site, output: Tensor | tuple[Tensor]) -> None:
        wanted[site] = output if isinstance(output, Tensor) else output[0]

    blocks[2].register_forward_hook(lambda _module, _args, output: keep(Site(2), output))
    for layer in range(3 if added else 0):
        site = Site(layer, "mlp_out")
        blocks[layer].get_submodule(str(added)).register_forward_hook(lambda _m, _args, output, site=site: keep(site, output))
    tokens = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    wanted |= {Site(0): states[1], Site(1): states[2]}
    taken: dict[Site, Tensor] = {}
    LanguageModel(model, tuple(sorted(wanted)), torch.device("cpu")).run(
        tokens, lambda site, x: taken.update({site: x.clone()})
    )
    assert set(taken) == set(wanted) and len(wanted) == (6 if added else 3)
    for site, values in wanted.items():
        assert values.std() > 0.01
        torch.testing.assert_close(taken[site], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("harvested", ["gpt_neox"], indirect=True)
def test_a_hook_can_be_added_freed_and_repaired(harvested: Harvested, cli: Cli, tmp_path: Path) -> None:
    path, both = tmp_path / "c", harvested.cache
    assert cli("harvest", *harvested.args, "--cache", path).code == 0
    added = cli("harvest", *harvested.args, "--cache", path, "--layers", "1-2.mlp_out")
    assert added.code == 0 and "layers 1-2.mlp_out complete" in added.out
    cache = Cache.open(path)
    assert cache.sites == parse_sites("0-2,1-2.mlp_out")
    for site in cache.sites:
        assert cache.block_path(site, 3).read_bytes() == both.block_path(site, 3).read_bytes()
    whole = content(cache)
    flip(cache.block_path(SITE, 3))
    verified = cli("harvest", "verify", "--cache", path)
    assert verified.code == 1 and "layer 2.mlp_out block 3 " in verified.out
    assert "repaired 1 layer blocks" in cli("harvest", "repair", "--cache", path, "--device", "cpu").out
    assert content(cache) == whole
    freed = cli("harvest", "free", "--cache", path, "--layers", "2.mlp_out", "--yes")
    assert freed.code == 0 and cache.freed() == (SITE,) and cache.freeable(SITE) == []
    assert cache.freeable(Site(2)) == list(range(cache.spec.train_blocks))


def test_an_sae_of_a_hook_is_trained_and_its_loss_is_spliced_there(harvested: Harvested, cli: Cli, tmp_path: Path) -> None:
    where = (*DEMO, "--cache", harvested.cache.path, "--runs", tmp_path)
    size = ("--batch", 256, "--expansion", 2, "--window-blocks", 2, "--lr-warmup", 0)
    trained = cli("train", *where, *size, "--l1", "1e-3", "--layers", "2.mlp_out")
    assert trained.code == 0, trained.err
    measured = cli("eval", *where, "--ce-tokens", 256, "--numbers-only")
    assert measured.code == 0, measured.err
    (run,) = tmp_path.glob("*/config.json")
    assert len(list(run.parent.glob("sae_layer02.mlp_out_*.pt"))) == 6
    records = json.loads((run.parent / "results" / "metrics.json").read_bytes())
    record = records["layer02.mlp_out_final"]
    assert record["layer"] == "2.mlp_out"
    tokens = torch.from_numpy(harvested.cache.block_tokens(harvested.cache.spec.train_blocks))
    spliced = SplicedModel(str(harvested.model), None, "fp32", torch.device("cpu"), tokens)
    clean, (same, none) = spliced.losses(SITE, [lambda x: x, torch.zeros_like])
    assert record["ce"] == clean == same.ce != none.ce == record["ce_zero"]


@pytest.fixture
def unknown(lm: Path, tmp_path: Path) -> Path:
    config = GPTNeoConfig(
        hidden_size=16, num_layers=3, attention_types=[[["global"], 3]], num_heads=2, vocab_size=400, max_position_embeddings=32
    )
    return saved(config, lm, tmp_path / "lm")


def test_a_family_without_a_row_is_refused_before_anything_is_done(unknown: Path, text: Path, cli: Cli, tmp_path: Path) -> None:
    args = (*DEMO, "--model", unknown, "--dataset", text, *SHAPE, "--cache", tmp_path / "c", "--layers")
    for before in ((), parse_sites("0")):
        refused = cli("harvest", *args, "0,1.mlp_out")
        assert refused.code == 2 and len(refused.err.splitlines()) == 1
        assert "mlp_out is not known of a gpt_neo model: harvest another hook, or a model of gemma, " in refused.err
        assert (Cache.open(tmp_path / "c").sites if before else tuple(tmp_path.glob("c/*"))) == before
        assert before or cli("harvest", *args, 0).code == 0
