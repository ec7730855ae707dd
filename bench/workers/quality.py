"""SAEs of other libraries trained by their own trainers on batches from a file; runs in their environments, as all here do.

    python -m bench.workers.quality PEER --batches FILE.npy --features F --lr LR --warmup STEPS --seed S --out FOLDER LAMBDA …

Writes <out>/<lambda>.npz with w_enc [F, d], w_dec [F, d], b_enc [F], b_pre [d] for each. λ goes with an error that is a mean
over dimensions; their losses have sums over dimensions, so theirs is λ · d. All else is as their trainers have it by default,
but for batches, learning rate and its warm-up, and no warm-up of L1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, Tensor]


def rows(path: Path) -> Iterator[Tensor]:
    """float16 [steps, batch, d], a batch at a time."""
    for batch in np.load(path, mmap_mode="r"):
        yield torch.from_numpy(np.array(batch, dtype=np.float32))


def sae_lens(args: argparse.Namespace, shape: tuple[int, ...], l1: float) -> Weights:
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


def dictionary_learning(name: str) -> Callable[[argparse.Namespace, tuple[int, ...], float], Weights]:
    def train(args: argparse.Namespace, shape: tuple[int, ...], l1: float) -> Weights:
        trainer: Any = getattr(import_module("dictionary_learning.trainers.standard"), name)(
            steps=shape[0], activation_dim=shape[2], dict_size=args.features, layer=0, lm_name="none", device="cpu",
            lr=args.lr, l1_penalty=l1, warmup_steps=args.warmup, sparsity_warmup_steps=None, seed=args.seed,
        )  # fmt: skip
        for step, x in enumerate(rows(args.batches)):
            trainer.update(step, x)
        ae = trainer.ae
        return {"w_enc": ae.encoder.weight, "w_dec": ae.decoder.weight.t(), "b_enc": ae.encoder.bias, "b_pre": ae.bias}

    return train


PEERS = {
    "sae_lens": sae_lens,
    "standard": dictionary_learning("StandardTrainer"),
    "april": dictionary_learning("StandardTrainerAprilUpdate"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("lambdas", nargs="+")
    for name, kind in {"batches": Path, "out": Path, "features": int, "lr": float, "warmup": int, "seed": int}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    args = parser.parse_args()
    shape = np.load(args.batches, mmap_mode="r").shape
    for l1 in args.lambdas:
        torch.manual_seed(args.seed)
        weights = PEERS[args.peer](args, shape, float(l1) * shape[2])
        arrays: dict[str, Any] = {name: value.detach().numpy() for name, value in weights.items()}
        np.savez(args.out / f"{l1}.npz", **arrays)


if __name__ == "__main__":
    main()
