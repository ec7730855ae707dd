"""The pieces of a training step that no matrix product does, and which implementation runs them.

Three implementations of one interface. `TorchKernels` (this file) is plain torch, runs on any device and in any dtype,
and is the definition the others are tested against. `native.NativeKernels` is a small compiled C file for CPUs,
`triton_kernels.TritonKernels` is for CUDA. Shapes everywhere: B tokens, d = d_model, F features; a weight is always
handed over as an [F, d] view, whatever its storage order, so that a row is a feature.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(kw_only=True, frozen=True, slots=True)
class AdamStep:
    """One Adam update's scalars. `clip` multiplies the gradient; step counts from 1 (bias correction)."""

    step: int
    lr: float
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass(kw_only=True, frozen=True, slots=True)
class Activation:
    """What one pass over the hidden layer counts."""

    row_count: Tensor  # int32 [B]: active features of each token
    feature_count: Tensor  # int32 [F]: tokens on which each feature is active
    total: Tensor  # float32 scalar: sum of all activations


@dataclass(kw_only=True, frozen=True, slots=True)
class Active:
    """The non-zero entries of z [B, F], listed by token and, as positions in that list, by feature.

    Entries of token b are `row_start[b] : row_start[b+1]`; entries of feature i are
    `by_feature[feature_start[i] : feature_start[i+1]]`, tokens ascending.
    """

    row_start: Tensor  # int64 [B+1]
    feature: Tensor  # int32 [nnz]
    value: Tensor  # float32 [nnz]
    feature_start: Tensor  # int64 [F+1]
    by_feature: Tensor  # int32 [nnz], positions in the two lists above
    token: Tensor  # int32 [nnz], the token of each entry of by_feature (same order as by_feature)


class Kernels(Protocol):
    """Every method writes its results completely; a trailing underscore marks the argument changed in place."""

    def activate_(self, h: Tensor, bias: Tensor) -> Activation:
        """h [B, F] becomes z = relu(h + bias), bias float32 [F] added in float32, rounded to h's dtype."""
        ...

    def mask_(self, gz: Tensor, z: Tensor, l1_grad: float) -> Tensor:
        """gz [B, F] becomes (gz + l1_grad) where z > 0, else 0. Returns its column sums, float32 [F]."""
        ...

    def compact(self, z: Tensor, activation: Activation, nnz: int) -> Active:
        """List the nnz non-zero entries of z [B, F]."""
        ...

    def residual(
        self, active: Active, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float, l1_grad: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode, compare, and pull the error back to the active entries.

        x̂ = z @ w_dec + bias; g = scale · (x̂ − x).  w_dec [F, d], x [B, d] (any float dtype), bias float32 [d].
        Returns g [B, d] in w_dec's dtype, the hidden gradient g_b · w_dec[i] + l1_grad of each entry, float32 [nnz],
        and Σ (x̂ − x)², a float32 scalar.
        """
        ...

    def weight_grads(self, active: Active, g: Tensor, xc: Tensor, g_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both weight gradients from the active entries alone.

        g, xc [B, d]. Returns dW_enc [F, d] = Σ g_hidden · xc_b, dW_dec [F, d] = Σ value · g_b, both in g's dtype, and
        the encoder bias gradient Σ g_hidden, float32 [F]; zero for features with no entry.
        """
        ...

    def adam_(self, w: Tensor, m: Tensor, v: Tensor, grad: Tensor, adam: AdamStep, *, unit_norm: bool, copy: Tensor) -> None:
        """Adam on w, m, v [F, d] (contiguous masters) from grad [F, d] (any strides); then, if `unit_norm`, scale
        every row of w to norm 1; then write w into `copy` [F, d] (any strides, any dtype)."""
        ...


class TorchKernels:
    """The definition, in torch operations. Accumulates in float32, or in float64 for float64 inputs."""

    def activate_(self, h: Tensor, bias: Tensor) -> Activation:
        torch.add(h, bias, out=h) if h.dtype == bias.dtype else h.copy_(h.to(bias.dtype) + bias)
        h.relu_()
        active = h > 0
        return Activation(
            row_count=active.sum(1, dtype=torch.int32),
            feature_count=active.sum(0, dtype=torch.int32),
            total=h.sum(dtype=_accumulator(h)),
        )

    def mask_(self, gz: Tensor, z: Tensor, l1_grad: float) -> Tensor:
        gz.copy_(torch.where(z > 0, gz.to(_accumulator(gz)) + l1_grad, 0.0))
        return gz.sum(0, dtype=_accumulator(gz))

    def compact(self, z: Tensor, activation: Activation, nnz: int) -> Active:
        token, feature = z.nonzero(as_tuple=True)
        by_feature = torch.sort(feature, stable=True).indices
        return Active(
            row_start=starts(activation.row_count),
            feature=feature.int(),
            value=z[token, feature].to(_accumulator(z)),
            feature_start=starts(activation.feature_count),
            by_feature=by_feature.int(),
            token=token[by_feature].int(),
        )

    def residual(
        self, active: Active, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float, l1_grad: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        accumulator = _accumulator(w_dec)
        token = _tokens(active)
        rows = w_dec[active.feature.long()].to(accumulator)
        r = bias.to(accumulator) - x.to(accumulator)
        r.index_add_(0, token, rows * active.value[:, None])
        g = (scale * r).to(w_dec.dtype)
        g_hidden = (g[token].to(accumulator) * rows).sum(1) + l1_grad
        return g, g_hidden, r.square().sum()

    def weight_grads(self, active: Active, g: Tensor, xc: Tensor, g_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        accumulator = _accumulator(g)
        token, feature = _tokens(active), active.feature.long()
        n_features, d = active.feature_start.numel() - 1, g.shape[1]
        dw_enc = torch.zeros(n_features, d, dtype=accumulator, device=g.device)
        dw_dec = torch.zeros_like(dw_enc)
        dw_enc.index_add_(0, feature, xc[token].to(accumulator) * g_hidden[:, None])
        dw_dec.index_add_(0, feature, g[token].to(accumulator) * active.value[:, None])
        db_enc = torch.zeros(n_features, dtype=accumulator, device=g.device).index_add_(0, feature, g_hidden)
        return dw_enc.to(g.dtype), dw_dec.to(g.dtype), db_enc

    def adam_(self, w: Tensor, m: Tensor, v: Tensor, grad: Tensor, adam: AdamStep, *, unit_norm: bool, copy: Tensor) -> None:
        adam_update_(w, m, v, grad.to(w.dtype), adam)
        if unit_norm:
            w.div_(w.norm(dim=1, keepdim=True).clamp_min_(1e-12))
        copy.copy_(w)


def adam_update_(w: Tensor, m: Tensor, v: Tensor, grad: Tensor, adam: AdamStep) -> None:
    """Adam (Kingma & Ba 2015, algorithm 1) on tensors of any one shape, in place."""
    g = grad * adam.clip
    m.lerp_(g, 1 - adam.beta1)
    v.mul_(adam.beta2).addcmul_(g, g, value=1 - adam.beta2)
    scale = adam.lr / (1 - adam.beta1**adam.step)
    w.addcdiv_(m, (v / (1 - adam.beta2**adam.step)).sqrt_().add_(adam.eps), value=-scale)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def starts(counts: Tensor) -> Tensor:
    """Where each group begins when groups of these sizes lie one after the other; int64 [n + 1]."""
    start = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=start[1:])
    return start


def _tokens(active: Active) -> Tensor:
    """The token of every entry, in the by-token order; int64 [nnz]."""
    counts = active.row_start.diff()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
