"""The hidden layer on CUDA: relu, the choice among a batch and the mask of its gradient, each in one pass over [B, F].

A pass also sets a bit for every active element, so that whoever comes after reads a sixteenth of z or less. These passes are
for what `hopper` does not finish inside the product itself.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_saes.shared.launch import launch as _launch
from residual_saes.shared.launch import row_stride as _row_stride
from residual_saes.train.kernels.base import Activation, TorchKernels, starts

TILE_ROWS, TILE_COLS, TILE_BLOCK = 8, 512, 512  # activate_: a tile, and the rows that one program goes down
PATTERNS = 2**15  # of 16-bit floats that are not negative
SAMPLE = 2**18  # keep_largest_: entries from which it is told where the least of them may lie
HISTOGRAMS = 16  # copies of one histogram, so that programs do not wait for one another's additions
MASK_ROWS, MASK_COLS, MASK_BLOCK = 16, 256, 2048  # mask_: a tile, and the rows one program adds up, tile by tile


@dataclass(kw_only=True, frozen=True, slots=True)
class MarkedActivation(Activation):
    """Also remembers which elements are active, so that `compact` and `mask_` need not read z again to find them."""

    bits: Tensor  # int32 [B, ceil(F / 32)]: bit j of word k stands for feature 32 k + j


class HiddenKernels(TorchKernels):
    def activate_(self, h: Tensor, bias: Tensor) -> MarkedActivation:
        return _mark_in_place(_activate_kernel, h, bias)

    def keep_largest_(self, z: Tensor, count: int) -> tuple[Activation, Tensor]:
        """16-bit floats ≥ 0 are in the order of their bit patterns, NaN after all others: so it is patterns that are compared.
        z contiguous."""
        if z.dtype.itemsize != 2:
            return super().keep_largest_(z, count)
        n_rows, n_cols = z.shape
        least, above = _least_pattern(z, count)
        per_row = torch.empty(n_rows, dtype=torch.int32, device=z.device)
        _launch(
            _equal_kernel, (triton.cdiv(n_rows, TILE_ROWS),), z, least, per_row, n_rows, n_cols, _row_stride(z),
            ROWS=TILE_ROWS, COLS=TILE_COLS, num_warps=4,
        )  # fmt: skip
        room = count - above - (per_row.cumsum(0) - per_row)
        # Equal ones stay in front of a column: in most rows all or none of them, in one row at most the first few.
        stay = torch.where(room >= per_row, n_cols, 0)
        last = ((room > 0) & (room < per_row)).int().argmax()[None]
        seen = (_patterns(z.index_select(0, last)) == least).cumsum(1)
        stay.index_copy_(0, last, (seen <= room[last]).sum(1))

        activation = _mark_in_place(_keep_kernel, z, least, stay.int())
        return activation, least.to(torch.int16).view(z.dtype)[0]

    def mask_(self, gz: Tensor, z: Tensor, activation: Activation, l1_grad: float) -> Tensor:
        n_rows, n_cols = gz.shape
        bits = bits_of(activation)
        grid = (triton.cdiv(n_cols, MASK_COLS), triton.cdiv(n_rows, MASK_BLOCK))
        partial = torch.empty(grid[1], n_cols, dtype=torch.float32, device=gz.device)
        _launch(
            _mask_kernel, grid,
            gz, bits, partial, float(l1_grad), n_rows, n_cols, _row_stride(gz), bits.stride(0),
            BLOCK=MASK_BLOCK, ROWS=MASK_ROWS, COLS=MASK_COLS, num_warps=8,
        )  # fmt: skip
        return partial.sum(0)


def bits_of(activation: Activation) -> Tensor:
    if not isinstance(activation, MarkedActivation):
        raise TypeError("these kernels take the activation that they made themselves")
    return activation.bits


def _mark_in_place(kernel: Any, z: Tensor, *rule: Tensor) -> MarkedActivation:
    """Run a kernel that changes z [B, F] by a rule of its own, strip by strip, and marks, counts and adds what is left."""
    n_rows, n_cols = z.shape
    grid = (triton.cdiv(n_cols, TILE_COLS), triton.cdiv(n_rows, TILE_BLOCK))
    feature_count = torch.zeros(n_cols, dtype=torch.int32, device=z.device)
    bits = torch.empty(n_rows, triton.cdiv(n_cols, 32), dtype=torch.int32, device=z.device)
    partial = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=z.device)
    _launch(
        kernel, grid, z, *rule, bits, feature_count, partial, n_rows, n_cols, _row_stride(z), bits.stride(0),
        BLOCK=TILE_BLOCK, ROWS=TILE_ROWS, COLS=TILE_COLS, num_warps=4,
    )  # fmt: skip
    return MarkedActivation(feature_count=feature_count, total=partial.sum(), bits=bits)


def _patterns(z: Tensor) -> Tensor:
    """Bit patterns of 16-bit floats that are not negative; int32."""
    return z.view(torch.int16).int() & (PATTERNS - 1)


def _least_pattern(z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The bit pattern of the count-th largest of z, int32 [1], 0 if so many are not above 0; and how many are larger.

    A sample says below which patterns nobody need look: counting all that are above 0, mostly many more, takes longer. Where
    the sample said too much, the rest is counted after all, which is for the device to find out."""
    n_rows, n_cols = z.shape
    # An odd stride, for one that divides a row would meet the same few features in every row.
    sample = _patterns(z.view(-1)[:: max(1, z.numel() // SAMPLE) | 1])
    expected = sample.numel() * count / z.numel()
    rank = min(sample.numel(), math.ceil(expected + 4 * math.sqrt(expected) + 4))
    first = sample.topk(rank).values[-1:].clamp_min(1)
    histogram = torch.zeros(HISTOGRAMS, PATTERNS, dtype=torch.int32, device=z.device)

    def add(first: Tensor, end: Tensor) -> None:
        grid = (triton.cdiv(n_cols, TILE_COLS), triton.cdiv(n_rows, TILE_BLOCK))
        _launch(
            _histogram_kernel, grid, z, first, end, histogram, n_rows, n_cols, _row_stride(z),
            COPIES=HISTOGRAMS, PATTERNS=PATTERNS, BLOCK=TILE_BLOCK, ROWS=TILE_ROWS, COLS=TILE_COLS, num_warps=4,
        )  # fmt: skip

    add(first, torch.full_like(first, PATTERNS))
    add(torch.ones_like(first), torch.where(histogram.sum() < count, first, 0))
    larger = starts(histogram.sum(0).flip(0))  # how many are above each pattern, from the largest one down
    place = (larger[1:] < count).sum()[None]
    return (PATTERNS - 1 - place).clamp_min(0).int(), larger.index_select(0, place)


@triton.jit
def _pack(active: tl.tensor, ROWS: tl.constexpr, COLS: tl.constexpr) -> tl.tensor:
    """[ROWS, COLS] of 0 and 1 as [ROWS, COLS / 32] words. A thread holds 8 columns, so four threads make a word."""
    lanes = tl.reshape(active, [ROWS, COLS // 32, 32])
    return tl.sum(lanes << tl.arange(0, 32)[None, None, :], axis=2)


@triton.jit
def _unpack(words: tl.tensor, ROWS: tl.constexpr, COLS: tl.constexpr) -> tl.tensor:
    """[ROWS, COLS / 32] words as [ROWS, COLS] of 0 and 1."""
    return tl.reshape((words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1, [ROWS, COLS])


@triton.jit
def store_bits(
    bits_ptr: tl.tensor, words: tl.tensor, rows: tl.tensor, first_col: tl.tensor, n_rows: tl.tensor, n_cols: tl.tensor,
    stride: tl.tensor, COLS: tl.constexpr,
) -> None:  # fmt: skip
    word = first_col // 32 + tl.arange(0, COLS // 32)
    inside = (rows < n_rows)[:, None] & (word * 32 < n_cols)[None, :]
    tl.store(bits_ptr + rows.to(tl.int64)[:, None] * stride + word[None, :], words, mask=inside)


@triton.jit
def _store_marked(  # type: ignore[no-untyped-def]
    at: tl.tensor, z: tl.tensor, inside: tl.tensor, bits_ptr: tl.tensor, rows: tl.tensor, first_col: tl.tensor,
    n_rows: tl.tensor, n_cols: tl.tensor, bits_stride: tl.tensor, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Store a tile of z and its bits; returns it in float32, and as 0 and 1 where it is active."""
    tl.store(at, z, mask=inside)
    wide = z.to(tl.float32)
    active = (wide > 0.0).to(tl.int32)
    store_bits(bits_ptr, _pack(active, ROWS, COLS), rows, first_col, n_rows, n_cols, bits_stride, COLS)
    return wide, active


@triton.jit
def _store_counts(
    feature_count_ptr: tl.tensor, partial_ptr: tl.tensor, cols: tl.tensor, n_cols: tl.tensor, count: tl.tensor,
    total: tl.tensor,
) -> None:  # fmt: skip
    """What a strip counted and added up."""
    # Integers: the order of the additions does not matter, and nobody reads them before the kernel ends.
    tl.atomic_add(feature_count_ptr + cols, tl.sum(count, axis=0), mask=cols < n_cols, sem="relaxed")
    tl.store(partial_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(total))


@triton.jit
def _activate_kernel(
    h_ptr: tl.tensor, bias_ptr: tl.tensor, bits_ptr: tl.tensor, feature_count_ptr: tl.tensor, partial_ptr: tl.tensor,
    n_rows: tl.tensor, n_cols: tl.tensor, h_stride: tl.tensor, bits_stride: tl.tensor,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """One strip of COLS columns and BLOCK rows, ROWS at a time; counts and sum stay in registers until the strip ends."""
    block = tl.program_id(1)
    first_col = tl.program_id(0) * COLS
    cols = first_col + tl.arange(0, COLS)
    col_inside = cols < n_cols
    bias = tl.load(bias_ptr + cols, mask=col_inside, other=0.0)
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    count = tl.zeros([ROWS, COLS], dtype=tl.int32)
    for first in range(0, BLOCK, ROWS):
        rows = block * BLOCK + first + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & col_inside[None, :]
        at = h_ptr + rows.to(tl.int64)[:, None] * h_stride + cols[None, :]
        raw = tl.load(at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        # "Not above" rather than a maximum: NaN must come through, or a broken run would look merely sparse.
        z = tl.where(inside & ~(raw <= 0.0), raw, 0.0).to(h_ptr.dtype.element_ty)
        wide, active = _store_marked(at, z, inside, bits_ptr, rows, first_col, n_rows, n_cols, bits_stride, ROWS, COLS)
        total += wide
        count += active
    _store_counts(feature_count_ptr, partial_ptr, cols, n_cols, count, total)


@triton.jit
def _pattern(z: tl.tensor) -> tl.tensor:
    """See `_patterns`."""
    return z.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF


@triton.jit
def _histogram_kernel(
    z_ptr: tl.tensor, first_ptr: tl.tensor, end_ptr: tl.tensor, histogram_ptr: tl.tensor, n_rows: tl.tensor, n_cols: tl.tensor,
    z_stride: tl.tensor, COPIES: tl.constexpr, PATTERNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:  # fmt: skip
    """One strip, as in _activate_kernel: how often each bit pattern from `first` to before `end` occurs."""
    start = tl.load(first_ptr)
    end = tl.load(end_ptr)
    if start >= end:
        return
    block = tl.program_id(1)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    histogram = histogram_ptr + (block + tl.program_id(0)) % COPIES * PATTERNS
    for first in range(0, BLOCK, ROWS):
        rows = block * BLOCK + first + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        z = tl.load(z_ptr + rows.to(tl.int64)[:, None] * z_stride + cols[None, :], mask=inside, other=0.0)
        pattern = _pattern(z)
        # One comparison for both ends; what is not inside is 0, which `first` is not.
        counted = (pattern - start).to(tl.uint32, bitcast=True) < (end - start).to(tl.uint32, bitcast=True)
        tl.atomic_add(histogram + pattern, 1, mask=counted, sem="relaxed")


@triton.jit
def _equal_kernel(
    z_ptr: tl.tensor, least_ptr: tl.tensor, count_ptr: tl.tensor, n_rows: tl.tensor, n_cols: tl.tensor, z_stride: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS rows: how many entries of each are equal to the least."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = z_ptr + rows.to(tl.int64)[:, None] * z_stride
    least = tl.load(least_ptr)
    count = tl.zeros([ROWS, COLS], dtype=tl.int32)
    for first in range(0, n_cols, COLS):
        cols = first + tl.arange(0, COLS)
        inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        z = tl.load(start + cols[None, :], mask=inside, other=0.0)
        count += ((_pattern(z) == least) & inside).to(tl.int32)
    tl.store(count_ptr + rows, tl.sum(count, axis=1), mask=rows < n_rows)


@triton.jit
def _keep_kernel(
    z_ptr: tl.tensor, least_ptr: tl.tensor, stay_ptr: tl.tensor, bits_ptr: tl.tensor, feature_count_ptr: tl.tensor,
    partial_ptr: tl.tensor, n_rows: tl.tensor, n_cols: tl.tensor, z_stride: tl.tensor, bits_stride: tl.tensor,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """_activate_kernel with another rule: what is above the least stays, and what is equal to it in front of a row's column."""
    block = tl.program_id(1)
    first_col = tl.program_id(0) * COLS
    cols = first_col + tl.arange(0, COLS)
    col_inside = cols < n_cols
    least = tl.load(least_ptr)
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    count = tl.zeros([ROWS, COLS], dtype=tl.int32)
    for first in range(0, BLOCK, ROWS):
        rows = block * BLOCK + first + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & col_inside[None, :]
        at = z_ptr + rows.to(tl.int64)[:, None] * z_stride + cols[None, :]
        z = tl.load(at, mask=inside, other=0.0)
        stay = tl.load(stay_ptr + rows, mask=rows < n_rows, other=0)
        pattern = _pattern(z)
        kept = (pattern > least) | ((pattern == least) & (cols[None, :] < stay[:, None]))
        z = tl.where(kept, z, 0.0)
        wide, active = _store_marked(at, z, inside, bits_ptr, rows, first_col, n_rows, n_cols, bits_stride, ROWS, COLS)
        total += wide
        count += active
    _store_counts(feature_count_ptr, partial_ptr, cols, n_cols, count, total)


@triton.jit
def _mask_kernel(
    gz_ptr: tl.tensor, bits_ptr: tl.tensor, partial_ptr: tl.tensor, l1_grad: tl.tensor, n_rows: tl.tensor,
    n_cols: tl.tensor, gz_stride: tl.tensor, bits_stride: tl.tensor,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """One strip of COLS columns and BLOCK rows, ROWS at a time; the sums stay in registers until the strip ends."""
    block = tl.program_id(1)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    word = tl.program_id(0) * (COLS // 32) + tl.arange(0, COLS // 32)
    col_inside = cols < n_cols
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for first in range(0, BLOCK, ROWS):
        rows = block * BLOCK + first + tl.arange(0, ROWS)
        row_inside = (rows < n_rows)[:, None]
        inside = row_inside & col_inside[None, :]
        wide = rows.to(tl.int64)[:, None]
        at = gz_ptr + wide * gz_stride + cols[None, :]
        gz = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        words = tl.load(bits_ptr + wide * bits_stride + word[None, :], mask=row_inside & (word * 32 < n_cols)[None, :], other=0)
        active = _unpack(words, ROWS, COLS)
        rounded = tl.where(active != 0, gz + l1_grad, 0.0).to(gz_ptr.dtype.element_ty)
        tl.store(at, rounded, mask=inside)
        total += rounded.to(tl.float32)
    tl.store(partial_ptr + block.to(tl.int64) * n_cols + cols, tl.sum(total, axis=0), mask=col_inside)
