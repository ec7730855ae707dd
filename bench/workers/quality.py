"""SAEs of other libraries trained by their own trainers on batches from a file; runs in their environments, as all here do.

    python -m bench.workers.quality LIBRARY KIND JOB LEVEL …

JOB is JSON: batches, a file; features, lr, warmup, seed; out, a folder. Writes <out>/<level>/ as the library saves an SAE, and
beside it by what the activations were multiplied. A level is an L0, or for L1 a λ with an error that is a mean over dimensions;
their losses have sums over dimensions, so theirs is λ · d. All else is as their trainers have it by default, but for batches,
learning rate and its warm-up, its decay over the last fifth where ours has one too, no warm-up of L1, and what they count in
steps that such a short run has not. SAELens' rows have a mean length of √d, as its runner scales them; dictionary_learning's
come as they are, but for JumpReLU, whose bandwidth is for a mean length of 1. sparsify's do, too, from a model that looks
them up, for its trainer reads language models; it has Adam, which had less FVU here than its signum, and its own linear decay.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

FRACTIONS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]  # of the dictionary, in Matryoshka's groups


def rows(path: str, scale: float = 1.0) -> Iterator[Tensor]:
    """float16 [steps, batch, d], a batch at a time, multiplied in float32."""
    for batch in np.load(path, mmap_mode="r"):
        yield torch.from_numpy(np.array(batch, dtype=np.float32)) * scale


def sae_lens(kind: str, args: SimpleNamespace, level: str, out: Path) -> float:
    steps, batch, d = args.shape
    scale: float = math.sqrt(d) / args.length
    name, title, more = {
        "L1": ("standard", "Standard", {"l1_coefficient": float(level) * d}),
        "TopK": ("topk", "TopK", {"k": int(float(level))}),
        "BatchTopK": ("batchtopk", "BatchTopK", {"k": float(level)}),
        "Matryoshka": ("matryoshka_batchtopk", "MatryoshkaBatchTopK", {"k": float(level)}),
        "JumpReLU": ("jumprelu", "JumpReLU", {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(level)}),
    }[kind]
    if kind == "Matryoshka":
        more["matryoshka_widths"] = [round(args.features * sum(FRACTIONS[: n + 1])) for n in range(len(FRACTIONS))]
    module = import_module(f"sae_lens.saes.{name}_sae")
    config = getattr(module, f"{title}TrainingSAEConfig")(d_in=d, d_sae=args.features, dtype="float32", **more)
    trainer = import_module("sae_lens.training.sae_trainer").SAETrainer(
        cfg=import_module("sae_lens.config").SAETrainerConfig(
            total_training_samples=steps * batch, train_batch_size_samples=batch, lr=args.lr, lr_end=args.lr,
            lr_warm_up_steps=args.warmup, lr_decay_steps=0 if kind == "L1" else steps // 5,
        ),
        sae=getattr(module, f"{title}TrainingSAE")(config),
        data_provider=rows(args.batches, scale),
    )  # fmt: skip
    trainer.fit().save_inference_model(out)
    return scale


def dictionary_learning(kind: str, args: SimpleNamespace, level: str, out: Path, april: bool = False) -> float:
    steps, _, d = args.shape
    scale = 1 / args.length if kind == "JumpReLU" else 1.0
    start = {"threshold_beta": 0.98, "threshold_start_step": steps // 4}
    name, trainer, more = {
        "L1": ("standard", "StandardTrainerAprilUpdate" if april else "StandardTrainer", {}),
        "TopK": ("top_k", "TopKTrainer", start),
        "BatchTopK": ("batch_top_k", "BatchTopKTrainer", start),
        "Matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer", start | {"group_fractions": FRACTIONS}),
        "JumpReLU": ("jumprelu", "JumpReluTrainer", {}),
    }[kind]
    if kind in ("L1", "JumpReLU"):
        more = {"sparsity_warmup_steps": None}
    own = {"L1": ("l1_penalty", float(level) * d), "JumpReLU": ("target_l0", float(level))}
    key, value = own.get(kind, ("k", int(float(level))))
    decay = {} if kind == "L1" else {"decay_start": steps - steps // 5}
    trained: Any = getattr(import_module(f"dictionary_learning.trainers.{name}"), trainer)(
        steps=steps, activation_dim=d, dict_size=args.features, layer=0, lm_name="none", device="cpu", lr=args.lr,
        warmup_steps=args.warmup, seed=args.seed, **{key: value}, **decay, **more,
    )  # fmt: skip
    for step, x in enumerate(rows(args.batches, scale)):
        trained.update(step, x)
    torch.save(trained.ae.state_dict(), out / "ae.pt")
    (out / "config.json").write_text(json.dumps({"trainer": trained.config}, default=str))
    return scale


class Rows(torch.nn.Embedding):
    """A model whose hidden states are a file's rows, and whose tokens are their numbers."""

    def __init__(self, path: str) -> None:
        batches = np.load(path)
        super().__init__(batches.shape[0] * batches.shape[1], batches.shape[2])
        self.weight.data.copy_(torch.from_numpy(batches).view(self.weight.shape))
        self.device, self.dummy_inputs = torch.device("cpu"), {"input": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> "Rows":
        return self


def sparsify(args: SimpleNamespace, level: str, out: Path) -> float:
    steps, batch, _ = args.shape
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # kernels that need a GPU
    config = import_module("sparsify.config")
    trainer = import_module("sparsify.trainer").Trainer(
        config.TrainConfig(
            config.SparseCoderConfig(num_latents=args.features, k=int(level)), batch_size=1, optimizer="adam", lr=args.lr,
            lr_warmup_steps=args.warmup, hookpoints=[""], init_seeds=[args.seed], log_to_wandb=False,
            save_dir=str(out.parent), run_name=out.name,
        ),
        [{"input_ids": numbers} for numbers in torch.arange(steps * batch).view(steps, batch)],
        Rows(args.batches),
    )  # fmt: skip
    trainer.fit()
    return 1.0


def main(library: str, kind: str, job: str, *levels: str) -> None:
    args = SimpleNamespace(**json.loads(job))
    batches = np.load(args.batches, mmap_mode="r")
    args.shape, args.length = batches.shape, float(np.linalg.norm(batches[:4].astype(np.float32), axis=-1).mean())
    for level in levels:
        torch.manual_seed(args.seed)
        out = Path(args.out) / level
        out.mkdir(parents=True)
        if library == "SAELens":
            scale = sae_lens(kind, args, level, out)
        elif library == "sparsify":
            scale = sparsify(args, level, out)
        else:
            scale = dictionary_learning(kind, args, level, out, april=library.endswith("April"))
        (out / "scale").write_text(str(scale))


if __name__ == "__main__":
    main(*sys.argv[1:])
