"""Training beside the harvest: begun when the first window is there, and in the end the bytes of training afterwards."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from residual_saes.shared.cache import Cache
from residual_saes.shared.files import publish_file
from residual_saes.shared.shuffle import block_turns
from residual_saes.shared.sites import Site
from residual_saes.train.saver import Saver
from residual_saes.train.step import Begun, StepResult, TrainingSae
from tests.conftest import TRAIN_ARGS, Cli
from tests.crash.sweep import contents, difference

ARGS = ("train", *TRAIN_ARGS[:-4], "--device", "cpu", "--window-blocks", 1, "--layers", 1, "--l1", "3e-3,adaptive:5e-3@12")
FIRST = 4 + 16  # blocks: held-out ones, and those of the first window


class Harvest:
    """One that has come to the end of the tokens, and commits as many blocks as it is told to."""

    def __init__(self, whole: Cache, path: Path) -> None:
        shutil.copytree(whole.path, path)
        self.cache, self._whole, spec = Cache.open(path), whole, whole.spec
        self._turns = block_turns(spec.n_blocks, spec.train_blocks, spec.slices, seed=spec.seed).tolist()
        for block in self._turns:
            self._entry(self.cache, block).unlink()

    def _entry(self, cache: Cache, block: int) -> Path:
        return cache.ledger.entry_path(cache.sites, block)

    def go_on(self, blocks: int) -> None:
        for block in self._turns[:blocks]:
            publish_file(self._entry(self.cache, block), self._entry(self._whole, block).read_bytes())
        del self._turns[:blocks]


@pytest.fixture
def harvest(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harvest:
    for module in ("loader", "layer", "__main__"):
        monkeypatch.setattr(f"residual_saes.train.{module}.FOLLOW_POLL", 0.01)
    return Harvest(cache, tmp_path / "c")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were done, as they are."""
    done, finish = list[int](), TrainingSae.finish

    def watched(self: TrainingSae, begun: Begun, **options: object) -> StepResult:
        done.append(self.step_count)
        return finish(self, begun, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingSae, "finish", watched)
    return done


def until(what: list[int], step: int) -> None:
    end = time.monotonic() + 60
    while step not in what and time.monotonic() < end:
        time.sleep(0.005)


@pytest.fixture
def afterwards(cli: Cli, cache: Cache, tmp_path: Path) -> dict[str, object]:
    assert cli(*ARGS, "--cache", cache.path, "--runs", tmp_path / "wanted").code == 0
    return contents(tmp_path / "wanted")


def test_it_begins_with_the_first_window_and_ends_with_the_same_bytes(
    cli: Cli, harvest: Harvest, afterwards: dict[str, object], steps: list[int], tmp_path: Path
) -> None:
    seen: list[list[int]] = []

    def work() -> None:
        time.sleep(0.2)
        seen.append(steps[:])
        harvest.go_on(FIRST)
        until(steps, 1)
        time.sleep(0.2)
        seen.append(sorted(set(steps)))
        for _ in range(24):
            harvest.go_on(1)
            time.sleep(0.01)

    steps.clear()
    thread = threading.Thread(target=work)
    thread.start()
    result = cli(*ARGS, "--cache", harvest.cache.path, "--runs", tmp_path / "r", "--follow")
    thread.join()
    assert result.code == 0, result.err
    assert seen == [[], [0, 1]]  # two batches are a window
    assert difference(contents(tmp_path / "r"), afterwards) == ""


def test_a_signal_does_not_wait_for_the_harvest(
    cli: Cli, harvest: Harvest, afterwards: dict[str, object], steps: list[int], tmp_path: Path
) -> None:
    args = (*ARGS, "--cache", harvest.cache.path, "--runs", tmp_path / "r")

    def stop(at: int | None) -> None:
        if at is not None:
            until(steps, at)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    steps.clear()
    for at in (None, 1):  # before the first window, and before the second
        thread = threading.Thread(target=stop, args=(at,))
        thread.start()
        assert cli(*args, "--follow").code == 143
        thread.join()
        harvest.go_on(FIRST)
    harvest.go_on(44)
    result = cli(*args)
    assert result.code == 0, result.err
    assert steps.count(0) == 2 and steps.count(1) == 2  # of two settings: nothing was done again
    assert difference(contents(tmp_path / "r"), afterwards) == ""


def test_damage_is_no_reason_to_wait(cli: Cli, harvest: Harvest, tmp_path: Path) -> None:
    harvest.go_on(FIRST)
    for block in range(40):
        harvest.cache.block_path(Site(1), block).write_bytes(bytes(harvest.cache.spec.block_bytes))
    result = cli(*ARGS, "--cache", harvest.cache.path, "--runs", tmp_path / "r", "--follow")
    assert result.code == 2 and "layer 1 block " in result.err and "is damaged" in result.err


def test_a_harvest_that_has_not_begun_is_waited_for(cli: Cli, harvest: Harvest, tmp_path: Path) -> None:
    harvest.go_on(44)
    hidden = tmp_path / "hidden"
    harvest.cache.path.rename(hidden)
    timer = threading.Timer(0.3, hidden.rename, (harvest.cache.path,))
    timer.start()
    result = cli(*ARGS, "--cache", harvest.cache.path, "--runs", tmp_path / "r", "--tokens", 2048, "--follow")
    timer.join()
    assert result.code == 0, result.err
    assert "waiting until a harvest has written the tokens" in result.err


def test_layers_that_another_harvest_adds_are_waited_for(cli: Cli, harvest: Harvest, tmp_path: Path) -> None:
    harvest.go_on(44)
    arrays, hidden = harvest.cache.path / "activations.zarr" / "resid_post", tmp_path / "hidden"
    (arrays / "01").rename(hidden)  # it has not begun the layer
    timer = threading.Timer(0.5, hidden.rename, (arrays / "01",))
    timer.start()
    result = cli(*ARGS, "--cache", harvest.cache.path, "--runs", tmp_path / "r", "--tokens", 2048, "--follow")
    timer.join()
    assert result.code == 0, result.err
    assert f"waiting until a harvest has begun layers 1 of {harvest.cache.path}" in result.err
    args = ("train", *ARGS[1:], "--cache", harvest.cache.path, "--runs", tmp_path / "r", "--follow")
    refused = cli(*args, "--layers", "0,9")
    assert refused.code == 2 and "waiting" not in refused.err  # the model has no such layer


@pytest.mark.parametrize("layers", [("--layers", "1"), ()])
def test_hooks_that_a_target_reads_and_writes_are_waited_for(
    cli: Cli, harvest: Harvest, tmp_path: Path, layers: tuple[str, ...]
) -> None:
    harvest.go_on(44)
    arrays, moved = harvest.cache.path / "activations.zarr" / "resid_post", ("00", "02")  # no layer has one before it
    for name in moved:
        (arrays / name).rename(tmp_path / name)
    timer = threading.Timer(0.5, lambda: [(tmp_path / name).rename(arrays / name) for name in moved])
    timer.start()
    args = ("train", *TRAIN_ARGS[:-4], "--device", "cpu", "--window-blocks", 1, "--l1", "3e-3", "--tokens", 2048)
    args = (*args, "--cache", harvest.cache.path, "--runs", tmp_path / "r", "--follow", *layers)
    result = cli(*args, "--target", "resid_post@l-1>resid_post")
    timer.join()
    assert result.code == 0, result.err
    what = "layers 0" if layers else "resid_post@l-1>resid_post"
    assert f"waiting until a harvest has begun {what} of {harvest.cache.path}" in result.err
    refused = cli(*args[: len(args) - len(layers)], "--target", "0,9")
    assert refused.code == 2 and "waiting" not in refused.err


def test_layers_that_were_added_meanwhile_are_said(
    cli: Cli, harvest: Harvest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest.go_on(44)
    arrays, hidden, done = harvest.cache.path / "activations.zarr" / "resid_post", tmp_path / "hidden", Saver.submit
    (arrays / "01").rename(hidden)

    def added(self: Saver, *args: object) -> None:
        if hidden.exists():
            hidden.rename(arrays / "01")
        done(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Saver, "submit", added)
    every = [arg for i, arg in enumerate(ARGS) if "--layers" not in ARGS[max(0, i - 1) : i + 1]]
    args = (*every, "--cache", harvest.cache.path, "--runs", tmp_path / "r", "--tokens", 2048, "--batch", 256)
    result = cli(*args, "--follow")
    assert result.code == 0 and "note: layers 1 were added meanwhile: run the same command again" in result.err, result.err
    assert "added meanwhile" not in cli(*args, "--follow").err
