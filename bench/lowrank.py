"""Crosscoders held to a low rank, or read through masks, beside plain ones: FVU at equal L0 by autograd, in float32.

    python -m bench.lowrank CACHE FORM,RANK,RATE,SEED[,FEATURES[,STEPS[,MASKED %]]]…

plain    rows as they are. mix: each dimension's layers turned into their principal mixes, of which RANK are kept.
pca      the RANK first principal directions of the rows of all layers beside each other.
feature  the [layers, d] of each feature, in encoder and decoder, is cut to its RANK largest components after every step.
MASKED % of the layers of each token are read as zeros, the others made so much larger; all are reconstructed.
"""

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from residual_saes.shared.cache import Cache
from residual_saes.shared.sites import RESID_POST

BATCH, K, WARMUP, LOOK = 512, 32, 50, 40_000


def rows(cache: Cache, first: int, last: int) -> Tensor:
    """Rows of all layers beside each other, float16 [tokens, layers · d]."""
    sites = [site for site in cache.sites if site.hook == RESID_POST]
    blocks = ([torch.from_numpy(cache.values(site, cache.whole_block(site, n))) for site in sites] for n in range(first, last))
    return torch.cat([torch.cat(block, 1) for block in blocks])


def kept(h: Tensor) -> Tensor:
    """The K largest a token, of a batch together."""
    return h * (h >= h.detach().flatten().topk(K * len(h)).values[-1])


def turned(form: str, rank: int, x: Tensor, layers: int) -> Tensor:
    """What rows are multiplied by, [layers · d, width], orthonormal."""
    d = x.shape[1] // layers
    if form == "mix":
        by_layer = x.view(-1, layers, d)
        mixes = torch.linalg.eigh(torch.einsum("nld,nmd->lm", by_layer, by_layer))[1].flip(1)[:, :rank]
        return torch.kron(mixes.contiguous(), torch.eye(d))
    return torch.linalg.eigh(x.t() @ x)[1].flip(1)[:, :rank].contiguous() if form == "pca" else torch.eye(layers * d)


@torch.no_grad()
def cut_(weights: Tensor, layers: int, rank: int) -> None:
    of_features = weights.view(len(weights), layers, -1)
    largest = torch.linalg.eigh(of_features @ of_features.mT)[1][:, :, -rank:]
    of_features.copy_(largest @ (largest.mT @ of_features))


def trial(
    cache: Cache, form: str, rank: int, rate: float, seed: int, features: int = 1024, steps: int = 256, masked: int = 0
) -> str:
    spec, draw = cache.spec, torch.Generator().manual_seed(seed)
    train, test = rows(cache, 0, spec.train_blocks), rows(cache, spec.train_blocks, spec.n_blocks).float()
    layers = train.shape[1] // spec.d_model
    look = train[:LOOK].float()
    deviation = (look - look.mean(0)).view(LOOK, layers, -1).square().mean((0, 2)).sqrt()
    scale = (deviation / deviation.square().mean().sqrt()).repeat_interleave(spec.d_model)
    mean = (look / scale).mean(0)
    turn = turned(form, rank, look / scale - mean, layers)
    dec = torch.nn.functional.normalize(torch.randn(features, turn.shape[1], generator=draw))
    enc, b_enc, b_dec = dec * 2 * turn.shape[1] / features, torch.zeros(features), torch.zeros(turn.shape[1])
    weights = [w.requires_grad_() for w in (dec, enc, b_enc, b_dec)]
    adam = torch.optim.Adam(weights, lr=rate)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(7 + seed))
    began = time.process_time()
    for step in range(steps):
        adam.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        x = (train[order[step * BATCH % len(train) :][:BATCH]].float() / scale - mean) @ turn
        read = x
        if masked:
            mask = (torch.rand(BATCH, layers, generator=draw) >= masked / 100).float()
            mask *= layers / mask.sum(1, keepdim=True).clamp(min=1)
            read = (x.view(BATCH, layers, -1) * mask[:, :, None]).view(BATCH, -1)
        error = kept(torch.relu(read @ enc.t() + b_enc)) @ dec + b_dec - x
        adam.zero_grad()
        torch.autograd.backward(error.square().sum() / (BATCH * len(scale)))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        for each in (dec, enc) if form == "feature" else ():
            cut_(each.data, layers, rank)
        dec.data /= dec.data.norm(dim=1, keepdim=True)
    seconds, square = time.process_time() - began, torch.zeros(len(scale))
    with torch.no_grad():
        for part in torch.split(test, 4096):
            x = part / scale
            z = kept(torch.relu((x - mean) @ turn @ enc.t() + b_enc))
            square += (mean + (z @ dec + b_dec) @ turn.t() - x).square().sum(0)
    fvu = float(square.sum() / (test / scale - (test / scale).mean(0)).square().sum())
    what = f"{form} {rank}, rate {rate:g}, seed {seed}, F {features}, {steps} steps, masked {masked} %"
    return f"{what}: FVU {fvu:.4f}, {seconds:.0f} s"


if __name__ == "__main__":
    opened = Cache.open(Path(sys.argv[1]))
    for one in sys.argv[2:]:
        form, rank, rate, seed, *more = one.split(",")
        print(trial(opened, form, int(rank), float(rate), int(seed), *map(int, more)), flush=True)
