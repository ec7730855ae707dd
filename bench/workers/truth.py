"""SAELens' SAEs of kinds that ours have too, trained by its own trainer on batches from a file, and saved as it saves them: for
`rsae eval --saes` on a cache of synthetic worlds. Runs in SAELens' environment.

    python -m bench.workers.truth BATCHES OUT KIND LR…       KIND: batchtopk, matryoshka, or jumprelu:COEFFICIENT

BATCHES is float16 [steps, batch, d] (`dump` of bench/quality.py). Writes <out>/<kind>-<lr>/. All is as SAELens has it by
default but k or target L0 (8), prefixes (a 32nd, an eighth, a half), rate, warm-up, and decay over the last fifth.
"""

import sys
from importlib import import_module
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from bench.workers.quality import fit_sae_lens, rows

FEATURES, K, WARM_UP, DECAY = 512, 8, 100, 0.2


def main(batches: str, out: str, kind: str, *rates: str) -> None:
    shape, name = np.load(batches, mmap_mode="r").shape, kind.partition(":")[0]
    metadata = import_module("sae_lens.saes.sae").SAEMetadata(hook_name="blocks.0.hook_resid_post")
    widths = [16, 64, 256, FEATURES]
    kinds: dict[str, tuple[str, str, dict[str, Any]]] = {
        "batchtopk": ("batchtopk", "BatchTopK", {"k": K}),
        "matryoshka": ("matryoshka_batchtopk", "MatryoshkaBatchTopK", {"k": K, "matryoshka_widths": widths}),
        "jumprelu": ("jumprelu", "JumpReLU", {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": K}),
    }  # fmt: skip
    module, title, own = kinds[name]
    own = own | {"metadata": metadata} | ({"l0_coefficient": float(kind.partition(":")[2])} if name == "jumprelu" else {})
    for rate in rates:
        torch.manual_seed(0)
        args = SimpleNamespace(
            shape=shape, features=FEATURES, lr=float(rate), warmup=WARM_UP, decay=round(DECAY * shape[0])
        )  # fmt: skip
        sae = fit_sae_lens(module, title, own, args, cycle(rows(batches)))
        sae.save_inference_model(Path(out) / f"{kind.replace(':', '-')}-{rate}")


if __name__ == "__main__":
    main(*sys.argv[1:])
