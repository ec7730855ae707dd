"""One step of SAELens' standard (L1) SAE: its own `SAETrainer.step`, autocast on where bf16 is quick, fed from memory.

It has no decoder normalisation step: its L1 term weighs each feature by its decoder norm instead.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from itertools import repeat
from types import ModuleType

from bench.workers.worker import Job, Prepared, sparse_batch


def prepare(job: Job) -> Prepared:
    if find_spec("wandb") is None:  # which it imports and, as it is set up here, never calls
        sys.modules["wandb"] = ModuleType("wandb")
        sys.modules["wandb"].__spec__ = ModuleSpec("wandb", None)
    standard = import_module("sae_lens.saes.standard_sae")
    config = import_module("sae_lens.config")
    training = import_module("sae_lens.training.sae_trainer")

    sae = standard.StandardTrainingSAE(
        standard.StandardTrainingSAEConfig(
            d_in=job.d, d_sae=job.features, dtype="float32", device=job.device, l1_coefficient=1e-2
        )
    )
    trainer = training.SAETrainer(
        cfg=config.SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=job.tokens,
            lr=job.lr,
            lr_end=job.lr / 10,  # what its runner sets; the schedule is constant
            device=job.device,
            autocast=job.bf16,
        ),
        sae=sae,
        data_provider=repeat(sparse_batch(job)),
    )

    def step() -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1

    products = "bf16 autocast" if job.bf16 else "float32"
    return Prepared(step=step, version=version("sae-lens"), note=f"SAETrainer.step, standard SAE, {products}")
