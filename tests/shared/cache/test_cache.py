import dataclasses
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from residual_saes.shared.cache import BlockStats, Cache, CacheSpec, TokenChunk, slice_checksums
from residual_saes.shared.cache.spec import Imported
from residual_saes.shared.cache.zarr import block_key
from residual_saes.shared.errors import UserError
from residual_saes.shared.seal import _google_crc32c, crc32c, from_bytes, to_bytes
from residual_saes.shared.sites import Site, parse_sites
from residual_saes.shared.stores import Location, open_store
from residual_saes.shared.temporaries import _release, temporary

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
STATS = BlockStats(bytes=48, rows=8, crc32c="0" * 64, tokens="0" * 8, nonfinite=0)


def test_crc32c_is_the_standard_one() -> None:
    assert crc32c(np.frombuffer(b"123456789", dtype=np.uint8)) == "e3069283"  # the check value of RFC 3720


@given(st.binary(max_size=300))
def test_every_way_to_the_checksum_is_the_same(data: bytes) -> None:
    raw = np.frombuffer(data, dtype=np.uint8)
    assert crc32c(raw) == f"{_google_crc32c(raw):08x}"


def test_checksums_need_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("residual_saes.shared.seal.load", lambda source: None)
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


SITES = (Site(0), Site(1), Site(2), Site(2, "mlp_out"))


class LedgerMachine(RuleBasedStateMachine):
    """Whatever two harvesters commit, one over the other, and whatever is lost: missing is wanted less committed and there."""

    def __init__(self) -> None:
        super().__init__()
        self.place = self.new_place()
        self.caches = [Cache.create(self.place, SPEC, SITES[:2]), Cache.create(self.place, SPEC, SITES[2:])]
        self.committed: dict[tuple[Site, int], BlockStats] = {}

    def new_place(self) -> Location:
        return Path(tempfile.mkdtemp())

    @rule(
        who=st.integers(0, 1),
        block=st.integers(0, 5),
        layers=st.sets(st.sampled_from(SITES), min_size=1),
        value=st.integers(0, 3),
        replace=st.booleans(),
    )
    def commit(self, who: int, block: int, layers: set[Site], value: int, replace: bool) -> None:
        data = np.full((8, 3), value, np.float16)
        stats = dataclasses.replace(STATS, crc32c=slice_checksums(data, SPEC.slice_rows), tokens=f"{value:08d}")
        cache = self.caches[who]
        staged = {layer: cache.stage_block(layer, block, data.copy(), replace=replace) for layer in layers}
        cache.commit(block, dict.fromkeys(sorted(layers), stats), staged, replace=replace)
        for layer in layers:
            self.committed[layer, block] = stats if replace else self.committed.get((layer, block), stats)

    @rule(layer=st.sampled_from(SITES), block=st.integers(0, 5))
    def lose(self, layer: Site, block: int) -> None:
        open_store(self.place).delete(block_key(layer, block))
        self.committed.pop((layer, block), None)

    @invariant()
    def missing_is_the_difference(self) -> None:
        wanted = {(layer, block) for layer in SITES for block in range(6)}
        for cache in self.caches:
            missing = cache.missing(SITES)
            listed = [(layer, block) for group, blocks in missing.items() for layer in group for block in blocks]
            assert len(listed) == len(set(listed))
            assert set(listed) == wanted - set(self.committed)

    @invariant()
    def the_record_is_of_the_bytes(self) -> None:
        out = np.empty((8, 3), np.float16)
        for (layer, block), stats in self.committed.items():
            for cache in self.caches:
                assert cache.stats(layer, block) == stats
                assert cache.has_block((layer,), block)
                cache.read_block(layer, block, out)
                cache.check_block(layer, block, out, stats)

    def teardown(self) -> None:
        open_store(self.place).delete_all("")


LedgerMachine.TestCase.settings = settings(max_examples=8, stateful_step_count=12)
TestLedger = LedgerMachine.TestCase


def test_any_zarr_tool_reads_what_is_stored(cache: Cache) -> None:
    spec, out = cache.spec, np.empty((cache.spec.block_rows, cache.spec.d_model), dtype=np.float16)
    group = zarr.open_group(str(cache.path / "activations.zarr"), mode="r")
    for layer in cache.sites:
        array = group[layer.array]
        assert isinstance(array, zarr.Array)
        assert array.shape == (spec.n_blocks * spec.block_rows, spec.d_model)
        for block in (0, 17, spec.n_blocks - 1):
            cache.read_block(layer, block, out)
            np.testing.assert_array_equal(array[block * spec.block_rows : (block + 1) * spec.block_rows], out)
    assert group.attrs["format"] == 2
    assert group.attrs["digest"] == cache.digest
    tokens = group["tokens"]
    assert isinstance(tokens, zarr.Array)
    assert tokens.dtype == spec.token_dtype
    np.testing.assert_array_equal(tokens[:], cache.read_tokens(0, spec.sequences))
    assert [name for name, _ in group.arrays()] == ["tokens"]


def test_the_ledger_tells_the_truth(cache: Cache) -> None:
    out = np.empty((cache.spec.block_rows, cache.spec.d_model), dtype=np.float16)
    for layer in cache.sites:
        cache.read_block(layer, 3, out)
        stats = cache.stats(layer, 3)
        cache.check_block(layer, 3, out, stats)
        checksums = "".join(crc32c(piece) for piece in np.split(out, 16))
        assert (stats.bytes, stats.rows, stats.nonfinite, stats.crc32c) == (out.nbytes, len(out), 0, checksums)
        assert stats.tokens == crc32c(cache.block_tokens(3).astype(cache.spec.token_dtype))


def test_a_changed_byte_is_named_by_layer_and_block(cache: Cache) -> None:
    out = np.empty((cache.spec.block_rows, cache.spec.d_model), dtype=np.float16)
    cache.read_block(Site(1), 2, out)
    out[5, 7] += 1
    with pytest.raises(UserError, match=r"layer 1 block 2 .*checksum.*repair"):
        cache.check_block(Site(1), 2, out, cache.stats(Site(1), 2))


def test_slices_are_read_and_checked_alone(cache: Cache) -> None:
    spec = cache.spec
    whole, stats = np.empty((spec.block_rows, spec.d_model), dtype=np.float16), cache.stats(Site(1), 2)
    cache.read_block(Site(1), 2, whole)
    assert (spec.slice_rows, spec.slices) == (32, 16)
    out = np.empty((spec.slice_rows, spec.d_model), dtype=np.float16)
    for index in (0, 7, 15):
        cache.read_slice(Site(1), 2, index, out)
        np.testing.assert_array_equal(out, whole[index * 32 : (index + 1) * 32])
        cache.check_slice(Site(1), 2, index, out, stats)
        with pytest.raises(
            UserError, match=f"layer 1 block 2 .*slice {15 - index} does not match" if index != 7 else "slice 8"
        ):
            cache.check_slice(Site(1), 2, 15 - index if index != 7 else 8, out, stats)


@pytest.mark.parametrize(
    ("rows", "slice_rows", "slices"), [(32_768, 2048, 16), (16, 1, 16), (8, 1, 8), (100, 7, 15), (33, 3, 11)]
)
def test_slices_cover_a_block_of_any_size(rows: int, slice_rows: int, slices: int) -> None:
    spec = dataclasses.replace(SPEC, context=rows, block_sequences=1)
    assert (spec.slice_rows, spec.slices) == (slice_rows, slices)
    data = (np.arange(3 * rows) % 1000).reshape(rows, 3).astype(np.float16)
    assert len(slice_checksums(data, spec.slice_rows)) == 8 * slices
    assert slice_checksums(data, spec.slice_rows)[-8:] == crc32c(data[(slices - 1) * slice_rows :])


def test_a_missing_or_short_file_is_named(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0"))
    out = np.empty((8, 3), dtype=np.float16)
    with pytest.raises(UserError, match="layer 0 block 4 .*No such file"):
        cache.read_block(Site(0), 4, out)
    cache.block_path(Site(0), 4).write_bytes(b"x" * 40)
    with pytest.raises(UserError, match="8 bytes short"):
        cache.read_block(Site(0), 4, out)
    cache.block_path(Site(0), 4).unlink()
    cache.block_path(Site(0), 4).mkdir()
    with pytest.raises(UserError, match="layer 0 block 4 .*Is a directory"):
        cache.read_block(Site(0), 4, out)
    with pytest.raises(UserError, match="layer 0 block 4 .*is not harvested"):
        cache.stats(Site(0), 4)


def test_what_is_no_cache_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no activation cache"):
        Cache.open(tmp_path)
    zarr.create_group(str(tmp_path / "a" / "activations.zarr"))
    (tmp_path / "b" / "activations.zarr").mkdir(parents=True)
    (tmp_path / "b" / "activations.zarr" / "zarr.json").write_text("{ nonsense")
    older = {"zarr_format": 3, "node_type": "group", "attributes": {"format": 1, "spec": {}, "layers": "0"}}
    (tmp_path / "c" / "activations.zarr").mkdir(parents=True)
    (tmp_path / "c" / "activations.zarr" / "zarr.json").write_text(json.dumps(older))
    messages = {
        "a": "not an activation cache",
        "b": "not a readable Zarr",
        "c": "a cache of format 1, and this program reads format 2",
    }
    for name, message in messages.items():
        meta = (tmp_path / name / "activations.zarr" / "zarr.json").read_bytes()
        with pytest.raises(UserError, match=message):
            Cache.open(tmp_path / name)
        with pytest.raises(UserError, match=message):
            Cache.create(tmp_path / name, SPEC, parse_sites("0"))
        assert [p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()] == [meta]


def test_every_flip_in_what_says_which_cache_it_is_is_noticed(tmp_path: Path) -> None:
    Cache.create(tmp_path / "c", SPEC, parse_sites("0"))
    path = tmp_path / "c" / "cache.json"
    whole = path.read_bytes()
    for at in range(len(whole) - 1):  # the last byte is a newline
        for bit in (1, 16):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            with pytest.raises(UserError, match=r"cache.json is damaged .* remove that file and run"):
                Cache.open(tmp_path / "c")
    for changed in (b"", b"[]", b"{}", b"\xff\xfe", b"null", whole[: len(whole) // 2]):
        path.write_bytes(changed)
        with pytest.raises(UserError, match="damaged"):
            Cache.open(tmp_path / "c")
    path.unlink()  # as the line says
    Cache.create(tmp_path / "c", SPEC, parse_sites("0"))
    assert path.read_bytes() == whole


def test_a_file_of_that_name_that_is_anothers_stays(tmp_path: Path) -> None:
    (tmp_path / "cache.json").write_text('{"packages": []}')
    for use in (lambda: Cache.open(tmp_path), lambda: Cache.create(tmp_path, SPEC, parse_sites("0"))):
        with pytest.raises(UserError, match="cache.json is not of an activation cache; choose another folder"):
            use()
    assert [p.name for p in tmp_path.iterdir()] == ["cache.json"]


def test_a_cache_of_another_format_is_refused(tmp_path: Path) -> None:
    Cache.create(tmp_path / "c", SPEC, parse_sites("0"))
    (tmp_path / "c" / "cache.json").write_bytes(to_bytes({"format": 3}))
    with pytest.raises(UserError, match="format 3, and this program reads format 2"):
        Cache.open(tmp_path / "c")


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0,1"))
    Cache.open(tmp_path / "c").require_same(SPEC)
    with pytest.raises(UserError, match=r"context is 4 there, 8 here; seed is 0 there, 1 here"):
        cache.require_same(dataclasses.replace(SPEC, context=8, seed=1))
    with pytest.raises(UserError, match=r"seed is 0 there, 1 here"):
        Cache.create(tmp_path / "c", dataclasses.replace(SPEC, seed=1), parse_sites("0"))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(CacheSpec)])
def test_identity_is_every_field_but_where_things_lay(field: str) -> None:
    value: object = 77 if isinstance(getattr(SPEC, field), int) else "other"
    if field == "imported":
        value = Imported(sites=(Site(0),), rows=8, positions=True, tokens=False, sha256="other")
    other = dataclasses.replace(SPEC, **{field: value})  # type: ignore[arg-type]
    place = field in ("model", "model_branch", "model_commit", "dataset")
    assert (SPEC.digest == other.digest) == place
    assert (SPEC.differences(other) == []) == place


def test_the_digest_is_part_of_the_format() -> None:
    assert SPEC.digest == "3d1eae406b7b563dce51b860fe2a7f929922c1a0a9c57fff94d81d8092ef1601"


def test_a_creation_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    """Whatever lies there without cache.json, of the same settings or of others, the same command makes the cache."""
    whole = Cache.create(tmp_path / "whole", SPEC, parse_sites("0,1"))
    files = {p.relative_to(whole.path): p.read_bytes() for p in whole.path.rglob("*") if p.is_file()}
    for other in (SPEC, dataclasses.replace(SPEC, context=8)):
        for n in range(len(files)):
            path = tmp_path / f"{n}-{other.context}"
            for file, _ in list(files.items())[:n]:
                if file.name != "cache.json":
                    (path / file).parent.mkdir(parents=True, exist_ok=True)
                    (path / file).write_bytes(
                        (Cache.create(tmp_path / "o", other, parse_sites("0,1")).path / file).read_bytes()
                    )
            Cache.create(path, SPEC, parse_sites("0,1"))
            assert {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()} == files
        shutil.rmtree(tmp_path / "o", ignore_errors=True)


def test_of_many_creators_all_have_the_same_cache(tmp_path: Path) -> None:
    def create(i: int) -> "Cache | UserError":
        try:
            return Cache.create(tmp_path / "c", dataclasses.replace(SPEC, seed=i % 2), (Site(i % 4),))
        except UserError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(create, range(16)))
    spec = Cache.open(tmp_path / "c").spec
    caches = [c for c in made if isinstance(c, Cache)]
    assert len(caches) == 8
    assert {c.spec for c in caches} == {spec}
    refused = [str(c) for c in made if not isinstance(c, Cache)]
    assert len(refused) == 8
    assert all("seed is" in line for line in refused)
    assert Cache.open(tmp_path / "c").sites == parse_sites("0,2" if spec.seed == 0 else "1,3")
    assert Cache.open(tmp_path / "c").bad_metadata() == []


def test_a_ledger_beside_arrays_that_are_gone_counts_as_nothing(tmp_path: Path) -> None:
    for spec in (SPEC, dataclasses.replace(SPEC, seed=1)):  # whose entries they are
        cache = Cache.create(tmp_path / "c", spec, parse_sites("0,1"))
        staged = {s: cache.stage_block(s, 2, np.zeros((8, 3), np.float16), replace=False) for s in parse_sites("0,1")}
        cache.commit(2, {Site(0): STATS, Site(1): STATS}, staged)
        cache.tokens.commit(0, np.zeros((32, 4), np.uint16), {}, 0)
        shutil.rmtree(tmp_path / "c" / "activations.zarr")
        (tmp_path / "c" / "cache.json").unlink()
        again = Cache.create(tmp_path / "c", SPEC, parse_sites("0,1"))
        assert again.missing(parse_sites("0,1")) == {parse_sites("0,1"): [0, 1, 2, 3, 4, 5]}
        assert again.tokens.missing() == [0]
        assert not again.has_block(parse_sites("0"), 2)
        (tmp_path / "c" / "cache.json").unlink()
        shutil.rmtree(tmp_path / "c" / "activations.zarr")


def test_another_caches_blocks_are_not_thrown_away_for_a_lost_file(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0"))
    cache.commit(2, {Site(0): STATS})
    (tmp_path / "c" / "cache.json").unlink()
    with pytest.raises(UserError, match=r"1 ledger entries of a cache with other settings, whose cache.json is gone"):
        Cache.create(tmp_path / "c", dataclasses.replace(SPEC, seed=1), parse_sites("0"))
    assert Cache.create(tmp_path / "c", SPEC, parse_sites("0")).stats(Site(0), 2) == STATS


def test_a_cache_with_blocks_is_never_discarded(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0"))
    cache.commit(2, {Site(0): STATS})
    with pytest.raises(UserError, match="has committed blocks and is kept"):
        cache.discard()
    assert Cache.open(tmp_path / "c").stats(Site(0), 2) == STATS
    cache.ledger.entry_path(parse_sites("0"), 2).unlink()
    cache.discard()
    assert list((tmp_path / "c").iterdir()) == []


def test_every_flip_in_an_entry_is_a_damaged_block(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0"))
    cache.commit(2, {Site(0): STATS})
    path = cache.ledger.entry_path(parse_sites("0"), 2)
    whole = path.read_bytes()
    assert cache.stats(Site(0), 2) == STATS
    for at in range(len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"layer 0 block 2 .*ledger entry .*unreadable.*repair"):
            cache.stats(Site(0), 2)
        with pytest.raises(UserError, match=r"layer 0 block 2 .*repair"):
            cache.totals()
    cache.commit(2, {Site(0): STATS})  # what repair does
    assert path.read_bytes() == whole


def test_entries_of_earlier_versions_are_read(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0"))
    for block, by in enumerate(("", "cpu, threads: 2", "cpu, threads: 2")):
        cache.commit(block, {Site(0): dataclasses.replace(STATS, by=by)})
    path = cache.ledger.entry_path(parse_sites("0"), 0)
    entry = from_bytes(path.read_bytes())
    del entry["layers"]["0"]["by"]
    entry["layers"]["0"] |= {"mean": 0.5, "m2": 1.0, "max_norm": 2.0}
    path.write_bytes(to_bytes(entry))
    assert cache.stats(Site(0), 0) == STATS
    assert cache.totals()[Site(0)].mixed == "1 on unknown, 2 on cpu, threads: 2"
    path.unlink()
    assert cache.totals()[Site(0)].mixed == ""


def test_an_entry_in_anothers_place_is_damage(tmp_path: Path) -> None:
    cache, other = (
        Cache.create(tmp_path / name, spec, parse_sites("0,1,2"))
        for name, spec in (("c", SPEC), ("d", dataclasses.replace(SPEC, seed=1)))
    )
    cache.commit(2, {Site(0): STATS, Site(1): STATS})
    cache.commit(3, {Site(2): STATS})
    other.commit(4, {Site(0): STATS, Site(1): STATS})
    entry = cache.ledger.entry_path(parse_sites("0,1"), 2).read_bytes()
    for source, layers, block, why in (
        (entry, parse_sites("0,1"), 5, "another block"),
        (entry, parse_sites("1,2"), 2, "other layers"),
        (entry, parse_sites("0"), 4, "other layers"),
        (other.ledger.entry_path(parse_sites("0,1"), 4).read_bytes(), parse_sites("0,1"), 4, "another cache"),
    ):
        path = cache.ledger.entry_path(layers, block)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(source)
        with pytest.raises(UserError, match=f"layer {layers[-1]} block {block} .*{why}"):
            cache.stats(layers[-1], block)
        path.unlink()


def test_an_entry_of_another_size_is_damage(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0"))
    for change in ({"rows": 7}, {"bytes": 47}, {"crc32c": "0" * 56}):
        cache.commit(1, {Site(0): dataclasses.replace(STATS, **change)})  # type: ignore[arg-type]
        with pytest.raises(UserError, match="layer 0 block 1 .*another size"):
            cache.stats(Site(0), 1)
        cache.ledger.entry_path(parse_sites("0"), 1).unlink()


def test_an_unreadable_entry_of_several_layers_gives_way_to_what_is_harvested_again(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0,1"))
    cache.commit(2, {Site(0): STATS, Site(1): STATS})
    cache.ledger.entry_path(parse_sites("0,1"), 2).write_bytes(b"{}")
    cache.commit(2, {Site(1): STATS})
    assert cache.stats(Site(1), 2) == STATS
    assert cache.committed(Site(0)) == set()  # nothing is known of it any more


def test_foreign_things_in_a_cache_are_passed_over(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0,1"))
    for name in ("@eaDir", "0-1 copy", "00-01", "1-0", "x", ".snapshot"):
        (tmp_path / "c" / "ledger" / name).mkdir(parents=True)
        (tmp_path / "c" / "activations.zarr" / "resid_post" / name).mkdir()
    cache.commit(2, {Site(0): STATS, Site(1): STATS})
    for name in ("2.json", "00000099.json", "00000003.json.bak", "x.json"):
        cache.ledger.entry_path(parse_sites("0,1"), 2).with_name(name).write_text("{}")
    (tmp_path / "c" / "ledger" / "notes.txt").touch()
    assert cache.committed(Site(0)) == {2}
    assert Cache.open(tmp_path / "c").sites == parse_sites("0,1")
    assert tuple(cache.totals()) == parse_sites("0,1")


def test_damaged_metadata_is_named_and_made_again(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0,1"))
    metas = sorted((tmp_path / "c").rglob("zarr.json"))
    assert len(metas) == 5
    for meta in metas:
        whole = meta.read_bytes()
        meta.write_bytes(whole[:-20])
        assert cache.bad_metadata() == [str(meta.relative_to(tmp_path / "c"))]
        Cache.open(tmp_path / "c").add_sites(())
        assert meta.read_bytes() == whole
        meta.unlink()
        assert len(cache.bad_metadata()) == 1
        Cache.open(tmp_path / "c").add_sites(parse_sites("1"))
        assert meta.read_bytes() == whole


def token_cache(path: Path) -> "tuple[Cache, np.ndarray[tuple[int, int], np.dtype[np.uint16]]]":
    """Three chunks of tokens, the last of them not full."""
    spec = dataclasses.replace(SPEC, n_blocks=33)
    cache = Cache.create(path, spec, parse_sites("0"))
    tokens = np.zeros((96, 4), np.uint16)
    tokens[: spec.sequences] = np.arange(264).reshape(66, 4)
    for chunk in range(3):
        cache.tokens.commit(chunk, tokens[32 * chunk : 32 * chunk + 32], {"place": chunk}, chunk)
    return cache, tokens[: spec.sequences]


def test_tokens_are_read_across_chunks(tmp_path: Path) -> None:
    cache, tokens = token_cache(tmp_path / "c")
    np.testing.assert_array_equal(cache.read_tokens(0, 66), tokens)
    np.testing.assert_array_equal(cache.read_tokens(30, 65), tokens[30:65])
    np.testing.assert_array_equal(cache.block_tokens(16), tokens[32:34])
    assert cache.tokens.entry(1) == TokenChunk(crc32c=crc32c(tokens[32:64]), source={"place": 1}, skip=1)
    assert cache.tokens.missing() == []
    array = zarr.open_array(str(tmp_path / "c" / "activations.zarr" / "tokens"), mode="r")
    np.testing.assert_array_equal(array[:], tokens)


def test_no_default_stands_in_for_tokens(tmp_path: Path) -> None:
    cache, _ = token_cache(tmp_path / "c")
    path, entry = cache.tokens.path(1), cache.tokens.entry_path(1)
    whole, record = path.read_bytes(), entry.read_bytes()
    damages = [(path, whole[:40] + b"x" + whole[41:]), (path, whole[:-1]), (path, whole + b"\0"), (path, None), (path, b"")]
    damages += [(entry, record[:30] + b"x" + record[31:]), (entry, None), (entry, b""), (entry, b"[]")]
    damages += [(path, cache.tokens.path(0).read_bytes()), (entry, cache.tokens.entry_path(0).read_bytes())]
    for file, data in damages:
        file.unlink() if data is None else file.write_bytes(data)
        again = Cache.open(tmp_path / "c")
        np.testing.assert_array_equal(again.block_tokens(0), np.arange(8).reshape(2, 4))
        for start, stop in ((32, 34), (10, 66)):
            with pytest.raises(UserError, match=r"token chunk 1 of .* is damaged: .*; mend it with `rsae harvest repair"):
                again.read_tokens(start, stop)
        path.write_bytes(whole)
        entry.write_bytes(record)
    assert Cache.open(tmp_path / "c").block_tokens(16)[0, 0] == 128


def test_other_tokens_than_the_ledger_has_are_never_written(tmp_path: Path) -> None:
    cache, tokens = token_cache(tmp_path / "c")
    cache.tokens.path(1).write_bytes(b"damaged")
    with pytest.raises(UserError, match="token chunk 1 .* came out otherwise .* nothing was changed"):
        cache.tokens.commit(1, np.ones((32, 4), np.uint16), {}, 0)
    assert cache.tokens.path(1).read_bytes() == b"damaged"
    cache.tokens.commit(1, tokens[32:64], {}, 0)
    np.testing.assert_array_equal(cache.read_tokens(0, 66), tokens)


def test_nothing_is_left_of_a_writer_that_died(tmp_path: Path) -> None:
    path = tmp_path / "c"
    Cache.create(path, SPEC, parse_sites("0")).commit(1, {Site(0): STATS})
    folders = [path, path / "ledger", path / "ledger" / "0", path / "activations.zarr"]
    folders += [path / "activations.zarr" / "tokens", path / "activations.zarr" / "resid_post" / "00"]
    before = sorted(path.rglob("*"))
    for folder in folders:
        left = temporary(folder / "c.0.0")
        left.write_bytes(b"half")
        _release(left)
    cache = Cache.open(path)
    assert cache.leftovers() == [4] * len(folders)
    cache.remove_leftovers()
    assert cache.leftovers() == []
    assert sorted(path.rglob("*")) == before


def test_listing_a_full_size_ledger_is_quick(tmp_path: Path) -> None:
    """Not a speed test: a bound that only an accidental read of every entry would break (9,155 blocks at full size)."""
    spec = dataclasses.replace(SPEC, n_blocks=9155)
    cache = Cache.create(tmp_path / "c", spec, parse_sites("0"))
    folder = cache.ledger.entry_path(parse_sites("0"), 0).parent
    folder.mkdir(parents=True)
    for block in range(9155):
        (folder / f"{block:08d}.json").touch()  # empty: reading one would fail
        cache.block_path(Site(0), block).touch()
    assert len(cache.committed(Site(0))) == 9155
    assert cache.missing(parse_sites("0")) == {}


def test_an_entry_is_found_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was published since, in a folder that was not there; no folder is listed for one that is known."""
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0,1"))
    cache.commit(2, {Site(0): STATS, Site(1): STATS})
    assert cache.stats(Site(1), 2) == STATS
    other = dataclasses.replace(STATS, nonfinite=5)
    Cache.open(tmp_path / "c").commit(3, {Site(1): other})
    assert cache.stats(Site(1), 3) == other

    def listed(*_: object) -> None:
        raise AssertionError("a folder was listed")

    monkeypatch.setattr(os, "listdir", listed)
    assert (cache.stats(Site(1), 2), cache.stats(Site(1), 3)) == (STATS, other)


def test_an_entry_that_cannot_be_read_gets_no_second_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache.create(tmp_path / "c", SPEC, parse_sites("0,1"))
    cache.commit(3, {Site(0): STATS, Site(1): STATS})

    def failing(self: object, key: str) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot read .*00000003.json: Input/output error"):
        patch.setattr("residual_saes.shared.stores.folder.Folder.get", failing)
        cache.commit(3, {Site(0): STATS})
    assert [path.name for path in (tmp_path / "c" / "ledger").iterdir()] == ["0-1"]
