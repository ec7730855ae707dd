"""Python calls: what they hand out equals what files, plain transformers and the command lines say."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import residual_saes as rs
from residual_saes.eval.pages.spell import spell
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.lm import Unembedding, load_model
from tests.conftest import ROOT, TRAIN_ARGS, Cli

TEXT = "The quick brown fox jumps over the lazy dog"


@pytest.fixture
def sae(runs_path: Path) -> rs.LoadedSae:
    return rs.saes(runs_path)[0].load()


def test_one_sae_by_every_way_to_it(runs_path: Path, sae: rs.LoadedSae, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rs.saes(runs_path)
    monkeypatch.setenv("HOME", str(runs_path.parent))
    assert rs.saes("~/runs")[0].path == found[0].path
    with pytest.raises(UserError, match="'s3://lab/runs' is a bucket, and this must be a folder of this machine"):
        rs.saes("s3://lab/runs")
    assert [each.layer for each in found] == ["0", "1", "2"] * 3
    assert repr(found[0]) == f"<{found[0].run}, layer 0, final>"
    for place, layer in ((found[0].path, None), (runs_path / found[0].run, 0), (f"~/runs/{found[0].run}", "0")):
        other = rs.load(place, layer)
        assert repr(other) == repr(sae) == f"<SAE {found[0].run}, layer 0: 128 features of 32 dimensions>"
        assert torch.equal(other.sae.w_enc, sae.sae.w_enc)
    with pytest.raises(UserError, match=r"has SAEs of layers 0-2: choose one with layer="):
        rs.load(runs_path / found[0].run)
    with pytest.raises(UserError, match="name a .pt file, a run folder, or a repository"):
        rs.load("/nowhere")


def test_rows_of_numpy_lists_and_tensors_are_encoded_alike(sae: rs.LoadedSae, cache: Cache) -> None:
    rows = cache.layer(0)[:5]
    assert rows.dtype == np.float16
    z = sae.encode(rows)
    assert z.dtype == torch.float32 and z.shape == (5, 128)
    assert torch.equal(z, sae.sae.encode(torch.from_numpy(rows.astype(np.float32))))
    assert torch.equal(z, sae.encode(rows.tolist())) and torch.equal(z, sae.encode(torch.from_numpy(rows)))
    assert torch.equal(sae(rows), sae.sae.decode(z)) and torch.equal(sae.to("cpu").decode(z), sae(rows))


def test_a_text_has_the_activations_that_plain_hooks_take(runs_path: Path, lm: Path) -> None:
    """In bfloat16, as the harvest had it; the separator in front is not among the tokens."""
    for layer in (0, 1):
        sae = rs.saes(runs_path)[layer].load()
        model = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.float32)
        ids = torch.tensor([sae.tokens(TEXT)])
        assert ids[0, 0] == sae.spec.separator
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[layer + 1][0, 1:]
        torch.testing.assert_close(sae.activations(TEXT), states, rtol=0.05, atol=0.05 * float(states.std()))
        features = sae.features(TEXT)
        assert "".join(features.tokens) == TEXT and len(features.tokens) == len(features.z) == ids.shape[1] - 1
        assert torch.equal(features.z, sae.encode(sae.activations(TEXT)))
        best = features.top(3)
        assert best[0].value == features.z.max() == features.z[best[0].position, best[0].feature]
        assert best[0].token == features.tokens[best[0].position]
        at = features.at(2, 2)
        assert [a.value for a in at] == features.z[2].topk(2).values.tolist()
        assert f"{at[0].feature}:{at[0].value:.2f}" in str(features).splitlines()[2]
        assert repr(features) == f"<features of {len(features.z)} tokens: {(features.z > 0).any(0).sum()} of 128 active>"


def test_promoted_tokens_are_those_of_the_unembedding(sae: rs.LoadedSae, lm: Path) -> None:
    head = Unembedding(load_model(str(lm), None, "fp32", head=True))
    with torch.inference_mode():
        logits = head(sae.sae.w_dec[[7]]) - head(torch.zeros(1, 32))
    assert sae.promoted(7, 4) == [spell(sae.tokenizer, 400)[t] for t in logits[0].topk(4).indices.tolist()]


def test_a_patched_model_computes_with_reconstructions(sae: rs.LoadedSae) -> None:
    model, ids = sae.language_model(), torch.tensor([sae.tokens(TEXT)])

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return model(ids).logits

    clean = logits()
    with sae.patched(model):
        patched = logits()
    with sae.patched(model, keep_error=True):
        same = logits()
    feature = sae.features(TEXT).top(1)[0].feature

    def without(z: torch.Tensor) -> torch.Tensor:
        z[..., feature] = 0
        return z

    with sae.patched(model, without, keep_error=True):
        ablated = logits()
    assert torch.equal(logits(), clean)
    torch.testing.assert_close(same, clean, rtol=1e-3, atol=1e-3)
    assert (patched - clean).abs().max() > 0.1 and (ablated - clean).abs().max() > 0.01


def test_training_by_a_call_is_the_command(cli: Cli, cache: Cache, tmp_path: Path) -> None:
    options = {name[2:].replace("-", "_"): value for name, value in zip(TRAIN_ARGS[::2], TRAIN_ARGS[1::2], strict=True)}
    (made,) = rs.train(cache, "batchtopk:8", layers=[1], runs=tmp_path / "call", **options)
    args = ("--cache", cache.path, "--runs", tmp_path / "command", "--l1", "batchtopk:8", "--layers", 1)
    assert cli("train", *TRAIN_ARGS, *args).code == 0
    (other,) = rs.saes(tmp_path / "command")
    assert repr(made) == repr(other)
    assert made.load().sae.w_dec.equal(other.load().sae.w_dec)
    with pytest.raises(UserError, match="No such option"):
        rs.train(cache, "batchtopk:8", bach=3)


def test_a_model_without_a_preset(lm: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    """Cache, contexts, batch and setting follow the model and the text, and no other job's place is written to."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lm, "tiny")
    assert "say what to harvest with --dataset, --tokens" in cli("harvest", "--model", "tiny").err
    cache = rs.harvest(model="tiny", dataset=str(text), tokens="20K", layers="1", device="cpu")
    assert cache.path == Path("data/tiny") == rs.open_cache().path
    assert cache.spec.context == 64 and cache.spec.holdout_tokens >= 2000
    done = cli("train", "--device", "cpu", "--layers", 1)
    assert done.code == 0, done.err
    assert "layers 1: 256 features of 32, 79 steps of 256 tokens, lr 0.01; batchtopk-32 (best)" in done.err
    assert "warning: 79 steps are few: lower --batch" in done.err
    assert [each.run for each in rs.saes()] == ["tiny-saes-x8-batchtopk-32-best"]
    shutil.copytree("data/tiny", "data/other")
    assert "name the activation cache with --cache; data holds several: data/other, data/tiny" in cli("train").err


def test_it_is_imported_under_one_name_beside_anybodys_train(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('the wrong one')\n")
    code = "import residual_saes as rs; from residual_saes.train.config import Plan; assert callable(rs.train); rs.open_cache"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)
    code = "import residual_saes, sys; assert not {'torch', 'click', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
