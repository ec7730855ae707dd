import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Cli


@pytest.fixture
def evaluated(cli: Cli, runs_path: Path, cache_path: Path, tmp_path: Path) -> tuple[Path, tuple[object, ...], str]:
    shutil.copytree(runs_path, tmp_path / "runs")
    args = ("--preset", "demo", "--cache", cache_path, "--runs", tmp_path / "runs", "--device", "cpu", "--ce-tokens", 320)
    result = cli("eval", *args)
    assert result.code == 0, result.err
    return tmp_path / "runs", args, result.out


def test_everything_is_written_and_makes_sense(evaluated: tuple[Path, tuple[object, ...], str]) -> None:
    runs, _, out = evaluated
    for folder in (p for p in runs.iterdir() if p.is_dir()):
        records = json.loads((folder / "results" / "metrics.json").read_text())
        assert len(records) == 18
        with (folder / "results" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [float(r["fvu"]) for r in rows] == [r["fvu"] for r in records.values()]
        for layer in range(3):
            first, last = records[f"layer{layer:02d}_3413"], records[f"layer{layer:02d}_final"]
            assert last["fvu"] < first["fvu"]
            assert last["fvu"] < 0.9
            assert 0 <= last["dead_share"] <= 1
            assert 0 < last["cosine"] <= 1
        for name in ("1_training_curves", "2_metrics_heatmap"):
            assert (folder / "plots" / f"{name}.png").stat().st_size > 10_000
        assert folder.name in out
        assert folder.name in (runs / "report.html").read_text()
    assert f"report: {runs / 'report.html'}" in out


def test_a_second_evaluation_computes_nothing_again(
    cli: Cli, evaluated: tuple[Path, tuple[object, ...], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, args, out = evaluated
    monkeypatch.setattr("eval.evaluate.SplicedModel", None)
    again = cli("eval", *args)
    assert again.code == 0, again.err
    assert again.out == out
    monkeypatch.undo()
    folder = next(p for p in sorted(runs.iterdir()) if p.is_dir())
    before = json.loads((folder / "results" / "metrics.json").read_text())
    shutil.copy(folder / "sae_layer00_final.pt", folder / "sae_layer02_final.pt")
    assert cli("eval", *args).code == 0
    after = json.loads((folder / "results" / "metrics.json").read_text())
    assert [k for k in after if after[k] != before[k]] == ["layer02_final"]


def test_runs_of_other_caches_are_passed_over(cli: Cli, evaluated: tuple[Path, tuple[object, ...], str]) -> None:
    runs, args, out = evaluated
    shutil.copytree(next(p for p in runs.iterdir() if p.is_dir()), runs / "other")
    config = runs / "other" / "config.json"
    config.write_text(config.read_text().replace('"seed": 0,\n  "precision"', '"seed": 9,\n  "precision"'))
    assert json.loads(config.read_text())["cache"]["seed"] == 9
    assert cli("eval", *args).out == out
