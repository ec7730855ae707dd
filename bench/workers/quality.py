"""SAEs of other libraries trained by their own trainers on batches from a file; runs in their environments, as all here do.

    python -m bench.workers.quality PEER JOB LAMBDA …      (batches, a file; features, lr, warmup, seed; out, a folder; as JSON)

Writes <out>/<lambda>.npz with w_enc [F, d], w_dec [F, d], b_enc [F], b_pre [d] for each. λ goes with an error that is a mean
over dimensions; their losses have sums over dimensions, so theirs is λ · d. All else is as their trainers have it by default,
but for batches, learning rate and its warm-up, and no warm-up of L1.
"""

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, Tensor]


def rows(path: str) -> Iterator[Tensor]:
    """float16 [steps, batch, d], a batch at a time."""
    for batch in np.load(path, mmap_mode="r"):
        yield torch.from_numpy(np.array(batch, dtype=np.float32))


def sae_lens(args: SimpleNamespace, shape: tuple[int, ...], l1: float) -> Weights:
    standard = import_module("sae_lens.saes.standard_sae")
    config = standard.StandardTrainingSAEConfig(d_in=shape[2], d_sae=args.features, dtype="float32", l1_coefficient=l1)
    trainer = import_module("sae_lens.training.sae_trainer").SAETrainer(
        cfg=import_module("sae_lens.config").SAETrainerConfig(
            total_training_samples=shape[0] * shape[1], train_batch_size_samples=shape[1], lr=args.lr, lr_end=args.lr,
            lr_warm_up_steps=args.warmup,
        ),
        sae=standard.StandardTrainingSAE(config),
        data_provider=rows(args.batches),
    )  # fmt: skip
    sae = trainer.fit()
    return {"w_enc": sae.W_enc.t(), "w_dec": sae.W_dec, "b_enc": sae.b_enc, "b_pre": sae.b_dec}


def dictionary_learning(name: str) -> Callable[[SimpleNamespace, tuple[int, ...], float], Weights]:
    def train(args: SimpleNamespace, shape: tuple[int, ...], l1: float) -> Weights:
        trainer: Any = getattr(import_module("dictionary_learning.trainers.standard"), name)(
            steps=shape[0], activation_dim=shape[2], dict_size=args.features, layer=0, lm_name="none", device="cpu",
            lr=args.lr, l1_penalty=l1, warmup_steps=args.warmup, sparsity_warmup_steps=None, seed=args.seed,
        )  # fmt: skip
        for step, x in enumerate(rows(args.batches)):
            trainer.update(step, x)
        ae = trainer.ae
        return {"w_enc": ae.encoder.weight, "w_dec": ae.decoder.weight.t(), "b_enc": ae.encoder.bias, "b_pre": ae.bias}

    return train


def autograd(args: SimpleNamespace, shape: tuple[int, ...], l1: float) -> Weights:
    """The published recipe of docs/reference written once more from its formulas, in plain torch: nothing of ours is imported.
    It starts from the same directions, so that what differs is how a step is computed."""
    d = shape[2]
    w_dec = torch.randn(args.features, d, generator=torch.Generator().manual_seed(args.seed))
    w_dec /= w_dec.norm(dim=1, keepdim=True)
    w_enc, b_enc, b_pre, b_dec = w_dec * (2 * d / args.features), torch.zeros(args.features), torch.zeros(d), torch.zeros(d)
    b_pre.copy_(next(rows(args.batches)).mean(0))
    parameters = [p.requires_grad_() for p in (w_enc, b_enc, w_dec, b_dec, b_pre)]
    adam = torch.optim.Adam(parameters, lr=args.lr)
    rise = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, (step + 1) / args.warmup))
    for x in rows(args.batches):
        z = torch.relu((x - b_pre) @ w_enc.t() + b_enc)
        loss: Any = (z @ w_dec + b_dec + b_pre - x).square().mean() + l1 / d * z.sum(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        rise.step()
        with torch.no_grad():
            w_dec /= w_dec.norm(dim=1, keepdim=True)
    # Its x̂ is that of an SAE with one bias, whose encoder's bias takes up the difference.
    one = b_pre + b_dec
    return {"w_enc": w_enc, "w_dec": w_dec, "b_enc": b_enc + w_enc @ b_dec, "b_pre": one}


PEERS = {
    "autograd": autograd,
    "sae_lens": sae_lens,
    "standard": dictionary_learning("StandardTrainer"),
    "april": dictionary_learning("StandardTrainerAprilUpdate"),
}


def main(peer: str, job: str, *lambdas: str) -> None:
    args = SimpleNamespace(**json.loads(job))
    shape = np.load(args.batches, mmap_mode="r").shape
    for l1 in lambdas:
        torch.manual_seed(args.seed)
        weights = PEERS[peer](args, shape, float(l1) * shape[2])
        arrays: dict[str, Any] = {name: value.detach().numpy() for name, value in weights.items()}
        np.savez(Path(args.out) / f"{l1}.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
