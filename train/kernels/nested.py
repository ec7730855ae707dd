"""The second half of a step where the loss is of several prefixes of the dictionary, by the kernels of any device.

Prefix p ends with group p, and x̂_p = x̂_{p−1} + z_g W_dec,g: each group is decoded once. Backwards, what group g contributes to
are the prefixes from g on, so that G_g = Σ_{p ≥ g} ∂loss/∂x̂_p takes the place that the one gradient of x̂ has elsewhere. The
products are as large as those of one prefix. Along the active entries a token counts as one row for each group: its entries lie
by feature, so that those of a group follow one another.
"""

import copy
import dataclasses
import itertools

import torch
from torch import Tensor

from residual_saes.train.kernels.base import (
    Activation,
    Active,
    TorchKernels,
    WeightGrads,
    Workspace,
    mm,
    nested,
    tokens_of,
)


class Nested:
    """Takes the place of the kernels in one step: the squared error is the mean of the prefixes'."""

    def __init__(self, kernels: TorchKernels, ends: tuple[int, ...]) -> None:
        self._kernels, self._ends = kernels, ends
        self._groups = list(itertools.starmap(slice, itertools.pairwise([0, *ends])))
        self._g: Tensor  # G of each token and group, [B, n, d]
        self.last_square: Tensor  # Σ (x̂ − x)² of the whole dictionary

    def compact(self, z: Tensor, activation: Activation, nnz: int, n_frequent: int) -> Active:
        """A row for each token and group."""
        n, active = len(self._groups), self._kernels.compact(z, activation, nnz, 0)
        ends = torch.tensor(self._ends, dtype=torch.int32, device=z.device)
        group = torch.bucketize(active.feature, ends, right=True)
        rows = torch.arange(len(z) * n + 1, device=z.device)
        return dataclasses.replace(
            active,
            row_start=torch.searchsorted(tokens_of(active) * n + group, rows),
            token=(active.token * n + group[active.by_feature.long()]).int(),
        )

    def sparse_residual(
        self, active: Active, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float, l1_grad: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = len(self._groups)
        self._g, g_hidden, squares = self._kernels.nested_residual(active, w_dec, x, bias, scale, l1_grad, n)
        self.last_square = squares[-1]
        return self._g[:, 0].contiguous(), g_hidden, squares.mean()

    def dense_residual(self, z: Tensor, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        parts = [mm(w_dec[group].t(), z[:, group].t()).t() for group in self._groups]
        self._g, squares = nested(parts, w_dec, x, bias, scale)
        self.last_square = squares[-1]
        return self._g[:, 0].contiguous(), squares.mean()

    def sparse_weight_grads(
        self, active: Active, w_dec: Tensor, g: Tensor, xc: Tensor, g_hidden: Tensor, l1_grad: float, out: Workspace
    ) -> WeightGrads:
        return self._kernels.sparse_weight_grads(active, w_dec, self._g.flatten(0, 1), xc, g_hidden, l1_grad, out)

    def dense_weight_grads(
        self, z: Tensor, activation: Activation, w_dec: Tensor, g: Tensor, xc: Tensor, l1_grad: float, out: Workspace
    ) -> WeightGrads:
        # Where a group's columns do not lie together, only plain torch takes them.
        kernels = self._kernels if self._kernels.feature_major else TorchKernels()
        out.gz(len(z), max(group.stop - group.start for group in self._groups), feature_major=True)
        db_enc = []
        for index, group in enumerate(self._groups):
            part = copy.copy(out)
            part.dw_enc, part.dw_dec = out.dw_enc[group], out.dw_dec[group]
            gg = self._g[:, index].contiguous()
            db_enc.append(kernels.dense_weight_grads(z[:, group], activation, w_dec[group], gg, xc, l1_grad, part)[2])
        return out.dw_enc, out.dw_dec, torch.cat(db_enc)
