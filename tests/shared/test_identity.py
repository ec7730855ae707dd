import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from residual_saes.shared.errors import UserError
from residual_saes.shared.identity import _every_file, as_harvested, hash_files, open_model
from tests.shared.cache.test_cache import SPEC


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


def model(folder: Path, **shards: float) -> Path:
    """A model's folder, its weights in one file or in shards."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name, value in (shards or {"model": 1.0}).items():
        save_file({name: torch.full((3,), value)}, folder / f"{name}.safetensors")
    if shards:
        index = {"weight_map": {name: f"{name}.safetensors" for name in shards}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [{}, {"model-00001-of-00002": 1.0, "odd": 2.0}])
def test_a_model_is_what_is_loaded_of_it(tmp_path: Path, shards: dict[str, float]) -> None:
    """The identity of a model with nothing beside it is the one that earlier versions gave it."""
    plain, more = model(tmp_path / "plain", **shards), model(tmp_path / "more", **shards)
    for name in ("consolidated", "adapter_model"):
        save_file({name: torch.zeros(3)}, more / f"{name}.safetensors")
    (more / "consolidated.safetensors.index.json").write_text("{}")
    one, other = open_model(str(plain), None), open_model(str(more), None)
    assert one.sha256 == other.sha256 == hash_files(_every_file(plain)) != hash_files(_every_file(more))
    save_file({"x": torch.ones(3)}, plain / ("odd.safetensors" if shards else "model.safetensors"))
    assert open_model(str(plain), None).sha256 != one.sha256


def test_a_cache_of_the_earlier_identity_is_known(tmp_path: Path) -> None:
    more = model(tmp_path / "more")
    save_file({"x": torch.zeros(3)}, more / "consolidated.safetensors")
    spec = dataclasses.replace(SPEC, model=str(more), model_revision=hash_files(_every_file(more)))
    opened = open_model(str(more), None)
    assert as_harvested(spec, opened).sha256 == spec.model_revision != opened.sha256
    (more / "consolidated.safetensors").unlink()
    assert as_harvested(spec, opened) == opened


def test_weights_that_the_configuration_names_are_what_is_loaded(tmp_path: Path) -> None:
    folder = model(tmp_path / "lm", own=1.0)
    (folder / "config.json").write_text('{"transformers_weights": "own.safetensors"}')
    one = open_model(str(folder), None).sha256
    save_file({"x": torch.ones(3)}, folder / "model.safetensors")
    assert open_model(str(folder), None).sha256 == one == hash_files([folder / "config.json", folder / "own.safetensors"])
    (folder / "config.json").write_text('{"transformers_weights": "model.safetensors.index.json"}')
    files = ("config.json", "model.safetensors.index.json", "own.safetensors")
    assert open_model(str(folder), None).sha256 == hash_files([folder / name for name in files])


@pytest.mark.parametrize("named", [False, True])
def test_what_is_not_loaded_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    hub, calls = model(tmp_path / "hub", **({"own": 1.0} if named else {"model-00001-of-00002": 1.0, "odd": 2.0})), []
    if named:
        (hub / "config.json").write_text('{"transformers_weights": "own.safetensors"}')
        (hub / "model.safetensors.index.json").unlink()
    save_file({"x": torch.zeros(3)}, hub / "consolidated.safetensors")
    (tmp_path / "commit").mkdir()

    def download(name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        calls.append(revision)
        for file in filter_repo_objects(os.listdir(hub), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copy(hub / file, tmp_path / "commit")
        return str(tmp_path / "commit")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    opened = open_model("org/lm", "main")
    assert calls == ["main", "commit"] and opened.sha256 == open_model(str(hub), None).sha256
    names = {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "odd.safetensors"}
    assert set(os.listdir(opened.folder)) == {"config.json"} | ({"own.safetensors"} if named else names)


def test_weights_with_a_header_nested_too_deep_are_hashed_as_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residual_saes.shared.identity._HASHED_WHOLE", 0)
    header = b"[" * 200_000
    (path := tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert hash_files([path]).startswith("sha256:")
