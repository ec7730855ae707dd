"""How good one SAE is, on held-out tokens.

With r = x̂ − x over held-out activations x [tokens, d]:
    L0          mean number of active features of a token
    MSE         mean of r² over tokens and dimensions
    FVU         Σ r² / Σ (x − mean of x per dimension)²
    cosine      mean over tokens of cos(x̂, x)
    dead share  features that fire on no held-out token
    CE          mean next-token cross-entropy of the language model in nats: as it is, with the layer's output replaced
                by x̂, and with it replaced by zeros; recovered = (CE zero − CE spliced) / (CE zero − CE as it is)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.cache import Cache
from train.sae import Sae

_CHUNK_VALUES = 1 << 26  # values of z held at once


@dataclass(kw_only=True, frozen=True, slots=True)
class Reconstruction:
    """Metrics of x̂ against x; see the top of this file."""

    tokens: int
    l0: float
    mse: float
    fvu: float | None  # None where the activations do not vary
    cosine: float
    dead_share: float


def ratio(part: float, whole: float) -> float | None:
    """part / whole, or None where that is no number."""
    value = part / whole if whole else math.nan
    return value if math.isfinite(value) else None


def heldout_rows(cache: Cache, layer: int, tokens: int) -> Tensor:
    """Up to `tokens` held-out activations of a layer, float16 [n, d_model] on the CPU."""
    spec = cache.spec
    blocks = min(spec.holdout_blocks, -(-tokens // spec.block_rows))
    data = np.empty((blocks * spec.block_rows, spec.d_model), dtype=np.float16)
    for i in range(blocks):
        block, part = spec.train_blocks + i, data[i * spec.block_rows : (i + 1) * spec.block_rows]
        cache.read_block(layer, block, part)
        cache.check_block(layer, block, part, cache.stats(layer, block))
    return torch.from_numpy(data[:tokens])


def heldout_tokens(cache: Cache, tokens: int) -> Tensor:
    """Held-out sequences with at least one and about `tokens` tokens, int64 [n, context]."""
    spec = cache.spec
    first = spec.train_blocks * spec.block_sequences
    n = min(spec.sequences - first, max(1, tokens // spec.context))
    return torch.from_numpy(cache.read_tokens(first, first + n))


@torch.inference_mode()
def reconstruction(sae: Sae, x: Tensor) -> Reconstruction:
    """Metrics over x [tokens, d] on the SAE's device. Sums are taken in float64."""
    mean = x.double().mean(0)
    square = variance = cosine = active = 0.0
    fired = torch.zeros(len(sae.b_enc), dtype=torch.bool, device=x.device)
    for part in _chunks(x, len(sae.b_enc)):
        xs = part.float()
        z = sae.encode(xs)
        xhat = sae.decode(z)
        square += float((xhat - xs).square().sum(dtype=torch.float64))
        variance += float((xs.double() - mean).square().sum())
        cosine += float(torch.cosine_similarity(xhat, xs, dim=1).sum(dtype=torch.float64))
        on = z > 0
        active += float(on.sum())
        fired |= on.any(0)
    return Reconstruction(
        tokens=len(x),
        l0=active / len(x),
        mse=square / x.numel(),
        fvu=ratio(square, variance),
        cosine=cosine / len(x),
        dead_share=1 - float(fired.float().mean()),
    )


def _chunks(x: Tensor, features: int) -> Iterator[Tensor]:
    step = max(1, _CHUNK_VALUES // features)
    for start in range(0, len(x), step):
        yield x[start : start + step]
