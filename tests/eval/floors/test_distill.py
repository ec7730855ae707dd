import contextlib
import io
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from residual_saes.eval.floors.students import Student, Teacher
from residual_saes.eval.measure.features import load_features
from residual_saes.eval.measure.predicted import Statistics, critical_width, floors
from residual_saes.shared.seal import load_sealed, save_sealed, sealed
from tests.conftest import Cli, invoke

Call = Callable[..., list[dict[str, Any]]]
SMALL = ("--widths", "8,16,24", "--seeds", 2, "--tokens", "2K", "--batch", 8, "--lr", "1e-2", "--eval-tokens", 320)


@pytest.fixture(scope="module")
def evaluated_once(runs_path: Path, cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one SAE each, evaluated."""
    runs = tmp_path_factory.mktemp("evaluated") / "runs"
    for folder in sorted(runs_path.iterdir())[:2]:
        shutil.copytree(folder, runs / folder.name, ignore=shutil.ignore_patterns("sae_*"))
        shutil.copy(folder / "sae_layer01_final.pt", runs / folder.name)
    with contextlib.redirect_stdout(io.StringIO()):
        args = ("--preset", "demo", "--cache", cache_path, "--device", "cpu", "--ce-tokens", 320)
        assert invoke("eval", *args, "--numbers-only", "--runs", runs) == 0
    return runs


@pytest.fixture
def evaluated(evaluated_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(evaluated_once, tmp_path / "runs")


@pytest.fixture
def distil(cli: Cli, cache_path: Path) -> Call:
    """Runs the command, and gives what is in distilled.json then."""

    def call(runs: Path, *more: object, code: int = 0) -> list[dict[str, Any]]:
        args = ("--preset", "demo", "--cache", cache_path, "--runs", runs, "--device", "cpu")
        result = cli("eval", "distill", *args, *SMALL, *more)
        assert result.code == code, result.err
        experiments: list[dict[str, Any]] = json.loads((runs / "distilled.json").read_bytes())
        return experiments

    return call


@pytest.fixture(scope="module")
def undisturbed(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Students of one seed, where there are no SAEs."""
    runs = tmp_path_factory.mktemp("undisturbed")
    with contextlib.redirect_stdout(io.StringIO()):
        args = ("--preset", "demo", "--cache", cache_path, "--runs", runs, "--device", "cpu", *SMALL)
        assert invoke("eval", "distill", *args, "--seeds", 1) == 2  # for want of runs
    students: list[dict[str, Any]] = json.loads((runs / "distilled.json").read_bytes())[0]["students"]
    return students


def test_students_are_measured_and_held_beside_every_prediction(distil: Call, evaluated: Path) -> None:
    runs = evaluated
    (experiment,) = distil(runs)
    assert sealed(experiment)
    assert [(s["width"], s["seed"]) for s in experiment["students"]] == [(w, s) for w in (8, 16, 24) for s in (0, 1)]
    for f in experiment["floors"]:
        mine = [s["floor"] for s in experiment["students"] if s["width"] == f["width"]]
        assert (f["seeds"], f["floor"], f["spread"]) == (2, pytest.approx(np.mean(mine)), pytest.approx(np.std(mine, ddof=1)))
        assert 0 < f["floor"] < f["kl"] < 2 * math.log(400)  # the model of these tests is sure of itself
    assert experiment["teacher"]["width"] == 32
    assert experiment["setting"] | {"temperature": 2.0, "heldout_tokens": 320, "tokens": 2000} == experiment["setting"]
    names = sorted(p.name for p in runs.iterdir() if p.is_dir())
    assert [(p["run"], p["layer"]) for p in experiment["predictions"]] == [(name, 1) for name in names]
    for p in experiment["predictions"]:
        features, _ = load_features(runs / p["run"] / "results" / "features" / "layer01_final.safetensors")
        statistics = Statistics.measured(features.density.double(), features.mean_square.double(), 1e-5)
        importance = features.mean_square.double()[features.density > 1e-5].sort(descending=True).values
        assert p["critical_width"] == critical_width(statistics) and p["F"] == len(importance)
        for w, floor in floors(statistics, (8, 16, 24)).items():
            assert p["widths"][str(w)] == {"predicted": floor, "naive": pytest.approx(float(importance[w:].sum()))}
        fit = p["fits"]["naive"]
        assert [point["floor"] for point in fit["points"]] == [f["floor"] for f in experiment["floors"]]
        assert [point["x"] for point in fit["points"]] == [v["naive"] for v in p["widths"].values()]
        assert [point["x"] for point in p["fits"]["log_width"]["points"]] == [-math.log(w) for w in (8, 16, 24)]
    assert not (runs / "distilling").exists()


def test_results_are_added_to_and_nothing_is_trained_twice(
    distil: Call, evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, trained, real = evaluated, [], Student.__init__

    def noted(self: Student, teacher: Teacher, width: int, seed: int, *rest: Any) -> None:
        trained.append((width, seed))
        real(self, teacher, width, seed, *rest)

    monkeypatch.setattr(Student, "__init__", noted)
    (first,) = distil(runs, "--widths", 8, "--seeds", 1)
    (second,) = distil(runs)
    (third,) = distil(runs, "--widths", 8)
    other, before = distil(runs, "--widths", 8, "--seeds", 1, "--lr", "1e-3")
    assert trained == [(8, 0), (16, 0), (24, 0), (8, 1), (16, 1), (24, 1), (8, 0)]
    assert second["students"][0] == first["students"][0] and third == second == before
    assert other["digest"] != before["digest"] and other["students"][0]["floor"] != before["students"][0]["floor"]
    assert first["predictions"][0]["fits"]["log_width"] is None and second["predictions"][0]["fits"]["log_width"]
    assert (first["teacher"]["ce"], first["teacher"]["width"]) == (pytest.approx(other["teacher"]["ce"]), 32)


class Killed(BaseException):
    """Stands for a kill: nothing catches it, nothing cleans up after it."""


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_students_that_were_interrupted_end_with_the_same_bits(
    distil: Call, undisturbed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Killed after a step with one of three states written, the others of the step before, if there was one."""
    saves, real = [0], Student.save

    def save(self: Student) -> None:
        saves[0] += 1
        if saves[0] == 3 * steps - 1:
            raise Killed
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Student, "save", save)
        with pytest.raises(Killed):
            distil(tmp_path, "--seeds", 1, "--save-minutes", 0)
    assert len(list((tmp_path / "distilling").rglob("*.safetensors"))) == (1 if steps == 1 else 3)
    (resumed,) = distil(tmp_path, "--seeds", 1, code=2)
    assert resumed["students"] == undisturbed


def test_a_signal_ends_the_step_in_hand_and_the_next_run_goes_on(
    cli: Cli, distil: Call, undisturbed: list[dict[str, Any]], cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Teacher.train_step

    def step(self: Teacher, students: list[Student], tokens: torch.Tensor) -> list[float]:
        if students[0].step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, students, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "train_step", step)
        distil(tmp_path, "--seeds", 1, code=143)
    assert len(list((tmp_path / "distilling").rglob("*.safetensors"))) == 3
    (resumed,) = distil(tmp_path, "--seeds", 1, code=2)
    assert resumed["students"] == undisturbed


def test_a_width_alone_is_what_it_is_among_others(distil: Call, undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    (alone,) = distil(tmp_path, "--seeds", 1, "--widths", 16, code=2)
    assert alone["students"] == [undisturbed[1]]


@pytest.mark.parametrize("odd", ["tensors", "step"])
def test_a_damaged_state_costs_its_student_and_one_of_another_is_refused(
    odd: str,
    distil: Call,
    cli: Cli,
    undisturbed: list[dict[str, Any]],
    cache_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs, real = tmp_path / "runs", Student.save

    def save(self: Student) -> None:
        real(self)
        if self.step == 3 and self.width == 16:
            raise Killed

    args = ("--seeds", 1, "--widths", "8,16")
    with monkeypatch.context() as patch:
        patch.setattr(Student, "save", save)
        with pytest.raises(Killed):
            distil(runs, *args, "--save-minutes", 0)
    small, large = sorted((runs / "distilling").rglob("*.safetensors"))
    shutil.copy(small, tmp_path / "small")
    shutil.copy(large, small)
    command = ("eval", "distill", "--preset", "demo", "--cache", cache_path, "--runs", runs, "--device", "cpu", *SMALL, *args)
    refused = cli(*command)
    assert refused.code == 2 and "is of another student or experiment" in refused.err
    content = bytearray((tmp_path / "small").read_bytes())
    content[-1] ^= 1
    small.write_bytes(content)
    tensors, facts = load_sealed(large)
    if odd == "tensors":
        tensors.popitem()
    save_sealed(large, facts | ({"at": 10**6} if odd == "step" else {}), tensors)  # of another hand, under a right checksum
    again = cli(*command)
    assert "is damaged (its checksum does not match); that student is trained again from its start" in again.err
    assert f"{large} is damaged (its {odd} " in again.err
    assert json.loads((runs / "distilled.json").read_bytes())[0]["students"] == undisturbed[:2]


def test_what_was_not_evaluated_is_left_out_with_a_line_a_run(
    cli: Cli, cache_path: Path, evaluated: Path, runs_path: Path
) -> None:
    name = sorted(p.name for p in evaluated.iterdir() if p.is_dir())[1]
    for layer in (0, 1, 2):
        shutil.copy(runs_path / name / f"sae_layer{layer:02d}_final.pt", evaluated / name / f"sae_layer{layer:02d}_final.pt")
    args = ("--preset", "demo", "--cache", cache_path, "--runs", evaluated, "--device", "cpu", *SMALL)
    result = cli("eval", "distill", *args, "--widths", 8, "--seeds", 1)
    assert result.code == 2
    assert f"layers 0,2 of {evaluated / name} have not been evaluated: run `rsae eval`, then this again" in result.err
    (experiment,) = json.loads((evaluated / "distilled.json").read_bytes())
    assert [p["layer"] for p in experiment["predictions"]] == [1, 1] and len(experiment["students"]) == 1


def test_a_state_that_a_kill_left_after_its_student_was_measured_goes_with_the_next_run(
    distil: Call, evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(_folder: Path, known: set[tuple[int, int]]) -> None:
        if known:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("residual_saes.eval.floors.distill._drop_states", measured)
        distil(evaluated, "--seeds", 1)
    assert list(evaluated.rglob("distilling/*/width*_seed0.safetensors"))
    distil(evaluated, "--seeds", 1)
    assert not (evaluated / "distilling").exists()


def test_what_cannot_be_done_is_one_line(cli: Cli, cache_path: Path, evaluated: Path) -> None:
    runs = evaluated
    command = ("eval", "distill", "--preset", "demo", "--cache", cache_path, "--runs", runs, "--device", "cpu", *SMALL)
    for more, said in (
        (("--widths", "64"), "a student of width 64 is wider than the model, which has 32"),
        (("--widths", "7"), "a width of 7 has no heads whose rotated part is even"),
        (("--widths", "a"), "'a' is not a count"),
        (("--tokens", 100), "100 tokens are less than one batch of 8 x 32: lower --batch"),
        (("--model", runs), "is not the model"),
    ):
        result = cli(*command, *more)
        assert result.code == 2 and said in result.err, result.err
        assert result.err.count("\n") == 1, result.err
        assert not (runs / "distilled.json").exists()
    (runs / "distilled.json").write_text("[{}]")
    result = cli(*command)
    assert result.code == 2 and "distilled.json is damaged: restore it, or delete it" in result.err
    assert (runs / "distilled.json").read_text() == "[{}]"
