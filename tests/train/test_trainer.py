import dataclasses
import json
import math
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from residual_saes.shared.cache import Cache
from residual_saes.shared.runs.run import Run, snapshot_tokens
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site
from residual_saes.train.config import TrainConfig
from residual_saes.train.kernels.base import Workspace
from residual_saes.train.sparsity.base import Hidden
from residual_saes.train.step import Begun, StepResult, TrainingSae
from residual_saes.train.trainer import train
from tests.conftest import TRAIN_ARGS, Cli, Result, curve_of, invoke

L1 = "3e-3,8e-4,adaptive:5e-3@12"
NAMES = ["l1-3e-3-fixed", "l1-8e-4-fixed", "l1-adaptive-5e-3-l0-12"]


def finals(runs: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Every checkpoint's weights, by 'setting/file'."""
    found = {}
    for path in sorted(runs.glob("*/sae_*.pt")):
        found[f"{path.parent.name.split('-saes-')[1]}/{path.name}"] = torch.load(path, weights_only=True)["model_state"]
    return found


def same(a: dict[str, dict[str, torch.Tensor]], b: dict[str, dict[str, torch.Tensor]]) -> None:
    assert a.keys() == b.keys()
    for name, state in a.items():
        assert all(torch.equal(state[k], b[name][k]) for k in state), name


def test_a_run_folder_is_complete(runs_path: Path, cache: Cache) -> None:
    folders = sorted(p for p in runs_path.iterdir() if p.is_dir())
    assert [p.name.split("x4-")[1] for p in folders] == sorted(NAMES)
    for folder in folders:
        run = Run(folder)
        labels = [(s.site.layer, s.label) for s in run.snapshots()]
        assert len(labels) == 18  # six snapshots of three layers
        assert labels[5] == (0, "final")
        assert not list((folder / "state").rglob("*.safetensors"))
        assert run.config.stored["cache"]["spec"]["tokenizer_sha256"] == cache.spec.tokenizer_sha256
        for layer in range(3):
            curve = curve_of(run, Site(layer))
            assert curve[-1]["tokens"] == 20_480
            assert curve[-1]["loss"] < curve[0]["loss"]
            for key in ("mse", "l1", "l0", "lambda", "alive", "tokens_per_second", "wait_share"):
                assert math.isfinite(curve[-1][key])


def test_settings_do_what_they_say(runs_path: Path) -> None:
    """Less λ, more active features; the adaptive one rests over the first fifth and is steered to the last step."""
    by_name = {p.name.split("x4-")[1]: Run(p) for p in runs_path.iterdir() if p.is_dir()}
    for layer in range(3):
        sparse, rich, adaptive = (curve_of(by_name[n], Site(layer)) for n in NAMES)
        assert sparse[-1]["l0"] < rich[-1]["l0"]
        assert {r["lambda"] for r in adaptive if r["step"] <= 16} == {5e-3}
        last = [r["lambda"] for r in adaptive if r["step"] > 66]
        assert len(set(last)) == len(last) > 5


def test_a_setting_that_comes_later_catches_up_with_the_others(
    cli: Cli, runs_path: Path, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where steps are begun a batch ahead: two SAEs are stopped after 40 steps, and go on when the third is there.
    What is stopped before it had a batch of its own keeps the state that it has."""
    monkeypatch.setattr("residual_saes.train.layer.queues", lambda device: True)
    args = (*TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path, "--layers", 1, "--save-minutes", 60)
    for l1, calls, steps in (("8e-4,adaptive:5e-3@12", 80, [40, 40]), (L1, 10, [10, 40, 40])):
        stop_after(monkeypatch, calls)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/state/layer01/*")}
        assert cli("train", *args, "--l1", l1).code == 143
        states = [Run(path).load_state(Site(1)) for path in tmp_path.iterdir()]
        assert sorted(state[1]["step"] for state in states if state is not None) == steps
        assert all(path.stat().st_mtime_ns == then for path, then in before.items())
        monkeypatch.undo()
        monkeypatch.setattr("residual_saes.train.layer.queues", lambda device: True)
    assert cli("train", *args, "--l1", L1).code == 0
    same(finals(tmp_path), {name: each for name, each in finals(runs_path).items() if "layer01" in name})


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Have the process asked to stop when so many steps are begun."""
    begin, seen = TrainingSae.begin, 0

    def watched(self: TrainingSae, x: torch.Tensor, workspace: Workspace, hidden: Hidden, y: Any) -> Begun:
        nonlocal seen
        seen += 1
        if seen == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return begin(self, x, workspace, hidden, y)

    monkeypatch.setattr(TrainingSae, "begin", watched)


def test_settings_together_are_settings_alone(cli: Cli, runs_path: Path, cache_path: Path, tmp_path: Path) -> None:
    for l1 in L1.split(","):
        result = cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path, "--l1", l1, "--layers", 1)
        assert result.code == 0, result.err
    together = {k: v for k, v in finals(runs_path).items() if "layer01" in k}
    same(finals(tmp_path), together)


def test_shards_together_are_one_process(cli: Cli, runs_path: Path, cache_path: Path, tmp_path: Path) -> None:
    """Of three layers; and a checkpoint says on what machine it was made, whoever began the run."""
    args = (*TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path, "--l1", L1)
    threads = torch.get_num_threads()
    for shard, layers in (("0/2", "0,2"), ("1/2", "1")):
        result = cli("train", *args, "--shard", shard)
        assert result.code == 0, result.err
        assert f"trained layers {layers} into" in result.err
    same(finals(tmp_path), finals(runs_path))
    run = Run(next(tmp_path.iterdir()))
    run.snapshot_path(Site(0), "final").unlink()
    torch.set_num_threads(threads + 1)
    assert cli("train", *args, "--layers", 0).code == 0
    made = {s.label: Sae.load(s.path).config["machine"]["threads"] for s in run.snapshots() if s.site == Site(0)}
    assert made.pop("final") == threads + 1
    assert set(made.values()) == {threads}


def test_a_random_decoder_is_a_run_of_its_own_on_the_same_batches(
    cli: Cli, runs_path: Path, cache_path: Path, tmp_path: Path
) -> None:
    args = (*TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path, "--l1", "3e-3", "--layers", 1)
    assert cli("train", *args, "--decoder", "random").code == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("x4-l1-3e-3-fixed-random-decoder")
    run, trained = Run(folder), Run(runs_path / folder.name.removesuffix("-random-decoder"))
    assert run.config.stored["digest"] != trained.config.stored["digest"]
    first, *_, last = (Sae.load(s.path) for s in run.snapshots())
    assert torch.equal(first.w_dec, last.w_dec) and not torch.equal(first.w_enc, last.w_enc)
    ours, theirs = curve_of(run, Site(1)), curve_of(trained, Site(1))
    assert ours[0]["l0"] == pytest.approx(theirs[0]["l0"], rel=0.05)  # the same SAE at the start, the same batches
    assert ours[-1]["mse"] > theirs[-1]["mse"]


class Killed(BaseException):
    """Stands for a kill: nothing catches it, nothing cleans up after it."""


def kill_in_step(monkeypatch: pytest.MonkeyPatch, cli: Cli, step: int, *args: object) -> None:
    """Train three settings, and end in the middle of the second one's step."""
    finish, calls = TrainingSae.finish, 0

    def dying(self: TrainingSae, begun: Begun, **options: object) -> StepResult:
        nonlocal calls
        calls += 1
        if calls == 3 * step + 2:
            raise Killed
        return finish(self, begun, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingSae, "finish", dying)
    with pytest.raises(Killed):
        cli("train", *TRAIN_ARGS, *args)
    monkeypatch.setattr(TrainingSae, "finish", finish)


@pytest.mark.parametrize(("save_minutes", "ahead"), [(0, False), (60, False), (0, True)])
@pytest.mark.parametrize("kill_at", [1, 23, 41, 79])
def test_resumes_bit_for_bit(
    cli: Cli,
    runs_path: Path,
    cache_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: int,
    save_minutes: int,
    ahead: bool,
) -> None:
    """Killed in the middle of the second setting's step, with states saved as often as they can be, or none at all; and with
    steps begun a batch ahead, as on a GPU."""
    monkeypatch.setattr("residual_saes.train.layer.queues", lambda device: ahead)
    args = ("--cache", cache_path, "--runs", tmp_path, "--l1", L1, "--layers", 1, "--save-minutes", save_minutes)
    kill_in_step(monkeypatch, cli, kill_at, *args)
    assert bool(list(tmp_path.glob("*/state/*/*"))) == (save_minutes == 0)  # by the clock alone, not at snapshots
    result = cli("train", *TRAIN_ARGS, *args)
    assert result.code == 0, result.err
    same(finals(tmp_path), {k: v for k, v in finals(runs_path).items() if "layer01" in k})
    timeless = {"tokens_per_second", "wait_share"}
    for folder in tmp_path.iterdir():
        mine, whole = curve_of(Run(folder), Site(1)), curve_of(Run(runs_path / folder.name), Site(1))
        assert [{k: v for k, v in r.items() if k not in timeless} for r in mine] == [
            {k: v for k, v in r.items() if k not in timeless} for r in whole
        ]


@pytest.mark.parametrize(
    ("number", "code", "ahead"), [(signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 1)]
)
def test_a_signal_costs_no_work(
    cli: Cli,
    runs_path: Path,
    cache_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    ahead: int,
) -> None:
    """It comes in the middle of the first setting's 31st step: that step is finished for both, or the one that is begun a
    batch ahead, and saved."""
    monkeypatch.setattr("residual_saes.train.layer.queues", lambda device: bool(ahead))
    args = ("--cache", cache_path, "--runs", tmp_path, "--l1", "3e-3,8e-4", "--layers", 1, "--save-minutes", 60)
    finish, calls = TrainingSae.finish, 0

    def signalled(self: TrainingSae, begun: Begun, **options: object) -> StepResult:
        nonlocal calls
        calls += 1
        if calls == 61:
            os.kill(os.getpid(), number)
        return finish(self, begun, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingSae, "finish", signalled)
    stopped = cli("train", *TRAIN_ARGS, *args)
    assert stopped.code == code
    assert stopped.err.splitlines()[-1].endswith("run the same command again to continue")
    for folder in tmp_path.iterdir():
        state = Run(folder).load_state(Site(1))
        assert state is not None and state[1]["step"] == 31 + ahead
        assert [p.name for p in (folder / "state" / "layer01").iterdir()] == ["state.safetensors"]
    calls = 61
    assert cli("train", *TRAIN_ARGS, *args).code == 0
    assert calls == 61 + 2 * (80 - 31 - ahead)
    same(finals(tmp_path), {k: v for k, v in finals(runs_path).items() if "layer01" in k and "adaptive" not in k})


@pytest.fixture
def one(runs_path: Path, tmp_path: Path) -> Run:
    """A copy of a finished run."""
    folder = next(runs_path.glob("*3e-3-fixed"))
    shutil.copytree(folder, tmp_path / "runs" / folder.name)
    return Run(tmp_path / "runs" / folder.name)


def contents(run: Run) -> dict[str, bytes]:
    return {str(p.relative_to(run.path)): p.read_bytes() for p in sorted(run.path.rglob("*")) if p.is_file()}


def again(cli: Cli, cache_path: Path, run: Run, *more: object) -> Result:
    return cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", run.path.parent, "--l1", "3e-3", *more)


def test_what_is_missing_or_damaged_is_made_again(cli: Cli, cache_path: Path, one: Run) -> None:
    """An empty final, a snapshot deleted in the middle, a flipped byte: the same files as before, and no others touched."""
    before = contents(one)
    one.snapshot_path(Site(0), "final").write_bytes(b"")
    one.snapshot_path(Site(1), "6826").unlink()
    flipped = bytearray(before["sae_layer02_3413.pt"])
    flipped[len(flipped) // 2] ^= 1
    one.snapshot_path(Site(2), "3413").write_bytes(flipped)
    kept = {p: p.stat().st_mtime_ns for p in one.path.glob("*.pt")}
    result = again(cli, cache_path, one)
    assert result.code == 0, result.err
    assert "layer 0: final must be made, and there is no state; trained again from its start" in result.err
    after = contents(one)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name.endswith((".pt", "config.json")))
    assert [len(curve_of(one, Site(layer))) for layer in range(3)] == [80] * 3
    changed = {p.name for p, t in kept.items() if p.stat().st_mtime_ns != t}
    assert changed == {"sae_layer00_final.pt", "sae_layer02_3413.pt"}


def test_a_snapshot_before_the_state_that_is_gone_is_made_again(
    cli: Cli, cache_path: Path, one: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(one)
    shutil.rmtree(one.path)
    save = Run.save_state

    def stop_at_40(self: Run, site: Site, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        save(self, site, tensors, facts)
        if facts["step"] >= 40:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Run, "save_state", stop_at_40)
    full = again(cli, cache_path, one, "--layers", 0, "--save-minutes", 0)
    assert full.code == 2 and "No space left" in full.err and "Traceback" not in full.err
    assert not list(one.path.rglob("*.tmp"))
    monkeypatch.undo()
    one.snapshot_path(Site(0), "6826").unlink()
    result = again(cli, cache_path, one, "--layers", 0)
    assert result.code == 0, result.err
    assert "must be made again, and the state is of a later step; trained again from its start" in result.err
    assert contents(one).keys() == {name for name in before if "layer01" not in name and "layer02" not in name}
    assert all(content == before[name] for name, content in contents(one).items() if name.endswith(".pt"))


def test_a_state_that_is_damaged_or_anothers(cli: Cli, cache_path: Path, one: Run, tmp_path: Path) -> None:
    """Damaged: the layer is trained from its start, to the same end. Another layer's, or one that cannot be read: refused, and
    nothing is touched."""
    before = contents(one)
    for path in one.path.glob("sae_layer00_*"):
        path.unlink()
    one.save_state(Site(1), {"a": torch.zeros(3)}, {"step": 7})
    path = one.state_path(Site(0))
    path.parent.mkdir()
    shutil.move(one.state_path(Site(1)), path)
    refused = again(cli, cache_path, one, "--layers", 0)
    assert refused.code == 2
    assert "is the state of layer 1 of this run, not of layer 0" in refused.err
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    refused = again(cli, cache_path, one, "--layers", 0)
    assert refused.code == 2 and "Is a directory" in refused.err and path.exists()
    path.rmdir()
    path.write_bytes(content[:-2])
    result = again(cli, cache_path, one, "--layers", 0)
    assert result.code == 0, result.err
    assert "state.safetensors is damaged" in result.err
    assert {k: v for k, v in contents(one).items() if k.endswith(".pt")} == {k: v for k, v in before.items() if ".pt" in k}


def test_a_second_trainer_of_a_layer_is_refused(cli: Cli, cache_path: Path, one: Run) -> None:
    one.snapshot_path(Site(2), "final").unlink()
    with one.claim([Site(2)]):
        before = contents(one)
        result = again(cli, cache_path, one)
        assert result.code == 3
        assert f"layer 2 of {one.path} is being trained by process {os.getpid()} on" in result.err
        assert contents(one) == before
    assert again(cli, cache_path, one).code == 0


def test_points_that_come_again_are_taken_back(cli: Cli, cache_path: Path, one: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: list[dict[str, Any]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.seen: dict[str, Any] = {"purge": purge_step, "steps": [], "closed": False}
            writers.append(self.seen)

        def add_scalar(self, key: str, value: float, step: int) -> None:
            self.seen["steps"].append(step)

        def close(self) -> None:
            self.seen["closed"] = True

    shutil.rmtree(one.path)
    save = Run.save_state

    def stop(self: Run, site: Site, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        save(self, site, tensors, facts)
        monkeypatch.setattr(Run, "save_state", save)  # a second signal would mean now, wherever the trainer is
        os.kill(os.getpid(), signal.SIGTERM)

    for module in ("job", "trainer"):
        monkeypatch.setattr(f"residual_saes.train.{module}.summary_writer", lambda: Writer)
    monkeypatch.setattr(Run, "save_state", stop)
    assert again(cli, cache_path, one, "--layers", 0, "--save-minutes", 0, "--tensorboard").code == 143
    state = one.load_state(Site(0))
    assert state is not None
    assert again(cli, cache_path, one, "--layers", 0, "--tensorboard").code == 0
    assert writers[0]["purge"] == 1
    assert writers[1]["purge"] == state[1]["step"] * 256 + 1
    assert min(writers[1]["steps"]) >= writers[1]["purge"]
    assert all(writer["closed"] for writer in writers)
    shutil.rmtree(one.path)
    (one.path / "tensorboard").mkdir(parents=True)
    (one.path / "tensorboard" / "layer00").symlink_to(cache_path)
    assert "which is left alone" in again(cli, cache_path, one, "--layers", 0, "--tensorboard").err


@pytest.mark.parametrize("odd", ["missing", "shape", "l1", "step"])
def test_a_state_of_another_hand_is_not_gone_on_from(cli: Cli, cache_path: Path, one: Run, odd: str) -> None:
    """Its checksum is right."""
    final, facts = one.snapshot_path(Site(0), "final"), {"step": 79, "l1": {"value": 3e-3}}
    wanted = Sae.load(final).w_enc
    final.unlink()
    (one.path / "state" / "layer00").mkdir(parents=True)
    d, n = 32, 128
    shapes = {"w_enc": (n, d), "w_dec": (n, d), "bias": (n + 2 * d,)}
    tensors = {f"{of}{name}": torch.zeros(shape) for name, shape in shapes.items() for of in ("", "m.", "v.")}
    tensors["last_active"] = torch.zeros(n, dtype=torch.int32)
    if odd == "missing":
        del tensors["v.bias"]
    elif odd == "shape":
        tensors["m.w_enc"] = torch.zeros(3)
    else:
        facts[odd] = "x"
    one.save_state(Site(0), tensors, facts)
    again_ = again(cli, cache_path, one, "--layers", 0)
    assert again_.code == 0 and "is no state to go on from" in again_.err, again_.err
    assert torch.equal(Sae.load(final).w_enc, wanted)


def test_another_machine_is_said(cli: Cli, cache_path: Path, one: Run) -> None:
    one.snapshot_path(Site(0), "final").unlink()
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert "not bit for bit" in again(cli, cache_path, one, "--layers", 0).err


def test_training_goes_on_while_a_state_is_written(
    cli: Cli, runs_path: Path, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first state takes until the 50th step; what it holds is the SAE after the first step all the same."""
    reached, states = threading.Event(), []
    finish, save = TrainingSae.finish, Run.save_state

    def watched(self: TrainingSae, begun: Begun, **options: object) -> StepResult:
        if self.step_count == 50:
            reached.set()
        return finish(self, begun, **options)  # type: ignore[arg-type]

    def slow(self: Run, site: Site, tensors: dict[str, torch.Tensor], facts: dict[str, float]) -> None:
        assert reached.wait(60), "training waited"
        states.append((facts["step"], int(tensors["last_active"].max())))
        save(self, site, tensors, facts)

    monkeypatch.setattr(TrainingSae, "finish", watched)
    monkeypatch.setattr(Run, "save_state", slow)
    args = ("--cache", cache_path, "--runs", tmp_path, "--l1", "3e-3", "--layers", 1, "--save-minutes", 0, "--tokens", 20_480)
    # no snapshot may be due before the 50th step, for it would wait for room
    monkeypatch.setattr("residual_saes.train.job.snapshot_tokens", lambda tokens: {"final": tokens})
    result = cli("train", *TRAIN_ARGS, *args)
    assert result.code == 0, result.err
    assert states[0] == (1, 1)
    assert all(step == last for step, last in states)
    same(finals(tmp_path), {k: v for k, v in finals(runs_path).items() if "3e-3-fixed/sae_layer01_final" in k})


def test_a_state_is_never_ahead_of_its_snapshots_nor_dropped_before_the_last(
    cli: Cli, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash at any moment a resumed run makes every snapshot that is not there."""
    save, drop, seen = Run.save_state, Run.drop_state, []

    def labels(self: Run, site: Site) -> list[str]:
        return [s.label for s in self.snapshots() if s.site == site]

    def checked_save(self: Run, site: Site, tensors: dict[str, torch.Tensor], facts: dict[str, int]) -> None:
        due = [label for label, tokens in snapshot_tokens(20_480).items() if tokens // 256 <= facts["step"]]
        assert labels(self, site) == due
        seen.append(len(due))
        save(self, site, tensors, facts)

    def checked_drop(self: Run, site: Site) -> None:
        assert labels(self, site)[-1] == "final"
        seen.append(-1)
        drop(self, site)

    monkeypatch.setattr(Run, "save_state", checked_save)
    monkeypatch.setattr(Run, "drop_state", checked_drop)
    args = ("--cache", cache_path, "--runs", tmp_path, "--l1", "3e-3,8e-4", "--layers", "0-1", "--save-minutes", 0)
    result = cli("train", *TRAIN_ARGS, *args)
    assert result.code == 0, result.err
    assert max(seen) > 0
    assert seen.count(-1) == 4


def test_a_disk_that_is_full_stops_training_in_one_line(
    cli: Cli, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Sae, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Sae, "save", full)
    result = cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path, "--l1", "3e-3", "--layers", 1)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith(f"error: cannot write to {tmp_path} ([Errno 28] No space left on device)")


def test_a_finished_run_is_left_alone(cli: Cli, runs_path: Path, cache_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in runs_path.rglob("*.pt")}
    assert cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", runs_path, "--l1", L1).code == 0
    assert {p: p.stat().st_mtime_ns for p in runs_path.rglob("*.pt")} == before


@pytest.mark.parametrize(("log_records", "ahead"), [(300, False), (2, False), (2, True)])
def test_a_setting_that_diverges_stops_alone(
    cli: Cli, runs_path: Path, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_records: int, ahead: bool
) -> None:
    """One SAE's loss turns NaN at its 30th step: it stops there with its state kept, the other goes on to the same end. Where
    nothing is written at that step it is noticed one later; and with steps begun a batch ahead, as on a GPU."""
    monkeypatch.setattr("residual_saes.train.layer.queues", lambda device: ahead)
    records = {"log_records": log_records}
    monkeypatch.setattr(
        "residual_saes.train.__main__.train", lambda *args: train(*args[:-1], dataclasses.replace(args[-1], **records))
    )
    begin, first = TrainingSae.begin, list[TrainingSae]()

    def poisoned(self: TrainingSae, x: torch.Tensor, workspace: Workspace, hidden: Hidden, y: Any) -> Begun:
        first.append(self)
        return begin(self, x * math.nan if self.step_count == 30 and self is first[0] else x, workspace, hidden, y)

    monkeypatch.setattr(TrainingSae, "begin", poisoned)
    args = ("--cache", cache_path, "--runs", tmp_path, "--l1", "3e-3,8e-4", "--layers", 1)
    result = cli("train", *TRAIN_ARGS, *args)
    assert result.code == 2
    assert "l1-3e-3-fixed layer 1 stopped at 7,936 tokens: loss nan" in result.err
    stopped, other = (Run(next(tmp_path.glob(f"*{n}"))) for n in NAMES[:2])
    assert curve_of(stopped, Site(1))[-1] == {"step": 31, "tokens": 7936, "stopped": "not finite"}
    state = stopped.load_state(Site(1))
    assert state is not None
    assert state[1]["step"] == 30
    assert all(torch.isfinite(t).all() for t in state[0].values())
    assert other.snapshot_path(Site(1), "final").exists()
    monkeypatch.setattr(TrainingSae, "begin", begin)
    assert cli("train", *TRAIN_ARGS, *args).code == 0
    same(finals(tmp_path), {k: v for k, v in finals(runs_path).items() if "layer01" in k and "adaptive" not in k})


def test_options_reach_the_step(cli: Cli, cache_path: Path, tmp_path: Path) -> None:
    result = cli(
        "train", *TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path, "--l1", "1e-2", "--layers", "0", "--tokens", "5k",
        "--l1-reduction", "mean", "--lr", "2e-3", "--lr-warmup", 5, "--seed", 3, "--epochs", 1,
    )  # fmt: skip
    assert result.code == 0, result.err
    config = json.loads(next(tmp_path.glob("*/config.json")).read_text())["train"]
    assert config["step"]["l1_reduction"] == "mean"
    assert (config["lr"], config["lr_warmup"], config["seed"], config["tokens"]) == (2e-3, 5, 3, 5000)
    assert curve_of(Run(next(tmp_path.iterdir())), Site(0))[-1]["lambda"] == pytest.approx(1e-2)


def test_the_rate_falls_over_its_share_and_has_a_fall_of_its_own_where_l0_is_held() -> None:
    config = TrainConfig(tokens=1000, batch=1, lr=1.0, lr_warmup=10, lr_decay=0.2, hold_l0=0.1)
    lr = [config.lr_at(step) for step in range(config.steps)]
    assert config.hold_from == 900
    assert (lr[0], lr[9], lr[700], lr[800], lr[899]) == pytest.approx((0.1, 1, 1, 0.5, 0.005))
    assert (lr[900], lr[950], lr[999]) == pytest.approx((1, 0.5, 0.01))
    plain = TrainConfig(tokens=1000, batch=1, lr=1.0)
    assert {plain.lr_at(step) for step in range(1000)} == {1.0}


def test_a_recipe_is_defaults_that_options_win_over(cli: Cli, cache_path: Path, tmp_path: Path) -> None:
    args = ("--cache", cache_path, "--runs", tmp_path, "--l1", "1e-2", "--layers", "0", "--tokens", "5k")
    assert cli("train", *TRAIN_ARGS, *args, "--recipe", "best", "--lr-decay", 0.5).code == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("-l1-1e-2-fixed-best")
    train = Run(folder).config.stored["train"]
    wanted = {"decoder_norm": "free", "lr_decay": 0.5, "refit": 0.2, "refit_kind": "topk", "l1_warmup": 0}
    assert {name: (train | train["step"])[name] for name in wanted} == wanted
    saved = Sae.load(next(folder.glob("*final.pt")))
    torch.testing.assert_close(saved.w_dec.norm(dim=1), torch.ones(len(saved.w_dec)))


OTHERS = (
    "--recipe",
    "best",
    "--lr-decay",
    0.2,
    "--l1",
    "3e-3,adaptive:5e-3@12,batchtopk:12,topk:12,jumprelu:12,matryoshka:12",
    "--layers",
    1,
    "--save-minutes",
    0,
)


@pytest.fixture(scope="module")
def others(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by the other recipe, in every kind."""
    path = tmp_path_factory.mktemp("others")
    assert invoke("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", path, *OTHERS) == 0
    return path


@pytest.mark.parametrize(("kill_at", "ahead"), [(40, True), (77, False), (77, True)])
@pytest.mark.slow
def test_other_recipes_and_settings_resume_bit_for_bit(
    cli: Cli, others: Path, cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int, ahead: bool
) -> None:
    """Killed before L0 is held, and after; and with steps begun a batch ahead, as on a GPU."""
    monkeypatch.setattr("residual_saes.train.layer.queues", lambda device: ahead)
    kill_in_step(monkeypatch, cli, kill_at, "--cache", cache_path, "--runs", tmp_path, *OTHERS)
    result = cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path, *OTHERS)
    assert result.code == 0, result.err
    same(finals(tmp_path), finals(others))


def test_holding_l0_lowers_the_error(others: Path) -> None:
    run = Run(next(others.glob("*l1-3e-3-fixed-best")))
    curve = curve_of(run, Site(1))
    before, after = (next(record for record in reversed(curve) if bool(record["lambda"]) is l1) for l1 in (True, False))
    assert after["lambda"] == 0.0
    assert after["l0"] == pytest.approx(before["l0"], rel=0.1)
    assert after["mse"] < before["mse"]
    thresholds = [Sae.load(s.path).threshold is not None for s in run.snapshots()]
    assert thresholds[0] is False and thresholds[-1] is True


def test_l0_is_held_at_the_target_at_the_end_and_through_the_threshold(others: Path, cache: Cache) -> None:
    run = Run(next(others.glob("*adaptive-5e-3-l0-12-best")))
    assert [record["l0"] for record in curve_of(run, Site(1))][-9:] == [12.0] * 9
    assert l0_held_out(run, cache) == pytest.approx(12, rel=0.15)


def test_batchtopk_keeps_as_many_of_other_text_through_its_threshold(others: Path, cache: Cache) -> None:
    run = Run(next(others.glob("*x4-batchtopk-12-best")))
    l0s = [record["l0"] for record in curve_of(run, Site(1))]
    assert 12 <= max(l0s) < 13 and l0s[-1] == 12  # for half the run features may keep an entry more
    assert l0_held_out(run, cache) == pytest.approx(12, rel=0.15)


def l0_held_out(run: Run, cache: Cache) -> float:
    """Of the last snapshot of layer 1, which must have thresholds."""
    saved = Sae.load(run.snapshot_path(Site(1), "final"))
    held_out = torch.empty(cache.spec.block_rows, cache.spec.d_model, dtype=torch.float16)
    cache.read_block(Site(1), cache.spec.train_blocks, held_out.numpy())
    assert saved.threshold is not None and float(saved.threshold.min()) > 0
    return float((saved.encode(held_out.float()) > 0).sum(1).double().mean())


def test_epochs_go_over_the_cache_again(cli: Cli, cache_path: Path, tmp_path: Path) -> None:
    args = ("--cache", cache_path, "--runs", tmp_path, "--l1", "3e-3", "--layers", 0, "--tokens", 40_960)
    refused = cli("train", *TRAIN_ARGS, *args)
    assert refused.code == 2
    assert "go over it 2 times with --epochs" in refused.err
    assert cli("train", *TRAIN_ARGS, *args, "--epochs", 2).code == 0
    sae = Sae.load(next(tmp_path.glob("*/sae_layer00_final.pt")))
    assert sae.stats["tokens"] == 40_960


def test_a_changed_setting_needs_another_folder(cli: Cli, cache_path: Path, runs_path: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_path, tmp_path / "r")
    result = cli("train", *TRAIN_ARGS, "--cache", cache_path, "--runs", tmp_path / "r", "--l1", "3e-3", "--lr", "5e-2")
    assert result.code == 2
    assert "lr is 0.003 there, 0.05 here" in result.err
