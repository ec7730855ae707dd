"""Sets of transcoders for circuit-tracer: by its formula, and by the tool itself where it is installed."""

import dataclasses
import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor
from transformers import AutoConfig

from bench.peers import ENVIRONMENTS
from residual_saes.eval.publish.formats import (
    CIRCUIT_TRACER,
    Origin,
    Source,
    circuit_tracer_hooks,
    circuit_tracer_layer,
)
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.run import FINAL, Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site
from tests.conftest import TRAIN_ARGS, Cli, invoke
from tests.eval.publish.test_export import a_sae, require_ours, some_x
from tests.test_sites import saved

SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64, "n_ctx": 64},  # n_ctx: TransformerLens'
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
}
SETTINGS = {"gpt2": ("jumprelu:8",), "llama": ("batchtopk:8", "--skip")}


@pytest.mark.parametrize(
    "rule", [f"{kind}-{rule}" for kind in ("transcoder", "skip") for rule in ("relu", "threshold", "jump")]
)
def test_a_layer_is_our_function(rule: str) -> None:
    """SingleLayerTranscoder: F.linear(x, W_enc, b_enc), of which JumpReLU keeps what is above its threshold, else relu;
    @ W_dec + b_dec, + x @ W_skip.T."""
    sae = a_sae(rule=rule)
    w, x = load(circuit_tracer_layer(sae)), some_x(sae)
    z = x @ w["W_enc"].T + w["b_enc"]
    z = z * (z > w["activation_function.threshold"]) if "activation_function.threshold" in w else torch.relu(z)
    require_ours(sae, x, z, z @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0), CIRCUIT_TRACER)


def test_a_threshold_below_zero_lets_nothing_below_zero_through() -> None:
    """A gate's may be; ours are of what relu leaves."""
    sae = dataclasses.replace(a_sae(rule="transcoder-threshold"), threshold=torch.full((256,), -0.5))
    assert float(load(circuit_tracer_layer(sae))["activation_function.threshold"].min()) == 0


def test_what_it_cannot_hold_is_refused() -> None:
    origin = Origin(site=Site(1), source=Source(run="r", file="a.pt"), family="llama")
    sae = a_sae(rule="skip-threshold")
    of = {
        name: dataclasses.replace(sae, config={"inputs": [name], "outputs": ["1.mlp_out"]})
        for name in ("1.mlp_in", "1.resid_mid")
    }
    hooks = circuit_tracer_hooks(of["1.mlp_in"], origin)
    assert hooks == {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    assert circuit_tracer_hooks(of["1.resid_mid"], origin)["feature_input_hook"] == "hook_resid_mid"
    qwen = circuit_tracer_hooks(of["1.mlp_in"], dataclasses.replace(origin, family="qwen3"))
    assert qwen["feature_output_hook"] == "mlp.hook_out"
    cases: list[tuple[Sae, str | None, str]] = [
        (a_sae(), None, "r/a.pt is an SAE, and circuit-tracer loads transcoders: export it to saelens or"),
        (a_sae(rule="transcoder-topk"), None, "with topk, and circuit-tracer has no such transcoders: export it to sparsify"),
        (sae, None, "r/a.pt is of 0>1, and circuit-tracer puts transcoders in the place of MLPs"),
        (of["1.mlp_in"], "olmo2", "behind a norm of olmo2 models"),
    ]
    for wrong, family, message in cases:
        with pytest.raises(UserError, match=message):
            circuit_tracer_hooks(wrong, dataclasses.replace(origin, family=family))


@dataclasses.dataclass(kw_only=True, frozen=True, slots=True)
class Trained:
    """A tiny model, its cache, and a run of transcoders of all its MLPs."""

    model: Path
    cache: Cache
    run: Run


@pytest.fixture(scope="module", params=["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, lm: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    family, folder = request.param, tmp_path_factory.mktemp("circuit")
    model = saved(AutoConfig.for_model(family, vocab_size=400, initializer_range=0.2, **SIZES[family]), lm, folder / "lm")
    shape = ("--context", 32, "--block-sequences", 16, "--tokens", 10_240, "--holdout-tokens", 2_048, "--precision", "fp32")
    where = ("--model", model, "--dataset", text, "--cache", folder / "cache", "--sites", "mlp_in,mlp_out")
    assert invoke("harvest", "--preset", "demo", "--device", "cpu", *shape, *where) == 0
    args = ("--cache", folder / "cache", "--runs", folder / "runs", "--target", "mlp_in>mlp_out", "--l1")
    assert invoke("train", *TRAIN_ARGS, *args, *SETTINGS[family]) == 0
    (run,) = (folder / "runs").iterdir()
    return Trained(model=model, cache=Cache.open(folder / "cache"), run=Run(run))


def exported(trained: Trained, out: Path, *more: object) -> Path:
    assert invoke("eval", "export", "--to", CIRCUIT_TRACER, "--runs", trained.run.path, "--out", out, *more) == 0
    (folder,) = out.iterdir()
    return folder


def test_a_set_is_of_all_layers_and_made_whole_again(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    folder = exported(trained, tmp_path / "out")
    assert folder.name == trained.run.path.name
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(content) == ["config.yaml", *(f"layer_{n}.safetensors" for n in range(3))]
    config = json.loads(content["config.yaml"])
    assert (config["model_kind"], config["scan"]) == ("transcoder_set", folder.name) and "model_name" not in config
    assert [source["file"] for source in config["sources"]] == [f"sae_layer0{n}.mlp_out_final.pt" for n in range(3)]
    (folder / "layer_0.safetensors").unlink()
    (folder / "layer_2.safetensors").write_bytes(content["layer_2.safetensors"][:-9])
    assert exported(trained, tmp_path / "out") == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    args = ("eval", "export", "--to", CIRCUIT_TRACER, "--runs", trained.run.path, "--out")
    few = cli(*args, tmp_path / "few", "--layers", "0.mlp_out,2.mlp_out")
    assert few.code == 2 and "lacks layers 1, and circuit-tracer wants all of a model's" in few.err
    assert "2 of 2 SAEs are left out" in few.err and not (tmp_path / "few").exists()
    label = trained.run.snapshots()[0].label
    assert exported(trained, tmp_path / "early", "--snapshot", label).name == f"{folder.name}_{label}"
    other = cli(*args, tmp_path / "out", "--model", "some/model")
    assert other.code == 2 and "holds something else already" in other.err


@torch.no_grad()
def ours(trained: Trained, tokens: Tensor) -> Tensor:
    """What features of all layers do on some tokens, by hooks of transformers alone, [layers, tokens, F]."""
    from residual_saes.shared.lm import load_model

    model: Any = load_model(str(trained.model), None, "fp32", head=False)
    blocks, read = model.h if hasattr(model, "h") else model.layers, dict[int, Tensor]()

    def keep(layer: int, _module: Any, args: tuple[Tensor, ...]) -> None:
        read[layer] = args[0][0]

    for layer, block in enumerate(blocks):
        block.mlp.register_forward_pre_hook(partial(keep, layer))
    model(input_ids=tokens[None])
    return torch.stack([sae.encode(read[layer]) for layer, sae in enumerate(saes(trained))])


def saes(trained: Trained) -> list[Sae]:
    return [Sae.load(trained.run.snapshot_path(Site(layer, "mlp_out"), FINAL)) for layer in range(3)]


@pytest.mark.slow
def test_circuit_tracer_opens_it_and_draws_a_graph(trained: Trained, tmp_path: Path) -> None:
    environment = ENVIRONMENTS / "circuit_tracer"
    if not (environment / "stamp.json").exists():  # which bench.peers puts into one that is complete
        pytest.skip(f"circuit_tracer is not installed in {environment}; `python -m bench.peers` does it")
    folder = exported(trained, tmp_path / "sets")
    tokens = torch.from_numpy(trained.cache.read_tokens(0, 1))[0, :12].long()
    tokens[0] = 0  # the end of a text, for circuit-tracer wants a special token first
    first = trained.cache.spec.train_tokens
    x = torch.stack([torch.from_numpy(trained.cache.layer(Site(n, "mlp_in"))[first:][:500]).float() for n in range(3)])
    torch.save({"x": x, "tokens": tokens}, tmp_path / "in.pt")
    given, out, worker = tmp_path / "in.pt", tmp_path / "out.pt", Path(__file__).with_name("load_circuit_tracer.py")
    done = subprocess.run(
        [environment / "bin" / "python", worker, trained.model, folder.name, given, out],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "CIRCUIT_TRACER_CACHE_DIR": str(folder.parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    got = torch.load(out, weights_only=True)
    assert got["said"] == ["mlp.hook_in", "hook_mlp_out", folder.name]
    for layer, sae in enumerate(saes(trained)):
        z = sae.encode(x[layer])
        assert float((z > 0).double().mean()) > 0.01
        for mine, theirs in ((z, got["z"][layer]), (sae.reconstruct(x[layer], z), got["y"][layer])):
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4 * float(mine.abs().max()))
    z = ours(trained, got["tokens"])
    z[:, 0] = 0  # where it lets nothing be active
    torch.testing.assert_close(got["activations"], z, rtol=1e-3, atol=1e-4 * float(z.max()))
    layers, positions, features = got["features"].T
    assert len(layers) == int((z > 0).sum()) > 10
    torch.testing.assert_close(got["values"], z[layers, positions, features], rtol=1e-3, atol=1e-4 * float(z.max()))
    edges = got["edges"]
    assert bool(edges.isfinite().all()) and bool((edges[-got["n_logits"] :] != 0).any(1).all())  # something leads to each logit
    assert bool((edges[: len(layers)] != 0).any())
