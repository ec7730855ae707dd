"""A layer of a cache as an array in reading order, for notebooks.

    layer = Cache.open(Path("data/demo")).layer(3)
    x = layer[rows]                      # float16 [..., d_model]
    layer.tokens[rows], layer.context(rows[0])

Row r is position r % context of sequence r // context: the order of the text, in every layer, not the order of the file.
What is read is whole slices, each compared with its checksum before a row of it is handed out; those of the last block are
kept. So neighbouring rows cost one read of their block, and rows at random places a slice each (4 MiB at full size).
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from residual_saes.shared.cache.ledger import BlockStats
from residual_saes.shared.cache.spec import CacheSpec
from residual_saes.shared.errors import UserError
from residual_saes.shared.sites import Site, format_sites
from residual_saes.shared.stores import Location

Rows: TypeAlias = int | np.integer[Any] | slice | Sequence[int] | NDArray[Any]
_Gather: TypeAlias = Callable[[int, NDArray[np.int64]], NDArray[Any]]  # (block, rows in it, in reading order) → their values


class Cached(Protocol):
    """What is asked of a `Cache`, which makes the views and so cannot be imported here."""

    spec: CacheSpec
    path: Location
    sites: tuple[Site, ...]

    def block_order(self, block: int) -> NDArray[np.int64]: ...
    def stats(self, site: Site, block: int) -> BlockStats: ...
    def read_slice(self, site: Site, block: int, index: int, out: NDArray[Any]) -> None: ...
    def check_slice(self, site: Site, block: int, index: int, data: NDArray[Any], stats: BlockStats) -> None: ...
    def values(self, site: Site, stored: NDArray[Any]) -> NDArray[np.float16]: ...
    def read_tokens(self, start: int, stop: int) -> NDArray[np.int64]: ...


class Layer:
    """One layer's activations, float16 [rows, d_model]."""

    def __init__(self, cache: Cached, site: Site) -> None:
        """Raises UserError for a layer that is not in the cache."""
        if site not in cache.sites:
            raise UserError(f"layer {site} is not in {cache.path}: it has layers {format_sites(cache.sites)}")
        self.cache, self.site, self.tokens = cache, site, Tokens(cache)
        self._block: _Block | None = None  # the last one, as far as it was read

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.cache.spec.d_model

    def __getitem__(self, rows: Rows) -> NDArray[np.float16]:
        """Activations in the order asked for, the shape of `rows` and d_model; a copy.

        `rows` is an int, a slice, or a list or array of ints; negative ones count from the end. Raises IndexError for rows that
        are not there, TypeError for what are no rows, UserError for a block that is damaged or not harvested.
        """
        out: NDArray[np.float16] = _take(self.cache, rows, self._gather, (self.cache.spec.d_model,), np.dtype(np.float16))
        return out

    def context(self, row: int, *, before: int | None = None, after: int = 0) -> NDArray[np.int64]:
        """The token ids that the model had read at `row`, int64, the last one the row's own.

        At most `before` of the ones before it, and up to `after` of those that follow in its sequence. Raises as `[]` does, and
        ValueError for numbers below zero.
        """
        start, row = self._sequence(row)
        before, after = row if before is None else operator.index(before), operator.index(after)
        if min(before, after) < 0:
            raise ValueError(f"{min(before, after)} tokens cannot be shown: before and after are whole numbers from 0")
        return self.tokens[max(start, row - before) : min(row + 1 + after, start + self.cache.spec.context)]

    def _sequence(self, row: int) -> tuple[int, int]:
        """(first row of the row's sequence, the row counted from the front)."""
        row = int(_indices(row, len(self)))
        return row - row % self.cache.spec.context, row

    def _gather(self, block: int, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        kept, self._block = self._block, None  # after a failure nothing is kept: the block may be repaired by the next time
        if kept is None or kept.block != block:
            kept = _Block(self.cache, self.site, block)
        values = kept.rows(rows)
        self._block = kept
        return values


class _Block:
    """A block in memory, in the order of the file, slice by slice as they are wanted."""

    def __init__(self, cache: Cached, site: Site, block: int) -> None:
        spec = cache.spec
        self._cache, self._site, self.block, self._stats = cache, site, block, cache.stats(site, block)
        self._data = spec.stored_rows(spec.block_rows)
        self._read = np.zeros(spec.slices, bool)
        self._place = np.empty(spec.block_rows, np.int64)  # where each row of the text is stored
        self._place[cache.block_order(block)] = np.arange(spec.block_rows)

    def rows(self, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        """Rows of the block in the order of the text."""
        places, size = self._place[rows], self._cache.spec.slice_rows
        for index in map(int, np.unique(places // size)):
            if not self._read[index]:
                part = self._data[index * size : (index + 1) * size]
                self._cache.read_slice(self._site, self.block, index, part)
                self._cache.check_slice(self._site, self.block, index, part, self._stats)
                self._read[index] = True
        return self._cache.values(self._site, self._data[places])


class Tokens:
    """The token that each row is at, int64 [rows]: the same rows as the layer's."""

    def __init__(self, cache: Cached) -> None:
        self._cache = cache

    def __len__(self) -> int:
        return self._cache.spec.sequences * self._cache.spec.context

    def __getitem__(self, rows: Rows) -> NDArray[np.int64]:
        """Takes and raises what the layer's `[]` does."""
        out: NDArray[np.int64] = _take(self._cache, rows, self._gather, (), np.dtype(np.int64))
        return out

    def _gather(self, block: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        first, context = block * self._cache.spec.block_sequences, self._cache.spec.context
        low, high = int(rows.min()) // context, int(rows.max()) // context
        sequences: NDArray[np.int64] = self._cache.read_tokens(first + low, first + high + 1).reshape(-1)
        return sequences[rows - low * context]


def _take(cache: Cached, rows: Rows, gather: _Gather, tail: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The values of `rows`, block by block, each block asked for once."""
    block_rows = cache.spec.block_rows
    wanted = _indices(rows, cache.spec.sequences * cache.spec.context)
    flat = wanted.reshape(-1)
    out = np.empty((flat.size, *tail), dtype)
    order = np.argsort(flat // block_rows, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(flat[order] // block_rows)) + 1):
        if part.size:
            block = int(flat[part[0]]) // block_rows
            out[part] = gather(block, flat[part] - block * block_rows)
    shaped: NDArray[Any] = out.reshape((*wanted.shape, *tail))[()]  # a single token is a number, as of any array
    return shaped


def _indices(rows: Rows, n: int) -> NDArray[np.int64]:
    if isinstance(rows, slice):
        return np.arange(*rows.indices(n))
    if isinstance(rows, tuple):
        raise TypeError("there is one axis of rows: write layer[[100, 5]] for two rows, layer[100][5] for a dimension of one")
    array = np.asarray(rows)
    if array.size == 0:
        array = array.astype(np.int64)  # an empty list has no type of its own
    if array.dtype.kind not in "iu":
        raise TypeError(f"rows are whole numbers, not {array.dtype}; of a mask, np.flatnonzero gives them")
    outside = array[(array < -n) | (array >= n)]
    if outside.size:
        raise IndexError(f"row {outside.flat[0]} is not there: the cache has {n:,} rows")
    indices = array.astype(np.int64)  # in which the number of rows can be added
    return np.where(indices < 0, indices + n, indices)
