"""SAEs of other tools: what is exported comes back the same, and what is no function of ours is refused in one line."""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.peers import ENVIRONMENTS
from residual_saes.eval.foreign.forms import read_sae
from residual_saes.eval.foreign.places import read_before, site_of
from residual_saes.eval.publish.export import FORMS, ExportConfig, export
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.run import FINAL, Run, cache_identity, run_config
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.runs.sparsity import Reading
from residual_saes.shared.sites import HOOKS, Site, lens_name
from tests.conftest import Cli
from tests.eval.publish.test_export import RULES, TOOLS, a_sae, some_x, written

WHERE = ("--preset", "demo", "--ce-tokens", 64, "--device", "cpu", "--numbers-only")


def small(*, scale: float = 0.01, rule: str = "relu") -> Sae:
    """Over the cache's dimensions."""
    return a_sae(d=32, scale=scale, rule=rule)


def read_back(form: str, folder: Path) -> Sae:
    foreign = read_sae(form, folder)
    function = {k: v for k in ("w_enc", "w_dec", "b_enc", "b_pre", "b_dec", "threshold", "skip")
                if (v := getattr(foreign.function, k)) is not None}  # fmt: skip
    target = {"inputs": [0], "outputs": [1]} if foreign.transcodes else {}
    return Sae(**function, config=target | {"sparsity": foreign.function.reading("").fields()}, stats={})


def require_near(got: Tensor, wanted: Tensor, most: float) -> None:
    """Within this of the largest, but for what stands at a threshold."""
    far = (got - wanted).abs() > most * wanted.abs().max()
    assert float(far.double().mean()) < 1e-4


@pytest.mark.parametrize(("form", "rule"), RULES)
def test_an_export_comes_back_the_same(form: str, rule: str, tmp_path: Path) -> None:
    sae = a_sae(rule=rule)
    got, x = read_back(form, written(form, sae, tmp_path / "a")), some_x(sae)
    assert got.rule == sae.rule and got.k == sae.k
    wanted = [] if form == "saelens" or rule != "nested" else [64, 128]  # SAELens' form does not say them
    assert got.prefixes == wanted
    require_near(got.encode(x), sae.encode(x), 1e-5)
    require_near(got.reconstruct(x, got.encode(x)), sae.reconstruct(x, sae.encode(x)), 1e-5)


# --- the command ---


def a_run(folder: Path, cache: Cache, rule: str) -> Run:
    """One of ours, of one layer, whose SAE was drawn."""
    run, drawn = Run(folder / f"ours-{rule}"), small(rule=rule)
    sparsity = drawn.config["sparsity"]
    reading = Reading(words=rule, rule=drawn.rule, k=sparsity.get("k"), prefixes=sparsity.get("prefixes"))
    train = {"tokens": 20_480, "batch": 256, "expansion": 8, "l1": {"kind": rule}, "step": {}}
    train |= {"target": "resid_post@l-1>resid_post", "skip": drawn.skip is not None} if drawn.transcodes else {}
    run.path.mkdir(parents=True)
    run.create(run_config(train, cache_identity(cache, run.path)) | {"sparsity": reading.fields()}, {})
    config = json.loads(
        json.dumps(run.config.portable | (drawn.target.fields() if drawn.transcodes else {}) | run.belongs(Site(1), FINAL))
    )
    stats = drawn.stats | {"tokens": 20_480, "lambda": 0.0}
    dataclasses.replace(drawn, config=config, stats=stats).save(run.snapshot_path(Site(1), FINAL))
    return run


def metrics(run: Path) -> dict[str, Any]:
    (result,) = json.loads((run / "results" / "metrics.json").read_bytes()).values()
    return {k: v for k, v in result.items() if k not in ("run", "file", "checksum", "trained_tokens", "lambda")}


@pytest.fixture(scope="session")
def exported(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ with a run of each rule, and out/ with their exports to every tool that has such SAEs."""
    folder = tmp_path_factory.mktemp("exported")
    for rule in dict.fromkeys(rule for _, rule in RULES):
        run = a_run(folder / "runs", cache, rule)
        for form in FORMS:
            if (form, rule) in RULES:
                export((run.path,), ExportConfig(to=form, out=folder / "out" / form))
    return folder


def test_the_same_metrics(cli: Cli, exported: Path, cache_path: Path, tmp_path: Path) -> None:
    """Of every rule and form, beside ours; and a second time nothing is measured."""
    shutil.copytree(exported / "runs", runs := tmp_path / "runs")
    args = ("eval", "--cache", cache_path, "--runs", runs, *WHERE, "--saes", exported / "out")
    first = cli(*args)
    assert first.code == 0, first.err
    for form, rule in RULES:
        ours, theirs = metrics(runs / f"ours-{rule}"), metrics(runs / f"ours-{rule}-{form}")
        assert ours["l0"] > 1 and ours.keys() == theirs.keys()
        for key, value in ours.items():
            near = pytest.approx(value, rel=1e-5, abs=1e-8) if isinstance(value, float) else value  # measured: 1e-6
            assert theirs[key] == near, (form, rule, key)
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.pt")}
    assert cli(*args).code == 0 and {path: path.stat().st_mtime_ns for path in runs.rglob("*.pt")} == before


def test_pages_report_and_exports_are_made_of_them(cli: Cli, exported: Path, cache_path: Path, tmp_path: Path) -> None:
    runs, saes = tmp_path / "runs", exported / "out" / "dictionary_learning" / "ours-nested"
    args = ("--cache", cache_path, "--runs", runs, "--preset", "demo", "--device", "cpu")
    assert cli("eval", *args, "--ce-tokens", 64, "--saes", saes, "--from", "dictionary_learning").code == 0
    name = "ours-nested-dictionary_learning"
    page, card = (runs / "report.html").read_text(), (runs / name / "README.md").read_text()
    assert "MatryoshkaBatchTopKSAE" in page and "rsae eval --cache CACHE --saes ours-nested --from dictionary_learning" in page
    assert "trained by dictionary_learning (its folder ours-nested), on what is not known here" in card.replace("\\_", "_")
    assert cli("eval", "pages", *args).code == 0 and (runs / "pages" / name).is_dir()
    for form in ("saelens", "dictionary_learning"):
        assert cli("eval", "export", "--to", form, "--runs", runs, "--out", tmp_path / form).code == 0
    said = json.loads((tmp_path / "saelens" / name / "layer_1" / "cfg.json").read_text())["metadata"]
    assert not {"context_size", "dataset_path", "prepend_bos"} & set(said)  # of what they were trained on nothing is known
    again = read_back("dictionary_learning", tmp_path / "dictionary_learning" / name / "layer_1")
    assert torch.equal(again.w_enc, read_back("dictionary_learning", saes / "layer_1").w_enc) and again.prefixes == [64, 128]


def three_layers(folder: Path) -> Path:
    """As sparsify writes them, which says the layer by the folder's name alone."""
    folder.mkdir(parents=True)
    for layer in range(3):
        cfg = written("sparsify", small(scale=0.01 * (layer + 1)), folder / f"layers.{layer}") / "cfg.json"
        cfg.write_text(json.dumps({k: v for k, v in json.loads(cfg.read_text()).items() if k != "layer"}))
    return folder


def test_killed_half_way_and_continued(cli: Cli, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saes, run = three_layers(tmp_path / "theirs"), tmp_path / "runs" / "theirs-sparsify"
    args = ("eval", "--cache", cache_path, "--runs", tmp_path / "runs", *WHERE, "--saes", saes)
    save, left = Sae.save, [1]

    def killed(self: Sae, path: Path) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(Sae, "save", killed)
        assert cli(*args).code == 130
    assert sorted(p.name for p in run.glob("*.pt")) == ["sae_layer00_final.pt"]
    first = (run / "sae_layer00_final.pt").stat().st_mtime_ns
    again = cli(*args)
    assert again.code == 0, again.err
    assert sorted(p.name for p in run.glob("*.pt")) == [f"sae_layer0{n}_final.pt" for n in range(3)]
    assert (run / "sae_layer00_final.pt").stat().st_mtime_ns == first and not (run / "state").exists()
    (damaged := run / "sae_layer02_final.pt").write_bytes(damaged.read_bytes()[:-9])
    assert "it is made again" in cli(*args).err
    assert Sae.load(damaged, belongs=Run(run).belongs(Site(2), FINAL))
    other = three_layers(tmp_path / "other" / "theirs")
    shutil.copy(other / "layers.0" / "sae.safetensors", other / "layers.1")
    refused = cli(*args[:-1], other)
    assert refused.code == 2 and "sae_layer01_final.pt was made of other files than" in refused.err


# --- what is refused ---


class Dangerous:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def changed(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text())
    content.get("trainer", content).update(values)
    path.write_text(json.dumps(content))


def without(folder: Path, name: str, key: str) -> None:
    tensors = load_file(folder / name)
    del tensors[key]
    save_file(tensors, folder / name)


BAD: list[tuple[str, Any, str]] = [
    ("saelens", lambda f: changed(f, "cfg.json", normalize_activations="layer_norm"), "for normalize_activations 'layer_norm'"),
    ("saelens", lambda f: changed(f, "cfg.json", reshape_activations="hook_z"), "asks for reshape_activations 'hook_z'"),
    ("saelens", lambda f: changed(f, "cfg.json", architecture="temporal"), "is of kind 'temporal', which is none of ours"),
    ("saelens", lambda f: changed(f, "cfg.json", architecture="transcoder", d_out=16), "reads 32 dimensions and writes 16"),
    ("saelens", lambda f: changed(f, "cfg.json", architecture="skip_transcoder"), "has no W_skip, which such an SAE has"),
    ("saelens", lambda f: changed(f, "cfg.json", architecture="transcoder"), "does not say which layer it is of: give it"),
    ("saelens", lambda f: changed(f, "cfg.json", d_in=16), "W_enc is (32, 256), where its configuration asks for (16, 256)"),
    ("saelens", lambda f: changed(f, "cfg.json", d_in="32"), "d_in is '32', and must be a whole number"),
    ("saelens", lambda f: without(f, "sae_weights.safetensors", "b_enc"), "has no b_enc, which such an SAE has"),
    ("saelens", lambda f: changed(f, "cfg.json", metadata={"hook_name": "blocks.1.attn.hook_z"}), "has no name here"),
    ("saelens", lambda f: changed(f, "cfg.json", metadata={}), "does not say which layer it is of: give it alone"),
    ("saelens", lambda f: changed(f, "cfg.json", metadata={"hook_name": "blocks.7.hook_resid_post"}), "of layer 7, and"),
    ("saelens", lambda f: written("saelens", a_sae(), shutil.rmtree(f) or f), "is over 64 dimensions, and"),
    ("saelens", lambda f: (f / "cfg.json").write_text("[1]"), "is not of an SAE of saelens: it holds no object"),
    ("saelens", lambda f: (f / "cfg.json").unlink(), "has no cfg.json: get it again"),
    ("sparsify", lambda f: changed(f, "cfg.json", activation="groupmax"), "asks for activation 'groupmax'"),
    ("sparsify", lambda f: changed(f, "cfg.json", skip_connection=True), "asks for skip_connection True"),
    ("sparsify", lambda f: changed(f, "cfg.json", transcode=True, layer=0), "reads what gives 0, which no"),
    ("sparsify", lambda f: changed(f, "cfg.json", transcode=True, read=2), "reads layer_2, which no"),
    ("sparsify", lambda f: changed(f, "cfg.json", transcode=True, read="0.mlp_in"), "is of layer 0.mlp_in>1, and"),
    ("sparsify", lambda f: (f / "sae.safetensors").write_bytes(b"cut"), "is not a file of tensors"),
    ("dictionary_learning", lambda f: changed(f, "config.json", dict_class="IdentityDict"), "is of kind 'IdentityDict'"),
    ("dictionary_learning", lambda f: torch.save(Dangerous(), f / "ae.pt"), "is not a file of tensors (UnpicklingError)"),
    ("dictionary_learning", lambda f: torch.save({"bias": torch.zeros(32), "log_z": 1}, f / "ae.pt"), "has no decoder.weight"),
    ("dictionary_learning", lambda f: changed(f, "config.json", submodule_name="attn_1"), "is of attn_1, which has no name"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "spoil", "message"), BAD)
def test_what_is_none_of_ours_is_refused(
    cli: Cli, form: str, spoil: Any, message: str, cache_path: Path, tmp_path: Path
) -> None:
    spoil(written(form, small(), tmp_path / "saes"))
    result = cli(
        "eval", "--cache", cache_path, "--runs", tmp_path / "runs", *WHERE, "--saes", tmp_path / "saes", "--from", form
    )
    assert result.code == 2 and message in result.err and result.err.count("error:") == 1, result.err
    assert not (tmp_path / "runs").exists()


def test_one_that_is_bad_is_left_out_and_a_layer_can_be_given(cli: Cli, cache_path: Path, tmp_path: Path) -> None:
    saes = three_layers(tmp_path / "theirs")
    without(saes / "layers.1", "sae.safetensors", "W_dec")
    args = ("eval", "--cache", cache_path, "--runs", tmp_path / "runs", *WHERE)
    result = cli(*args, "--saes", saes)
    assert result.code == 2 and "left out: " in result.err and "1 left out, as said above" in result.err
    names = sorted(p.name for p in (tmp_path / "runs").rglob("*.pt"))
    assert names == ["sae_layer00_final.pt", "sae_layer02_final.pt"]
    moved = saes.joinpath("layers.0").rename(tmp_path / "alone")
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--saes", moved), "is of alone, which has no name here: give it alone, with its layer by --layers"),
        (("--saes", saes, "--layers", "0,2"), "there is no SAE of layers 0 in"),
        (("--saes", saes, "--from", "saelens"), "there is no SAE of saelens in"),
        (("--saes", tmp_path / "none"), "there is no SAE of saelens or sparsify or dictionary_learning in"),
        (("--layers", 1), "--from and --layers are of other tools' SAEs: name their folder by --saes"),
    ]
    for more, message in cases:
        refused = cli(*args, *more)
        assert refused.code == 2 and message in refused.err, refused.err
    one = cli(*args[:-1], "--numbers-only", "--saes", moved, "--layers", 1)
    assert one.code == 0, one.err
    (path,) = (tmp_path / "runs").glob("*-alone-sparsify/*.pt")
    assert path.name == "sae_layer01_final.pt"


def test_what_hooks_of_other_tools_are_here() -> None:
    known = {
        "blocks.3.hook_resid_post": Site(3), "blocks.3.hook_resid_pre": Site(2), "blocks.3.hook_mlp_out": Site(3, "mlp_out"),
        "layers.5": Site(5), "gpt_neox.layers.5": Site(5), "transformer.h.0": Site(0), "model.layers.5.mlp": Site(5, "mlp_out"),
        "layer_12.mlp_out": Site(12, "mlp_out"), "layer_12": Site(12), "blocks.3.mlp.hook_in": Site(3, "mlp_in"),
    }  # fmt: skip
    assert {place: site_of(place) for place in known} == known
    for place in (
        "blocks.0.hook_resid_pre",
        "blocks.3.hook_mlp_in",
        "layer_12_50M",
        "trainer_0",
        "layers",
        "blocks.3.attn.hook_z",
    ):
        assert site_of(place) is None, place


def test_a_module_is_what_it_is_in_the_caches_model() -> None:
    """What Gemma 2 adds to the stream goes through a norm first, so that its MLP's output is no site."""
    assert site_of("layers.5.mlp", "llama") == site_of("layers.5.post_feedforward_layernorm", "gemma2") == Site(5, "mlp_out")
    assert site_of("layers.5.mlp", "gemma2") is None and site_of("layers.5.attn", "llama") is None
    for family in (None, "llama", "olmo2"):
        for hook in HOOKS:
            assert site_of(lens_name(Site(4, hook), family), family) == Site(4, hook)


def test_what_goes_into_the_module_that_gives_a_site() -> None:
    assert read_before(Site(3, "mlp_out"), None) == read_before(Site(3, "mlp_out"), "gpt2") == Site(3, "mlp_in")
    assert (read_before(Site(3), "llama"), read_before(Site(0), None)) == (Site(2), None)
    for site, family in ((Site(3, "attn_out"), "llama"), (Site(3, "mlp_out"), "gemma2"), (Site(3, "mlp_out"), "bloom")):
        assert read_before(site, family) is None


# --- the tools themselves ---

MADE = {"saelens": 12, "sparsify": 4, "dictionary_learning": 7}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_what_a_tool_itself_saves_is_read_as_it_computes(form: str, tmp_path: Path) -> None:
    environment = ENVIRONMENTS / TOOLS[form]
    if not (environment / "stamp.json").exists():  # which bench.peers puts into one that is complete
        pytest.skip(f"{TOOLS[form]} is not installed in {environment}; `python -m bench.peers` does it")
    done = subprocess.run(
        [environment / "bin" / "python", Path(__file__).with_name("make_saes.py"), form, tmp_path],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "SPARSIFY_DISABLE_TRITON": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folders = sorted(path.parent for path in tmp_path.glob("*/out.pt"))
    assert len(folders) == MADE[form]
    for folder in folders:
        sae, out = read_back(form, folder), torch.load(folder / "out.pt", weights_only=True)
        z = sae.encode(out["x"])
        assert 0.01 < float((z > 0).double().mean()) < 0.9, folder.name
        require_near(z, out["z"], 1e-5)
        require_near(sae.reconstruct(out["x"], z), out["xhat"], 1e-5)


def test_a_gate_is_a_threshold(tmp_path: Path) -> None:
    """Against the formula of Rajamanoharan et al., arXiv:2404.16014, eq. 6."""
    rng = torch.Generator().manual_seed(0)
    w = {"encoder.weight": (256, 64), "decoder.weight": (64, 256), "decoder_bias": (64,), "r_mag": (256,), "gate_bias": (256,),
         "mag_bias": (256,)}  # fmt: skip
    weights = {name: torch.randn(shape, generator=rng) for name, shape in w.items()}
    torch.save(weights, tmp_path / "ae.pt")
    trainer = {"dict_class": "GatedAutoEncoder", "activation_dim": 64, "dict_size": 256, "layer": 1}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    sae, x = read_back("dictionary_learning", tmp_path), torch.randn(500, 64, generator=rng)
    pre = (x - weights["decoder_bias"]) @ weights["encoder.weight"].T
    z = (pre + weights["gate_bias"] > 0) * torch.relu(pre * weights["r_mag"].exp() + weights["mag_bias"])
    require_near(sae.encode(x), z, 1e-5)
    with pytest.raises(UserError, match="has no ae.pt"):
        read_sae("dictionary_learning", tmp_path.joinpath("ae.pt").rename(tmp_path / "gone").parent)
