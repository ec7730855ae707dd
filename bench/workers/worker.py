"""What every worker shares: its arguments, its data and its conversation with the parent.

A worker prepares once and then says, as one JSON object a line on standard output,

    {"ready": true, "version": "...", "torch": "...", "note": "..."}

For each line `go` on standard input it runs ONE timed round and answers

    {"seconds": 1.234, "loss": 0.98}        (a writer says "bytes" instead of "loss")

`quit`, or the end of the input, ends it. A failure is said as {"error": "..."} before the exit, so that
the parent can report it. The parent therefore decides when each round runs and can interleave the peers.

Runs inside environments that hold only a peer and torch: nothing but those, the standard library and bench/clock.py here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.clock import timed


@dataclass(frozen=True, kw_only=True)
class Job:
    d: int
    features: int
    tokens: int
    threads: int
    device: str
    directory: Path
    lr: float = 3e-4


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A peer ready to run: `step` is timed, `reset` is not; `step` returns the facts of its round."""

    step: Callable[[], dict[str, float]]
    version: str
    note: str
    reset: Callable[[], None] | None = None


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


def arguments(argv: list[str]) -> Job:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name in ("d", "features", "tokens", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--directory", type=Path, required=True, help="where writers write")
    return Job(**vars(parser.parse_args(argv)))


def round_seconds(prepared: Prepared, job: Job) -> float:
    return round_of(prepared, job)["seconds"]


def round_of(prepared: Prepared, job: Job) -> dict[str, float]:
    if prepared.reset is not None:
        prepared.reset()
    facts: dict[str, float] = {}
    seconds = timed(lambda: facts.update(prepared.step()), job.device)
    return {"seconds": seconds, **facts}


def main(prepare: Callable[[Job], Prepared]) -> None:
    # Peers print. What they print goes to standard error; the protocol keeps the real standard output.
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(answer: dict[str, object]) -> None:
        protocol.write(json.dumps(answer) + "\n")

    job = arguments(sys.argv[1:])
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    try:
        prepared = prepare(job)
        say({"ready": True, "version": prepared.version, "torch": torch.__version__, "note": prepared.note})
        for line in sys.stdin:
            if line.strip() == "quit":
                break
            say(dict(round_of(prepared, job)))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"[:500]})
        raise
