"""Lists of the active entries on CUDA, by token and by feature, from the bits of the hidden layer.

z itself is read where a bit is set and nowhere else. A feature's share of the dense products costs as much as its entries where
it fires on about a 64th of the tokens; those that fire more often are taken out of the lists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from residual_saes.shared.launch import launch as _launch
from residual_saes.shared.launch import row_stride as _row_stride
from residual_saes.train.kernels.base import Activation, Active, Frequent, TorchKernels, starts
from residual_saes.train.kernels.cuda_hidden import bits_of

WORDS = 1024  # compact: words of 32 features at a time
FREQUENT = 1 / 64  # share of the tokens above which a feature is taken into dense products
FREQUENT_STEP = 64  # their number is rounded up to a multiple of it: sizes that the products like


class ListKernels(TorchKernels):
    def counts(self, activation: Activation) -> Tensor:
        frequent = self._frequent(activation)
        rare = torch.where(frequent, 0, activation.feature_count)
        counts = [activation.feature_count.sum(), activation.total, rare.sum(), frequent.sum()]
        return torch.stack([count.double() for count in counts])

    def _frequent(self, activation: Activation) -> Tensor:
        return activation.feature_count > FREQUENT * len(bits_of(activation))

    def compact(self, z: Tensor, activation: Activation, nnz: int, n_frequent: int) -> Active:
        n_rows, n_cols = z.shape
        bits = bits_of(activation)
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


def _words(bits: Tensor) -> int:
    return int(min(WORDS, triton.next_power_of_2(bits.shape[1])))


def _packed(flags: Tensor) -> Tensor:
    """bool [F] as int32 [ceil(F / 32)], as `MarkedActivation` has its rows."""
    padded = torch.nn.functional.pad(flags, (0, -len(flags) % 32)).view(-1, 32)
    return (padded.long() << torch.arange(32, device=flags.device)).sum(1).int()  # the 32nd bit becomes the sign


def _feature_order(feature: Tensor, n_features: int) -> Tensor:
    """Entries by feature, tokens ascending. A radix sort takes a pass per byte of the key, so the key is short."""
    key = (feature - 2**15).to(torch.int16) if n_features <= 2**16 else feature
    return torch.sort(key, stable=True).indices


@triton.jit
def _popcount(x: tl.tensor) -> tl.tensor:
    """Bits set in each uint32. Spelt out because the interpreter has no popc; the compiler knows the idiom."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


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
