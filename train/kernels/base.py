"""The arithmetic of a training step in pieces, and which implementation runs them.

`TorchKernels` (this file) is plain torch, runs on any device and in any dtype, and is the definition that the others are
tested against; they replace those of its methods at which they are faster: `cpu` with compiled C, `cuda` and `hopper` with
Triton. Shapes everywhere: B tokens, d = d_model, F features. Weights and their
gradients are [F, d], a row is a feature. The hidden layer is a [B, F] view of memory that the native kernels fill
feature-major: then a feature's tokens are a row, for the products, for the bias, and for the lists of active entries.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from residual_saes.shared.device import bfloat16_is_slow

COMPUTE = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass(kw_only=True, frozen=True, slots=True)
class AdamStep:
    """One Adam update's scalars. `clip` multiplies the gradient; if it is NaN the update changes nothing, so that a host that
    does not wait for the gradient's norm can leave that to the device. `step` counts from 1 (bias correction)."""

    step: int
    lr: float
    clip: float | Tensor = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass(kw_only=True, frozen=True, slots=True)
class Activation:
    """What one pass over the hidden layer counts."""

    feature_count: Tensor  # int32 [F]: tokens on which each feature is active
    total: Tensor  # float32 or float64 scalar: sum of all activations


@dataclass(kw_only=True, frozen=True, slots=True)
class Frequent:
    """Features that fire so often that a dense product over them is cheaper than following their entries."""

    feature: Tensor  # int64 [n], ascending
    z: Tensor  # [B, n], their columns of z


@dataclass(kw_only=True, frozen=True, slots=True)
class Active:
    """The non-zero entries of z [B, F] but for those of the frequent features: listed by token and, as positions in that
    list, by feature.

    Entries of token b are `row_start[b] : row_start[b+1]`; entries of feature i are
    `by_feature[feature_start[i] : feature_start[i+1]]`, tokens ascending.
    """

    row_start: Tensor  # int64 [B+1]
    feature: Tensor  # int32 [nnz]
    value: Tensor  # float32 [nnz]
    feature_start: Tensor  # int64 [F+1]
    by_feature: Tensor  # int32 [nnz], positions in the two lists above
    token: Tensor  # int32 [nnz], the token of each entry of by_feature (same order as by_feature)
    frequent: Frequent | None = None


@dataclass(kw_only=True, frozen=True, slots=True)
class Near:
    """The entries of [B, F] that lie near to their features' thresholds, feature by feature or token by token."""

    token: Tensor  # int64 [n]
    feature: Tensor  # int64 [n]


class Workspace:
    """Memory that steps of one shape share, whichever SAE they belong to: [B, F] once for each of the `slots` steps that may
    be under way at a time and (on CUDA) once more, and [F, d] twice."""

    def __init__(
        self, batch: int, d_model: int, n_features: int, precision: str, device: torch.device, *, slots: int = 1
    ) -> None:
        dtype = COMPUTE[precision]
        self._z = [torch.empty(batch * n_features, dtype=dtype, device=device) for _ in range(slots)]
        self._gz = self._z[0][:0]  # only dense steps need it, and not everyone's, so it is made by the first of them
        self.dw_enc = torch.empty(n_features, d_model, dtype=dtype, device=device)
        self.dw_dec = torch.empty(n_features, d_model, dtype=dtype, device=device)

    def z(self, batch: int, *, feature_major: bool) -> Tensor:
        """A hidden layer, [batch, F]: the one that was handed out longest ago."""
        self._z.append(self._z.pop(0))
        return _view(self._z[-1], batch, len(self.dw_enc), feature_major)

    def gz(self, batch: int, n_features: int, *, feature_major: bool) -> Tensor:
        """The gradient of some features of the hidden layer, [batch, n_features]."""
        if self._gz.numel() < batch * n_features:
            self._gz = self._z[0].new_empty(batch * n_features)
        return _view(self._gz, batch, n_features, feature_major)


def _view(flat: Tensor, batch: int, n_features: int, feature_major: bool) -> Tensor:
    flat = flat[: batch * n_features]
    return flat.view(n_features, batch).t() if feature_major else flat.view(batch, n_features)


# dW_enc and dW_dec [F, d] in compute precision, and the gradient of the encoder's bias, [F] in the accumulator's
WeightGrads = tuple[Tensor, Tensor, Tensor]


class TorchKernels:
    """The definition, in torch operations. Accumulates in float32, or in float64 for float64 inputs.

    Every method writes its results completely; a trailing underscore marks the argument changed in place.
    """

    feature_major = False  # the order in which the hidden layer lies
    features_at_once: int | None = None  # the part of the hidden gradient that is made and used up at once; None is all
    sparse_below = 1 / 64  # share of active entries under which following them alone is the faster way

    def centre(self, x: Tensor, b_pre: Tensor, dtype: torch.dtype) -> Tensor:
        """x [B, d] − b_pre [d], taken in b_pre's precision and rounded to `dtype`."""
        return (x.to(b_pre.dtype) - b_pre).to(dtype)

    def encode(self, xc: Tensor, w_enc: Tensor, bias: Tensor, out: Workspace) -> tuple[Tensor, Activation]:
        """z [B, F] = relu(xc [B, d] · w_encᵀ + bias), bias float32 [F] added in float32; it lies in the workspace."""
        z = _product(xc, w_enc.t(), out.z(len(xc), feature_major=self.feature_major))
        return z, self.activate_(z, bias)

    def project(self, xc: Tensor, w_enc: Tensor, bias: Tensor, out: Workspace) -> Tensor:
        """h [B, F] = xc [B, d] · w_encᵀ + bias, for activation functions that `encode` does not have; in the workspace."""
        return _add_(_product(xc, w_enc.t(), out.z(len(xc), feature_major=self.feature_major)), bias)

    def count(self, z: Tensor) -> Activation:
        """What `encode` counts, of a hidden layer z [B, F] ≥ 0 that something else made, in the order that `encode` fills."""
        return self.activate_(z, torch.zeros(z.shape[1], dtype=accumulator(z), device=z.device))

    def activate_(self, h: Tensor, bias: Tensor) -> Activation:
        """h [B, F] becomes z = relu(h + bias), rounded to h's dtype."""
        _add_(h, bias).relu_()
        active = h > 0
        return Activation(
            feature_count=active.sum(0, dtype=torch.int32),
            total=h.sum(dtype=accumulator(h)),
        )

    def keep_largest_(self, z: Tensor, count: int) -> tuple[Activation, Tensor]:
        """z [B, F] ≥ 0 keeps its `count` largest entries and becomes 0 elsewhere; of those that are equal to the least of them,
        the first in memory stay. Returns what is counted then, and the least, a scalar: 0 if fewer are above 0."""
        rows = z.t() if self.feature_major else z
        least = self.kth_largest(rows, count)
        above, equal = rows > least, rows == least
        per_row = equal.sum(1)
        room = count - above.sum() - (per_row.cumsum(0) - per_row)  # for equal ones, at the start of each row
        rows.mul_(above | (equal & (room >= per_row)[:, None]))
        # one row at most has room for some of its equal ones
        last = ((room > 0) & (room < per_row)).int().argmax()
        some = equal[last] & (equal[last].cumsum(0) <= room[last]) & (room[last] < per_row[last])
        rows[last] += (least * some).to(z.dtype)
        return self.count(z), least

    def jump_(self, z: Tensor, low: Tensor, threshold: Tensor, high: Tensor) -> tuple[Activation, Near]:
        """z [B, F] ≥ 0 becomes 0 where it is not above its feature's threshold, [F] > 0 like the other bounds and of z's dtype.
        Returns what is counted then, and the entries that lay between `low` and `high`, in the order in which z lies."""
        rows, bounds = (z.t(), (slice(None), None)) if self.feature_major else (z, (None, slice(None)))
        place = ((rows > low[bounds]) & (rows < high[bounds])).nonzero()
        rows.mul_(rows > threshold[bounds])  # a NaN stays one, and stops the step
        feature, token = (place if self.feature_major else place.flip(1)).t()
        return self.count(z), Near(token=token, feature=feature)

    def kth_largest(self, x: Tensor, k: int) -> Tensor:
        """The k-th largest number of x ≥ 0, contiguous; a scalar."""
        return torch.topk(x.view(-1), k, sorted=False).values.min()

    def dense_residual(self, z: Tensor, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Decode and compare: x̂ = z · w_dec + bias, g = scale · (x̂ − x). x [B, d] (any float dtype), bias float32 [d].

        Returns g [B, d] in w_dec's dtype and Σ (x̂ − x)², a scalar.
        """
        decoded = mm(w_dec.t(), z.t()).t() if self.feature_major else mm(z, w_dec)
        residual = decoded.to(accumulator(w_dec)).add_(bias).sub_(x)
        square = residual.square().sum()
        return residual.mul_(scale).to(w_dec.dtype).contiguous(), square

    def dense_weight_grads(
        self, z: Tensor, activation: Activation, w_dec: Tensor, g: Tensor, xc: Tensor, l1_grad: float, out: Workspace
    ) -> WeightGrads:
        """Both weight gradients through the whole hidden gradient (g · w_decᵀ + l1_grad where z > 0, else 0)."""
        db_enc = torch.empty(z.shape[1], dtype=accumulator(z), device=z.device)
        for part in _parts(z.shape[1], self.features_at_once or z.shape[1]):
            gz = out.gz(len(z), part.stop - part.start, feature_major=self.feature_major)
            db_enc[part] = self.hidden_grad(g, w_dec[part], z[:, part], activation, l1_grad, gz)
            mm(z[:, part].t(), g, out.dw_dec[part])
            mm(gz.t(), xc, out.dw_enc[part])
        return out.dw_enc, out.dw_dec, db_enc

    def hidden_grad(self, g: Tensor, w_dec: Tensor, z: Tensor, activation: Activation, l1_grad: float, gz: Tensor) -> Tensor:
        """gz [B, F] = g · w_decᵀ + l1_grad where z > 0, else 0; z came with this activation. Returns its column sums, [F]."""
        return self.mask_(_product(g, w_dec.t(), gz), z, activation, l1_grad)

    def mask_(self, gz: Tensor, z: Tensor, activation: Activation, l1_grad: float) -> Tensor:
        """gz [B, F] becomes (gz + l1_grad) where z > 0, else 0; z came with this activation. Returns gz's column sums, [F]."""
        gz.copy_(torch.where(z > 0, gz.to(accumulator(gz)) + l1_grad, 0.0))
        return gz.sum(0, dtype=accumulator(gz))

    def counts(self, activation: Activation) -> Tensor:
        """float64 [4]: active entries, the sum of all activations, entries that `compact` would list, frequent features."""
        active = activation.feature_count.sum().double()
        return torch.stack([active, activation.total.double(), active, torch.zeros_like(active)])

    def compact(self, z: Tensor, activation: Activation, nnz: int, n_frequent: int) -> Active:
        """List the nnz non-zero entries of z [B, F] that do not belong to one of the n_frequent frequent features."""
        token, feature = z.nonzero(as_tuple=True)
        by_feature = torch.sort(feature, stable=True).indices
        return Active(
            row_start=starts((z > 0).sum(1)),
            feature=feature.int(),
            value=z[token, feature].to(accumulator(z)),
            feature_start=starts(activation.feature_count),
            by_feature=by_feature.int(),
            token=token[by_feature].int(),
        )

    def sparse_residual(
        self, active: Active, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float, l1_grad: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`dense_residual` from the active entries alone, and the error pulled back to them.

        Returns also, second, the hidden gradient g_b · w_dec[i] + l1_grad of each entry, float32 [nnz].
        """
        wide = accumulator(w_dec)
        token = tokens_of(active)
        rows = w_dec[active.feature.long()].to(wide)
        r = bias.to(wide) - x.to(wide)
        r.index_add_(0, token, rows * active.value[:, None])
        g = (scale * r).to(w_dec.dtype)
        g_hidden = (g[token].to(wide) * rows).sum(1) + l1_grad
        return g, g_hidden, r.square().sum()

    def sparse_weight_grads(
        self, active: Active, w_dec: Tensor, g: Tensor, xc: Tensor, g_hidden: Tensor, l1_grad: float, out: Workspace
    ) -> WeightGrads:
        """Both weight gradients from the active entries alone: dW_enc = Σ g_hidden · xc_b, dW_dec = Σ value · g_b, and the
        encoder bias gradient Σ g_hidden; zero for features with no entry. `w_dec` and `l1_grad` are for frequent features.
        Tokens are rows of g, which has as many for each row of xc as groups of features are nested, or one."""
        token, feature = tokens_of(active), active.feature.long()
        xc = xc.repeat_interleave(len(g) // len(xc), 0)
        for target, rows, weight in ((out.dw_enc, xc, g_hidden), (out.dw_dec, g, active.value)):
            total = torch.zeros_like(target, dtype=accumulator(g))
            target.copy_(total.index_add_(0, feature, rows[token].to(total.dtype) * weight[:, None]))
        db_enc = torch.zeros(len(out.dw_enc), dtype=accumulator(g), device=g.device).index_add_(0, feature, g_hidden)
        return out.dw_enc, out.dw_dec, db_enc

    def nested_residual(
        self, active: Active, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float, l1_grad: float, n: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`sparse_residual` of the prefixes that end with each of n groups of features, whose loss is the mean of theirs; a
        row of `active` is a token and a group. Returns g [B, n, d], the sum of the gradients by x̂ of the prefixes from that
        group on; the hidden gradient; and each prefix's Σ (x̂ − x)², [n]."""
        nothing = torch.zeros_like(bias)
        blank = torch.zeros(len(active.row_start) - 1, x.shape[1], dtype=bias.dtype, device=x.device)
        parts = self.sparse_residual(active, w_dec, blank, nothing, 1.0, 0.0)[0].view(len(x), n, -1)
        g, squares = nested(list(parts.unbind(1)), w_dec, x, bias, scale)
        return g, self.dots(active.row_start, active.feature, g.view(blank.shape), w_dec) + l1_grad, squares

    def dots(self, row_start: Tensor, index: Tensor, rows: Tensor, others: Tensor) -> Tensor:
        """⟨rows[r], others[i]⟩ of each entry i of row r, listed by row as `Active` lists them by token; [entries]. It is what a
        sparse residual is pulled back with, where nothing is added to it."""
        index = index.int()
        nothing = torch.zeros(len(index), dtype=accumulator(rows), device=rows.device)
        active = Active(
            row_start=row_start, feature=index, value=nothing, feature_start=row_start, by_feature=index, token=index
        )
        bias = torch.zeros(rows.shape[1], dtype=nothing.dtype, device=rows.device)
        return self.sparse_residual(active, others, -rows, bias, 1.0, 0.0)[1]

    def fold_(self, w_enc: Tensor, w_dec: Tensor, enc: Tensor, dec: Tensor) -> Tensor:
        """enc = n · w_enc and dec = w_dec / n, with n = ‖w_dec‖ of each row. All [F, d]; returns n."""
        norms = row_norms(w_dec)
        enc.copy_(w_enc * norms[:, None])
        dec.copy_(w_dec / norms[:, None])
        return norms

    def unfold_(
        self, dw_enc: Tensor, dw_dec: Tensor, db_enc: Tensor, w_enc: Tensor, w_dec: Tensor, b_enc: Tensor, norms: Tensor
    ) -> Tensor:
        """Gradients by the folded weights (n · w_enc, n · b_enc, u = w_dec / n, with n = ‖w_dec‖ of each row) become those by
        the weights themselves, masters [F, d]: the chain rule. dw_enc and dw_dec in place; returns that of b_enc.

            dw_enc ← n · dw_enc    db_enc ← n · db_enc    dw_dec ← (dw_dec − u ⟨u, dw_dec⟩) / n + u · ∂/∂n
            ∂/∂n = ⟨w_enc, dw_enc⟩ + b_enc · db_enc
        """
        n, unit = norms[:, None], w_dec / norms[:, None]
        wide = dw_dec.to(w_dec.dtype)
        by_norm = (w_enc * dw_enc).sum(1) + b_enc * db_enc
        dw_dec.copy_(wide / n + unit * (by_norm - (unit * wide).sum(1) / norms)[:, None])
        dw_enc.mul_(n)
        return db_enc * norms

    def square_sum(self, x: Tensor) -> Tensor:
        """Σ x² of a contiguous tensor, a scalar in at least the accumulator's precision."""
        norm: Tensor = torch.linalg.vector_norm(x, dtype=accumulator(x))
        return norm.square()

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
        """Adam (Kingma & Ba 2015, algorithm 1) on w, m, v [F, d] (contiguous masters) from grad [F, d]; then, if `unit_norm`,
        scale every row of w to norm 1; then write w into `copy` [F, d], if there is one, of the compute precision."""
        clip = float(adam.clip)
        if math.isnan(clip):
            return
        g = grad.to(w.dtype) * clip
        m.lerp_(g, 1 - adam.beta1)
        v.mul_(adam.beta2).addcmul_(g, g, value=1 - adam.beta2)
        scale = adam.lr / (1 - adam.beta1**adam.step)
        w.addcdiv_(m, (v / (1 - adam.beta2**adam.step)).sqrt_().add_(adam.eps), value=-scale)
        if unit_norm:
            w.div_(w.norm(dim=1, keepdim=True).clamp_min_(1e-12))
        if copy is not None:
            copy.copy_(w)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a · b for an `out` stored either way round; torch.mm would go through a copy for one of them."""
    if out.is_contiguous():
        return mm(a, b, out)
    mm(b.t(), a.t(), out.t())
    return out


def _add_(h: Tensor, bias: Tensor) -> Tensor:
    """h + bias in the bias's precision, in h's place."""
    return torch.add(h, bias, out=h) if h.dtype == bias.dtype else h.copy_(h.to(bias.dtype) + bias)


def mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """torch.mm, and on processors that have no bfloat16 the same by way of float32: there torch's own is 30 times as slow."""
    if a.dtype == torch.bfloat16 and bfloat16_is_slow(a.device):
        wide = torch.mm(a.float(), b.float())
        return wide.to(a.dtype) if out is None else out.copy_(wide)
    return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)


def nested(parts: list[Tensor], w_dec: Tensor, x: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What `nested_residual` returns first and last, of what each group of features adds to x̂, [B, d]."""
    wide = accumulator(w_dec)
    residual = bias.to(wide) - x.to(wide)
    residuals = [residual := residual + part for part in parts]
    all_ = torch.empty(len(x), len(parts), x.shape[1], dtype=w_dec.dtype, device=x.device)
    g = torch.zeros_like(residual)
    for index in reversed(range(len(parts))):
        g.add_(residuals[index], alpha=scale / len(parts))
        all_[:, index] = g
    return all_, torch.stack([residual.square().sum() for residual in residuals])


def _parts(n: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def row_norms(w: Tensor) -> Tensor:
    """‖w‖ of each row, [F], above zero."""
    norms: Tensor = w.norm(dim=1).clamp_min_(1e-12)
    return norms


def starts(counts: Tensor) -> Tensor:
    """Where each group begins when groups of these sizes lie one after the other; int64 [n + 1]."""
    start = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=start[1:])
    return start


def tokens_of(active: Active) -> Tensor:
    """The token of every entry, in the by-token order; int64 [nnz]."""
    counts = active.row_start.diff()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
