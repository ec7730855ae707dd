"""Kernels for CUDA, in Triton. Written for H100, H200 and A100; in TRITON_INTERPRET=1 it runs on CPU tensors, slowly.

Every method moves bytes and does little with them, so the number that matters is bytes over bandwidth. Full size is
B = F = 32,768, d = 1024, bf16, L0 = 150 (4.9M entries). Measured on an H200 whose memory copies at 4.2 TB/s:

    activate_      h 2.15 GB read and written, a bit for every element 0.13 GB             4.4 GB HBM     1.4 ms
    mask_          gz 2.15 GB read and written, the bits                                   4.4 GB HBM     1.25 ms
                   (both only where `triton_products` does not finish the product itself)
    compact        bits 0.13 GB twice, z only where a bit is set (64 bytes each) 0.31 GB,
                   lists written, sorted (0.2 ms) and permuted 0.5 GB                      1.1 GB HBM     0.57 ms
    sparse_residual       2 KB of w_dec for each entry, twice: 20 GB                        8.2 TB/s       2.5 ms
    sparse_weight_grads   2 KB of x and 2 KB of g for each entry: 20 GB                     8.2 TB/s       2 x 1.25 ms
    keep_largest_  z 2.15 GB read three times and written once, the bits (torch: 48 ms)    8.7 GB HBM     3.5 ms
    unfold_        two gradients read and written, two masters read (torch: 1.03 ms)       0.54 GB HBM    0.13 ms
    fold_          two masters read, two copies written (torch: 0.36 ms)                   0.40 GB HBM    0.10 ms
    dense_residual 0.04, centre 0.03, adam_ 28 bytes an element                            3.5 TB/s       0.22 ms a matrix

The two sparse ones are bound by L2 and the instructions around it: narrow tiles of one warp, many at a time, read 8 TB/s where
64 rows by 8 warps read 2. They grow with L0: with features that are all equally frequent a sparse step takes as long as a
dense one at L0 = 380, 1/86 of F. A feature's share of the dense products costs as much as its entries where it fires on
1/69 of the tokens; those that fire more often (FREQUENT) are taken out of the lists.

What they trade:

- The gathers work on one slice of the d columns at a time, all tokens (or features) of a slice before the next slice:
  the slice of the matrix being gathered from (8 or 32 MB) then stays in L2, which the whole matrix would not.
  `sparse_residual` needs each row twice, first to decode and then to pull g back. Keeping the rows in registers meanwhile,
  or taking both products to the tensor cores, was slower (4.3 and 4.7 ms). Paid for with partial dot products, a float for
  each entry and slice.
- Counts come from integer atomics: any order gives the same integers. Every float sum is taken in a fixed order
  (partials in a buffer, added by a second reduction), so two runs of a step agree to the bit.
- A feature can be active on a third of all tokens. Its entries are cut into chunks that separate programs add into a
  float32 workspace of at most 2·nnz / CHUNK rows, and a last kernel adds the chunks up; features of one chunk, most of
  them, go straight to the output.
- Nothing waits for the device. Where a size is known only there, the grid covers the largest it can be and the
  programs left over return at once.

Offsets of the [B, F] matrices and of the entry lists are 64 bits wide: B·F passes 2^31 before it passes the memory.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.launch import launch as _launch
from shared.launch import row_stride as _row_stride
from train.kernels.base import Activation, Active, AdamStep, Frequent, TorchKernels, WeightGrads, Workspace, starts

# Tile shapes: what a program keeps in registers. 16-byte accesses need 8 bf16 columns a thread, so a warp spans 256.
TILE_ROWS, TILE_COLS, TILE_BLOCK = 8, 512, 512  # activate_: a tile, and the rows that one program goes down
PATTERNS = 2**15  # of 16-bit floats that are not negative
SAMPLE = 2**18  # keep_largest_: entries from which it is told where the least of them may lie
HISTOGRAMS = 16  # copies of one histogram, so that programs do not wait for one another's additions
MASK_ROWS, MASK_COLS, MASK_BLOCK = 16, 256, 2048  # mask_: a tile, and the rows one program adds up, tile by tile
RESIDUAL_ELEMENTS = 4096  # centre, dense_residual: elements of a program
WORDS = 1024  # compact: words of 32 features at a time
DECODE_ENTRIES, DECODE_COLS, DECODE_WARPS = 8, 128, 1  # residual: rows gathered at once, and the slice of d
GRAD_ENTRIES, GRAD_COLS, GRAD_WARPS = 2, 512, 1  # weight_grads: the same
CHUNK = 256  # weight_grads: entries of one feature that one program adds up
FREQUENT = 1 / 64  # share of the tokens above which a feature is taken into dense products
FREQUENT_STEP = 64  # their number is rounded up to a multiple of it: sizes that the products like
ADAM_ELEMENTS = 1024  # adam_: elements a program updates, where rows are shorter


@dataclass(kw_only=True, frozen=True, slots=True)
class MarkedActivation(Activation):
    """Also remembers which elements are active, so that `compact` and `mask_` need not read z again to find them."""

    bits: Tensor  # int32 [B, ceil(F / 32)]: bit j of word k stands for feature 32 k + j


class TritonKernels(TorchKernels):
    """What is not here, the dense products, is torch's. bf16, float16 or float32; columns of [B, F] and [B, d] contiguous."""

    sparse_below = 1 / 86

    def centre(self, x: Tensor, b_pre: Tensor, dtype: torch.dtype) -> Tensor:
        n_rows, d = x.shape
        rows, cols = _tile(d)
        out = torch.empty(n_rows, d, dtype=dtype, device=x.device)
        _launch(
            _centre_kernel, (triton.cdiv(n_rows, rows), triton.cdiv(d, cols)),
            x, b_pre, out, n_rows, d, _row_stride(x), ROWS=rows, COLS=cols, num_warps=4,
        )  # fmt: skip
        return out

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

    def dense_residual(self, z: Tensor, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        g = torch.mm(z, w_dec)
        n_rows, d = x.shape
        rows, cols = _tile(d)
        grid = (triton.cdiv(n_rows, rows), triton.cdiv(d, cols))
        squares = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=x.device)
        _launch(
            _dense_residual_kernel, grid,
            g, x, bias, squares, float(scale), n_rows, d, _row_stride(x), ROWS=rows, COLS=cols, num_warps=4,
        )  # fmt: skip
        return g, squares.sum()

    def mask_(self, gz: Tensor, z: Tensor, activation: Activation, l1_grad: float) -> Tensor:
        n_rows, n_cols = gz.shape
        bits = _bits(activation)
        grid = (triton.cdiv(n_cols, MASK_COLS), triton.cdiv(n_rows, MASK_BLOCK))
        partial = torch.empty(grid[1], n_cols, dtype=torch.float32, device=gz.device)
        _launch(
            _mask_kernel, grid,
            gz, bits, partial, float(l1_grad), n_rows, n_cols, _row_stride(gz), bits.stride(0),
            BLOCK=MASK_BLOCK, ROWS=MASK_ROWS, COLS=MASK_COLS, num_warps=8,
        )  # fmt: skip
        return partial.sum(0)

    def counts(self, activation: Activation) -> Tensor:
        frequent = self._frequent(activation)
        rare = torch.where(frequent, 0, activation.feature_count)
        counts = [activation.feature_count.sum(), activation.total, rare.sum(), frequent.sum()]
        return torch.stack([count.double() for count in counts])

    def _frequent(self, activation: Activation) -> Tensor:
        return activation.feature_count > FREQUENT * len(_bits(activation))

    def compact(self, z: Tensor, activation: Activation, nnz: int, n_frequent: int) -> Active:
        n_rows, n_cols = z.shape
        bits = _bits(activation)
        feature_count = activation.feature_count
        frequent, columns, mask, place = None, z, bits[0], feature_count
        if n_frequent:
            flags = self._frequent(activation)
            place = torch.where(flags, flags.cumsum(0, dtype=torch.int32) - 1, -1)
            mask = _packed(~flags)
            feature = torch.sort(flags, stable=True, descending=True).indices[:n_frequent]
            columns = z.new_zeros(n_rows, triton.cdiv(n_frequent, FREQUENT_STEP) * FREQUENT_STEP)
            frequent = Frequent(feature=feature, z=columns)
            feature_count = torch.where(flags, 0, feature_count)
        row_count = torch.empty(n_rows, dtype=torch.int32, device=z.device)
        split = frequent is not None
        _launch(
            _count_kernel, (n_rows,),
            bits, mask, row_count, bits.shape[1], bits.stride(0), SPLIT=split, WORDS=_words(bits), num_warps=4,
        )  # fmt: skip
        row_start = starts(row_count)
        feature = torch.empty(nnz, dtype=torch.int32, device=z.device)
        value = torch.empty(nnz, dtype=torch.float32, device=z.device)
        token = torch.empty(nnz, dtype=torch.int32, device=z.device)
        _launch(
            _compact_kernel, (n_rows,),
            bits, z, row_start, feature, value, token, mask, place, columns, bits.shape[1], bits.stride(0), _row_stride(z),
            columns.stride(0), SPLIT=split, WORDS=_words(bits), num_warps=4,
        )  # fmt: skip
        order = _feature_order(feature, n_cols)
        return Active(
            row_start=row_start,
            feature=feature,
            value=value,
            feature_start=starts(feature_count),
            by_feature=order.int(),
            token=token[order],
            frequent=frequent,
        )

    def sparse_residual(
        self, active: Active, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float, l1_grad: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_rows, d = x.shape
        nnz = active.feature.numel()
        cols = _slice(d, DECODE_COLS)
        n_slices = triton.cdiv(d, cols)
        g = torch.empty(n_rows, d, dtype=w_dec.dtype, device=x.device)
        dots = torch.empty(n_slices, nnz, dtype=torch.float32, device=x.device)
        squares = torch.empty(n_slices * n_rows, dtype=torch.float32, device=x.device)
        often = active.frequent
        if often is not None:
            torch.mm(often.z, _rows(w_dec, often), out=g)
        _launch(
            _residual_kernel, (n_rows, n_slices),
            active.row_start, active.feature, active.value, w_dec, x, bias, g, dots, squares,
            float(scale), float(l1_grad), nnz, d, w_dec.stride(0), w_dec.stride(1), _row_stride(x),
            BEGUN=often is not None, ENTRIES=DECODE_ENTRIES, COLS=cols, num_warps=DECODE_WARPS,
        )  # fmt: skip
        return g, dots[0] if n_slices == 1 else dots.sum(0), squares.sum()

    def sparse_weight_grads(
        self, active: Active, w_dec: Tensor, g: Tensor, xc: Tensor, g_hidden: Tensor, l1_grad: float, out: Workspace
    ) -> WeightGrads:
        plan = _plan(active, g.shape[1])
        db_enc = plan.weighted_sums(xc, g_hidden.index_select(0, active.by_feature), out.dw_enc)
        plan.weighted_sums(g, active.value.index_select(0, active.by_feature), out.dw_dec)
        if (often := active.frequent) is not None:
            gz = torch.mm(g, _rows(w_dec, often).t()).add_(l1_grad)
            gz = torch.ops.aten.threshold_backward(gz, often.z, 0.0)  # 0 where z is
            n = len(often.feature)
            out.dw_enc.index_copy_(0, often.feature, torch.mm(gz.t(), xc)[:n])
            out.dw_dec.index_copy_(0, often.feature, torch.mm(often.z.t(), g)[:n])
            db_enc.index_copy_(0, often.feature, gz.sum(0, dtype=db_enc.dtype)[:n])
        return out.dw_enc, out.dw_dec, db_enc

    def fold_(self, w_enc: Tensor, w_dec: Tensor, enc: Tensor, dec: Tensor) -> Tensor:
        n_rows, d = w_enc.shape
        norms = torch.empty(n_rows, dtype=w_dec.dtype, device=w_dec.device)
        cols = triton.next_power_of_2(d)
        _launch(
            _fold_kernel, (n_rows,),
            w_enc, w_dec, enc, dec, norms, d, _row_stride(w_enc), _row_stride(w_dec), _row_stride(enc), _row_stride(dec),
            COLS=cols, num_warps=min(16, max(1, cols // 256)),
        )  # fmt: skip
        return norms

    def unfold_(
        self, dw_enc: Tensor, dw_dec: Tensor, db_enc: Tensor, w_enc: Tensor, w_dec: Tensor, b_enc: Tensor, norms: Tensor
    ) -> Tensor:
        n_rows, d = w_enc.shape
        out = torch.empty_like(db_enc)
        cols = triton.next_power_of_2(d)
        _launch(
            _unfold_kernel, (n_rows,),
            dw_enc, dw_dec, db_enc, w_enc, w_dec, b_enc, norms, out, d, _row_stride(dw_enc), _row_stride(dw_dec),
            _row_stride(w_enc), _row_stride(w_dec), COLS=cols, num_warps=min(16, max(1, cols // 256)),
        )  # fmt: skip
        return out

    def adam_(
        self,
        w: Tensor,
        m: Tensor,
        v: Tensor,
        grad: Tensor,
        adam: AdamStep,
        *,
        unit_norm: bool = False,
        copy: Tensor | None = None,
    ) -> None:
        if not (w.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
            raise ValueError("adam_ takes contiguous w, m and v")
        n_rows, d = w.shape
        # A norm needs its row in one program; otherwise the widths of a row are independent.
        cols = triton.next_power_of_2(d) if unit_norm else _slice(d, ADAM_ELEMENTS)
        rows = max(1, ADAM_ELEMENTS // cols)
        clip = torch.as_tensor(adam.clip, dtype=torch.float32, device=w.device)
        copy = w if copy is None else copy  # then the same numbers go to the same places twice
        _launch(
            _adam_kernel, (triton.cdiv(n_rows, rows), triton.cdiv(d, cols)),
            w, m, v, grad, copy, clip,
            1 - adam.beta1, adam.beta2, 1 - adam.beta2, 1 / (1 - adam.beta2**adam.step), adam.eps,
            adam.lr / (1 - adam.beta1**adam.step), n_rows, d,
            grad.stride(0), grad.stride(1), copy.stride(0), copy.stride(1),
            UNIT_NORM=unit_norm, ROWS=rows, COLS=cols, num_warps=min(16, max(4, cols // 512)),
        )  # fmt: skip


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
    found = torch.zeros(HISTOGRAMS, PATTERNS, dtype=torch.int32, device=z.device)

    def add(first: Tensor, end: Tensor) -> None:
        grid = (triton.cdiv(n_cols, TILE_COLS), triton.cdiv(n_rows, TILE_BLOCK))
        _launch(
            _histogram_kernel, grid, z, first, end, found, n_rows, n_cols, _row_stride(z),
            COPIES=HISTOGRAMS, PATTERNS=PATTERNS, BLOCK=TILE_BLOCK, ROWS=TILE_ROWS, COLS=TILE_COLS, num_warps=4,
        )  # fmt: skip

    add(first, torch.full_like(first, PATTERNS))
    add(torch.ones_like(first), torch.where(found.sum() < count, first, 0))
    larger = starts(found.sum(0).flip(0))  # how many are above each pattern, from the largest one down
    place = (larger[1:] < count).sum()[None]
    return (PATTERNS - 1 - place).clamp_min(0).int(), larger.index_select(0, place)


@dataclass(kw_only=True, frozen=True, slots=True)
class _Plan:
    """How the entries of every feature are shared out among programs.

    `work` lists a feature for each program: first the chunks of features longer than CHUNK (`n_chunks` of them at most,
    those unused holding F), then every feature once. Long ones first: what starts last should be short.
    """

    active: Active
    work: Tensor  # int32 [n_chunks + F]
    chunk_start: Tensor  # int64 [F+1]: where the chunks of each feature start; short features have none
    n_chunks: int
    sums: Tensor  # float32 [n_chunks, d]
    coefficient_sums: Tensor  # float32 [n_chunks]

    def weighted_sums(self, rows: Tensor, coefficient: Tensor, out: Tensor) -> Tensor:
        """`out` [F, d] = Σ coefficient · rows[token] over the entries of each feature; returns Σ coefficient, float32 [F].

        `coefficient` lists the entries by feature.
        """
        n_features, d = self.active.feature_start.numel() - 1, rows.shape[1]
        total = torch.empty(n_features, dtype=torch.float32, device=rows.device)
        cols = _slice(d, GRAD_COLS)
        _launch(
            _weighted_sum_kernel, (self.work.numel(), triton.cdiv(d, cols)),
            self.work, self.active.feature_start, self.chunk_start, self.active.token, coefficient, rows,
            out, total, self.sums, self.coefficient_sums, self.n_chunks, n_features, d, _row_stride(rows),
            CHUNK=CHUNK, ENTRIES=GRAD_ENTRIES, COLS=cols, num_warps=GRAD_WARPS,
        )  # fmt: skip
        if self.n_chunks:
            _launch(
                _add_chunks_kernel, (n_features,),
                self.chunk_start, self.sums, self.coefficient_sums, out, total, d,
                CHUNKS=8, COLS=cols, num_warps=4,
            )  # fmt: skip
        return total


def _plan(active: Active, d: int) -> _Plan:
    nnz, n_features = active.feature.numel(), active.feature_start.numel() - 1
    device = active.feature.device
    # Σ ceil(n / CHUNK) over features with n > CHUNK, without asking the device: at most nnz / CHUNK whole chunks, and
    # for each such feature one begun.
    n_chunks = nnz // CHUNK + min(n_features, nnz // CHUNK)
    count = active.feature_start.diff()
    chunk_start = starts(torch.where(count > CHUNK, (count + (CHUNK - 1)) // CHUNK, 0))
    work = torch.arange(-n_chunks, n_features, dtype=torch.int32, device=device)
    if n_chunks:
        chunk = torch.arange(n_chunks, device=device)
        work[:n_chunks] = torch.searchsorted(chunk_start, chunk, right=True, out_int32=True) - 1
    return _Plan(
        active=active,
        work=work,
        chunk_start=chunk_start,
        n_chunks=n_chunks,
        sums=torch.empty(n_chunks, d, dtype=torch.float32, device=device),
        coefficient_sums=torch.empty(n_chunks, dtype=torch.float32, device=device),
    )


def _bits(activation: Activation) -> Tensor:
    if not isinstance(activation, MarkedActivation):
        raise TypeError("these kernels take the activation that they made themselves")
    return activation.bits


def _words(bits: Tensor) -> int:
    return int(min(WORDS, triton.next_power_of_2(bits.shape[1])))


def _packed(flags: Tensor) -> Tensor:
    """bool [F] as int32 [ceil(F / 32)], as `MarkedActivation` has its rows."""
    padded = torch.nn.functional.pad(flags, (0, -len(flags) % 32)).view(-1, 32)
    return (padded.long() << torch.arange(32, device=flags.device)).sum(1).int()  # the 32nd bit becomes the sign


def _rows(w_dec: Tensor, frequent: Frequent) -> Tensor:
    """Their rows of w_dec, and zeros for the columns that only round their number up."""
    rows = w_dec.new_zeros(frequent.z.shape[1], w_dec.shape[1])
    rows[: len(frequent.feature)] = w_dec[frequent.feature]
    return rows


def _feature_order(feature: Tensor, n_features: int) -> Tensor:
    """Entries by feature, tokens ascending. A radix sort takes a pass per byte of the key, so the key is short."""
    key = (feature - 2**15).to(torch.int16) if n_features <= 2**16 else feature
    return torch.sort(key, stable=True).indices


def _slice(d: int, most: int) -> int:
    return int(min(most, max(16, triton.next_power_of_2(d))))


def _tile(d: int) -> tuple[int, int]:
    """Rows and columns of a program that has nothing to add up along either."""
    cols = _slice(d, 1024)
    return max(1, RESIDUAL_ELEMENTS // cols), cols


@triton.jit
def _popcount(x: tl.tensor) -> tl.tensor:
    """Bits set in each uint32. Spelt out because the interpreter has no popc; the compiler knows the idiom."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


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
def _store_bits(
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
    _store_bits(bits_ptr, _pack(active, ROWS, COLS), rows, first_col, n_rows, n_cols, bits_stride, COLS)
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
    z_ptr: tl.tensor, first_ptr: tl.tensor, end_ptr: tl.tensor, found_ptr: tl.tensor, n_rows: tl.tensor, n_cols: tl.tensor,
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
    found = found_ptr + (block + tl.program_id(0)) % COPIES * PATTERNS
    for first in range(0, BLOCK, ROWS):
        rows = block * BLOCK + first + tl.arange(0, ROWS)
        inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        z = tl.load(z_ptr + rows.to(tl.int64)[:, None] * z_stride + cols[None, :], mask=inside, other=0.0)
        pattern = _pattern(z)
        # One comparison for both ends; what is not inside is 0, which `first` is not.
        counted = (pattern - start).to(tl.uint32, bitcast=True) < (end - start).to(tl.uint32, bitcast=True)
        tl.atomic_add(found + pattern, 1, mask=counted, sem="relaxed")


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
def _centre_kernel(
    x_ptr: tl.tensor, b_pre_ptr: tl.tensor, out_ptr: tl.tensor, n_rows: tl.tensor, d: tl.tensor, x_stride: tl.tensor,
    ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < n_rows)[:, None] & (cols < d)[None, :]
    wide = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    b_pre = tl.load(b_pre_ptr + cols, mask=cols < d, other=0.0)
    tl.store(out_ptr + wide * d + cols[None, :], (x - b_pre[None, :]).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dense_residual_kernel(
    g_ptr: tl.tensor, x_ptr: tl.tensor, bias_ptr: tl.tensor, squares_ptr: tl.tensor, scale: tl.tensor, n_rows: tl.tensor,
    d: tl.tensor, x_stride: tl.tensor, ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """g comes as z · w_dec and leaves as scale · (x̂ − x)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < n_rows)[:, None] & (cols < d)[None, :]
    wide = rows.to(tl.int64)[:, None]
    at = g_ptr + wide * d + cols[None, :]
    x = tl.load(x_ptr + wide * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < d, other=0.0)
    error = tl.load(at, mask=inside, other=0.0).to(tl.float32) + bias[None, :] - x
    error = tl.where(inside, error, 0.0)  # rows past the end have a bias all the same
    tl.store(squares_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(error * error))
    tl.store(at, (error * scale).to(g_ptr.dtype.element_ty), mask=inside)


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


@triton.jit
def _count_kernel(
    bits_ptr: tl.tensor, mask_ptr: tl.tensor, count_ptr: tl.tensor, n_words: tl.tensor, bits_stride: tl.tensor,
    SPLIT: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """One token: how many bits it has, if they are SPLIT inside the mask."""
    row = tl.program_id(0)
    total = tl.zeros([WORDS], dtype=tl.int32)
    for first in range(0, n_words, WORDS):
        index = first + tl.arange(0, WORDS)
        words = tl.load(bits_ptr + row.to(tl.int64) * bits_stride + index, mask=index < n_words, other=0)
        if SPLIT:
            words &= tl.load(mask_ptr + index, mask=index < n_words, other=0)
        total += _popcount(words.to(tl.uint32))
    tl.store(count_ptr + row, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["bits_stride"])  # aligned loads would give a thread 4 words, and every store a shuffle
def _compact_kernel(
    bits_ptr: tl.tensor, z_ptr: tl.tensor, row_start_ptr: tl.tensor, feature_ptr: tl.tensor, value_ptr: tl.tensor,
    token_ptr: tl.tensor, mask_ptr: tl.tensor, place_ptr: tl.tensor, columns_ptr: tl.tensor, n_words: tl.tensor,
    bits_stride: tl.tensor, z_stride: tl.tensor, columns_stride: tl.tensor, SPLIT: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """One token. Every word takes its lowest bit off at each turn, so there are as many turns as the fullest word has
    bits (two or three at L0 = 150), not 32. What the mask leaves out goes to its place among the frequent columns."""
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    base = tl.load(row_start_ptr + row)
    for first in range(0, n_words, WORDS):
        index = first + tl.arange(0, WORDS)
        words = tl.load(bits_ptr + wide * bits_stride + index, mask=index < n_words, other=0).to(tl.uint32)
        often = words
        if SPLIT:
            words &= tl.load(mask_ptr + index, mask=index < n_words, other=0).to(tl.uint32)
            often ^= words
        count = _popcount(words)
        at = base + tl.cumsum(count, axis=0) - count
        base += tl.sum(count, axis=0)
        for _ in range(tl.max(count, axis=0)):
            left = words != 0
            rest = words & (words - 1)
            feature = index * 32 + _popcount((words ^ rest) - 1)
            value = tl.load(z_ptr + wide * z_stride + feature, mask=left, other=0.0)
            tl.store(feature_ptr + at, feature, mask=left)
            tl.store(value_ptr + at, value.to(tl.float32), mask=left)
            tl.store(token_ptr + at, row, mask=left)
            words = rest
            at += 1
        if SPLIT:
            for _ in range(tl.max(_popcount(often), axis=0)):
                left = often != 0
                rest = often & (often - 1)
                feature = index * 32 + _popcount((often ^ rest) - 1)
                value = tl.load(z_ptr + wide * z_stride + feature, mask=left, other=0.0)
                place = tl.load(place_ptr + feature, mask=left, other=0)
                tl.store(columns_ptr + wide * columns_stride + place, value, mask=left)
                often = rest


@triton.jit
def _residual_kernel(
    row_start_ptr: tl.tensor, feature_ptr: tl.tensor, value_ptr: tl.tensor, w_ptr: tl.tensor, x_ptr: tl.tensor,
    bias_ptr: tl.tensor, g_ptr: tl.tensor, dots_ptr: tl.tensor, squares_ptr: tl.tensor, scale: tl.tensor,
    l1_grad: tl.tensor, nnz: tl.tensor, d: tl.tensor, w_stride: tl.tensor, w_col_stride: tl.tensor, x_stride: tl.tensor,
    BEGUN: tl.constexpr, ENTRIES: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """One token and one slice of the columns. Tokens vary fastest: see the opening about L2. If the reconstruction is BEGUN,
    g comes with what the frequent features gave."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    cols = part * COLS + tl.arange(0, COLS)
    inside = cols < d
    w_cols = cols.to(tl.int64)[None, :] * w_col_stride
    start = tl.load(row_start_ptr + row)
    end = tl.load(row_start_ptr + row + 1)

    # The next features are asked for before this turn's rows, else each turn would wait for memory twice.
    total = tl.zeros([ENTRIES, COLS], dtype=tl.float32)
    entry = start + tl.arange(0, ENTRIES)
    feature = tl.load(feature_ptr + entry, mask=entry < end, other=0)
    value = tl.load(value_ptr + entry, mask=entry < end, other=0.0)
    for _ in range(start, end, ENTRIES):
        mask = (entry < end)[:, None] & inside[None, :]
        at = feature.to(tl.int64)[:, None] * w_stride + w_cols
        entry += ENTRIES
        feature = tl.load(feature_ptr + entry, mask=entry < end, other=0)
        rows = tl.load(w_ptr + at, mask=mask, other=0.0)
        total += rows.to(tl.float32) * value[:, None]
        value = tl.load(value_ptr + entry, mask=entry < end, other=0.0)

    x = tl.load(x_ptr + row.to(tl.int64) * x_stride + cols, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0)
    error = bias - x + tl.sum(total, axis=0)
    g_at = g_ptr + row.to(tl.int64) * d + cols
    if BEGUN:
        error += tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(squares_ptr + part * tl.num_programs(0) + row, tl.sum(error * error, axis=0))
    g = (error * scale).to(g_ptr.dtype.element_ty)
    tl.store(g_at, g, mask=inside)

    rounded = g.to(tl.float32)  # the gradient that everything downstream sees is the rounded one
    once = tl.where(part == 0, l1_grad, 0.0)
    for first in range(start, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        feature = tl.load(feature_ptr + entry, mask=entry < end, other=0)
        mask = (entry < end)[:, None] & inside[None, :]
        at = feature.to(tl.int64)[:, None] * w_stride + w_cols
        rows = tl.load(w_ptr + at, mask=mask, other=0.0)
        dot = tl.sum(rows.to(tl.float32) * rounded[None, :], axis=1) + once
        tl.store(dots_ptr + part.to(tl.int64) * nnz + entry, dot, mask=entry < end)


@triton.jit
def _weighted_sum_kernel(
    work_ptr: tl.tensor, feature_start_ptr: tl.tensor, chunk_start_ptr: tl.tensor, token_ptr: tl.tensor,
    coefficient_ptr: tl.tensor, rows_ptr: tl.tensor, out_ptr: tl.tensor, total_ptr: tl.tensor, sums_ptr: tl.tensor,
    coefficient_sums_ptr: tl.tensor, n_chunks: tl.tensor, n_features: tl.tensor, d: tl.tensor, stride: tl.tensor,
    CHUNK: tl.constexpr, ENTRIES: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """One feature, or one chunk of a long one, and one slice of the columns. Features vary fastest."""
    program = tl.program_id(0)
    feature = tl.load(work_ptr + program)
    if feature >= n_features:
        return  # there are fewer chunks than there could be
    start = tl.load(feature_start_ptr + feature)
    end = tl.load(feature_start_ptr + feature + 1)
    is_chunk = program < n_chunks
    if (end - start > CHUNK) & (program >= n_chunks):
        return  # its chunks have programs of their own
    if is_chunk:
        start += (program - tl.load(chunk_start_ptr + feature)) * CHUNK
    end = tl.minimum(end, start + CHUNK)

    part = tl.program_id(1)
    cols = part * COLS + tl.arange(0, COLS)
    inside = cols < d
    total = tl.zeros([ENTRIES, COLS], dtype=tl.float32)
    coefficients = tl.zeros([ENTRIES], dtype=tl.float32)
    entry = start + tl.arange(0, ENTRIES)
    token = tl.load(token_ptr + entry, mask=entry < end, other=0)
    coefficient = tl.load(coefficient_ptr + entry, mask=entry < end, other=0.0)
    for _ in range(start, end, ENTRIES):  # as in _residual_kernel, the next tokens before these rows
        mask = (entry < end)[:, None] & inside[None, :]
        at = token.to(tl.int64)[:, None] * stride + cols[None, :]
        entry += ENTRIES
        token = tl.load(token_ptr + entry, mask=entry < end, other=0)
        rows = tl.load(rows_ptr + at, mask=mask, other=0.0)
        total += rows.to(tl.float32) * coefficient[:, None]
        coefficients += coefficient
        coefficient = tl.load(coefficient_ptr + entry, mask=entry < end, other=0.0)

    column_sums = tl.sum(total, axis=0)
    coefficient_sum = tl.sum(coefficients, axis=0)
    if is_chunk:
        tl.store(sums_ptr + program.to(tl.int64) * d + cols, column_sums, mask=inside)
        tl.store(coefficient_sums_ptr + program, coefficient_sum, mask=part == 0)
    else:
        tl.store(out_ptr + feature.to(tl.int64) * d + cols, column_sums.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(total_ptr + feature, coefficient_sum, mask=part == 0)


@triton.jit
def _add_chunks_kernel(
    chunk_start_ptr: tl.tensor, sums_ptr: tl.tensor, coefficient_sums_ptr: tl.tensor, out_ptr: tl.tensor,
    total_ptr: tl.tensor, d: tl.tensor, CHUNKS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """One feature, all columns; most find no chunk and return."""
    feature = tl.program_id(0)
    start = tl.load(chunk_start_ptr + feature)
    end = tl.load(chunk_start_ptr + feature + 1)
    if start == end:
        return
    coefficients = tl.zeros([CHUNKS], dtype=tl.float32)
    for first in range(start, end, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        coefficients += tl.load(coefficient_sums_ptr + chunk, mask=chunk < end, other=0.0)
    tl.store(total_ptr + feature, tl.sum(coefficients, axis=0))
    for first_col in range(0, d, COLS):
        cols = first_col + tl.arange(0, COLS)
        total = tl.zeros([CHUNKS, COLS], dtype=tl.float32)
        for first in range(start, end, CHUNKS):
            chunk = first + tl.arange(0, CHUNKS)
            mask = (chunk < end)[:, None] & (cols < d)[None, :]
            total += tl.load(sums_ptr + chunk[:, None] * d + cols[None, :], mask=mask, other=0.0)
        out = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + feature.to(tl.int64) * d + cols, out, mask=cols < d)


@triton.jit
def _fold_kernel(
    w_enc_ptr: tl.tensor, w_dec_ptr: tl.tensor, enc_ptr: tl.tensor, dec_ptr: tl.tensor, norms_ptr: tl.tensor, d: tl.tensor,
    w_enc_stride: tl.tensor, w_dec_stride: tl.tensor, enc_stride: tl.tensor, dec_stride: tl.tensor, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """One feature."""
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    cols = tl.arange(0, COLS)
    inside = cols < d
    w_enc = tl.load(w_enc_ptr + wide * w_enc_stride + cols, mask=inside, other=0.0)
    w_dec = tl.load(w_dec_ptr + wide * w_dec_stride + cols, mask=inside, other=0.0)
    norm = tl.maximum(tl.sqrt(tl.sum(w_dec * w_dec, axis=0)), 1e-12)
    tl.store(enc_ptr + wide * enc_stride + cols, (w_enc * norm).to(enc_ptr.dtype.element_ty), mask=inside)
    tl.store(dec_ptr + wide * dec_stride + cols, (w_dec / norm).to(dec_ptr.dtype.element_ty), mask=inside)
    tl.store(norms_ptr + row, norm)


@triton.jit
def _unfold_kernel(
    dw_enc_ptr: tl.tensor, dw_dec_ptr: tl.tensor, db_enc_ptr: tl.tensor, w_enc_ptr: tl.tensor, w_dec_ptr: tl.tensor,
    b_enc_ptr: tl.tensor, norms_ptr: tl.tensor, out_ptr: tl.tensor, d: tl.tensor, dw_enc_stride: tl.tensor,
    dw_dec_stride: tl.tensor, w_enc_stride: tl.tensor, w_dec_stride: tl.tensor, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """One feature."""
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    cols = tl.arange(0, COLS)
    inside = cols < d
    dw_enc_at = dw_enc_ptr + wide * dw_enc_stride + cols
    dw_dec_at = dw_dec_ptr + wide * dw_dec_stride + cols
    dw_enc = tl.load(dw_enc_at, mask=inside, other=0.0).to(tl.float32)
    dw_dec = tl.load(dw_dec_at, mask=inside, other=0.0).to(tl.float32)
    w_enc = tl.load(w_enc_ptr + wide * w_enc_stride + cols, mask=inside, other=0.0)
    w_dec = tl.load(w_dec_ptr + wide * w_dec_stride + cols, mask=inside, other=0.0)
    norm = tl.load(norms_ptr + row)
    db_enc = tl.load(db_enc_ptr + row)

    unit = w_dec / norm
    by_norm = tl.sum(w_enc * dw_enc, axis=0) + tl.load(b_enc_ptr + row) * db_enc
    new = dw_dec / norm + unit * (by_norm - tl.sum(unit * dw_dec, axis=0) / norm)
    tl.store(dw_dec_at, new.to(dw_dec_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_enc_at, (dw_enc * norm).to(dw_enc_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + row, db_enc * norm)


@triton.jit
def _adam_kernel(
    w_ptr: tl.tensor, m_ptr: tl.tensor, v_ptr: tl.tensor, grad_ptr: tl.tensor, copy_ptr: tl.tensor, clip_ptr: tl.tensor,
    one_minus_beta1: tl.tensor, beta2: tl.tensor, one_minus_beta2: tl.tensor, v_correction: tl.tensor, eps: tl.tensor,
    rate: tl.tensor, n_rows: tl.tensor, d: tl.tensor, grad_stride: tl.tensor, grad_col_stride: tl.tensor,
    copy_stride: tl.tensor, copy_col_stride: tl.tensor,
    UNIT_NORM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    clip = tl.load(clip_ptr)
    if clip != clip:
        return  # not finite: nothing is changed
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (rows < n_rows)[:, None] & (cols < d)[None, :]
    wide_row = rows.to(tl.int64)[:, None]
    wide_col = cols.to(tl.int64)[None, :]
    at = wide_row * d + wide_col
    grad = tl.load(grad_ptr + wide_row * grad_stride + wide_col * grad_col_stride, mask=inside, other=0.0)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    w = tl.load(w_ptr + at, mask=inside, other=0.0)

    g = grad.to(tl.float32) * clip
    m += one_minus_beta1 * (g - m)
    v = v * beta2 + one_minus_beta2 * g * g
    w -= rate * m / (tl.sqrt(v * v_correction) + eps)
    if UNIT_NORM:
        norm = tl.sqrt(tl.sum(w * w, axis=1))
        w = w / tl.maximum(norm, 1e-12)[:, None]

    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)
    tl.store(w_ptr + at, w, mask=inside)
    copy_at = copy_ptr + wide_row * copy_stride + wide_col * copy_col_stride
    tl.store(copy_at, w.to(copy_ptr.dtype.element_ty), mask=inside)
