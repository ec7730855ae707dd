"""Kernels for CPUs: bfloat16 matrices, float32 arithmetic; loops are in kernels.c and choose.c, AMX products in amx.c."""

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from residual_saes.shared.compile import arguments, cpu_flags, load
from residual_saes.train.kernels.base import (
    Activation,
    Active,
    AdamStep,
    Near,
    TorchKernels,
    WeightGrads,
    Workspace,
    starts,
)

_AMX_SIDE = 32  # sizes must be multiples of it: two tiles
_PATTERNS = 1 << 15  # of the bits of numbers that are not negative, which are in the numbers' order
_SAMPLE = 1 << 16
_SUM_PARTS = 1024  # of a sum of squares: float32 within a part, float64 over the parts


def load_native() -> "NativeKernels | None":
    """None where the C file cannot be compiled."""
    here = Path(__file__)
    library, choose = load(here.with_name("kernels.c")), load(here.with_name("choose.c"))
    if library is None or choose is None:
        return None
    amx = load(here.with_name("amx.c")) if "amx_bf16" in cpu_flags() else None
    return AmxKernels(library, choose, amx) if amx is not None and amx.amx_allowed() else NativeKernels(library, choose)


@dataclass(kw_only=True, frozen=True, slots=True)
class RowActivation(Activation):
    """Also knows where each token's entries will begin, so that `compact` need not count them."""

    row_count: Tensor  # int64 [B]: active features of each token


def _activation(token_counts: Tensor, feature_count: Tensor, feature_total: Tensor) -> RowActivation:
    """Of what the C functions count: active features [threads, B], and active tokens and sum of each feature, [F]."""
    total = feature_total.sum(dtype=torch.float64)
    return RowActivation(row_count=token_counts.sum(0), feature_count=feature_count, total=total)


class NativeKernels(TorchKernels):
    """Matrices are contiguous bfloat16, the hidden layer feature-major; see `kernels.TorchKernels` for the rest."""

    feature_major = True
    features_at_once = 4096  # a part that stays in cache: the two products that use it take 113 ms instead of 146

    def __init__(self, library: ctypes.CDLL, choose: ctypes.CDLL) -> None:
        self._c, self._choose = library, choose

    @property
    def _threads(self) -> int:
        """Of the next parallel loop: whoever sets another number of threads sets it for this library too."""
        return int(self._c.omp_get_max_threads())

    def activate_(self, h: Tensor, bias: Tensor) -> Activation:
        tokens, features = h.shape
        token_counts = torch.zeros(self._threads, tokens, dtype=torch.int32)
        feature_count = torch.empty(features, dtype=torch.int32)
        feature_total = torch.empty_like(bias)
        self._c.activate(*arguments(_hidden(h), bias, token_counts, feature_count, feature_total, tokens, features))
        return _activation(token_counts, feature_count, feature_total)

    def keep_largest_(self, z: Tensor, count: int) -> tuple[Activation, Tensor]:
        tokens, features = z.shape
        hidden, equal = _hidden(z), torch.empty(features, dtype=torch.int64)
        least, above = self._least(hidden, count)
        self._choose.equal(*arguments(hidden, least, equal, tokens, features))
        room = count - above - (equal.cumsum(0) - equal)
        token_counts = torch.zeros(self._threads, tokens, dtype=torch.int32)
        counts = (token_counts, torch.empty(features, dtype=torch.int32), torch.empty(features))
        self._choose.keep(*arguments(hidden, least, room, *counts, tokens, features))
        return _activation(*counts), torch.tensor(least, dtype=torch.int16).view(torch.bfloat16)

    def _least(self, hidden: Tensor, count: int) -> tuple[int, int]:
        """The bit pattern of the count-th largest number, 0 if so many are not above 0, and how many are larger.

        A sample says below which patterns nobody need look: counting those that are above 0, mostly many more, takes four times
        as long."""
        n = hidden.numel()
        sample = hidden.view(-1)[:: max(1, n // _SAMPLE)].view(torch.int16).int()
        expected = sample.numel() * count / n
        rank = min(sample.numel(), math.ceil(expected + 4 * math.sqrt(expected) + 4))
        for first in (max(1, int(sample.topk(rank).values[-1])), 1):
            histogram = torch.zeros(self._threads, _PATTERNS, dtype=torch.int32)
            self._choose.histogram(*arguments(hidden, histogram, first, n))
            at_least = histogram.sum(0).flip(0).cumsum(0)  # from the largest pattern down
            if at_least[-1] >= count:
                place = int(torch.searchsorted(at_least, count))
                return _PATTERNS - 1 - place, int(at_least[place - 1]) if place else 0
        return 0, int(at_least[-1])

    def jump_(self, z: Tensor, low: Tensor, threshold: Tensor, high: Tensor) -> tuple[Activation, Near]:
        tokens, features = z.shape
        hidden, near = _hidden(z), torch.empty(features, dtype=torch.int64)
        self._choose.near(*arguments(hidden, low, high, near, tokens, features))
        start = starts(near)
        token, feature = torch.empty(int(start[-1]), dtype=torch.int64), torch.arange(features)
        token_counts = torch.zeros(self._threads, tokens, dtype=torch.int32)
        counts = (token_counts, torch.empty(features, dtype=torch.int32), torch.empty(features))
        self._choose.jump(*arguments(hidden, low, threshold, high, start, token, *counts, tokens, features))
        return _activation(*counts), Near(token=token, feature=feature.repeat_interleave(near))

    def mask_(self, gz: Tensor, z: Tensor, activation: Activation, l1_grad: float) -> Tensor:
        tokens, features = z.shape
        sums = torch.empty(features)
        self._c.mask(*arguments(_hidden(gz), _hidden(z), l1_grad, sums, tokens, features))
        return sums

    def compact(self, z: Tensor, activation: Activation, nnz: int, n_frequent: int) -> Active:
        tokens, features = z.shape
        assert isinstance(activation, RowActivation)
        active = Active(
            row_start=starts(activation.row_count),
            feature=torch.empty(nnz, dtype=torch.int32),
            value=torch.empty(nnz),
            feature_start=starts(activation.feature_count),
            by_feature=torch.empty(nnz, dtype=torch.int32),
            token=torch.empty(nnz, dtype=torch.int32),
        )
        a, listed = active, torch.empty(nnz)
        lists = (a.row_start, a.feature_start, a.feature, a.value, a.by_feature, a.token, listed)
        self._c.compact(*arguments(_hidden(z), *lists, tokens, features, self._threads))
        return active

    def sparse_residual(
        self, active: Active, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float, l1_grad: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, d = x.shape
        g = torch.empty(tokens, d, dtype=torch.bfloat16)
        g_hidden, row_square = torch.empty_like(active.value), torch.empty(tokens)
        lists = (active.row_start, active.feature, active.value)
        x = x.float().contiguous()
        self._c.residual(*arguments(*lists, _matrix(w_dec), x, bias, scale, l1_grad, g, g_hidden, row_square, tokens, d))
        return g, g_hidden, row_square.sum(dtype=torch.float64)

    def nested_residual(
        self, active: Active, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float, l1_grad: float, n: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, d = x.shape
        g = torch.empty(tokens, n, d, dtype=torch.bfloat16)
        g_hidden, square = torch.empty_like(active.value), torch.empty(tokens, n)
        lists, x = (active.row_start, active.feature, active.value), x.float().contiguous()
        self._c.nested_residual(*arguments(*lists, _matrix(w_dec), x, bias, scale, l1_grad, g, g_hidden, square, tokens, n, d))
        return g, g_hidden, square.sum(0, dtype=torch.float64)

    def dots(self, row_start: Tensor, index: Tensor, rows: Tensor, others: Tensor) -> Tensor:
        out, index = torch.empty(len(index)), index.int()
        self._c.dots(*arguments(row_start, index, _matrix(rows), _matrix(others), out, *rows.shape))
        return out

    def sparse_weight_grads(
        self, active: Active, w_dec: Tensor, g: Tensor, xc: Tensor, g_hidden: Tensor, l1_grad: float, out: Workspace
    ) -> WeightGrads:
        features, d = out.dw_enc.shape
        db_enc = torch.empty(features)
        row_of_xc = active.token if len(g) == len(xc) else active.token // (len(g) // len(xc))
        lists = (active.feature_start, active.by_feature, active.token, row_of_xc, active.value, g_hidden)
        results = (out.dw_enc, out.dw_dec, db_enc)
        self._c.weight_grads(*arguments(*lists, _matrix(g), _matrix(xc), *results, features, d))
        return results

    def unfold_(
        self, dw_enc: Tensor, dw_dec: Tensor, db_enc: Tensor, w_enc: Tensor, w_dec: Tensor, b_enc: Tensor, norms: Tensor
    ) -> Tensor:
        gradients = (_matrix(dw_enc), _matrix(dw_dec), db_enc)
        self._c.unfold(*arguments(*gradients, w_enc, w_dec, b_enc, norms, *w_enc.shape))
        return db_enc

    def square_sum(self, x: Tensor) -> Tensor:
        partial = torch.empty(min(_SUM_PARTS, x.numel()), dtype=torch.float64)
        self._c.squares(*arguments(_matrix(x), partial, x.numel(), partial.numel()))
        return partial.sum()

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
        if copy is None:  # the biases
            super().adam_(w, m, v, grad, adam, unit_norm=unit_norm)
            return
        if math.isnan(clip := float(adam.clip)):
            return
        lr, inverse_correction2 = adam.lr / (1 - adam.beta1**adam.step), 1 / (1 - adam.beta2**adam.step)
        scalars = (lr, clip, adam.beta1, adam.beta2, inverse_correction2, adam.eps)
        shape = (*w.shape, int(unit_norm))
        self._c.adam(*arguments(w, m, v, _matrix(grad), _matrix(copy), *shape), *arguments(*map(float, scalars)))


class AmxKernels(NativeKernels):
    """Dense products by amx.c where the sizes are multiples of 32, by torch otherwise."""

    def __init__(self, library: ctypes.CDLL, choose: ctypes.CDLL, amx: ctypes.CDLL) -> None:
        super().__init__(library, choose)
        self._amx = amx

    def encode(self, xc: Tensor, w_enc: Tensor, bias: Tensor, out: Workspace) -> tuple[Tensor, Activation]:
        tokens, features, d = len(xc), *w_enc.shape
        if not _fits(tokens, features, d):
            return super().encode(xc, w_enc, bias, out)
        z = out.z(tokens, feature_major=True)
        token_counts = torch.zeros(self._threads, tokens, dtype=torch.int32)
        feature_count = torch.zeros(features, dtype=torch.int32)
        totals = torch.zeros(self._threads, dtype=torch.float64)
        matrices = (_matrix(w_enc), _matrix(xc), bias, _hidden(z))
        self._amx.amx_encode(*arguments(*matrices, feature_count, token_counts, totals, tokens, features, d))
        return z, RowActivation(row_count=token_counts.sum(0), feature_count=feature_count, total=totals.sum())

    def dense_residual(self, z: Tensor, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        tokens, features, d = *z.shape, x.shape[1]
        if not _fits(tokens, features, d):
            return super().dense_residual(z, w_dec, x, bias, scale)
        g, row_square = torch.empty(tokens, d, dtype=torch.bfloat16), torch.empty(tokens)
        x = x.float().contiguous()
        self._amx.amx_decode(*arguments(_matrix(w_dec), _hidden(z), x, bias, scale, g, row_square, tokens, features, d))
        return g, row_square.sum(dtype=torch.float64)

    def dense_weight_grads(
        self, z: Tensor, activation: Activation, w_dec: Tensor, g: Tensor, xc: Tensor, l1_grad: float, out: Workspace
    ) -> WeightGrads:
        tokens, features, d = *z.shape, xc.shape[1]
        if not _fits(tokens, features, d):
            return super().dense_weight_grads(z, activation, w_dec, g, xc, l1_grad, out)
        results = (out.dw_enc, out.dw_dec, torch.empty(features))
        matrices = (_matrix(w_dec), _hidden(z), _matrix(g), _matrix(xc))
        self._amx.amx_weight_grads(*arguments(*matrices, l1_grad, *results, tokens, features, d))
        return results


def _fits(*sizes: int) -> bool:
    return all(size % _AMX_SIDE == 0 for size in sizes)


def _matrix(x: Tensor) -> Tensor:
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous()
    return x


def _hidden(z: Tensor) -> Tensor:
    """A feature-major [B, F] view as the [F, B] matrix that lies in memory."""
    return _matrix(z.t())
