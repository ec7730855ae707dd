"""SAELens' SAEs of kinds that ours have too, trained by its own trainer on batches from a file, and saved as it saves them: for
`rsae eval --saes` on a cache of synthetic worlds. Runs in SAELens' environment.

    python -m bench.workers.truth BATCHES OUT KIND LR…       KIND: batchtopk, matryoshka, or jumprelu:COEFFICIENT

BATCHES is float16 [steps, batch, d] (`dump` of bench/quality.py). Writes <out>/<kind>-<lr>/. All is as SAELens has it by
default but k or target L0 (8), prefixes (a 32nd, an eighth, a half), rate, warm-up, and decay over the last fifth, all ours.
"""

import sys
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.workers.quality import rows

FEATURES, K, WARM_UP, DECAY = 512, 8, 100, 0.2


def main(batches: str, out: str, kind: str, *rates: str) -> None:
    steps, batch, d = np.load(batches, mmap_mode="r").shape
    base, name = import_module("sae_lens.saes.sae"), kind.partition(":")[0]
    metadata = base.SAEMetadata(hook_name="blocks.0.hook_resid_post")
    widths = [16, 64, 256, FEATURES]
    kinds: dict[str, tuple[str, str, dict[str, Any]]] = {
        "batchtopk": ("batchtopk_sae", "BatchTopK", {"k": K}),
        "matryoshka": ("matryoshka_batchtopk_sae", "MatryoshkaBatchTopK", {"k": K, "matryoshka_widths": widths}),
        "jumprelu": ("jumprelu_sae", "JumpReLU", {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": K}),
    }  # fmt: skip
    module, title, own = kinds[name]
    if name == "jumprelu":
        own["l0_coefficient"] = float(kind.partition(":")[2])
    of = import_module(f"sae_lens.saes.{module}")
    for rate in rates:
        torch.manual_seed(0)
        config = getattr(of, f"{title}TrainingSAEConfig")(d_in=d, d_sae=FEATURES, metadata=metadata, **own)
        trainer = import_module("sae_lens.training.sae_trainer").SAETrainer(
            cfg=import_module("sae_lens.config").SAETrainerConfig(
                total_training_samples=steps * batch, train_batch_size_samples=batch, lr=float(rate), lr_end=float(rate),
                lr_warm_up_steps=WARM_UP, lr_decay_steps=round(DECAY * steps),
            ),
            sae=getattr(of, f"{title}TrainingSAE")(config),
            data_provider=cycle(rows(batches)),
        )  # fmt: skip
        trainer.fit().save_inference_model(Path(out) / f"{kind.replace(':', '-')}-{rate}")


if __name__ == "__main__":
    main(*sys.argv[1:])
