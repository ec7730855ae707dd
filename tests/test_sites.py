"""Hooks beside the residual stream, from the harvest to the loss, in each family of language models."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPTNeoConfig,
    PretrainedConfig,
)

from residual_saes.eval.measure.splice import SplicedModel, zeros
from residual_saes.eval.publish.formats import Origin, Source, saelens
from residual_saes.harvest.language_model import LanguageModel
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.lm import changing, family_of, known_model, module_name, require_site
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site, format_sites, parse_sites
from tests.conftest import Cli, invoke
from tests.harvest.conftest import content, flip

_LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 400}
_FEW = {"num_key_value_heads": 1}
_GEMMA = {"head_dim": 8, "num_key_value_heads": 1, "sliding_window": 8}
# {name: (model_type, what its configuration needs beside the sizes, the modules of a block whose outputs are added to the
# stream, whether one is added before the other reads)}
FAMILIES: dict[str, tuple[str, dict[str, object], tuple[str, str] | None, bool]] = {
    "bloom": ("bloom", {"n_layer": 3, "n_head": 2}, None, True),
    "gemma": ("gemma", {"head_dim": 8, **_FEW}, ("self_attn", "mlp"), True),
    "gemma2": ("gemma2", _GEMMA, ("post_attention_layernorm", "post_feedforward_layernorm"), True),
    "gemma3_text": ("gemma3_text", _GEMMA, ("post_attention_layernorm", "post_feedforward_layernorm"), True),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}, ("attn", "mlp"), True),
    "gpt_neox": ("gpt_neox", {}, ("attention", "mlp"), False),
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}, ("attention", "mlp"), True),
    "gptj": ("gptj", {"n_embd": 16, "n_layer": 3, "n_head": 2, "rotary_dim": 4}, ("attn", "mlp"), False),
    "llama": ("llama", {}, ("self_attn", "mlp"), True),
    "mistral": ("mistral", {"sliding_window": 8, **_FEW}, ("self_attn", "mlp"), True),
    "nanochat": ("nanochat", {}, None, True),  # whose last norm is its first as well
    "olmo": ("olmo", {}, ("self_attn", "mlp"), True),
    "olmo2": ("olmo2", {}, ("post_attention_layernorm", "post_feedforward_layernorm"), True),
    "olmo3": ("olmo3", {"sliding_window": 8}, ("post_attention_layernorm", "post_feedforward_layernorm"), True),
    "phi": ("phi", {}, ("self_attn", "mlp"), False),
    "qwen2": ("qwen2", _FEW, ("self_attn", "mlp"), True),
    "qwen3": ("qwen3", {"head_dim": 8, **_FEW}, ("self_attn", "mlp"), True),
    "stablelm": ("stablelm", _FEW, ("self_attn", "mlp"), True),
    "stablelm, side by side": ("stablelm", {"use_parallel_residual": True, **_FEW}, ("self_attn", "mlp"), False),
}
SITE = Site(2, "mlp_out")
SHAPE = ("--context", 32, "--block-sequences", 8, "--tokens", 2048, "--holdout-tokens", 512, "--precision", "fp32")
DEMO = ("--preset", "demo", "--device", "cpu")
CPU = torch.device("cpu")


def config_of(name: str) -> PretrainedConfig:
    family, more, _, _ = FAMILIES[name]
    sizes = _LLAMA if "n_layer" not in more else {"hidden_size": 16, "vocab_size": 400}
    return AutoConfig.for_model(family, initializer_range=0.2, **sizes | more)


def hooks_of(name: str) -> tuple[str, ...]:
    """That a model of the family has, in the order in which a pass comes to them."""
    _, _, added, sequential = FAMILIES[name]
    return (*(("attn_out", *(("resid_mid",) if sequential else ()), "mlp_in", "mlp_out") if added else ()), "resid_post")


@dataclass(kw_only=True, frozen=True, slots=True)
class Harvested:
    """A model and the cache of all its layers at every hook, harvested in one pass."""

    name: str
    model: Path
    args: tuple[object, ...]  # for another cache of it
    cache: Cache


def saved(config: PretrainedConfig, lm: Path, folder: Path) -> Path:
    """A model with random weights and the tokenizer of `lm`."""
    shutil.copytree(lm, folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gpt_neox", "gpt_neox, one after the other", "gpt2", "llama", "gemma2", "olmo2"])
def harvested(request: pytest.FixtureRequest, lm: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Harvested:
    name, folder = request.param, tmp_path_factory.mktemp("family")
    model = saved(config_of(name), lm, folder / "lm")
    args = (*DEMO, "--model", model, "--dataset", text, *SHAPE)
    assert invoke("harvest", *args, "--cache", folder / "cache", "--sites", ",".join(hooks_of(name))) == 0
    return Harvested(name=name, model=model, args=args, cache=Cache.open(folder / "cache"))


def blocks_of(model: Any) -> Any:
    return model.h if hasattr(model, "h") else model.layers


def part(values: Tensor | tuple[Tensor, ...]) -> Tensor:
    return values if isinstance(values, Tensor) else values[0]


@torch.no_grad()
def hooked(model: Any, name: str, tokens: Tensor) -> dict[Site, Tensor]:
    """The same activations as anyone takes them, float32 [sequences, context, d_model]; the stream inside a block as a sum."""
    values, added = dict[Site, Tensor](), FAMILIES[name][2]
    streams = dict[int, Tensor]()

    def keep(where: dict[Any, Tensor], key: Any) -> Any:
        return lambda _module, _args, output=None: where.update({key: part(_args if output is None else output)})

    for layer, block in enumerate(blocks_of(model)):
        block.register_forward_pre_hook(keep(streams, layer))
        block.register_forward_hook(keep(values, Site(layer)))
        if added:
            block.mlp.register_forward_pre_hook(keep(values, Site(layer, "mlp_in")))
            for module, hook in zip(added, ("attn_out", "mlp_out"), strict=True):
                block.get_submodule(module).register_forward_hook(keep(values, Site(layer, hook)))
    model(input_ids=tokens)
    if "resid_mid" in hooks_of(name):
        values |= {Site(n, "resid_mid"): x + values[Site(n, "attn_out")] for n, x in streams.items()}
    if added:  # what is called added is all that is
        for n, x in streams.items():
            total = x + values[Site(n, "attn_out")] + values[Site(n, "mlp_out")]
            torch.testing.assert_close(total, values[Site(n)], rtol=1e-5, atol=1e-5)
    return values


def test_every_hook_is_what_plain_hooks_see(harvested: Harvested) -> None:
    """Up to the rounding of float16, in which a cache stores values."""
    cache, sites = harvested.cache, parse_sites("0-2", hooks=hooks_of(harvested.name))
    assert cache.sites == sites and cache.missing(sites) == {}
    model = AutoModel.from_pretrained(harvested.model, dtype=torch.float32).eval()
    wanted = hooked(model, harvested.name, torch.from_numpy(cache.tokens.read(0, cache.spec.sequences)))
    assert set(wanted) == set(sites)
    for site, values in wanted.items():
        flat = values.reshape(-1, cache.spec.d_model).numpy()
        np.testing.assert_allclose(cache.layer(site)[:].astype(np.float32), flat, rtol=2**-11, atol=2e-6)


@pytest.fixture
def random_model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(request.param)).eval().requires_grad_(False)


TOKENS = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("random_model", "name"), [(name, name) for name in FAMILIES], indirect=["random_model"])
def test_a_family_is_harvested_as_its_whole_model_computes_it(random_model: Any, name: str) -> None:
    """The model without its head and last norm, beside the one that transformers has, in float32 with random weights."""
    wanted, taken = hooked(copy.deepcopy(random_model.base_model), name, TOKENS), dict[Site, Tensor]()
    sites = parse_sites("0-2", hooks=hooks_of(name))
    LanguageModel(random_model.base_model, sites, CPU).run(TOKENS, lambda site, x: taken.update({site: x.clone()}))
    assert set(taken) == set(wanted) == set(sites)
    for site, values in wanted.items():
        assert values.std() > 0.01
        torch.testing.assert_close(taken[site], values, rtol=1e-5, atol=1e-6)


def shift(x: Tensor) -> Tensor:
    return 0.5 * x + torch.linspace(-1, 1, 16)


@torch.no_grad()
def spliced(model: Any, name: str, site: Site, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits of a model that goes on with other activations at a site, by another way for the stream inside a block: its
    attention adds what is missing."""
    block, streams, added = blocks_of(model.base_model)[site.layer], list[Tensor](), FAMILIES[name][2]
    handles = [block.register_forward_pre_hook(lambda _module, args: streams.append(args[0]))]

    def after(output: Tensor | tuple[Tensor, ...]) -> Any:
        x = part(output)
        new = change(streams[-1] + x) - streams[-1] if site.hook == "resid_mid" else change(x)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    if site.hook == "mlp_in":
        handles.append(block.mlp.register_forward_pre_hook(lambda _module, args: change(args[0])))
    else:
        attention, mlp = added or ("", "")
        module = {"resid_post": "", "mlp_out": mlp}.get(site.hook, attention)
        handles.append(block.get_submodule(module).register_forward_hook(lambda _module, _args, output: after(output)))
    logits = model(input_ids=TOKENS).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize(("random_model", "name"), [(name, name) for name in FAMILIES], indirect=["random_model"])
def test_activations_are_replaced_where_they_are(random_model: Any, name: str, tmp_path: Path) -> None:
    """In the loss that is measured and in a model at work: the stream inside a block for its MLP and around it."""
    random_model.save_pretrained(tmp_path)
    measured = SplicedModel(str(tmp_path), None, "fp32", CPU, TOKENS)
    clean = torch.nn.functional.cross_entropy(
        random_model(input_ids=TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
    )
    seen = set[float]()
    for site in parse_sites("0,2", hooks=hooks_of(name)):
        own, losses = measured.losses(site, [lambda _, x: shift(x), zeros, lambda x, _: x])
        assert own == losses[2].ce == pytest.approx(float(clean), rel=1e-5)
        for change, loss in zip((shift, torch.zeros_like), losses, strict=False):
            logits = spliced(random_model, name, site, change)
            wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
            assert loss.ce == pytest.approx(float(wanted), rel=1e-5)
            with torch.no_grad(), changing(random_model.base_model, site, change):
                torch.testing.assert_close(random_model(input_ids=TOKENS).logits, logits, rtol=1e-4, atol=1e-5)
            seen.add(round(loss.ce, 4))
    assert len(seen) > len(hooks_of(name)) * 2 - 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in random_model.modules())


@pytest.mark.parametrize(
    ("name", "site", "why"),
    [
        ("gpt_neox", "1.resid_mid", "this gpt_neox model has no resid_mid: its attention and MLP stand side by side; "),
        ("stablelm, side by side", "1.resid_mid", "this stablelm model has no resid_mid: "),
        ("phi", "1.resid_mid", "this phi model has no resid_mid: "),
        ("gptj", "1.resid_mid", "this gptj model has no resid_mid: "),
        ("bloom", "1.attn_out", "attn_out is not known of a bloom model: harvest another hook, or a model of gemma, "),
        ("bloom", "1.mlp_in", "mlp_in is not known of a bloom model: "),
    ],
)
def test_a_hook_that_a_model_lacks_is_refused(name: str, site: str, why: str) -> None:
    with pytest.raises(UserError) as refused:
        require_site(config_of(name), *parse_sites(site))
    assert str(refused.value).startswith(why) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "site", "lens", "module"),
    [
        ("gpt2", "1.resid_mid", "blocks.1.hook_resid_mid", "transformer.h.1.ln_2.input"),
        ("gpt_neox", "1", "blocks.1.hook_resid_post", "gpt_neox.layers.1.output"),
        ("gpt_neox", "1.attn_out", "blocks.1.hook_attn_out", "gpt_neox.layers.1.attention.output"),
        ("llama", "1.mlp_in", "blocks.1.mlp.hook_in", "model.layers.1.mlp.input"),
        ("gemma2", "1.attn_out", "blocks.1.hook_attn_out", "model.layers.1.post_attention_layernorm.output"),
        ("gemma2", "1.mlp_out", "blocks.1.hook_mlp_out", "model.layers.1.post_feedforward_layernorm.output"),
        ("olmo2", "1.attn_out", "blocks.1.ln1.hook_out", "model.layers.1.post_attention_layernorm.output"),
        ("olmo2", "1.mlp_out", "blocks.1.ln2.hook_out", "model.layers.1.post_feedforward_layernorm.output"),
    ],
)
def test_other_tools_are_told_where_it_is(name: str, site: str, lens: str, module: str, lm: Path, tmp_path: Path) -> None:
    """In the words of TransformerLens, whose hooks on OLMo 2 come before the norm of what is added, and of transformers."""
    of, model = parse_sites(site)[0], known_model(str(saved(config_of(name), lm, tmp_path / "lm")), None)
    origin = Origin(site=of, source=Source(run="r", file="a.pt"), family=family_of(model), module=module_name(model, of))
    zeros = torch.zeros(16, 16)
    sae = Sae(b_pre=zeros[0], w_enc=zeros, b_enc=zeros[:, 0], w_dec=zeros, b_dec=zeros[0], config={}, stats={})
    said = json.loads(saelens(sae, origin)["cfg.json"])["metadata"]
    assert (said["hook_name"], said["hf_hook_name"]) == (lens, module)


@pytest.mark.parametrize("harvested", ["gpt_neox"], indirect=True)
def test_hooks_and_layers_make_the_same_sites_as_sites_by_name(harvested: Harvested, cli: Cli, tmp_path: Path) -> None:
    planned = cli(
        "harvest",
        "plan",
        *harvested.args[:2],
        "--model",
        harvested.model,
        "--layers",
        "0-1,2.mlp_out",
        "--sites",
        "mlp_in,attn_out",
        "--json",
    )
    sites = ["0.attn_out", "0.mlp_in", "1.attn_out", "1.mlp_in", "2.mlp_out"]
    assert json.loads(planned.out)["layers"] == sites
    path = tmp_path / "c"
    assert cli("harvest", *harvested.args, "--cache", path, "--layers", "0-1,2.mlp_out", "--sites", "mlp_in,attn_out").code == 0
    cache = Cache.open(path)
    assert [site.json for site in cache.sites] == sites
    refused = cli("harvest", *harvested.args, "--cache", path, "--sites", "mlp_in,resid_pre")
    assert refused.code == 2 and len(refused.err.splitlines()) == 1
    assert "'resid_pre' is not a hook: write some of resid_post,resid_mid,mlp_in,mlp_out,attn_out" in refused.err
    refused = cli("harvest", *harvested.args, "--cache", path, "--sites", "resid_mid")
    assert refused.code == 2 and "has no resid_mid" in refused.err and len(refused.err.splitlines()) == 1
    for site in cache.sites:
        assert cache.block_path(site, 3).read_bytes() == harvested.cache.block_path(site, 3).read_bytes()


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


@pytest.mark.parametrize("harvested", ["gpt_neox, one after the other", "gemma2"], indirect=True)
def test_an_sae_of_a_hook_is_trained_and_its_loss_is_spliced_there(harvested: Harvested, cli: Cli, tmp_path: Path) -> None:
    where = (*DEMO, "--cache", harvested.cache.path, "--runs", tmp_path)
    size = ("--batch", 256, "--expansion", 2, "--window-blocks", 2, "--lr-warmup", 0)
    sites = parse_sites("2", hooks=hooks_of(harvested.name)[:-1])
    trained = cli("train", *where, *size, "--l1", "1e-3", "--layers", format_sites(sites))
    assert trained.code == 0, trained.err
    measured = cli("eval", *where, "--ce-tokens", 256, "--numbers-only", "--snapshots", "final")
    assert measured.code == 0, measured.err
    (run,) = tmp_path.glob("*/config.json")
    assert len(list(run.parent.glob("sae_layer02.mlp_out_*.pt"))) == 6
    records = json.loads((run.parent / "results" / "metrics.json").read_bytes())
    tokens = torch.from_numpy(harvested.cache.block_tokens(harvested.cache.spec.train_blocks))
    model = SplicedModel(str(harvested.model), None, "fp32", CPU, tokens)
    for site in sites:
        record = records[f"layer{site.key}_final"]
        assert record["layer"] == str(site)
        clean, (same, none) = model.losses(site, [lambda x, _: x, zeros])
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
