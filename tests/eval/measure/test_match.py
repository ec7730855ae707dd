import json
import shutil
from pathlib import Path

import pytest
import torch

from residual_saes.eval.measure.features import Features, features_path, save_features
from residual_saes.eval.measure.match import match
from residual_saes.shared.runs.run import Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site
from residual_saes.shared.temporaries import _release, temporary
from tests.conftest import Cli
from tests.test_bad_input import refused


@pytest.fixture
def run(runs_path: Path, tmp_path: Path) -> Run:
    path = next(p for p in sorted(runs_path.iterdir()) if p.is_dir())
    shutil.copytree(path, tmp_path / "a" / path.name)
    return Run(tmp_path / "a" / path.name)


def test_snapshots_come_nearer_to_their_final(cli: Cli, run: Run) -> None:
    (run.path / "results").mkdir()
    left = temporary(run.path / "results" / "match_final.json")
    _release(left)  # as a kill leaves it
    result = cli("eval", "match", run.path, "--device", "cpu")
    assert result.code == 0, result.err
    assert not left.exists()
    assert len(result.out.splitlines()) == 1 + 3 * 5
    found = json.loads((run.path / "results" / "match_final.json").read_text())
    assert [(m["layer"], m["snapshot"]) for m in found] == [
        (s.site.json, s.label) for s in run.snapshots() if s.label != "final"
    ]
    for layer in range(3):
        means = [m["mean_max_cosine"] for m in found if m["layer"] == layer]
        assert means == sorted(means)
        assert 0.3 < means[0] < means[-1] < 1
    assert not any(m["alive_only"] for m in found)
    assert {m["features"] for m in found} == {128}


def test_two_runs_are_matched_among_what_is_alive(cli: Cli, run: Run, tmp_path: Path) -> None:
    other = Run(tmp_path / "b" / run.name)
    shutil.copytree(run.path, other.path)
    for label in [s.label for s in other.snapshots() if s.site == Site(1) and s.label != "final"]:
        other.snapshot_path(Site(1), label).unlink()
    for s in [s for s in other.snapshots() if s.site == Site(2)]:
        s.path.unlink()
    sae = Sae.load(other.snapshot_path(Site(1), "final"))
    torch.manual_seed(0)
    sae.w_dec[40:] = torch.randn(88, 32)  # another seed's, say
    sae.w_dec = sae.w_dec[torch.randperm(128)]
    sae.save(other.snapshot_path(Site(1), "final"))
    for each, alive in ((run, torch.arange(128) < 60), (other, torch.arange(128) >= 0)):
        features = Features(**{n: alive.float() if n == "density" else torch.ones(128) for n in Features.__slots__})
        (final,) = [s for s in each.snapshots() if (s.site.json, s.label) == (1, "final")]
        save_features(features_path(each, Site(1), "final"), features, tokens=1, file=Sae.checksum(final.path))
        save_features(features_path(each, Site(0), "final"), features, tokens=1, file="of another checkpoint")
    result = cli("eval", "match", run.path, other.path, "--device", "cpu")
    assert result.code == 0, result.err
    found = json.loads((run.path / "results" / f"match_{run.name}-seed0.json").read_text())
    assert [(m["layer"], m["snapshot"]) for m in found] == [(0, s.label) for s in run.snapshots() if s.site == Site(0)] + [
        (1, "final")
    ]
    assert all(m["matched"] == 1 and m["mean_max_cosine"] == pytest.approx(1) for m in found[:6])
    wanted = match(Sae.load(run.snapshot_path(Site(1), "final")).w_dec[:60], sae.w_dec)
    assert (found[6]["features"], found[6]["matched"], found[6]["alive_only"]) == (60, wanted[1], True)
    assert (found[5]["features"], found[5]["alive_only"]) == (128, False)
    assert 40 / 60 <= found[6]["matched"] < 1


def test_what_cannot_be_matched_is_one_line(cli: Cli, run: Run, tmp_path: Path) -> None:
    refused(cli("eval", "match", tmp_path / "none", "--device", "cpu"), "is not a run folder")
    other = Run(tmp_path / "b" / run.name)
    shutil.copytree(run.path, other.path)
    for s in other.snapshots():
        if s.label == "final":
            s.path.unlink()
    refused(cli("eval", "match", other.path, "--device", "cpu"), "no layer with an earlier snapshot and a final one")
    for s in other.snapshots():
        s.path.unlink()
    refused(cli("eval", "match", run.path, other.path, "--device", "cpu"), "there is nothing to match")
    sae = Sae.load(run.snapshot_path(Site(0), "final"))
    sae.w_enc, sae.w_dec, sae.b_pre, sae.b_dec = sae.w_enc[:, :8], sae.w_dec[:, :8], sae.b_pre[:8], sae.b_dec[:8]
    sae.save(other.snapshot_path(Site(0), "final"))
    refused(cli("eval", "match", run.path, other.path, "--device", "cpu"), "over 32 dimensions")
