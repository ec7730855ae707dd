import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shared.cache import BlockStats, Cache, CacheSpec, _google_crc32c, crc32c, merge_moments
from shared.cli import UserError

SPEC = CacheSpec(
    model="m",
    model_revision="r",
    dataset="d",
    dataset_revision="r",
    split="train",
    text_column="text",
    tokenizer_sha256="t",
    separator=0,
    context=4,
    d_model=3,
    n_layers=4,
    vocab_size=100,
    block_sequences=2,
    n_blocks=6,
    holdout_blocks=1,
    seed=0,
    precision="bf16",
)
STATS = BlockStats(bytes=48, crc32c="00000000", rows=8, mean=0.0, m2=1.0, max_norm=2.0, nonfinite=0)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=20), max_size=6))
def test_merged_moments_are_the_moments_of_all(parts: list[list[float]]) -> None:
    merged = (0, 0.0, 0.0)
    for part in parts:
        x = np.array(part)
        merged = merge_moments(merged, (len(x), x.mean(), ((x - x.mean()) ** 2).sum()) if len(x) else (0, 0.0, 0.0))
    x = np.concatenate([np.array(p) for p in parts]) if parts else np.array([])
    assert merged[0] == len(x)
    if len(x):
        assert merged[1] == pytest.approx(x.mean(), abs=1e-9)
        assert merged[2] == pytest.approx(((x - x.mean()) ** 2).sum(), rel=1e-9, abs=1e-6)


def test_crc32c_is_the_standard_one() -> None:
    assert crc32c(np.frombuffer(b"123456789", dtype=np.uint8)) == "e3069283"  # the check value of RFC 3720


@given(st.binary(max_size=300))
def test_every_way_to_the_checksum_is_the_same(data: bytes) -> None:
    raw = np.frombuffer(data, dtype=np.uint8)
    assert crc32c(raw) == f"{_google_crc32c(raw):08x}"


def test_checksums_need_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.cache.load", lambda source: None)
    assert crc32c(np.frombuffer(b"123456789", dtype=np.uint8)) == "e3069283"


def test_sizes_of_the_published_job() -> None:
    spec = dataclasses.replace(
        SPEC, context=1024, d_model=1024, n_layers=24, vocab_size=50_304, block_sequences=32, n_blocks=9156, holdout_blocks=0
    )
    assert spec.train_tokens == 300_023_808
    assert spec.block_bytes == 64 << 20
    assert spec.n_blocks * spec.block_bytes == pytest.approx(614e9, rel=0.01)
    assert spec.token_dtype == np.uint16
    assert spec.token_bytes == pytest.approx(600e6, rel=0.01)


class LedgerMachine(RuleBasedStateMachine):
    """Whatever is committed, forgotten and added, what is missing is what is wanted less what is committed."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.cache = Cache.create(self.folder / "c", SPEC, (0, 1))
        self.committed: set[tuple[int, int]] = set()

    @rule(block=st.integers(0, 5), layers=st.sets(st.integers(0, 3), min_size=1))
    def commit(self, block: int, layers: set[int]) -> None:
        lacking = {layer for layer in layers if (layer, block) not in self.committed}
        if lacking:
            self.cache.commit(block, dict.fromkeys(sorted(lacking), STATS))
            self.committed |= {(layer, block) for layer in lacking}

    @rule(block=st.integers(0, 5), layers=st.sets(st.integers(0, 3), min_size=1))
    def forget(self, block: int, layers: set[int]) -> None:
        self.cache.forget(block, tuple(layers))
        self.committed -= {(layer, block) for layer in layers}

    @invariant()
    def missing_is_the_difference(self) -> None:
        wanted = {(layer, block) for layer in range(4) for block in range(6)}
        missing = self.cache.missing((0, 1, 2, 3))
        listed = [(layer, block) for group, blocks in missing.items() for layer in group for block in blocks]
        assert len(listed) == len(set(listed))
        assert set(listed) == wanted - self.committed

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


LedgerMachine.TestCase.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)
TestLedger = LedgerMachine.TestCase


def test_any_zarr_tool_reads_what_is_stored(cache: Cache) -> None:
    spec, out = cache.spec, np.empty((cache.spec.block_rows, cache.spec.d_model), dtype=np.float16)
    group = zarr.open_group(str(cache.path / "activations.zarr"), mode="r")
    for layer in cache.layers:
        array = group[f"resid_post/{layer:02d}"]
        assert isinstance(array, zarr.Array)
        assert array.shape == (spec.n_blocks * spec.block_rows, spec.d_model)
        for block in (0, 17, spec.n_blocks - 1):
            cache.read_block(layer, block, out)
            np.testing.assert_array_equal(array[block * spec.block_rows : (block + 1) * spec.block_rows], out)
    assert group.attrs["format"] == 1
    assert group.attrs["layers"] == "0-2"


def test_the_ledger_tells_the_truth(cache: Cache) -> None:
    out = np.empty((cache.spec.block_rows, cache.spec.d_model), dtype=np.float16)
    for layer in cache.layers:
        cache.read_block(layer, 3, out)
        stats, x = cache.stats(layer, 3), out.astype(np.float64)
        cache.check_block(layer, 3, out, stats)
        assert (stats.bytes, stats.rows, stats.nonfinite) == (out.nbytes, len(out), 0)
        assert stats.mean == pytest.approx(x.mean(), abs=1e-6)
        assert stats.m2 == pytest.approx(((x - x.mean()) ** 2).sum(), rel=1e-5)
        assert stats.max_norm == pytest.approx(np.linalg.norm(x, axis=1).max(), rel=1e-5)


def test_a_changed_byte_is_named_by_layer_and_block(cache: Cache) -> None:
    out = np.empty((cache.spec.block_rows, cache.spec.d_model), dtype=np.float16)
    cache.read_block(1, 2, out)
    out[5, 7] += 1
    with pytest.raises(UserError, match=r"layer 1 block 2 .*checksum.*repair"):
        cache.check_block(1, 2, out, cache.stats(1, 2))


def test_a_missing_or_short_file_is_named(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, (0,))
    out = np.empty((8, 3), dtype=np.float16)
    with pytest.raises(UserError, match="layer 0 block 4 .*No such file"):
        cache.read_block(0, 4, out)
    cache.block_path(0, 4).write_bytes(b"x" * 40)
    with pytest.raises(UserError, match="8 bytes short"):
        cache.read_block(0, 4, out)
    cache.block_path(0, 4).unlink()
    cache.block_path(0, 4).mkdir()
    with pytest.raises(UserError, match="layer 0 block 4 .*Is a directory"):
        cache.read_block(0, 4, out)
    with pytest.raises(UserError, match="layer 0 block 4 .*is not harvested"):
        cache.stats(0, 4)


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no activation cache"):
        Cache.open(tmp_path)
    zarr.create_group(str(tmp_path / "a" / "activations.zarr"))
    with pytest.raises(UserError, match="not an activation cache"):
        Cache.open(tmp_path / "a")
    (tmp_path / "b" / "activations.zarr").mkdir(parents=True)
    (tmp_path / "b" / "activations.zarr" / "zarr.json").write_text("{ nonsense")
    with pytest.raises(UserError, match="not a readable Zarr"):
        Cache.open(tmp_path / "b")
    Cache.create(tmp_path / "c", SPEC, (0,))
    meta = tmp_path / "c" / "activations.zarr" / "zarr.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(UserError, match="format 9, and this program reads format 1"):
        Cache.open(tmp_path / "c")


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, (0, 1))
    Cache.open(tmp_path / "c").require_same(SPEC)
    with pytest.raises(UserError, match=r"context is 4 there, 8 here; seed is 0 there, 1 here"):
        cache.require_same(dataclasses.replace(SPEC, context=8, seed=1))


def test_local_sources_are_known_by_content_not_by_place(tmp_path: Path) -> None:
    local = dataclasses.replace(SPEC, model="/a/lm", model_revision="sha256:1")
    cache = Cache.create(tmp_path / "c", local, (0,))
    cache.require_same(dataclasses.replace(local, model="b/lm"))
    with pytest.raises(UserError, match="model_revision"):
        cache.require_same(dataclasses.replace(local, model_revision="sha256:2"))


def test_a_damaged_entry_is_a_damaged_block(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, (0,))
    cache.commit(2, {0: STATS})
    assert cache.stats(0, 2) == STATS
    assert json.loads(cache.entry_path((0,), 2).read_text())["block"] == 2
    cache.entry_path((0,), 2).write_text("{")
    with pytest.raises(UserError, match="layer 0 block 2 .*ledger entry .*unreadable"):
        cache.stats(0, 2)


def test_listing_a_full_size_ledger_is_quick(tmp_path: Path) -> None:
    """Not a speed test: a bound that only an accidental read of every entry would break (9,155 blocks at full size)."""
    spec = dataclasses.replace(SPEC, n_blocks=9155)
    cache = Cache.create(tmp_path / "c", spec, (0,))
    folder = cache.entry_path((0,), 0).parent
    folder.mkdir()
    for block in range(9155):
        (folder / f"{block:08d}.json").touch()  # empty: reading one would fail
    assert len(cache.committed(0)) == 9155
    assert cache.missing((0,)) == {}


def test_an_entry_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was published since, in a folder that was not there; no folder is listed for one that is known."""
    cache = Cache.create(tmp_path / "c", SPEC, (0, 1))
    cache.commit(2, {0: STATS, 1: STATS})
    assert cache.stats(1, 2) == STATS
    other = dataclasses.replace(STATS, nonfinite=5)
    Cache.open(tmp_path / "c").commit(3, {1: other})
    assert cache.stats(1, 3) == other

    def listed(*_: object) -> None:
        raise AssertionError("a folder was listed")

    monkeypatch.setattr(Path, "iterdir", listed)
    monkeypatch.setattr(Path, "glob", listed)
    assert (cache.stats(1, 2), cache.stats(1, 3)) == (STATS, other)
