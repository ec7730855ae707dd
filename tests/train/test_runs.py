import dataclasses
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shared.cli import UserError
from tests.shared.test_cache import SPEC
from train.runs import Run, snapshot_tokens
from train.sae import Sae


def test_snapshots_of_the_published_job() -> None:
    assert list(snapshot_tokens(300_000_000)) == ["50M", "100M", "150M", "200M", "250M", "final"]


def sae(d: int = 6, f: int = 10) -> Sae:
    return Sae(
        w_enc=torch.randn(f, d),
        w_dec=torch.randn(f, d),
        b_enc=torch.randn(f),
        b_pre=torch.randn(d),
        b_dec=torch.randn(d),
        config={"train": {"lr": 1e-3}, "layer": 3},
        stats={"tokens": 5},
    )


def test_a_checkpoint_opens_anywhere(tmp_path: Path) -> None:
    """With nothing but torch and weights_only, in the published layout, and no larger than its numbers."""
    mine = sae()
    mine.save(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", map_location="cpu", weights_only=True)
    assert {k: tuple(v.shape) for k, v in content["model_state"].items()} == {
        "b_pre": (6,),
        "encoder.weight": (10, 6),
        "encoder.bias": (10,),
        "decoder.weight": (6, 10),
        "decoder.bias": (6,),
    }
    assert content["config"]["layer"] == 3
    assert content["stats"] == {"tokens": 5}
    again, x = Sae.load(tmp_path / "a.pt", 6), torch.randn(4, 6)
    torch.testing.assert_close(again.decode(again.encode(x)), mine.decode(mine.encode(x)))
    state = content["model_state"]
    z = torch.relu((x - state["b_pre"]) @ state["encoder.weight"].T + state["encoder.bias"])
    torch.testing.assert_close(z @ state["decoder.weight"].T + state["decoder.bias"] + state["b_pre"], again.decode(z))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(UserError, match="no checkpoint at"):
        Sae.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a readable SAE checkpoint"):
        Sae.load(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(UserError, match="not a readable SAE checkpoint"):
        Sae.load(path)
    sae().save(path)
    with pytest.raises(UserError, match="over 6 dimensions, the cache has 8"):
        Sae.load(path, 8)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="not a readable SAE checkpoint"):
        Sae.load(path)
    content = {"model_state": {}, "config": {}, "stats": {}}
    torch.save(content, path)
    with pytest.raises(UserError, match="not a readable"):
        Sae.load(path)


def test_no_pickled_code_is_ever_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model_state": Evil(), "config": {}, "stats": {}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a readable"):
        Sae.load(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_a_folder_holds_one_configuration(tmp_path: Path) -> None:
    config = {"tokens": 60, "lr": 1e-3}
    Run.open_or_create(tmp_path / "r", config, SPEC)
    Run.open_or_create(tmp_path / "r", config, SPEC)
    with pytest.raises(UserError, match=r"lr is 0.001 there, 0.01 here; seed is 0 there, 3 here"):
        Run.open_or_create(tmp_path / "r", config | {"lr": 1e-2}, dataclasses.replace(SPEC, seed=3))
    (tmp_path / "r" / "config.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(UserError, match="format 2, this program reads 1"):
        Run.open_or_create(tmp_path / "r", config, SPEC)


def test_metrics_after_the_cursor_are_dropped(tmp_path: Path) -> None:
    run = Run.open_or_create(tmp_path / "r", {"tokens": 60}, SPEC)
    for step in (10, 20, 30):
        run.append_metrics(2, {"step": step})
    with run.metrics_path(2).open("a") as file:
        file.write('{"step": 40, "lo')  # a crash in the middle of a line
    run.rewind_metrics(2, 20)
    assert run.metrics(2) == [{"step": 10}, {"step": 20}]


def test_state_survives_and_says_when_it_is_damaged(tmp_path: Path) -> None:
    run = Run.open_or_create(tmp_path / "r", {"tokens": 60}, SPEC)
    assert run.load_state(1) is None
    tensors = {"a": torch.randn(3), "b": torch.arange(4, dtype=torch.int32)}
    run.save_state(1, tensors, {"step": 7, "l1": 0.1 + 0.2})
    loaded = run.load_state(1)
    assert loaded is not None
    assert loaded[1] == {"step": 7, "l1": 0.1 + 0.2}
    assert all(torch.equal(loaded[0][k], tensors[k]) for k in tensors)
    run.state_path(1).write_bytes(b"\x00" * 50)
    with pytest.raises(UserError, match="is damaged .* delete it"):
        run.load_state(1)
    run.drop_state(1)
    assert run.load_state(1) is None


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond a page, which fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_says_why_and_leaves_what_was_there(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run = Run.open_or_create(tmp_path / "r", {"tokens": 60}, SPEC)
    sae().save(run.snapshot_path(1, "final"))
    run.save_state(1, {"a": torch.zeros(3)}, {"step": 7})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="File too large"):
        sae(64, 64).save(run.snapshot_path(1, "final"))
    with pytest.raises(OSError, match="state.safetensors.*File too large"):
        run.save_state(1, {"a": torch.randn(5000)}, {"step": 8})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_is_durable_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = Run.open_or_create(tmp_path / "r", {"tokens": 60}, SPEC), []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    sae().save(run.snapshot_path(1, "final"))
    assert calls == ["sae_layer01_final.tmp", "replace", "r"]
    calls.clear()
    run.save_state(1, {"a": torch.zeros(3)}, {"step": 7})
    assert calls == ["state.tmp", "replace", "layer01"]


def test_half_a_state_left_by_a_kill_is_dropped_with_the_rest(tmp_path: Path) -> None:
    run = Run.open_or_create(tmp_path / "r", {"tokens": 60}, SPEC)
    run.save_state(1, {"a": torch.zeros(3)}, {"step": 7})
    run.state_path(1).with_suffix(".tmp").write_bytes(b"half")
    run.drop_state(1)
    assert list((run.path / "state").iterdir()) == []
    run.drop_state(1)
