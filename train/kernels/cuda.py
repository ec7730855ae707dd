"""Kernels for CUDA, in Triton. Written for H100, H200 and A100; in TRITON_INTERPRET=1 they run on CPU tensors, slowly.

Every method moves bytes and does little with them, so the number that matters is bytes over bandwidth (what they reach:
docs/findings/kernels.md). By subject: the hidden layer (cuda_hidden), lists of its entries (cuda_lists), what is done along
the lists (cuda_sparse), rows of [B, d] and [F, d] (cuda_rows). What holds for all of them:

- Counts come from integer atomics: any order gives the same integers. Every float sum is taken in a fixed order
  (partials in a buffer, added by a second reduction), so two runs of a step agree to the bit.
- Nothing waits for the device. Where a size is known only there, the grid covers the largest it can be and the
  programs left over return at once.
- Offsets of the [B, F] matrices and of the entry lists are 64 bits wide: B·F passes 2^31 before it passes the memory.
"""

from residual_saes.train.kernels.cuda_hidden import HiddenKernels
from residual_saes.train.kernels.cuda_lists import ListKernels
from residual_saes.train.kernels.cuda_rows import RowKernels
from residual_saes.train.kernels.cuda_sparse import SparseKernels


class TritonKernels(HiddenKernels, ListKernels, SparseKernels, RowKernels):
    """What is not here, the dense products, is torch's. bf16, float16 or float32; columns of [B, F] and [B, d] contiguous."""

    sparse_below = 1 / 86  # where features are all equally frequent, a sparse step takes as long as a dense one
