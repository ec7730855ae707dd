"""One step of dictionary_learning's StandardTrainer: its own `update`, under bf16 autocast where bf16 is quick.

Its training loop casts the batch to `autocast_dtype` and autocasts on CUDA; on a CPU it does not
autocast, and its bf16 option fails there. The same autocast is applied here on the CPU, which favours it.
"""

from importlib import import_module
from importlib.metadata import version
from itertools import count

import torch

from bench.workers.worker import Job, Prepared, sparse_batch


def prepare(job: Job) -> Prepared:
    standard = import_module("dictionary_learning.trainers.standard").StandardTrainer
    x = sparse_batch(job).to(job.dtype)
    trainer = standard(
        steps=100_000, activation_dim=job.d, dict_size=job.features, layer=0, lm_name="none",
        device=job.device, lr=job.lr, l1_penalty=1e-2, warmup_steps=1, sparsity_warmup_steps=1, seed=0,
    )  # fmt: skip
    steps = count(1)  # past the warm-up of its L1 penalty, so that every round does the same

    def step() -> None:
        with torch.autocast(device_type=job.device.partition(":")[0], dtype=torch.bfloat16, enabled=job.bf16):
            trainer.update(next(steps), x)

    return Prepared(
        step=step,
        version=version("dictionary-learning"),
        note=f"StandardTrainer.update, {'bf16 autocast' if job.bf16 else 'float32'}; does not clip",
    )
