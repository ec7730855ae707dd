"""What is measured of transcoders and crosscoders, computed the other way."""

import contextlib
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from residual_saes import load
from residual_saes.eval.measure.features import features_path, load_features
from residual_saes.eval.pages.files import Pages
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.lm import load_model, widen
from residual_saes.shared.runs.run import FINAL, Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site
from tests.conftest import TRAIN_ARGS, Cli, invoke
from tests.eval.browser import DESKTOP, PHONE, Browser

TARGETS = (
    ("--target", "resid_post@l-1>resid_post@l", "--layers", 2, "--skip"),
    ("--target", "all"),
    ("--target", "shared:0,2"),
)
CE_TOKENS = 256


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache_path: Path) -> Path:
    path = tmp_path_factory.mktemp("runs")
    for options in TARGETS:
        args = ("--cache", cache_path, "--runs", path, "--l1", "topk:8", "--skip-positions", 1)
        assert invoke("train", *TRAIN_ARGS, *args, *options) == 0
    assert invoke("eval", "--cache", cache_path, "--runs", path, "--ce-tokens", CE_TOKENS, "--snapshots", "final") == 0
    return path


def run_of(runs: Path, kind: str) -> Run:
    (path,) = runs.glob(f"*-{kind}*")
    return Run(path)


def records(run: Run) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((run.path / "results" / "metrics.json").read_bytes())
    return found


def heldout(cache: Cache, layer: int) -> Tensor:
    """Rows that are not of first positions."""
    blocks = range(cache.spec.train_blocks, cache.spec.n_blocks)
    rows = [torch.from_numpy(cache.values(Site(layer), cache.whole_block(Site(layer), block))) for block in blocks]
    places = [torch.from_numpy(cache.block_order(block)) % cache.spec.context for block in blocks]
    return torch.cat(rows)[torch.cat(places) > 0].float()


def spliced(cache: Cache, lm: Path, sae: Sae, reads: list[int], layer: int, part: slice) -> tuple[float, float]:
    """(CE as it is, CE with this part of the reconstruction in place of a layer's output), but for first positions."""
    model: Any = load_model(str(lm), None, cache.spec.precision, head=True)
    widen(model)
    first = cache.spec.train_blocks * cache.spec.block_sequences
    tokens = torch.from_numpy(cache.read_tokens(first, first + CE_TOKENS // cache.spec.context))
    with torch.no_grad():
        clean = model(input_ids=tokens, labels=tokens, output_hidden_states=True)
        taken: dict[int, Tensor] = {}
        handles = [
            model.gpt_neox.layers[n].register_forward_hook(lambda _m, _a, out, n=n: taken.update({n: first_of(out)}))
            for n in reads
        ]
        model(input_ids=tokens)
        for handle in handles:
            handle.remove()
        x = torch.cat([taken[n] for n in reads], -1)
        new = sae.reconstruct(x.float(), sae.encode(x.float()))[..., part].to(x)
        block: nn.Module = model.gpt_neox.layers[layer]

        def hook(_module: nn.Module, _args: object, out: Any) -> Any:
            given = torch.cat([first_of(out)[:, :1], new[:, 1:]], 1)
            return given if isinstance(out, Tensor) else (given, *out[1:])

        block.register_forward_hook(hook)
        return float(clean.loss), float(model(input_ids=tokens, labels=tokens).loss)


def first_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_a_transcoder_is_measured_at_what_it_writes(runs: Path, cache: Cache, lm: Path) -> None:
    run = run_of(runs, "transcoders")
    sae = Sae.load(run.snapshot_path(Site(2), FINAL))
    record = records(run)["layer02_final"]
    x, y = heldout(cache, 1), heldout(cache, 2)
    z = sae.encode(x)
    error = sae.reconstruct(x, z) - y
    assert record["layer"] == 2 and record["tokens"] == len(x)
    assert record["fvu"] == pytest.approx(float(error.square().sum() / (y - y.mean(0)).square().sum()), rel=1e-4)
    assert record["fvu"] < 0.8
    assert record["l0"] == pytest.approx(float((z > 0).sum(1).double().mean()), rel=1e-6)
    assert record["average_encoder_decoder_cosine_sim"] is None
    assert "decoder_share" not in record and "f1" not in record
    ce, of_spliced = spliced(cache, lm, sae, [1], 2, slice(None))
    assert record["ce"] == pytest.approx(ce, rel=1e-5)
    assert record["ce_spliced"] == pytest.approx(of_spliced, rel=1e-4)
    assert record["ce_recovered"] == pytest.approx((record["ce_zero"] - of_spliced) / (record["ce_zero"] - ce), rel=1e-3)


def test_a_crosscoder_is_measured_at_every_layer(cli: Cli, runs: Path, cache: Cache, cache_path: Path, lm: Path) -> None:
    run = run_of(runs, "crosscoder")
    sae = Sae.load(run.snapshot_path(Site(0), FINAL))
    found = records(run)
    assert list(found) == [f"layer{layer:02d}_final" for layer in range(3)]
    rows = [heldout(cache, layer) for layer in range(3)]
    x = torch.cat(rows, 1)
    z = sae.encode(x)
    xhat, alive, shares = sae.reconstruct(x, z), (z > 0).any(0), sae.shares()
    for layer, record in enumerate(found.values()):
        part = slice(32 * layer, 32 * layer + 32)
        error, spread = xhat[:, part] - x[:, part], x[:, part] - x[:, part].mean(0)
        assert record["fvu"] == pytest.approx(float(error.square().sum() / spread.square().sum()), rel=1e-4)
        assert record["decoder_share"] == pytest.approx(float(shares[alive, layer].mean()), rel=1e-5)
        here = alive & (shares.argmax(1) == layer)
        assert record["largest_here"] == pytest.approx(int(here.sum()) / int(alive.sum()))
        assert record["layers_spanned"] == pytest.approx(float((1 / shares[here].square().sum(1)).mean()), rel=1e-5)
        ce, of_spliced = spliced(cache, lm, sae, [0, 1, 2], layer, part)
        assert record["ce"] == pytest.approx(ce, rel=1e-5)
        assert record["ce_spliced"] == pytest.approx(of_spliced, rel=1e-4)
        features, facts = load_features(features_path(run, Site(layer), FINAL))
        assert features.decoder_share is not None and facts["file"] == record["file"]
        torch.testing.assert_close(features.decoder_share, shares[:, layer])
    assert sum(record["largest_here"] for record in found.values()) == pytest.approx(1)
    before = (run.path / "results" / "metrics.json").read_bytes()
    again = cli("eval", "--cache", cache_path, "--runs", runs, "--ce-tokens", CE_TOKENS, "--snapshots", "final")
    assert again.code == 0 and "evaluating" not in again.err
    assert (run.path / "results" / "metrics.json").read_bytes() == before
    features_path(run, Site(1), FINAL).unlink()
    again = cli("eval", "--cache", cache_path, "--runs", runs, "--ce-tokens", CE_TOKENS, "--snapshots", "final")
    assert again.code == 0 and "1/1 SAEs" in again.err and features_path(run, Site(1), FINAL).exists()


def test_a_dictionary_that_layers_share_is_measured_as_an_sae_of_each(
    cli: Cli, runs: Path, cache: Cache, lm: Path, tmp_path: Path
) -> None:
    run = run_of(runs, "mlsae")
    found = records(run)
    assert list(found) == ["layer00_final", "layer02_final"] and len({record["file"] for record in found.values()}) == 1
    for layer in (0, 2):
        sae, record = load(run.path, layer).sae, found[f"layer{layer:02d}_final"]
        x = heldout(cache, layer)
        error = sae.reconstruct(x, sae.encode(x)) - x
        assert record["fvu"] == pytest.approx(float(error.square().sum() / (x - x.mean(0)).square().sum()), rel=1e-4)
        assert record["ce_spliced"] == pytest.approx(spliced(cache, lm, sae, [layer], layer, slice(None))[1], rel=1e-4)
        assert "decoder_share" not in record
    exported = cli("eval", "export", "--to", "saelens", "--runs", run.path, "--out", tmp_path)
    assert exported.code == 0 and {path.name for path in (tmp_path / run.name).iterdir()} == {"layer_0", "layer_2"}
    with pytest.raises(UserError, match="has SAEs of layers 0,2: choose one"):
        load(run.path)


def test_pages_are_of_what_is_read_and_show_layers(cli: Cli, runs: Path, cache: Cache, tmp_path: Path) -> None:
    result = cli("eval", "pages", "--runs", runs, "--out", tmp_path)
    assert result.code == 0, result.err
    for kind, layer, reads in (("transcoders", 2, [1]), ("crosscoder", 0, [0, 1, 2]), ("mlsae", 2, [2])):
        run = run_of(runs, kind)
        (sae,) = (run.load(s) for s in run.snapshots() if s.label == FINAL and s.site == Site(layer))
        (folder,) = (tmp_path / run.name).glob(f"layer{layer:02d}*")
        pages = Pages.open(folder)
        z = sae.encode(torch.cat([heldout(cache, layer) for layer in reads], 1))
        assert int((pages.columns["count"] - (z > 0).sum(0)).abs().sum()) <= 4  # but for sums in another order
        assert pages.facts.get("inputs", [pages.facts["layer"]]) == reads
        if kind == "crosscoder":
            torch.testing.assert_close(pages.columns["layer_share"], sae.shares())
    asked = cli("eval", "ask", "--runs", runs, "--text", "The court", "--layers", "0,2", "--out", tmp_path)
    assert asked.code == 0, asked.err
    assert (tmp_path / "ask.html").read_text().count("<h2") >= 2


def test_a_crosscoders_page_shows_its_layers_at_any_width(runs: Path, browser: Browser, tmp_path: Path) -> None:
    run = run_of(runs, "crosscoder")
    assert invoke("eval", "pages", "--runs", run.path, "--out", tmp_path) == 0
    for size in (DESKTOP, PHONE):
        browser.look(size)
        browser.open(tmp_path / "index.html", f"{run.name}/final/0/3")
        browser.until(lambda: browser.all(".layers"))
        assert browser.text("#feature .facts").startswith(f"layer 0-2 · {run.name} · ")
        shares = browser.text(".layers").split()
        assert shares[::4] == ["layer"] * 3 and sum(map(float, shares[2::4])) == pytest.approx(100, abs=0.2)
        assert browser.overflow() == 0 and browser.errors() == []


def test_the_report_has_a_picture_of_layers_and_the_commands(runs: Path) -> None:
    assert (run_of(runs, "crosscoder").path / "plots" / "9_feature_layers.svg").exists()
    assert not (run_of(runs, "transcoders").path / "plots" / "9_feature_layers.svg").exists()
    report = html.unescape((runs / "report.html").read_text())
    assert "--target 0-2 --" in report and "--target 'resid_post@l-1>resid_post' --layers 2 " in report and "--skip" in report
    assert "which other runs have" not in report  # layers that a run of another form has
    assert "Where features live" in report and "features largest here" in report


def test_exports_say_what_is_read_and_written(cli: Cli, runs: Path, tmp_path: Path) -> None:
    run = run_of(runs, "transcoders")
    assert cli("eval", "export", "--to", "sparsify", "--runs", run.path, "--out", tmp_path).code == 0
    config = json.loads((tmp_path / run.name / "layer_2" / "cfg.json").read_bytes())
    assert (config["transcode"], config["skip_connection"], config["layer"]) == (True, True, 2)
    refused = cli("eval", "export", "--to", "saelens", "--runs", run_of(runs, "crosscoder").path, "--out", tmp_path)
    assert refused.code == 2 and "is a crosscoder, and no tool" in refused.err


def test_in_python(runs: Path, cache: Cache) -> None:
    sae = load(run_of(runs, "transcoders").path)
    x = heldout(cache, 1)[:8]
    torch.testing.assert_close(sae(x), sae.sae.reconstruct(x, sae.encode(x)))
    assert not torch.allclose(sae(x), sae.decode(sae.encode(x)))  # without the skip connection
    assert load(run_of(runs, "crosscoder").path).features("The court").z.shape[1] == 128
    with pytest.raises(UserError, match="of SAEs of one site"), sae.patched(sae.language_model()):
        pass


def test_cards_say_what_it_is_and_how_it_is_loaded(cli: Cli, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, says in (("crosscoder", "A crosscoder with 128 features at layers 0-2 of"), ("mlsae", "One SAE that all of")):
        run = run_of(runs, kind)
        result = cli("eval", "publish", "--runs", run.path, "--to", "org", "--dry-run")
        assert result.code == 0, result.err
        assert ("pretrained_saes.yaml" in result.out) == ("layer_0/cfg.json" in result.out) == (kind == "mlsae")
        readme = (run.path / "README.md").read_text()
        assert says in readme and ("SAELens" in readme) == (kind == "mlsae")
        code, *others = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
        assert len(others) == (kind == "mlsae")
        monkeypatch.setattr("huggingface_hub.list_repo_files", lambda _repo, run=run: [p.name for p in run.path.iterdir()])
        monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _repo, name, run=run: run.path / name)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, {})
        assert "' c'" in printed.getvalue()
    readme = (run_of(runs, "transcoders").path / "README.md").read_text()
    assert "Transcoders resid\\_post@l-1" in readme and "ŷ = W_dec z + b_dec + W_skip (x − b_pre)" in readme
