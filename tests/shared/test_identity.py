from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from residual_saes.shared.errors import UserError
from residual_saes.shared.identity import hash_files


def test_files_are_known_by_content_not_by_name(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", b"one"), ("b.jsonl", b"one"), ("c.jsonl", b"two"), ("d.txt", b"one")):
        (tmp_path / name).write_bytes(data)
    a, b, c, d = (hash_files([tmp_path / name]) for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.txt"))
    assert a == b
    assert len({a, c, d}) == 3
    assert hash_files([tmp_path / "a.jsonl", tmp_path / "c.jsonl"]) != hash_files([tmp_path / "c.jsonl", tmp_path / "a.jsonl"])
    with pytest.raises(UserError, match="cannot read .*none: No such file"):
        hash_files([tmp_path / "none"])


def test_of_large_weights_every_tensor_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residual_saes.shared.identity._HASHED_WHOLE", 1000)
    path = tmp_path / "m.safetensors"
    tensors = {f"layers.{i}.weight": torch.full((64, 4096), float(i)) for i in range(4)} | {"none": torch.empty(0)}
    seen = set()
    for changed in (None, 0, 1, 2, 3):
        save_file({k: v + 1 if k == f"layers.{changed}.weight" else v for k, v in tensors.items()}, path)
        seen.add(hash_files([path]))
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 100)  # no weights at all
    seen.add(hash_files([path]))
    path.write_bytes(b"")
    seen.add(hash_files([path]))
    for end in (b"0", b"1"):
        (tmp_path / "big.txt").write_bytes(bytes((3 << 20) - 1) + end)
        seen.add(hash_files([tmp_path / "big.txt"]))
    assert len(seen) == 9
