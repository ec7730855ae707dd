"""The baseline with no tool at all: what a good researcher writes in twenty lines, with weights, gradients and Adam moments in
bf16 (or float32: `Job.bf16`), autograd's backward, and the fused Adam, because it is the fastest that torch has."""

import torch
from torch import nn

from bench.workers.worker import Job, Prepared, sparse_batch


def prepare(job: Job) -> Prepared:
    x = sparse_batch(job).to(job.dtype)
    encoder = nn.Linear(job.d, job.features, device=job.device, dtype=job.dtype)
    decoder = nn.Linear(job.features, job.d, device=job.device, dtype=job.dtype)
    with torch.no_grad():
        decoder.weight /= decoder.weight.norm(dim=0)
        encoder.weight.copy_(decoder.weight.t())
    parameters = [*encoder.parameters(), *decoder.parameters()]
    adam = torch.optim.Adam(parameters, lr=job.lr, fused=True)

    def step() -> None:
        z = torch.relu(encoder(x - decoder.bias))
        mse = (decoder(z) - x).pow(2).mean()
        (mse + 3e-5 * z.sum(dim=1).mean()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            decoder.weight /= decoder.weight.norm(dim=0)

    return Prepared(step=step, version=torch.__version__, note=f"weights, gradients and Adam in {job.dtype}; fused Adam")
