"""A layer as an array: the rows are those of the text, whatever lies where in the file, and none is handed out unchecked."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import residual_saes
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.sites import Site
from tests.conftest import ROOT


def test_a_row_is_what_the_model_has_at_that_position(cache: Cache, lm: Path) -> None:
    """Held against the model itself: sequences of two blocks, the held-out part's first among them."""
    context = cache.spec.context
    model = AutoModelForCausalLM.from_pretrained(lm, dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    model.gpt_neox.layers[1].register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    for sequence in (3, cache.spec.train_blocks * cache.spec.block_sequences):
        rows = range(sequence * context, (sequence + 1) * context)
        layer = cache.layer(1)
        with torch.inference_mode():
            model(torch.from_numpy(layer.tokens[rows])[None])
        expected = seen[-1].float().reshape(context, -1)
        got = torch.from_numpy(layer[rows]).float()
        assert torch.cdist(got, expected).argmin(1).tolist() == list(range(context))
        torch.testing.assert_close(got, expected, rtol=0.03, atol=0.1)


def test_every_row_of_the_file_is_at_its_place(cache: Cache) -> None:
    stored = np.asarray(zarr.open_array(str(cache.path / "activations.zarr" / "resid_post" / "02"), mode="r")[:])
    in_order = np.empty_like(stored)
    for block in range(cache.spec.n_blocks):
        first = block * cache.spec.block_rows
        in_order[first + cache.block_order(block)] = stored[first : first + cache.spec.block_rows]
    layer = cache.layer(2)
    assert layer.shape == stored.shape
    np.testing.assert_array_equal(layer[:], in_order)
    assert not np.array_equal(stored, in_order)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_indexing_is_numpys(cache: Cache, data: st.DataObject) -> None:
    layer = cache.layer(0)
    n = len(layer)
    row = st.integers(-n, n - 1)
    rows: Any = data.draw(
        st.one_of(
            row,
            st.lists(row, max_size=6),
            st.lists(row, min_size=4, max_size=4).map(lambda r: np.array(r).reshape(2, 2)),
            st.builds(slice, st.none() | row, st.none() | row, st.sampled_from([None, 97, -211])),
        )
    )
    index = rows if not isinstance(rows, list) else np.array(rows, dtype=np.int64)
    np.testing.assert_array_equal(layer[rows], _everything(cache)[0][index])
    np.testing.assert_array_equal(layer.tokens[rows], _everything(cache)[1][index])
    assert layer[rows].dtype == np.float16


_known: dict[Path, tuple[Any, Any]] = {}


def _everything(cache: Cache) -> tuple[Any, Any]:
    if cache.path not in _known:
        _known[cache.path] = cache.layer(0)[:], cache.read_tokens(0, cache.spec.sequences).reshape(-1)
    return _known[cache.path]


def test_a_context_ends_at_its_row_and_stays_in_its_sequence(cache: Cache) -> None:
    layer, context = cache.layer(0), cache.spec.context
    sequence = cache.read_tokens(5, 6)[0]
    row = 5 * context + 9
    assert layer.context(row).tolist() == sequence[:10].tolist()
    assert layer.context(row)[-1] == layer.tokens[row]
    assert layer.context(row, before=3, after=2).tolist() == sequence[6:12].tolist()
    assert layer.context(row, before=99, after=np.uint8(255)).tolist() == sequence.tolist()
    with pytest.raises(ValueError, match="-1 tokens cannot be shown"):
        layer.context(row, before=-1)
    assert layer.context(-1).tolist() == cache.read_tokens(cache.spec.sequences - 1, cache.spec.sequences)[0].tolist()


def test_what_are_no_rows_is_refused(cache: Cache) -> None:
    layer = cache.layer(0)
    for outside in (len(layer), -len(layer) - 1, [0, len(layer)], np.uint64(2**64 - 1), np.array([2**63], np.uint64)):
        with pytest.raises(IndexError, match="is not there: the cache has 22,528 rows"):
            layer[outside]
    for wrong in (0.5, [True, False], np.ones(3, bool), "7", np.array([3], "m8[s]"), [2**70], ...):
        with pytest.raises(TypeError, match="rows are whole numbers"):
            layer[wrong]
    with pytest.raises(UserError, match=r"layer 7 is not in .*: it has layers 0-2"):
        cache.layer(7)


def test_damage_is_found_where_it_is_read_and_nowhere_else(cache_path: Path, tmp_path: Path) -> None:
    shutil.copytree(cache_path, tmp_path / "c")
    cache = Cache.open(tmp_path / "c")
    path = cache.block_path(Site(1), 2)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    layer, rows = cache.layer(1), cache.spec.block_rows
    assert layer[: 2 * rows].shape == (2 * rows, 32)
    for _ in range(2):  # what failed once is not kept as if it were good
        with pytest.raises(UserError, match="layer 1 block 2 of .* is damaged: the checksum of slice 15 does not match"):
            layer[2 * rows : 3 * rows]
    unharmed = 2 * rows + int(cache.block_order(2)[0])
    assert layer[unharmed].tolist() == Cache.open(cache_path).layer(1)[unharmed].tolist()
    for entry in cache.path.glob("ledger/*/00000003.json"):
        entry.unlink()
    with pytest.raises(UserError, match="layer 1 block 3 of .* is not harvested"):
        layer[3 * rows]


def test_a_slice_is_read_once_for_neighbouring_rows(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    original = Cache.read_slice

    def counted(self: Cache, site: Site, block: int, index: int, out: Any) -> None:
        read.append((block, index))
        original(self, site, block, index, out)

    monkeypatch.setattr(Cache, "read_slice", counted)
    spec, layer = cache.spec, cache.layer(0)
    layer[3]
    assert read == [(0, int(np.flatnonzero(cache.block_order(0) == 3)[0]) // spec.slice_rows)]
    for row in range(spec.block_rows):
        layer[row]
    assert sorted(read) == [(0, index) for index in range(spec.slices)]
    layer[[5 * spec.block_rows, 3, 5 * spec.block_rows + 1]]
    assert {block for block, _ in read[spec.slices :]} == {5} and len(read) <= spec.slices + 2


def test_what_the_documentation_says_runs(cache: Cache) -> None:
    page = (ROOT / "docs" / "guides" / "python.md").read_text()
    code = "\n".join(re.findall(r"^## (?:Rows of a|A) cache\b.*?^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    assert 'Path("data/demo")' in code and "zarr" in code
    names: dict[str, Any] = {"rs": residual_saes}
    exec(code.replace('Path("data/demo")', f"Path({str(cache.path)!r})"), names)
    assert names["x"].shape == (100, 32)
    assert len(names["heldout"]) == cache.spec.holdout_tokens
    stored, layer, first = names["stored"], names["layer"], 2 * cache.spec.block_rows
    np.testing.assert_array_equal(stored[first + 17], layer[first + names["order"][17]])
    np.testing.assert_array_equal(stored[first : first + cache.spec.block_rows], layer[first + names["order"]])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16])
def test_rows_of_any_integer_type_are_the_same_rows(cache: Cache, dtype: type) -> None:
    layer, last = cache.layer(0), len(cache.layer(0)) - 1
    np.testing.assert_array_equal(layer[np.array([0, 100], dtype)], layer[[0, 100]])
    if np.issubdtype(dtype, np.signedinteger):
        np.testing.assert_array_equal(layer[np.array([-1], dtype)], layer[[last]])
    with pytest.raises(TypeError, match="one axis of rows"):
        layer[100, 5]  # type: ignore[index]
