"""What every worker shares: its arguments, its data and its conversation with the parent.

A worker prepares once and then says, as one JSON object a line on standard output,

    {"ready": true, "version": "...", "torch": "...", "note": "..."}

For each line `go` on standard input it runs ONE timed round and answers

    {"seconds": 1.234, "max_rss_bytes": 4567, "loss": 0.98}        (a writer says "bytes" instead of "loss")

`quit`, or the end of the input, ends it. A failure is said as {"error": "..."} before the exit, so that
the parent can report it. The parent therefore decides when each round runs and can interleave the peers.

With --check it trains at a tiny size on fixed synthetic sparse data instead, and fails unless the loss
falls.

Runs inside environments that hold only a peer and torch: nothing but the standard library and torch here.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

CHECK_ROUNDS = 40


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


def arguments(argv: list[str]) -> tuple[Job, bool]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument("--features", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--directory", type=Path, default=Path("build/bench/scratch"), help="where writers write")
    parser.add_argument("--check", action="store_true", help="train at a tiny size; fail unless the loss falls")
    given = vars(parser.parse_args(argv))
    check = given.pop("check")
    job = Job(**given)
    return (replace(job, d=64, features=512, tokens=1024, lr=3e-3) if check else job), check


def timed(prepared: Prepared, job: Job) -> dict[str, float]:
    if prepared.reset is not None:
        prepared.reset()
    _synchronize(job)
    start = time.perf_counter()
    facts = prepared.step()
    _synchronize(job)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "max_rss_bytes": peak, **facts}


def check(prepared: Prepared, job: Job) -> dict[str, object]:
    """The losses of the first and last round; a writer has none and passes by finishing."""
    rounds = [timed(prepared, job) for _ in range(CHECK_ROUNDS if prepared.reset is None else 1)]
    if "loss" not in rounds[0]:
        return {"check": "passed", **rounds[0]}
    first, last = rounds[0]["loss"], rounds[-1]["loss"]
    verdict = "passed" if last < 0.9 * first else "failed"
    return {"check": verdict, "rounds": len(rounds), "first_loss": first, "last_loss": last}


def main(prepare: Callable[[Job], Prepared]) -> None:
    # Peers print. What they print goes to standard error; the protocol keeps the real standard output.
    protocol = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(answer: dict[str, object]) -> None:
        protocol.write(json.dumps(answer) + "\n")

    job, checking = arguments(sys.argv[1:])
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    try:
        prepared = prepare(job)
        if checking:
            verdict = check(prepared, job)
            say(verdict)
            sys.exit(verdict["check"] != "passed")
        say({"ready": True, "version": prepared.version, "torch": torch.__version__, "note": prepared.note})
        for line in sys.stdin:
            if line.strip() == "quit":
                break
            say(dict(timed(prepared, job)))
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"[:500]})
        raise


def _synchronize(job: Job) -> None:
    if job.device.startswith("cuda"):
        torch.cuda.synchronize()
