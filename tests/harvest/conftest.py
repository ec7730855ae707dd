"""A small cache of its own, and harm to do to it."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from residual_saes.shared.cache import Cache
from tests.conftest import Cli


@pytest.fixture
def small(cli: Cli, lm: Path, text: Path, tmp_path: Path) -> Cache:
    """A cache of its own, of a model and a text of its own: three blocks of two layers."""
    shutil.copytree(lm, tmp_path / "lm")
    shutil.copy(text, tmp_path / "text.jsonl")
    result = cli("harvest", *small_args(tmp_path))
    assert result.code == 0, result.err
    return Cache.open(tmp_path / "c")


def small_args(path: Path, model: str = "lm", text: str = "text.jsonl", layers: str = "0-1") -> tuple[object, ...]:
    shape = ("--context", 32, "--block-sequences", 16, "--tokens", 1024, "--holdout-tokens", 512, "--device", "cpu")
    given = ("--model", path / model, "--dataset", path / text, "--layers", layers, "--cache", path / "c")
    return ("--preset", "demo", *given, *shape)


def content(cache: Cache) -> dict[str, bytes]:
    return {str(p.relative_to(cache.path)): p.read_bytes() for p in cache.path.rglob("*") if p.is_file()}


def flip(path: Path, at: int = 100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def other_weights(folder: Path) -> None:
    """The same configuration and sizes."""
    weights = load_file(folder / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
