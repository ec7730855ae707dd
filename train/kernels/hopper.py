"""The two products of a training step whose results are [B, F], with the pass over the result inside. For H100 and H200.

cuBLAS has an epilogue for relu, but features would still have to be counted in a pass of their own. What was measured:
docs/findings/kernels.md.

- Tiles come and go through the tensor memory accelerator: a few programs for each multiprocessor take tiles in turn, and
  the loads of the next tile begin before the last one is finished (`flatten` makes one loop of two for that).
- In the accumulator of a warp group four neighbouring threads hold a row, and each of them 2 columns of every 8. A thread
  packs its 8 flags of 32 columns into one integer before the four exchange anything.
- A tile is finished strip by strip: small strips on their way out leave shared memory for a fourth stage of loads. Features
  are counted from the bits, in a kernel of its own, and not while the tensor cores wait for a tile to be finished.
- Counts come from integer atomics; float sums are partials in a buffer, added in a fixed order.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from residual_saes.shared.launch import launch as _launch
from residual_saes.train.kernels.base import Activation, Workspace
from residual_saes.train.kernels.cuda import TritonKernels
from residual_saes.train.kernels.cuda_hidden import MarkedActivation, bits_of, store_bits


@dataclass(kw_only=True, frozen=True, slots=True)
class Tiling:
    """How a product is cut up: what a program holds in registers, and what the loads in flight take of shared memory,
    stages · (rows + cols) · depth · 2 bytes, beside rows · cols / parts · 2 bytes for the result on its way out."""

    rows: int
    cols: int
    depth: int = 64
    stages: int = 3
    warps: int = 8
    parts: int = 1  # the result leaves in so many column strips
    group: int = 32  # tiles are taken in strips of so many rows of tiles, column by column: these rows stay in L2
    per_processor: int = 1  # programs on each multiprocessor


_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ENCODE = Tiling(rows=128, cols=256, stages=4, parts=2)
HIDDEN_GRAD = Tiling(rows=128, cols=128, warps=4, parts=4, per_processor=2)
COUNT_ROWS, COUNT_WORDS, COUNT_BLOCK = 32, 32, 2048  # feature_count: a tile of bits, and the rows that one program goes down


class HopperKernels(TritonKernels):
    """For compute capability 9.0: at sizes that fit, the hidden layer and its gradient come finished from their products."""

    def encode(self, xc: Tensor, w_enc: Tensor, bias: Tensor, out: Workspace) -> tuple[Tensor, Activation]:
        if not fits(len(xc), *w_enc.shape):
            return super().encode(xc, w_enc, bias, out)
        z = out.z(len(xc), feature_major=False)
        return z, encode(xc, w_enc, bias, z)

    def hidden_grad(self, g: Tensor, w_dec: Tensor, z: Tensor, activation: Activation, l1_grad: float, gz: Tensor) -> Tensor:
        if not fits(len(g), *w_dec.shape):
            return super().hidden_grad(g, w_dec, z, activation, l1_grad, gz)
        return hidden_grad(g, w_dec, bits_of(activation), l1_grad, gz)


def fits(n_rows: int, n_cols: int, d: int) -> bool:
    """Whether the accelerator takes matrices of this size: rows of [B, F] and [B, d] must begin at multiples of 16 bytes."""
    return min(n_rows, n_cols, d) > 0 and n_cols % 8 == 0 and d % 8 == 0


def encode(xc: Tensor, w_enc: Tensor, bias: Tensor, z: Tensor, tiling: Tiling = ENCODE) -> MarkedActivation:
    """z [B, F] = relu(xc [B, d] · w_encᵀ + bias), w_enc [F, d], bias float32 [F] added in float32; all else bf16."""
    n_rows, n_cols = z.shape
    t = tiling
    bits = torch.empty(n_rows, triton.cdiv(n_cols, 32), dtype=torch.int32, device=z.device)
    n_tiles = triton.cdiv(n_rows, t.rows) * triton.cdiv(n_cols, t.cols)
    partial = torch.empty(n_tiles, dtype=torch.float32, device=z.device)
    _run(
        _encode_kernel, n_tiles, t, bits,
        _tiles(xc, t.rows, t.depth), _tiles(w_enc, t.cols, t.depth), _tiles(z, t.rows, t.cols // t.parts),
        bias, partial, n_rows, n_cols, xc.shape[1], bits.stride(0),
    )  # fmt: skip
    return MarkedActivation(feature_count=feature_count(bits, n_cols), total=partial.sum(), bits=bits)


def feature_count(bits: Tensor, n_cols: int) -> Tensor:
    """On how many rows of bits [B, ceil(n_cols / 32)] each column is set, int32 [n_cols]."""
    count = torch.zeros(n_cols, dtype=torch.int32, device=bits.device)
    _launch(
        _feature_count_kernel, (triton.cdiv(bits.shape[1], COUNT_WORDS), triton.cdiv(len(bits), COUNT_BLOCK)),
        bits, count, *bits.shape, n_cols, bits.stride(0), BLOCK=COUNT_BLOCK, ROWS=COUNT_ROWS, WORDS=COUNT_WORDS, num_warps=4,
    )  # fmt: skip
    return count


def hidden_grad(g: Tensor, w_dec: Tensor, bits: Tensor, l1_grad: float, gz: Tensor, tiling: Tiling = HIDDEN_GRAD) -> Tensor:
    """gz [B, F] = g [B, d] · w_decᵀ + l1_grad where bits [B, ceil(F / 32)] are set, else 0. Returns its column sums,
    float32 [F]."""
    n_rows, n_cols = gz.shape
    t = tiling
    n_row_tiles = triton.cdiv(n_rows, t.rows)
    partial = torch.empty(n_row_tiles, n_cols, dtype=torch.float32, device=gz.device)
    _run(
        _hidden_grad_kernel, n_row_tiles * triton.cdiv(n_cols, t.cols), t, bits,
        _tiles(g, t.rows, t.depth), _tiles(w_dec, t.cols, t.depth), _tiles(gz, t.rows, t.cols // t.parts),
        partial, float(l1_grad), n_rows, n_cols, g.shape[1], bits.stride(0),
    )  # fmt: skip
    return partial.sum(0)


def _tiles(x: Tensor, rows: int, cols: int) -> Any:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, cols])


def _run(kernel: Any, n_tiles: int, t: Tiling, out: Tensor, *args: Any) -> None:
    processors = torch.cuda.get_device_properties(out.device).multi_processor_count if out.is_cuda else 5
    _launch(
        kernel, (min(n_tiles, processors * t.per_processor),), out, *args,
        ROWS=t.rows, COLS=t.cols, DEPTH=t.depth, PARTS=t.parts, GROUP=t.group,
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip


@triton.jit
def _place(tile: tl.tensor, n_rows: tl.tensor, n_cols: tl.tensor, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of tiles at which the tile-th tile lies."""
    n_row_tiles = tl.cdiv(n_rows, ROWS)
    in_strip = GROUP * tl.cdiv(n_cols, COLS)
    first = tile // in_strip * GROUP
    height = tl.minimum(n_row_tiles - first, GROUP)
    return first + tile % in_strip % height, tile % in_strip // height


@triton.jit
def _product(
    a_tiles: tl.tensor_descriptor, b_tiles: tl.tensor_descriptor, first_row: tl.tensor, first_col: tl.tensor, d: tl.tensor,
    start: tl.tensor, DEPTH: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """start [ROWS, COLS] + a · bᵀ for one tile."""
    total = start
    for k in range(tl.cdiv(d, DEPTH)):
        a = a_tiles.load([first_row, k * DEPTH])
        b = b_tiles.load([first_col, k * DEPTH])
        total = tl.dot(a, b.T, total)
    return total


@triton.jit
def _halves(x: tl.tensor):  # type: ignore[no-untyped-def]
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _strips(x: tl.tensor, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """x cut into 1, 2 or 4 strips of columns, from left to right."""
    if PARTS == 1:
        strips = (x,)
    elif PARTS == 2:
        strips = _halves(x)
    else:
        left, right = _halves(x)
        strips = _halves(left) + _halves(right)
    return strips


@triton.jit
def _rounded(x: tl.tensor, RELU: tl.constexpr):  # type: ignore[no-untyped-def]
    """x, or relu(x), in bf16, and the same in float32. NaN comes through, or a broken run would look merely sparse.

    The compiler rounds two numbers with one instruction only where nothing else looks at either of them, and the one
    for a single number is several times slower; hence the words of its own language.
    """
    if _INTERPRETED:
        narrow = (tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) if RELU else x).to(tl.bfloat16)
        wide = narrow.to(tl.float32)
    else:
        ROUND: tl.constexpr = "cvt.rn.relu.bf16x2.f32" if RELU else "cvt.rn.bf16x2.f32"
        WIDEN: tl.constexpr = " $0, $4, $3; shl.b32 $1, $0, 16; and.b32 $2, $0, 0xffff0000;"
        narrow, wide = tl.inline_asm_elementwise(
            ROUND + WIDEN, "=r,=r,=r,r,r", [x], dtype=(tl.bfloat16, tl.float32), is_pure=True, pack=2
        )
    return narrow, wide


@triton.jit
def _bias(  # type: ignore[no-untyped-def]
    bias_ptr: tl.tensor, tile: tl.tensor, n_rows: tl.tensor, n_cols: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The bias of a tile's columns; those past the end are not to be active."""
    _, col_tile = _place(tile, n_rows, n_cols, ROWS, COLS, GROUP)
    cols = col_tile * COLS + tl.arange(0, COLS)
    return tl.load(bias_ptr + cols, mask=cols < n_cols, other=-float("inf"))


@triton.jit
def _encode_kernel(
    bits_ptr: tl.tensor, x_tiles: tl.tensor_descriptor, w_tiles: tl.tensor_descriptor, z_tiles: tl.tensor_descriptor,
    bias_ptr: tl.tensor, partial_ptr: tl.tensor, n_rows: tl.tensor, n_cols: tl.tensor, d: tl.tensor, bits_stride: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    tl.assume(d > 0)
    n_tiles = tl.cdiv(n_rows, ROWS) * tl.cdiv(n_cols, COLS)
    bias = _bias(bias_ptr, tl.program_id(0), n_rows, n_cols, ROWS, COLS, GROUP)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
        row_tile, col_tile = _place(tile, n_rows, n_cols, ROWS, COLS, GROUP)
        first_row, first_col = row_tile * ROWS, col_tile * COLS
        rows = first_row + tl.arange(0, ROWS)
        start = tl.zeros([ROWS, COLS], dtype=tl.float32)
        h = _product(x_tiles, w_tiles, first_row, first_col, d, start, DEPTH) + bias[None, :]
        # Asked for a tile ahead: nothing overlaps with waiting for it here.
        following = tl.minimum(tile + tl.num_programs(0), n_tiles - 1)
        bias = _bias(bias_ptr, following, n_rows, n_cols, ROWS, COLS, GROUP)

        # A thread's own flags first: feature 32 w + 8 group + 2 lane + side is bit 8 group + side of flags[row, w, lane].
        WIDTH: tl.constexpr = COLS // PARTS
        group, side = tl.arange(0, 4), tl.arange(0, 2)
        bit = 1 << (8 * group[:, None, None] + side[None, None, :])
        nothing = tl.full([], 2.0**-134, tl.float32)  # half of the smallest bf16: up to here it is rounded to 0
        sums = tl.zeros([ROWS], dtype=tl.float32)
        strips = _strips(h, PARTS)
        for i in tl.static_range(PARTS):
            active = tl.reshape(strips[i] > nothing, [ROWS, WIDTH // 32, 4, 4, 2])
            flags = tl.sum(tl.sum(tl.where(active, bit[None, None], 0), axis=4), axis=2)
            z, wide = _rounded(strips[i], True)
            z_tiles.store([first_row, first_col + i * WIDTH], z)
            sums += tl.sum(wide, axis=1)
            words = tl.sum(flags << (2 * tl.arange(0, 4))[None, None, :], axis=2)
            store_bits(bits_ptr, words, rows, first_col + i * WIDTH, n_rows, n_cols, bits_stride, WIDTH)
        tl.store(partial_ptr + tile, tl.sum(tl.where(rows < n_rows, sums, 0.0)))


@triton.jit
def _feature_count_kernel(
    bits_ptr: tl.tensor, count_ptr: tl.tensor, n_rows: tl.tensor, n_words: tl.tensor, n_cols: tl.tensor,
    bits_stride: tl.tensor, BLOCK: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """WORDS columns of words, BLOCK rows. Features 32 w + bit, + 8, + 16 and + 24 count in the bytes of counts[bit, row, w]."""
    tl.static_assert(BLOCK // ROWS < 256, "more rows than a byte can count")
    bit, byte = tl.arange(0, 8)[:, None, None], tl.arange(0, 4)[None, :, None]
    word = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    counts = tl.zeros([8, ROWS, WORDS], dtype=tl.int32)
    for first in tl.range(0, BLOCK, ROWS, num_stages=3):
        rows = tl.program_id(1) * BLOCK + first + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & (word < n_words)[None, :]
        words = tl.load(bits_ptr + rows.to(tl.int64)[:, None] * bits_stride + word[None, :], mask=inside, other=0)
        counts += (words[None] >> bit) & 0x01010101
    total = tl.sum((counts[:, None] >> (8 * byte)[:, :, None]) & 255, axis=2)
    feature = 32 * word[None, None, :] + 8 * byte + bit
    tl.atomic_add(count_ptr + feature, total, mask=feature < n_cols, sem="relaxed")


@triton.jit
def _hidden_grad_kernel(
    bits_ptr: tl.tensor, g_tiles: tl.tensor_descriptor, w_tiles: tl.tensor_descriptor, gz_tiles: tl.tensor_descriptor,
    partial_ptr: tl.tensor, l1_grad: tl.tensor, n_rows: tl.tensor, n_cols: tl.tensor, d: tl.tensor, bits_stride: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    tl.assume(d > 0)
    n_tiles = tl.cdiv(n_rows, ROWS) * tl.cdiv(n_cols, COLS)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
        row_tile, col_tile = _place(tile, n_rows, n_cols, ROWS, COLS, GROUP)
        first_row, first_col = row_tile * ROWS, col_tile * COLS
        rows, word = first_row + tl.arange(0, ROWS), col_tile * (COLS // 32) + tl.arange(0, COLS // 32)
        inside = (rows < n_rows)[:, None] & (word * 32 < n_cols)[None, :]
        words = tl.load(bits_ptr + rows.to(tl.int64)[:, None] * bits_stride + word[None, :], mask=inside, other=0)
        start = tl.zeros([ROWS, COLS], dtype=tl.float32) + l1_grad  # costs nothing here
        gz = _product(g_tiles, w_tiles, first_row, first_col, d, start, DEPTH)

        # As in _encode_kernel: one shift for a thread's 8 columns of 32, then constants.
        group, side = tl.arange(0, 4), tl.arange(0, 2)
        bit = 1 << (8 * group[:, None, None] + side[None, None, :])
        strips, word_strips = _strips(gz, PARTS), _strips(words, PARTS)
        for i in tl.static_range(PARTS):
            shifted = word_strips[i][:, :, None] >> (2 * tl.arange(0, 4))[None, None, :]
            active = tl.reshape((shifted[:, :, None, :, None] & bit[None, None]) != 0, [ROWS, COLS // PARTS])
            rounded, wide = _rounded(tl.where(active, strips[i], 0.0), False)
            cols = first_col + i * (COLS // PARTS) + tl.arange(0, COLS // PARTS)
            gz_tiles.store([first_row, first_col + i * (COLS // PARTS)], rounded)
            sums = tl.sum(wide, axis=0)
            tl.store(partial_ptr + row_tile.to(tl.int64) * n_cols + cols, sums, mask=cols < n_cols)
