"""SAELens' activation cache: its own `CacheActivationsRunner.run`, with a store that hands out ready activations.

So its language model costs nothing here and what is timed is its writing: making each shard, saving it, moving the shards
together. It does not sync; the files are fsynced at the end, inside the time, for the durability that our writer gives.
"""

import os
import shutil
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from bench.workers.worker import Job, Prepared

CONTEXT = 1024
PROMPTS_A_BATCH = 4
# A shard. Its default is 2 GB; smaller here, so that a round of a few hundred MB makes whole shards.
BUFFER_BYTES = 1 << 28


@dataclass(kw_only=True)
class ReadyStore:
    """Stands in for the store that runs the language model."""

    activations: Tensor
    ids: Tensor
    at: int = 0

    def get_raw_llm_batch(self) -> tuple[Tensor, Tensor]:
        end = self.at + PROMPTS_A_BATCH * CONTEXT
        batch = self.activations[self.at : end], self.ids[self.at : end]
        self.at = end % len(self.activations)
        return batch


def prepare(job: Job) -> Prepared:
    caching = import_module("sae_lens.cache_activations_runner")
    datasets = import_module("datasets")
    config = import_module("sae_lens.config").CacheActivationsRunnerConfig
    datasets.disable_progress_bars()
    batch = PROMPTS_A_BATCH * CONTEXT
    tokens = max(job.tokens // batch, 1) * batch
    payload = tokens * job.d * 2
    target = Path(job.directory) / "sae_lens_cache"

    cfg = config(
        dataset_path="none", model_name="none", model_batch_size=PROMPTS_A_BATCH, hook_name="resid_post",
        d_in=job.d, training_tokens=tokens, context_size=CONTEXT, new_cached_activations_path=str(target),
        shuffle=False, dtype="float16", device="cpu",
        # A hair above, because it turns gigabytes back into bytes by truncation.
        buffer_size_gb=(min(payload, BUFFER_BYTES) + 1) / 1e9,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(tokens, job.d, generator=generator).half()
    ids = torch.randint(0, 50_000, (tokens,), generator=generator)

    # Its constructor loads the language model; `run` and what it calls need only these four attributes.
    runner = caching.CacheActivationsRunner.__new__(caching.CacheActivationsRunner)
    runner.cfg, runner.context_size = cfg, CONTEXT
    runner.activations_store = ReadyStore(activations=activations, ids=ids)
    runner.features = datasets.Features(
        {
            "resid_post": datasets.Array2D(shape=(CONTEXT, job.d), dtype="float16"),
            "token_ids": datasets.Sequence(datasets.Value(dtype="int32"), length=CONTEXT),
        }
    )

    def reset() -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)

    def step() -> None:
        runner.run()
        for path in [*target.rglob("*"), target]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    note = f"CacheActivationsRunner.run from ready activations, {cfg.n_buffers} shards, fsync at the end"
    return Prepared(step=step, reset=reset, version=version("sae-lens"), note=note)
