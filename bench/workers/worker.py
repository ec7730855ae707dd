"""A process that runs another library: `python -m bench.workers.worker NAME JOB`, a job as JSON.

It prepares once and then says, as one JSON object a line on standard output,

    {"ready": true, "version": "...", "torch": "...", "note": "..."}

For each line `go` on standard input it runs ONE timed round and answers

    {"seconds": 1.234}

`quit`, or the end of the input, ends it. A failure is said as {"error": "..."} before the exit, so that
the parent can report it. The parent therefore decides when each round runs and can interleave the peers.

Runs inside environments that hold only a peer and torch: nothing but those, the standard library and bench/harness.py here.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from bench.harness import reason, timed


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is asked to do in a round."""

    d: int
    features: int
    tokens: int
    threads: int
    device: str
    directory: str  # where writers write
    lr: float = 3e-4
    bf16: bool = True  # what products are in; float32 on a processor that would emulate it, as its users would have it

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A peer ready to run: `step` is timed, `reset` is not."""

    step: Callable[[], object]
    version: str
    note: str
    reset: Callable[[], None] = lambda: None


def sparse_batch(job: Job) -> Tensor:
    """Activations with something to find: each token the sum of 16 of 2d unit directions, plus noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2 * job.d, job.d, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    active = torch.randint(0, 2 * job.d, (job.tokens, 16), generator=generator)
    strength = torch.rand(job.tokens, 16, generator=generator) + 0.5
    x = torch.nn.functional.embedding_bag(active, directions, per_sample_weights=strength, mode="sum")
    x += 0.01 * torch.randn(x.shape, generator=generator)
    return x.to(job.device)


def main(name: str, job: Job) -> None:
    # Peers print. What they print goes to standard error; the protocol keeps the real standard output.
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(answer: dict[str, object]) -> None:
        protocol.write(json.dumps(answer) + "\n")

    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    try:
        prepared: Prepared = import_module(f"bench.workers.{name}").prepare(job)
        say({"ready": True, "version": prepared.version, "torch": torch.__version__, "note": prepared.note})
        for line in sys.stdin:
            if line.strip() == "quit":
                break
            prepared.reset()
            say({"seconds": timed(prepared.step, job.device)})
    except Exception as error:
        say({"error": reason(error)})
        raise


if __name__ == "__main__":
    main(sys.argv[1], Job(**json.loads(sys.argv[2])))
