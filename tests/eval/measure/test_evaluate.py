import contextlib
import csv
import errno
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from residual_saes.eval.measure import evaluate
from residual_saes.eval.measure.runs import cache_places
from residual_saes.eval.report.page import CAPTIONS
from residual_saes.shared.progress import Progress
from residual_saes.shared.seal import seal
from tests.conftest import Cli, invoke

Evaluated = tuple[Path, tuple[object, ...], str]
NUMBERS = "--numbers-only"  # where pages are not what is looked at: drawing them takes most of the time


@pytest.fixture(scope="module")
def evaluated_once(runs_path: Path, cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    runs = tmp_path_factory.mktemp("evaluated") / "runs"
    for folder in sorted(runs_path.iterdir())[:2]:
        shutil.copytree(folder, runs / folder.name)
    args = ("--preset", "demo", "--cache", cache_path, "--device", "cpu", "--ce-tokens", 320)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert invoke("eval", *args, "--runs", runs) == 0
    return runs, args, out.getvalue()


@pytest.fixture
def evaluated(evaluated_once: Evaluated, tmp_path: Path) -> Evaluated:
    """A copy of two evaluated runs, the arguments, and what was printed."""
    runs, args, out = evaluated_once
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs", (*args, "--runs", tmp_path / "runs"), out.replace(str(runs), str(tmp_path / "runs"))


def test_everything_is_written_and_makes_sense(evaluated: Evaluated) -> None:
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
        assert {p.name for p in (folder / "plots").iterdir()} == {
            f"{n}{suffix}" for n in CAPTIONS for suffix in (".png", ".svg")
        }
        assert f"# {folder.name}" in (folder / "README.md").read_text(encoding="utf-8")
        assert folder.name in out
        assert folder.name in (runs / "report.html").read_text()
    assert f"report: {runs / 'report.html'}" in out


def test_what_is_made_of_the_records_is_made_again(cli: Cli, evaluated: Evaluated) -> None:
    """A kill comes between the last record and the table of them, or somebody deletes it."""
    runs, args, _ = evaluated
    tables = sorted(runs.glob("*/results/metrics.csv"))
    whole = [path.read_bytes() for path in tables]
    tables[0].unlink()
    tables[1].write_bytes(whole[1].rpartition(b"\n")[0])
    assert cli("eval", *args, NUMBERS).code == 0
    assert [path.read_bytes() for path in tables] == whole


def test_progress_is_shown_within_a_layer(cli: Cli, evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size a layer takes minutes, and all of its SAEs are done at once."""
    runs, args, _ = evaluated
    shutil.rmtree(first(runs) / "results")
    shown: list[tuple[float, str]] = []

    class Noted(Progress):
        def update(self, now: float, note: str = "") -> None:
            shown.append((now, note))
            super().update(now, note)

    monkeypatch.setattr(evaluate, "Progress", Noted)
    assert cli("eval", *args, NUMBERS).code == 0
    done = [now for now, _ in shown]
    assert done == sorted(done) and done[-1] == pytest.approx(18)
    first_finished = next(now for now, note in shown if note)
    assert len({now for now in done if 0 < now < first_finished}) > 1


def test_numbers_alone_leave_pictures_cards_and_report_as_they_are(cli: Cli, evaluated: Evaluated) -> None:
    runs, args, out = evaluated
    pages = [runs / "report.html", first(runs) / "README.md", first(runs) / "plots" / "2_metrics_heatmap.png"]
    for path in pages:
        path.write_text("as it is")
    result = cli("eval", *args, NUMBERS)
    assert (result.code, result.out) == (0, out[: out.index("\nreport: ")])
    assert [path.read_text() for path in pages] == ["as it is"] * 3


def test_records_that_cannot_be_written_are_one_line(cli: Cli, evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, args, _ = evaluated
    shutil.rmtree(first(runs) / "results")

    replace = os.replace

    def full(mine: Path, path: Path) -> None:
        if path.name == "metrics.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(mine, path)

    monkeypatch.setattr("residual_saes.shared.files.os.replace", full)
    result = cli("eval", *args, NUMBERS)
    assert result.code == 2
    assert "No space left on device" in result.err and "Traceback" not in result.err


def test_a_second_evaluation_computes_nothing_again(cli: Cli, evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    _, args, out = evaluated
    monkeypatch.setattr("residual_saes.eval.measure.evaluate.SplicedModel", None)
    again = cli("eval", *args)
    assert again.code == 0, again.err
    assert again.out == out


def first(runs: Path) -> Path:
    return next(p for p in sorted(runs.iterdir()) if p.is_dir())


def records(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results" / "metrics.json").read_text())
    return found


def test_another_amount_of_text_adds_records_and_a_copy_keeps_them(
    cli: Cli, evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, args, out = evaluated
    before = records(first(runs))
    assert cli("eval", *args, NUMBERS, "--eval-tokens", 64).code == 0
    after = records(first(runs))
    assert len(after) == 36
    assert {name: after[name] for name in before} == before
    assert sorted({r["tokens"] for r in after.values()}) == [64, 2048]
    monkeypatch.setattr("residual_saes.eval.measure.evaluate.SplicedModel", None)
    shutil.copytree(runs, tmp_path / "copy", copy_function=shutil.copyfile)
    copied = tuple(tmp_path / "copy" if a == runs else a for a in args)
    for same in (args, copied):
        result = cli("eval", *same)
        assert result.code == 0, result.err
        assert result.out.replace(str(tmp_path / "copy"), str(runs)) == out


def test_what_can_not_be_measured_again_is_kept(
    cli: Cli, evaluated: Evaluated, harvest_args: tuple[object, ...], tmp_path: Path
) -> None:
    """A cache with layer 0 alone, and a quick look at it."""
    runs, args, _ = evaluated
    before = records(first(runs))
    assert cli("harvest", *harvest_args, "--cache", tmp_path / "c", "--layers", 0).code == 0
    result = cli("eval", *args, "--cache", tmp_path / "c", NUMBERS, "--eval-tokens", 64)
    assert result.code == 0, result.err
    assert "layers 1-2 are not in" in result.err
    after = records(first(runs))
    assert {name: after[name] for name in before} == before
    assert {r["layer"] for name, r in after.items() if name not in before} == {0}
    assert [line.split()[-2] for line in result.out.splitlines() if line.strip()[:1] in set("012")][:3] == [
        "64",
        "2,048",
        "2,048",
    ]


def test_one_bad_item_is_left_out_with_a_line(cli: Cli, evaluated: Evaluated) -> None:
    """A snapshot cut short, one of another layer in its place, a folder of somebody else: all else is evaluated."""
    runs, args, _ = evaluated
    shutil.rmtree(first(runs) / "results")
    bad = [first(runs) / "sae_layer00_3413.pt", first(runs) / "sae_layer02_final.pt"]
    bad[0].write_bytes(bad[0].read_bytes()[:1000])
    shutil.copy(first(runs) / "sae_layer00_final.pt", bad[1])
    (runs / "z-model").mkdir()
    (runs / "z-model" / "config.json").write_text('{"model_type": "gpt_neox"}')
    result = cli("eval", *args)
    assert result.code == 2
    said = [line for line in result.err.splitlines() if line.startswith("left out: ")]
    assert len(said) == 3
    assert all(any(str(p) in line for line in said) for p in (*bad, runs / "z-model"))
    assert result.err.splitlines()[-1] == "error: 3 left out, as said above; all else is evaluated"
    assert set(records(first(runs))) == {
        f"layer{layer:02d}_{label}" for layer in range(3) for label in ("3413", "6826", "10240", "13653", "17066", "final")
    } - {"layer00_3413", "layer02_final"}
    row = next(line for line in result.out.splitlines() if line.split()[:1] == ["2"])
    assert row.endswith("17066 of 20480, unfinished")
    assert "17066 of 20480, unfinished" in (runs / "report.html").read_text(encoding="utf-8")


def test_results_that_are_not_as_they_were_written_are_left_alone(cli: Cli, evaluated: Evaluated) -> None:
    runs, args, _ = evaluated
    path = first(runs) / "results" / "metrics.json"
    good = path.read_text()
    for content in ("{", good.replace("0.", "0.1", 1)):
        path.write_text(content)
        result = cli("eval", *args, NUMBERS)
        assert result.code == 2
        assert f"left out: {path} is damaged" in result.err
        assert path.read_text() == content
    other = sorted(p for p in runs.iterdir() if p.is_dir())[1] / "results" / "metrics.json"
    relabelled = {k: seal(v | {"snapshot": "1B"}) for k, v in json.loads(good).items()}
    for content in (other.read_text(), json.dumps(relabelled)):
        path.write_text(content)
        assert "is of another run" in cli("eval", *args, NUMBERS).err


def test_a_curve_cut_by_a_crash_is_drawn_and_a_damaged_one_is_named(cli: Cli, evaluated: Evaluated) -> None:
    runs, args, out = evaluated
    path = first(runs) / "metrics" / "layer01.jsonl"
    good = path.read_bytes()
    path.write_bytes(good[:-40])
    cut = cli("eval", *args)
    assert (cut.code, cut.out) == (0, out)
    path.write_bytes(good.replace(b'"step": 3,', b'"step": 4,', 1))
    damaged = cli("eval", *args)
    assert (damaged.code, damaged.out) == (2, out)
    assert f"line 3 of {path} is damaged" in damaged.err


def test_a_signal_keeps_what_is_measured(cli: Cli, evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, args, _ = evaluated
    shutil.rmtree(first(runs) / "results")
    measure, calls = evaluate.measure, 0

    def signalled(*of: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*of)

    monkeypatch.setattr(evaluate, "measure", signalled)
    assert cli("eval", *args, NUMBERS).code == 143
    assert {r["layer"] for r in records(first(runs)).values()} == {0}
    assert len(records(first(runs))) == 6
    assert cli("eval", *args, NUMBERS).code == 0
    assert calls == 4


def test_hardly_any_text(cli: Cli, evaluated: Evaluated) -> None:
    """One activation has no variance, so there is no FVU; that is said as such."""
    runs, args, _ = evaluated
    result = cli("eval", *args, NUMBERS, "--eval-tokens", 1)
    assert result.code == 0, result.err
    added = [r for r in records(first(runs)).values() if r["tokens"] == 1]
    assert len(added) == 18
    assert all(r["fvu"] is None for r in added)


def test_runs_say_where_their_cache_is_and_one_that_is_damaged_hides_it_from_nobody(runs_path: Path, cache_path: Path) -> None:
    again = runs_path.parent / "again"  # as deep as they were: the place is seen from the run's folder
    shutil.copytree(runs_path, again)
    first(again).joinpath("config.json").write_text("{")
    assert cache_places(again) == cache_places(runs_path) == [cache_path]


def test_runs_of_other_caches_are_passed_over(cli: Cli, evaluated: Evaluated) -> None:
    runs, args, out = evaluated
    shutil.copytree(first(runs), runs / "other")
    path = runs / "other" / "config.json"
    config = json.loads(path.read_text())
    config["cache"]["digest"] = "of another"
    path.write_text(json.dumps(seal(config)))
    assert cli("eval", *args).out == out
