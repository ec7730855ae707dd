"""One step of eai-sparsify's TopK training, from its own parts, in the order of its trainer, with its defaults: the fvu loss,
sign SGD inside the schedule-free wrapper, fp32 weights, and bf16 autocast on CUDA only, so that on a CPU products are fp32."""

import os
from importlib import import_module
from importlib.metadata import version

import torch

from bench.workers.worker import Job, Prepared, sparse_batch

K = 128


def prepare(job: Job) -> Prepared:
    if not job.device.startswith("cuda"):
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its kernels for the decoder, which need a GPU
    parts = import_module("sparsify.sparse_coder")
    sign_sgd = import_module("sparsify.sign_sgd").SignSGD
    schedule_free = import_module("schedulefree").ScheduleFreeWrapper
    torch.set_float32_matmul_precision("high")  # its trainer's own setting

    x = sparse_batch(job)
    config = parts.SparseCoderConfig(num_latents=job.features, k=min(K, job.d // 4))
    sae = parts.SparseCoder(job.d, config, job.device, dtype=torch.float32)
    sae.b_dec.data = x.mean(0)
    optimizer = schedule_free(sign_sgd(sae.parameters(), lr=5e-3 / (job.features / 2**14) ** 0.5), momentum=0.95)
    optimizer.train()
    fired = torch.zeros(job.features, dtype=torch.bool, device=job.device)
    tokens_since_fired = torch.zeros(job.features, dtype=torch.long, device=job.device)

    def step() -> None:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, total_variance=(x - x.mean(0)).pow(2).sum())
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        tokens_since_fired.add_(len(x))
        tokens_since_fired[fired] = 0
        fired.zero_()

    products = "bf16 autocast, its Triton decoder" if job.device.startswith("cuda") else "fp32: it autocasts on CUDA only"
    return Prepared(step=step, version=version("eai-sparsify"), note=f"TopK k={config.k}, sign SGD; {products}")
