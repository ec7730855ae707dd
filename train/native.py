"""`Kernels` for CPUs: bfloat16 matrices, float32 arithmetic, the loops in kernels.c."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from shared.native import load
from train.kernels import Activation, Active, AdamStep, starts


def load_native() -> "NativeKernels | None":
    """None where the C file cannot be compiled."""
    library = load(Path(__file__).with_name("kernels.c"))
    return None if library is None else NativeKernels(library)


def _pointer(x: Tensor) -> ctypes.c_void_p:
    assert x.device.type == "cpu"
    return ctypes.c_void_p(x.data_ptr())


def _float(x: float) -> ctypes.c_float:
    return ctypes.c_float(x)


def _int(x: int) -> ctypes.c_int64:
    return ctypes.c_int64(x)


class NativeKernels:
    """Matrices are contiguous bfloat16 (weights for `adam_` also feature-last); see `kernels.Kernels` for the rest."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._c = library

    def activate_(self, h: Tensor, bias: Tensor) -> Activation:
        tokens, features = h.shape
        row_count, feature_count = torch.empty(tokens, dtype=torch.int32), torch.empty(features, dtype=torch.int32)
        row_total = torch.empty(tokens)
        self._c.activate(
            _matrix(h), _pointer(bias), _pointer(row_count), _pointer(feature_count), _pointer(row_total), _int(tokens),
            _int(features),
        )  # fmt: skip
        return Activation(row_count=row_count, feature_count=feature_count, total=row_total.sum())

    def mask_(self, gz: Tensor, z: Tensor, l1_grad: float) -> Tensor:
        tokens, features = z.shape
        parts = torch.get_num_threads()
        partial = torch.empty(parts, features)
        self._c.mask(_matrix(gz), _matrix(z), _float(l1_grad), _pointer(partial), _int(tokens), _int(features), _int(parts))
        return partial.sum(0)

    def compact(self, z: Tensor, activation: Activation, nnz: int) -> Active:
        tokens, features = z.shape
        active = Active(
            row_start=starts(activation.row_count),
            feature=torch.empty(nnz, dtype=torch.int32),
            value=torch.empty(nnz),
            feature_start=starts(activation.feature_count),
            by_feature=torch.empty(nnz, dtype=torch.int32),
            token=torch.empty(nnz, dtype=torch.int32),
        )
        self._c.compact(
            _matrix(z), _pointer(active.row_start), _pointer(active.feature_start), _pointer(active.feature),
            _pointer(active.value), _pointer(active.by_feature), _pointer(active.token), _int(tokens), _int(features),
            _int(torch.get_num_threads()),
        )  # fmt: skip
        return active

    def residual(
        self, active: Active, w_dec: Tensor, x: Tensor, bias: Tensor, scale: float, l1_grad: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, d = x.shape
        x = x.float().contiguous()
        g = torch.empty(tokens, d, dtype=torch.bfloat16)
        g_hidden, row_square = torch.empty_like(active.value), torch.empty(tokens)
        self._c.residual(
            _pointer(active.row_start), _pointer(active.feature), _pointer(active.value), _matrix(w_dec), _pointer(x),
            _pointer(bias), _float(scale), _float(l1_grad), _pointer(g), _pointer(g_hidden), _pointer(row_square),
            _int(tokens), _int(d),
        )  # fmt: skip
        return g, g_hidden, row_square.sum()

    def weight_grads(self, active: Active, g: Tensor, xc: Tensor, g_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, d = active.feature_start.numel() - 1, g.shape[1]
        dw_enc = torch.empty(features, d, dtype=torch.bfloat16)
        dw_dec, db_enc = torch.empty_like(dw_enc), torch.empty(features)
        self._c.weight_grads(
            _pointer(active.feature_start), _pointer(active.by_feature), _pointer(active.token), _pointer(active.value),
            _pointer(g_hidden), _matrix(g), _matrix(xc), _pointer(dw_enc), _pointer(dw_dec), _pointer(db_enc),
            _int(features), _int(d),
        )  # fmt: skip
        return dw_enc, dw_dec, db_enc

    def adam_(self, w: Tensor, m: Tensor, v: Tensor, grad: Tensor, adam: AdamStep, *, unit_norm: bool, copy: Tensor) -> None:
        features, d = w.shape
        self._c.adam(
            _pointer(w), _pointer(m), _pointer(v), _pointer(grad), _pointer(copy), _int(features), _int(d),
            _feature_last(grad), _feature_last(copy), int(unit_norm), _float(adam.lr / (1 - adam.beta1**adam.step)),
            _float(adam.clip), _float(adam.beta1), _float(adam.beta2), _float(1 / (1 - adam.beta2**adam.step)),
            _float(adam.eps),
        )  # fmt: skip


def _matrix(x: Tensor) -> ctypes.c_void_p:
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous()
    return _pointer(x)


def _feature_last(x: Tensor) -> int:
    """1 if the [F, d] matrix is stored as [d, F], 0 if as [F, d]."""
    assert x.dtype == torch.bfloat16
    if x.is_contiguous():
        return 0
    assert x.t().is_contiguous()
    return 1
