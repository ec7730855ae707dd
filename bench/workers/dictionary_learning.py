"""One step of dictionary_learning's StandardTrainer: its own `update`, under bf16 autocast.

Its training loop casts the batch to `autocast_dtype` and autocasts on CUDA; on a CPU it does not
autocast, and its bf16 option fails there. The same autocast is applied here on the CPU, which favours it.
"""

from importlib import import_module
from importlib.metadata import version
from itertools import count

import torch
from torch import Tensor

from bench.workers.worker import Job, Prepared, main, sparse_batch


def prepare(job: Job) -> Prepared:
    standard = import_module("dictionary_learning.trainers.standard").StandardTrainer
    x = sparse_batch(job).bfloat16()
    trainer = standard(
        steps=100_000, activation_dim=job.d, dict_size=job.features, layer=0, lm_name="none",
        device=job.device, lr=job.lr, l1_penalty=1e-2, warmup_steps=1, sparsity_warmup_steps=1, seed=0,
    )  # fmt: skip
    seen: list[Tensor] = []
    loss_of = trainer.loss

    def recorded_loss(*args: object, **kwargs: object) -> Tensor:
        """`update` keeps its loss to itself; this notes it on the way through."""
        loss: Tensor = loss_of(*args, **kwargs)
        seen[:] = [loss.detach()]
        return loss

    trainer.loss = recorded_loss
    steps = count(1)  # past the warm-up of its L1 penalty, so that every round does the same

    def step() -> dict[str, float]:
        with torch.autocast(device_type=job.device.partition(":")[0], dtype=torch.bfloat16):
            trainer.update(next(steps), x)
        return {"loss": float(seen[0])}

    return Prepared(
        step=step,
        version=version("dictionary-learning"),
        note="StandardTrainer.update, bf16 autocast; does not clip",
    )


if __name__ == "__main__":
    main(prepare)
