"""Sealed files of tensors. What reads them is tested where they are used."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from residual_saes.shared import seal
from residual_saes.shared.temporaries import remove_leftovers


def test_what_a_kill_leaves_of_a_file_of_tensors_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors writes to a name of its own before it moves the file to the one that it was given."""

    def killed(tensors: Any, path: Path, metadata: Any) -> None:
        (Path(path).parent / ".tmpmegwmD").write_bytes(b"half")
        os._exit(9)

    monkeypatch.setattr(seal, "save_file", killed)
    if (pid := os.fork()) == 0:
        seal.save_sealed(tmp_path / "state.safetensors", {}, {"x": torch.zeros(3)})
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert list(tmp_path.rglob(".tmpmegwmD"))
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_json_has_no_seal() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in ({"a": deep}, {"a": {1}}, {"a": 1, 2: 1}, ["a"], None):
        assert not seal.sealed(value)
    assert not seal.sealed({"a": 1}, {"x": torch.zeros(2, dtype=torch.bfloat16)})
    assert seal.sealed(seal.seal({"a": 1}))


def test_a_sealed_file_is_for_whoever_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        seal.save_sealed(tmp_path / "state.safetensors", {}, {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "state.safetensors").stat().st_mode & 0o777 == 0o664
