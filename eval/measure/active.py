"""The activations of an SAE on some rows, as a list of the active entries where these are few.

What is counted, summed and reconstructed along a list passes over [n, F] no more. On a GPU the encoder's product in float32 is
what is left, so there it is not taken either: a product in float16, on tensor cores, finds the entries that can be active at
all, and these alone are computed in float32. That none is missed is proven, not hoped. For a row x of float32, in any scale,
and a unit row w of the encoder let X and W be what float16 makes of them. Then by Cauchy and Schwarz

    |X·W − x·w| = |(X − x)·W + x·(W − w)| ≤ ‖X − x‖ ‖W‖ + ‖x‖ ‖W − w‖,

and these norms are measured, not bounded. Two sums of d products, one on tensor cores, which cut off where others round (Fasi,
Higham, Mikaitis & Pranesh 2021), the other the SAE's own in float32, are wrong by less than 2^-23 and 2^-24 d ‖x‖ ‖w‖; twice
2^-23 d allows for what is computed of norms and thresholds, too. The sum of all that is a row's margin. It is added to the
product as one more column; rounding keeps the order, so an entry that is below its threshold even then cannot be active.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from residual_saes.shared.runs.sae import Sae

_FEW = {"cpu": 1 / 12, "cuda": 1 / 32}  # share of entries up to which lists are quicker (docs/findings/evaluation.md)
_GATHERED = 1 << 14  # rows of a matrix held at once
_LARGEST = 14  # exponent of the largest value in float16, whose own is 15
_STEP = 2.0**-10  # of two neighbours in float16, relative; what is added is at least a half
_LEAST = 2.0**-24  # float16's smallest value


class Counted(NamedTuple):
    """What is summed up of some rows."""

    fired: Tensor  # [F]: in how many rows each feature is active
    sum: Tensor  # [F]
    square: Tensor  # [F]
    active: Tensor  # [n]: how many entries of each row are


@dataclass(frozen=True, slots=True)
class Dense:
    """z, where many entries are active."""

    z: Tensor  # float32 [n, F]

    def entries(self) -> tuple[Tensor, Tensor]:
        row, feature = self.z.nonzero().unbind(1)
        return row, feature

    def counted(self) -> Counted:
        """Counts are exact in float32; sums over the rows are rounded to it."""
        on = (self.z > 0).float()
        fired, active = on.sum(0), on.sum(1)
        return Counted(fired, self.z.sum(0), torch.square(self.z, out=on).sum(0), active)

    def decoded(self, w_dec: Tensor) -> Tensor:
        """z W_dec, float32 [n, d]."""
        return self.z @ w_dec


@dataclass(frozen=True, slots=True)
class Listed:
    """The same from the entries that are active."""

    start: Tensor  # int64 [n + 1]: where each row begins
    row: Tensor  # int64, ascending
    feature: Tensor  # int64
    value: Tensor  # float32
    features: int

    @classmethod
    def of(cls, row: Tensor, feature: Tensor, value: Tensor, rows: int, features: int) -> "Listed":
        start = torch.searchsorted(row, torch.arange(rows + 1, device=row.device))
        return cls(start, row, feature, value, features)

    def entries(self) -> tuple[Tensor, Tensor]:
        return self.row, self.feature

    def counted(self) -> Counted:
        """In float64, in which the order of a sum does not matter to what is kept of it."""
        wide = self.value.double()
        fired, total, square = (
            wide.new_zeros(self.features).index_add_(0, self.feature, of) for of in (torch.ones_like(wide), wide, wide.square())
        )
        return Counted(fired, total, square, self.start.diff())

    def decoded(self, w_dec: Tensor) -> Tensor:
        if w_dec.is_cuda:
            from residual_saes.eval.measure import active_cuda

            return active_cuda.weighted_rows(self.start, self.feature, self.value, w_dec)
        return embedding_bag(
            self.feature, w_dec, self.start, mode="sum", per_sample_weights=self.value, include_last_offset=True
        )


class Encoder:
    """An SAE's encoder. Whether there are many active entries is settled by the first rows that it is given."""

    def __init__(self, sae: Sae, finder: "Finder | None" = None) -> None:
        """On a GPU a `finder` is made where the SAE's weights are numbers, of which alone it can tell anything."""
        self._sae, self._listed, self._finder = sae, True, finder
        if finder is None and sae.w_enc.is_cuda and all(bool(t.isfinite().all()) for t in sae.tensors().values()):
            self._finder = Finder(sae)

    def __call__(self, x: Tensor) -> Dense | Listed:
        """x float32 [n, d] → z."""
        if self._listed and self._finder is not None:
            row, feature, value = self._finder.active(x)
        else:
            z = self._sae.encode(x)
            if not self._listed:
                return Dense(z)
            row, feature = z.nonzero().unbind(1)
            value = z[row, feature]
        n, features = len(x), len(self._sae.b_enc)
        self._listed = len(row) <= _FEW[x.device.type] * n * features
        return Listed.of(row.contiguous(), feature.contiguous(), value, n, features)

    def matrix(self, x: Tensor) -> Tensor:
        """x float32 [n, d] → z [n, F], whatever part of it is active."""
        z = Dense(self._sae.encode(x)) if self._finder is None else self(x)
        if isinstance(z, Dense):
            return z.z
        matrix = x.new_zeros(len(x), z.features)
        matrix[z.row, z.feature] = z.value
        return matrix

    def reconstruct(self, x: Tensor) -> Tensor:
        """x float32 [..., d] → x̂."""
        flat = x.flatten(0, -2)
        return self._sae.completed(flat, self(flat).decoded(self._sae.w_dec)).view(*x.shape[:-1], -1)


class Finder:
    """Of the entries of z those that are active, found in float16 and computed in float32, as this module opens with."""

    def __init__(self, sae: Sae) -> None:
        """Of finite weights."""
        norm = torch.linalg.vector_norm(sae.w_enc, dim=1, dtype=torch.float64).clamp(min=1e-30)
        unit = (sae.w_enc / norm[:, None]).float()
        narrow = unit.half()
        self._sae, self._norm = sae, norm.float()
        self._least = torch.zeros_like(sae.b_enc) if sae.threshold is None else sae.threshold.clamp(min=0)
        self._bound = ((self._least - sae.b_enc) / norm).float()
        self._of_w = float((narrow.float() - unit).norm(dim=1).max()) + 2 * unit.shape[1] * 2.0**-23 + 2.0**-20
        self._columns = torch.nn.functional.pad(narrow, (0, 8 - narrow.shape[1] % 8))  # a multiple of 8 is quick
        self._columns[:, unit.shape[1]] = 1  # it is multiplied by the margin

    def active(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x float32 [n, d] → rows, ascending, features and values of the active entries."""
        centred = x - self._sae.b_pre
        near, scale = self._above(centred)
        if self._sae.rule == "topk":
            return self._largest(x, centred, near, scale)
        row, feature = (near >= (self._bound * scale).half()).nonzero().unbind(1)  # rounding keeps the order
        value = self._values(centred, row, feature)
        on = (value > self._least[feature]).nonzero()[:, 0]
        return row[on], feature[on], value[on]

    def _above(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """At least scale · x·w of each row and unit row of the encoder, float16 [n, F], rounded to it; and the scale."""
        scale = torch.ldexp(x.new_ones(()), _LARGEST - torch.frexp(x.abs().max()).exponent.clamp(min=-64))
        scaled = x * scale
        narrow = scaled.half()
        margin = (narrow.float() - scaled).norm(dim=1) * (1 + _STEP) + scaled.norm(dim=1) * self._of_w
        columns = torch.nn.functional.pad(narrow, (0, self._columns.shape[1] - narrow.shape[1]))
        columns[:, narrow.shape[1]] = (margin * (1 + 2 * _STEP) + _LEAST).half()
        with _whole_sums():
            return columns @ self._columns.t(), scale

    def _largest(self, x: Tensor, centred: Tensor, near: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest of each row: they are among half as many again of those that may be largest, or the row is encoded in
        float32 throughout."""
        k, (n, features) = min(self._sae.k or 0, near.shape[1]), near.shape
        most = (near.float() + near.float().abs() * _STEP) * (self._norm / scale) + self._sae.b_enc
        may = most.topk(min(features, k + k // 2 + 16))
        row = torch.arange(n, device=x.device)[:, None].expand_as(may.indices)
        value = self._values(centred, row.flatten(), may.indices.flatten()).view_as(may.values).relu()
        best = value.topk(k)
        feature, value = may.indices.gather(1, best.indices), best.values
        unsure = (value[:, -1] < may.values[:, -1]).nonzero()[:, 0] if may.indices.shape[1] < features else row[:0, 0]
        value[unsure], feature[unsure] = self._sae.encode(x[unsure]).topk(k)
        at, place = value.nonzero().unbind(1)
        return at, feature[at, place], value[at, place]

    def _values(self, x: Tensor, row: Tensor, feature: Tensor) -> Tensor:
        """w·x + b of these entries, rows ascending, float32."""
        return dots(x, self._sae.w_enc, row, feature) + self._sae.b_enc[feature]


def dots(x: Tensor, w: Tensor, row: Tensor, feature: Tensor) -> Tensor:
    """x[row] · w[feature] of each entry, rows ascending; float32."""
    if x.is_cuda:
        from residual_saes.eval.measure import active_cuda

        return active_cuda.dots(x, w, torch.searchsorted(row, torch.arange(len(x) + 1, device=x.device)), feature)
    parts = zip(torch.split(row, _GATHERED), torch.split(feature, _GATHERED), strict=True)
    return torch.cat([torch.linalg.vecdot(x[r], w[f]) for r, f in parts])


@contextlib.contextmanager
def _whole_sums() -> Iterator[None]:
    """Products of float16 add up in float32 throughout."""
    cuda = torch.backends.cuda.matmul
    before = cuda.allow_fp16_reduced_precision_reduction
    cuda.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        cuda.allow_fp16_reduced_precision_reduction = before
