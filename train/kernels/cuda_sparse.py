"""A sparse step along the lists of active entries on CUDA: the residual, and the gradients of the weights.

Both are bound by L2 and the instructions around it, where narrow tiles of one warp, many at a time, read fastest; they grow
with L0. What they trade:

- The gathers work on one slice of the d columns at a time, all tokens (or features) of a slice before the next slice:
  the slice of the matrix being gathered from then stays in L2, which the whole matrix would not. `sparse_residual` needs
  each row twice, first to decode and then to pull g back. Paid for with partial dot products, a float for each entry and slice.
- A feature can be active on a third of all tokens. Its entries are cut into chunks that separate programs add into a
  float32 workspace of at most 2·nnz / CHUNK rows, and a last kernel adds the chunks up; features of one chunk, most of
  them, go straight to the output.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_saes.shared.launch import launch as _launch
from residual_saes.shared.launch import row_stride as _row_stride
from residual_saes.train.kernels.base import Active, Frequent, TorchKernels, WeightGrads, Workspace, starts
from residual_saes.train.kernels.cuda_rows import slice_of

DECODE_ENTRIES, DECODE_COLS, DECODE_WARPS = 8, 128, 1  # residual: rows gathered at once, and the slice of d
GRAD_ENTRIES, GRAD_COLS, GRAD_WARPS = 2, 512, 1  # weight_grads: the same
CHUNK = 256  # weight_grads: entries of one feature that one program adds up


class SparseKernels(TorchKernels):
    def sparse_residual(
        self, active: Active, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float, l1_grad: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n_rows, d = x.shape
        nnz = active.feature.numel()
        cols = slice_of(d, DECODE_COLS)
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
        xc = xc.repeat_interleave(len(g) // len(xc), 0) if len(g) != len(xc) else xc
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
        cols = slice_of(d, GRAD_COLS)
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


def _rows(w_dec: Tensor, frequent: Frequent) -> Tensor:
    """Their rows of w_dec, and zeros for the columns that only round their number up."""
    rows = w_dec.new_zeros(frequent.z.shape[1], w_dec.shape[1])
    rows[: len(frequent.feature)] = w_dec[frequent.feature]
    return rows


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
