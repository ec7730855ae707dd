"""Exports, held against each tool's own forward pass as documented; and by the tools themselves where they are installed."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.peers import ENVIRONMENTS
from residual_saes.eval.publish import export
from residual_saes.eval.publish.formats import FORMS, KINDS, TRANSCODERS, Origin, Source, fold
from residual_saes.shared import temporaries
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.run import Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site
from tests.conftest import ROOT, Cli

SAELENS_KEYS = {"W_enc": (64, 256), "b_enc": (256,), "W_dec": (256, 64), "b_dec": (64,)}


def a_sae(*, d: int = 64, n_features: int = 256, scale: float = 1.0, rule: str = "relu") -> Sae:
    """One in which every bias matters: far from the origin, and with a decoder bias of its own. Rules of transcoders have a
    word in front: "transcoder-topk", "skip-topk"."""
    kind, _, rule = rule.rpartition("-")
    rng = torch.Generator().manual_seed(0)
    w_dec = torch.nn.functional.normalize(torch.randn(n_features, d, generator=rng), dim=1)
    return Sae(
        w_enc=w_dec * 0.7 + 0.05 * torch.randn(n_features, d, generator=rng),
        w_dec=w_dec,
        b_enc=torch.randn(n_features, generator=rng) - 1,
        b_pre=20 * scale * torch.randn(d, generator=rng),
        b_dec=scale * torch.randn(d, generator=rng),
        config={"sparsity": {"topk": {"k": 20}, "nested": {"prefixes": [0.25, 0.5]}}.get(rule, {})}
        | ({"inputs": [0], "outputs": [1]} if kind else {}),
        stats={"l0": 20.2},
        threshold=0.5 + (rule == "jump") * torch.rand(n_features, generator=rng) + torch.zeros(n_features)
        if rule in ("threshold", "nested", "jump")
        else None,
        skip=0.1 * torch.randn(d, d, generator=rng) if "skip" in kind else None,
    )


def some_x(sae: Sae, n: int = 500) -> Tensor:
    return sae.b_pre + 2 * torch.randn(n, len(sae.b_pre), generator=torch.Generator().manual_seed(1))


def in_float64(sae: Sae, x: Tensor) -> tuple[Tensor, Tensor]:
    """(z, x̂) by the definition."""
    exact = Sae(**{k: v.double() for k, v in sae.tensors().items()}, config=sae.config, stats={})
    z = exact.encode(x.double())
    return z, exact.reconstruct(x.double(), z)


Forward = Callable[[Path, Tensor], tuple[Tensor, Tensor]]


def as_topk(z: Tensor, k: int) -> Tensor:
    values, indices = z.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(z).scatter(1, indices, values)


def as_saelens(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """StandardSAE: (x − b_dec · apply_b_dec_to_input) @ W_enc + b_enc, relu, @ W_dec + b_dec. JumpReLUSAE: what is not above
    its threshold is 0. TopKSAE: relu of the k largest."""
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    assert (cfg["normalize_activations"], cfg["reshape_activations"]) == ("none", "none")
    z = torch.relu((x - w["b_dec"] * cfg["apply_b_dec_to_input"]) @ w["W_enc"] + w["b_enc"])
    if cfg["architecture"].startswith("jumprelu"):
        z = z * (z > w["threshold"])
    else:
        assert "threshold" not in w
    if cfg["architecture"] == "topk":
        assert (cfg["k"], cfg["rescale_acts_by_decoder_norm"]) == (20, False)
        z = as_topk(z, cfg["k"])
    else:
        kinds = {"standard": False, "jumprelu": False} | dict.fromkeys(("transcoder", "jumprelu_transcoder"), True)
        assert kinds[cfg["architecture"].replace("skip_", "")] == ("d_out" in cfg) and "k" not in cfg
        assert ("skip_" in cfg["architecture"]) == ("W_skip" in w)
    return z, z @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0)


def as_sparsify(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """SparseCoder: the k largest of relu(encoder(x − b_dec)), times their rows of W_dec, plus b_dec; where it transcodes of
    relu(encoder(x)), and with a skip connection W_skip x is added."""
    cfg, w = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    assert (cfg["activation"], cfg["skip_connection"]) == ("topk", "W_skip" in w)
    assert w["encoder.weight"].shape == (cfg["num_latents"], cfg["d_in"])
    pre = torch.relu(
        torch.nn.functional.linear(x - w["b_dec"] * (not cfg["transcode"]), w["encoder.weight"], w["encoder.bias"])
    )
    z = as_topk(pre, cfg["k"])
    return z, z @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0)


def as_dictionary_learning(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """AutoEncoder: relu(encoder(x − bias)), decoder(·) + bias. BatchTopKSAE: the bias is b_dec, and there is a threshold.
    AutoEncoderTopK: the same, but the k largest are kept, and a threshold of −1 says that there is none. The other two have
    their weights as parameters; JumpReluAutoEncoder takes nothing from x."""
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    w = torch.load(folder / "ae.pt", weights_only=True)
    jump, nested = (trainer["dict_class"] == name for name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"))
    if jump or nested:
        assert jump or (int(w["k"]), w["group_sizes"].tolist(), w["threshold"].shape) == (20, [64, 64, 128], ())
        z = torch.relu((x if jump else x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        z = z * (z > w["threshold"])
        return z, z @ w["W_dec"] + w["b_dec"]
    if trainer["dict_class"] in ("BatchTopKSAE", "AutoEncoderTopK"):
        assert (trainer["k"], int(w["k"]), w["threshold"].shape) == (20, 20, ())
        w["bias"] = w["b_dec"]
    else:
        assert trainer["dict_class"] == "AutoEncoder" and "threshold" not in w
    assert w["encoder.weight"].shape == (trainer["dict_size"], trainer["activation_dim"])
    z = torch.relu(torch.nn.functional.linear(x - w["bias"], w["encoder.weight"], w["encoder.bias"]))
    z = as_topk(z, trainer["k"]) if trainer["dict_class"] == "AutoEncoderTopK" else z * (z > w.get("threshold", 0.0))
    return z, torch.nn.functional.linear(z, w["decoder.weight"]) + w["bias"]


FORWARD: dict[str, Forward] = {
    "saelens": as_saelens,
    "sparsify": as_sparsify,
    "dictionary_learning": as_dictionary_learning,
}


def written(form: str, sae: Sae, folder: Path, **known: Any) -> Path:
    folder.mkdir()
    for name, content in FORMS[form](sae, Origin(site=Site(1), source=Source(run="r", file="a.pt"), **known)).items():
        (folder / name).write_bytes(content)
    return folder


RULES = [(form, rule) for form in FORMS for rule in KINDS[form]]
RULES += [(form, rule) for form in ("saelens", "dictionary_learning") for rule in ("nested", "jump")]
RULES += [(form, f"{kind}-{rule}") for form in FORMS for kind in ("transcoder", "skip") for rule in TRANSCODERS.get(form, ())]


@pytest.mark.parametrize(("form", "rule"), RULES)
def test_the_exported_function_is_ours(form: str, rule: str, tmp_path: Path) -> None:
    sae = a_sae(rule=rule)
    x = some_x(sae)
    require_ours(sae, x, *FORWARD[form](written(form, sae, tmp_path / "a"), x), form)


def require_ours(sae: Sae, x: Tensor, z: Tensor, xhat: Tensor, form: str) -> None:
    exact_z, exact_xhat = in_float64(sae, x)
    assert 0.05 < float((exact_z > 0).double().mean()) < 0.9
    # as far as ours in float32, where values reach 80; and further where x is not centred before its product
    jump = sae.threshold is not None and bool((sae.threshold != sae.threshold[0]).any())
    far = 10 if sae.transcodes or (form == "dictionary_learning" and jump) else 1
    same = (z > 0) == (exact_z > 0)  # but for what is at its threshold
    assert float((~same).double().mean()) < 1e-4
    assert float((z - exact_z)[same].abs().max()) < 2e-5 * far
    assert float((xhat - exact_xhat)[same.all(1)].abs().max()) < 4e-5 * far


def test_thresholds_are_refused_where_a_tool_has_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^r/a.pt has thresholds, .* export it to saelens or dictionary_learning$"):
        written("sparsify", a_sae(rule="threshold"), tmp_path / "a")
    with pytest.raises(
        UserError, match=r"is a transcoder with topk, and saelens has no such transcoders: export it to sparsify$"
    ):
        written("saelens", a_sae(rule="skip-topk"), tmp_path / "b")
    with pytest.raises(
        UserError, match=r"and dictionary_learning has no such transcoders: export it to saelens or sparsify or"
    ):
        written("dictionary_learning", a_sae(rule="transcoder-relu"), tmp_path / "c")
    crosscoder = dataclasses.replace(a_sae(), config={"inputs": [0, 1], "outputs": [0, 1]})
    with pytest.raises(UserError, match="is a crosscoder"):
        written("saelens", crosscoder, tmp_path / "d")


def test_the_fold_is_as_good_as_float32_allows() -> None:
    """Large biases and a tiny one: what the rounding of b_pre + b_dec loses, b_enc makes up for."""
    sae = a_sae(scale=1000.0)
    b_enc, b_dec = fold(sae)
    assert torch.equal(b_dec, sae.b_pre + sae.b_dec)
    exact = sae.b_enc.double() + sae.w_enc.double() @ (b_dec.double() - sae.b_pre.double())
    assert torch.equal(b_enc, exact.float())
    x = some_x(sae)
    through = (x.double() - b_dec.double()) @ sae.w_enc.double().T + b_enc.double()
    ours = (x.double() - sae.b_pre.double()) @ sae.w_enc.double().T + sae.b_enc.double()
    torch.testing.assert_close(through, ours, rtol=0, atol=float(b_enc.abs().max()) * 2**-24 * 1.01)


def test_what_saelens_is_told(tmp_path: Path) -> None:
    log10_density = torch.linspace(-10, 0, 256)
    known = {"model": "EleutherAI/pythia-410m", "context": 1024, "dataset": "the/pile", "bos": False}
    known |= {"log10_density": log10_density}
    assert json.loads((written("saelens", a_sae(), tmp_path / "bos", bos=True) / "cfg.json").read_text())["metadata"][
        "prepend_bos"
    ]
    folder = written("saelens", a_sae(), tmp_path / "a", **known)
    cfg = json.loads((folder / "cfg.json").read_text())
    assert (cfg["d_in"], cfg["d_sae"], cfg["dtype"]) == (64, 256, "float32")
    assert cfg["metadata"] == {
        "sae_lens_version": "6.0.0",
        "model_name": "EleutherAI/pythia-410m",
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
        "hook_name": "blocks.1.hook_resid_post",
        "prepend_bos": False,
        "context_size": 1024,
        "dataset_path": "the/pile",
        "source": {"run": "r", "file": "a.pt"},
    }
    weights = load_file(folder / "sae_weights.safetensors")
    assert {name: tuple(w.shape) for name, w in weights.items()} == SAELENS_KEYS
    assert {str(w.dtype) for w in weights.values()} == {"torch.float32"}
    assert torch.equal(load_file(folder / "sparsity.safetensors")["sparsity"], log10_density)


# --- the command ---


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_of_every_run(cli: Cli, form: str, runs_path: Path, cache: Cache, tmp_path: Path) -> None:
    result = cli("eval", "export", "--to", form, "--runs", runs_path, "--layers", "0,2", "--out", tmp_path)
    assert (result.code, result.out) == (0, f"exported 6 SAEs to {tmp_path}\n")
    runs = sorted(p.parent for p in runs_path.glob("*/config.json"))
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.glob("*/*")) == sorted(
        Path(run.name) / f"layer_{layer}" for run in runs for layer in (0, 2)
    )
    for run in map(Run, runs):
        sae = Sae.load(run.snapshot_path(Site(2), "final"))
        x = torch.from_numpy(cache.layer(2)[-300:]).float()
        z, xhat = FORWARD[form](tmp_path / run.name / "layer_2", x)
        exact_z, exact_xhat = in_float64(sae, x)
        assert float((z - exact_z).abs().max()) < 1e-4 * float(exact_z.max())
        assert float((xhat - exact_xhat).abs().max()) < 1e-4 * float(exact_xhat.abs().max())
    for path in tmp_path.glob("*/*/*.json"):
        assert str(runs_path.parent) not in path.read_text()  # the folders of this machine are nobody else's
        assert "model_name" not in path.read_text() and "lm_name" not in path.read_text()
    assert "name is left out" in result.err


def test_the_source_is_the_file_it_was_made_from(cli: Cli, runs_path: Path, tmp_path: Path) -> None:
    run = min(p.parent for p in runs_path.glob("*/config.json"))
    args = ("eval", "export", "--to", "saelens", "--runs", run, "--layers", 1, "--out", tmp_path, "--model", "m/n")
    assert cli(*args).code == 0
    metadata = json.loads((tmp_path / run.name / "layer_1" / "cfg.json").read_text())["metadata"]
    digest = subprocess.run(["sha256sum", run / "sae_layer01_final.pt"], capture_output=True, check=True, text=True).stdout
    assert metadata["source"] == {"run": run.name, "file": "sae_layer01_final.pt", "sha256": digest.split()[0]}
    assert (metadata["model_name"], metadata["context_size"]) == ("m/n", 32)


def test_how_often_features_fire_is_as_the_evaluation_measured_it(
    cli: Cli, runs_path: Path, cache: Cache, tmp_path: Path
) -> None:
    (folder,) = {p.parent for p in runs_path.glob("*-l1-3e-3-fixed/config.json")}
    run = tmp_path / "runs" / folder.name
    shutil.copytree(folder, run, ignore=shutil.ignore_patterns("sae_*"))
    shutil.copy(folder / "sae_layer01_final.pt", run)
    args = ("--to", "saelens", "--runs", run, "--out")
    bare = cli("eval", "export", *args, tmp_path / "bare")
    assert bare.code == 0 and "sparsity.safetensors is left out where `rsae eval` has not measured" in bare.err
    assert not list((tmp_path / "bare").rglob("sparsity.safetensors"))
    evaluated = cli(
        "eval", "--preset", "demo", "--cache", cache.path, "--runs", run, "--ce-tokens", 32, "--device", "cpu", "--numbers-only"
    )
    assert evaluated.code == 0, evaluated.err
    measured = cli("eval", "export", *args, tmp_path / "out")
    assert measured.code == 0 and "left out" not in measured.err.replace("name is left out", "")
    out = tmp_path / "out" / run.name / "layer_1"
    x = torch.from_numpy(cache.layer(1)[cache.spec.train_tokens :]).float()
    share = (Sae.load(run / "sae_layer01_final.pt").encode(x) > 0).double().mean(0)
    got = load_file(out / "sparsity.safetensors")["sparsity"]
    assert got.dtype == torch.float32 and float(share.max()) > 0.01
    torch.testing.assert_close(10 ** got.double(), share, rtol=1e-5, atol=2e-10)
    assert json.loads((out / "cfg.json").read_text())["metadata"]["source"]["density_tokens"] == len(x) == 2048


def test_what_is_there_is_kept_and_what_is_something_else_is_not_replaced(cli: Cli, runs_path: Path, tmp_path: Path) -> None:
    run = min(p.parent for p in runs_path.glob("*/config.json"))
    args = ("eval", "export", "--to", "sparsify", "--runs", run, "--out", tmp_path)
    assert cli(*args).code == 0
    weights = tmp_path / run.name / "layer_0" / "sae.safetensors"
    shutil.rmtree(weights.parent.parent / "layer_2")
    before = weights.stat().st_mtime_ns
    assert cli(*args).code == 0
    temporaries._release(left := temporaries.temporary(weights.parent, folder=True))  # of one that was killed
    assert cli(*args).code == 0 and not left.exists()
    assert weights.stat().st_mtime_ns == before and (weights.parent.parent / "layer_2").exists()
    result = cli("eval", "export", "--to", "saelens", "--runs", run, "--out", tmp_path)
    assert result.code == 2
    assert "holds something else already" in result.err and "3 of 3 SAEs are left out" in result.err
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_gone_cut_or_flipped_are_made_again(cli: Cli, form: str, runs_path: Path, tmp_path: Path) -> None:
    run = min(p.parent for p in runs_path.glob("*/config.json"))
    args = ("eval", "export", "--to", form, "--runs", run, "--out", tmp_path)
    assert cli(*args).code == 0
    weights = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".pt"))
    whole = [path.read_bytes() for path in weights]
    gone, cut, flipped = weights
    gone.unlink()
    cut.write_bytes(whole[1][: len(whole[1]) // 2])
    flipped.write_bytes(whole[2][:-1] + bytes([whole[2][-1] ^ 1]))
    again = cli(*args)
    assert again.code == 0 and again.err.count("is missing or damaged: it is made again") == 3
    assert [path.read_bytes() for path in weights] == whole


def test_runs_in_the_hubs_own_cache_are_called_by_their_repositories(cli: Cli, runs_path: Path, tmp_path: Path) -> None:
    """There a snapshot's files are links to others, which are called by their hashes and lie in one folder."""
    for run in sorted(p.parent for p in runs_path.glob("*/config.json"))[:2]:
        repository = tmp_path / "hub" / f"models--org--{run.name}"
        (snapshot := repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
        (repository / "blobs").mkdir()
        for number, name in enumerate(("config.json", "sae_layer01_final.pt")):
            shutil.copy(run / name, repository / "blobs" / str(number))
            (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    snapshots = [word for path in (tmp_path / "hub").glob("*/snapshots/*") for word in ("--runs", path)]
    assert cli("eval", "export", "--to", "sparsify", *snapshots, "--out", tmp_path / "out").code == 0
    names = sorted(p.parent.name for p in runs_path.glob("*/config.json"))[:2]
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").glob("*/*")) == [
        f"{n}/layer_1" for n in names
    ]


def test_earlier_snapshots_have_folders_of_their_own(cli: Cli, runs_path: Path, tmp_path: Path) -> None:
    run = Run(min(p.parent for p in runs_path.glob("*/config.json")))
    label = run.snapshots()[0].label
    args = ("eval", "export", "--to", "dictionary_learning", "--runs", run.path, "--layers", 0, "--out", tmp_path)
    assert cli(*args, "--snapshot", label).code == 0
    assert [p.name for p in (tmp_path / run.name).iterdir()] == [f"layer_0_{label}"]


def test_a_damaged_one_is_left_out_and_the_others_are_not(cli: Cli, runs_path: Path, tmp_path: Path) -> None:
    run = min(p.parent for p in runs_path.glob("*/config.json"))
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(run / "sae_layer00_final.pt", tmp_path / "run" / "sae_layer02_final.pt")
    (tmp_path / "run" / "sae_layer01_final.pt").write_bytes((run / "sae_layer01_final.pt").read_bytes()[:5000])
    result = cli("eval", "export", "--to", "saelens", "--runs", tmp_path / "run", "--out", tmp_path / "out")
    assert result.code == 2 and "Traceback" not in result.err
    assert "sae_layer01_final.pt is not a readable SAE checkpoint" in result.err
    assert "sae_layer02_final.pt does not belong here: it says layer 0, not layer 2" in result.err
    assert "2 of 3 SAEs are left out" in result.err
    assert [p.name for p in (tmp_path / "out" / "run").iterdir()] == ["layer_0"]


# --- published files of others ---


def published(path: Path, sae: Sae, **more: Any) -> Path:
    state = {
        "b_pre": sae.b_pre,
        "encoder.weight": sae.w_enc,
        "encoder.bias": sae.b_enc,
        "decoder.weight": sae.w_dec.t().contiguous(),
        "decoder.bias": sae.b_dec,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state": state | more.pop("state", {}), **more}, path)
    return path


@pytest.mark.parametrize("more", [{}, {"config": {"layer_idx": 1, "l1": 3e-4}, "stats": {"l0": 3.0}}])
def test_published_files_of_the_same_names_open_too(cli: Cli, tmp_path: Path, more: dict[str, Any]) -> None:
    sae = a_sae()
    for name in ("sae_layer01_final.pt", "sae_layer01_50M.pt"):
        published(tmp_path / "repo" / name, sae, **more)
    (tmp_path / "repo" / "config.json").write_text('{"architectures": []}')
    args = (
        "eval",
        "export",
        "--to",
        "saelens",
        "--runs",
        tmp_path / "repo",
        "--out",
        tmp_path / "out",
        "--model",
        "pythia-410m",
    )
    assert cli(*args).code == 0
    folder = tmp_path / "out" / "repo" / "layer_1"
    x = some_x(sae)
    torch.testing.assert_close(as_saelens(folder, x)[1].double(), in_float64(sae, x)[1], rtol=0, atol=4e-5)
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["model_name"]) == ("blocks.1.hook_resid_post", "pythia-410m")
    assert not {"context_size", "dataset_path", "prepend_bos"} & set(metadata)


def test_bare_weights_of_any_name_need_their_layer(cli: Cli, tmp_path: Path) -> None:
    state = torch.load(published(tmp_path / "x.pt", a_sae()), weights_only=True)["model_state"]
    torch.save({name: w.bfloat16() for name, w in state.items()}, tmp_path / "repo.pt")
    args = ("eval", "export", "--to", "sparsify", "--runs", tmp_path / "repo.pt", "--out", tmp_path / "out")
    result = cli(*args)
    assert result.code == 2 and "does not say which layer it is of: name it with --layers" in result.err
    assert not (tmp_path / "out").exists()
    assert cli(*args, "--layers", 7).code == 0
    assert json.loads(next((tmp_path / "out").glob("*/layer_7_repo/cfg.json")).read_text())["layer"] == 7


BAD: list[tuple[dict[str, Any], str]] = [
    ({"log_threshold": torch.zeros(256)}, "is not an SAE of this kind: it holds b_pre, decoder.bias"),
    ({"decoder.weight": torch.zeros(256, 64)}, "decoder.weight is (256, 64), where the other weights ask for (64, 256)"),
    ({"b_pre": torch.full((64,), torch.nan)}, "holds values that are not finite"),
]


@pytest.mark.parametrize(("state", "message"), BAD)
def test_what_would_be_another_function_is_refused(cli: Cli, tmp_path: Path, state: dict[str, Tensor], message: str) -> None:
    path = published(tmp_path / "repo" / "sae_layer01_final.pt", a_sae(), state=state)
    result = cli("eval", "export", "--to", "saelens", "--runs", path, "--out", tmp_path / "out")
    assert result.code == 2 and message in result.err and "Traceback" not in result.err
    assert not (tmp_path / "out").exists()


def test_bad_input(cli: Cli, runs_path: Path, tmp_path: Path) -> None:
    run, out = min(p.parent for p in runs_path.glob("*/config.json")), ("--out", tmp_path / "out")
    (tmp_path / "page.pt").write_text("<html>")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--to", "neuronpedia", *out), "Invalid value for '--to'"),
        (("--to", "saelens"), "Missing option '--out'"),
        (("--to", "saelens", "--runs", tmp_path / "none", *out), "/none: name runs, folders or .pt files with --runs"),
        (("--to", "saelens", "--runs", run, "--layers", "1,7", *out), "there is no 'final' snapshot of layers 7 in"),
        (("--to", "saelens", "--runs", run, "--snapshot", "1B", *out), "there is no '1B' snapshot in"),
        (("--to", "saelens", "--runs", run, "--runs", run, *out), "two SAEs would be written to"),
        (("--to", "saelens", "--runs", tmp_path / "page.pt", "--layers", 1, *out), "page.pt is not a readable SAE checkpoint"),
        (("--to", "saelens", "--runs", run, "--out", tmp_path / "page.pt" / "x"), "page.pt"),
    ]
    for args, message in cases:
        result = cli("eval", "export", *args)
        assert result.code == 2 and message in result.err and "Traceback" not in result.err, (args, result)
    assert not (tmp_path / "out").exists()


# --- the tools themselves ---

TOOLS = {"saelens": "sae_lens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_the_tool_itself_loads_it_and_computes_the_same(form: str, tmp_path: Path) -> None:
    environment = ENVIRONMENTS / TOOLS[form]
    if not (environment / "stamp.json").exists():  # which bench.peers puts into one that is complete
        pytest.skip(f"{TOOLS[form]} is not installed in {environment}; `python -m bench.peers` does it")
    known: dict[str, Any] = {"model": "EleutherAI/pythia-410m", "context": 1024, "bos": False}
    known["log10_density"] = torch.linspace(-10, 0, 256)
    saes = {rule: a_sae(rule=rule) for each, rule in RULES if each == form}
    for rule, sae in saes.items():
        (tmp_path / rule).mkdir()
        written(form, sae, tmp_path / rule / "export", **known)
        torch.save(some_x(sae), tmp_path / rule / "x.pt")
    variables = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "WANDB_MODE": "disabled",
    }
    done = subprocess.run(
        [environment / "bin" / "python", Path(__file__).with_name("load_export.py"), form]
        + [tmp_path / rule / "export" for rule in saes],
        env=os.environ | variables | {"SPARSIFY_DISABLE_TRITON": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rule, sae in saes.items():
        ways = torch.load(tmp_path / rule / "out.pt", weights_only=True)
        for got in ways.values():
            require_ours(sae, some_x(sae), got["z"], got["xhat"], form)
        if form == "saelens":
            said = {
                "hook_name": f"blocks.{0 if sae.transcodes else 1}.hook_resid_post",
                "model_name": known["model"],
                "context_size": 1024,
            }
            assert all(got["said"] == said | {"prepend_bos": False} for got in ways.values())
            assert torch.equal(ways["from_pretrained"]["sparsity"], known["log10_density"])


@pytest.mark.slow
def test_two_exports_at_once_end_well(runs_path: Path, tmp_path: Path) -> None:
    run = min(p.parent for p in runs_path.glob("*/config.json"))
    command = [sys.executable, "-m", "eval", "export", "--to", "saelens", "--runs", run, "--out", tmp_path / "out"]
    both = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [(each.communicate()[1].count("something else"), each.returncode) for each in both] == [(0, 0), (0, 0)]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_folder_that_another_export_makes_meanwhile_is_as_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"cfg.json": b"{}", "weights": b"w"}

    def place(new: Path, folder: Path) -> None:
        folder.mkdir()
        for name, data in content.items():
            (folder / name).write_bytes(data)
        temporaries.place(new, folder)

    monkeypatch.setattr(export, "place", place)
    export.publish_folder(tmp_path / "a", content)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and len(list((tmp_path / "a").iterdir())) == 2
