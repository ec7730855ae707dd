import os
from pathlib import Path

import pytest

from shared.cli import UserError
from shared.files import free_bytes, make_dir, publish_file, publish_json
from shared.progress import Progress


def test_a_published_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    publish_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n'

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        publish_file(path, b"new")
    assert path.read_text() == '{\n "a": 1\n}\n'


def test_folders_are_proved_writable(tmp_path: Path) -> None:
    assert make_dir(tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to .*file/b: Not a directory"):
        make_dir(tmp_path / "file" / "b")


def test_free_space_of_what_is_not_there_yet_is_its_parents(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(free_bytes(tmp_path), rel=0.05)


def test_progress_says_how_far_how_fast_and_how_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("shared.progress.time.monotonic", lambda: now)
    with Progress("training layer 3", 5000, "tokens", start=1000) as progress:
        now += 20
        progress.update(3000, "L0 31")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training layer 3: 3k/5k tokens  60% · 100/s · ETA 20s · L0 31"
    assert lines[1] == "training layer 3: 3k/5k tokens  60% · 100/s · in 20s"
