"""One byte turned anywhere on the disk: the command that uses it names it, or makes what it would have made anyway.

verify   notices every one in blocks, tokens and ledger
train    notices those in the cache and in its resume states, or trains the SAEs of an undisturbed run
eval     notices those in the cache, in checkpoints and in their configuration, or measures what it would have measured
"""

import random
import sys
from pathlib import Path

import pytest

from tests.crash.sweep import Sweep, contents, difference, flip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the commands' server is started with glibc's preloading")

PLACES = 3  # of each kind of file and command
VERIFY = ("harvest", "verify", "--preset", "demo", "--cache", "cache", "--threads", "2")
FILES = {
    "blocks": "cache/activations.zarr/resid_post/*/c.*",
    "tokens": "cache/activations.zarr/tokens/c.*",
    "ledger": "cache/ledger/**/*.json",
    "arrays": "cache/**/zarr.json",
    "cache": "cache/cache.json",  # of format 2
    "states": "runs/*/state/**/*.safetensors",
    "checkpoints": "runs/*/*.pt",
    "configurations": "runs/*/config.json",
    "curves": "runs/*/metrics/*.jsonl",
}


USES = [
    ("verify", "blocks"), ("verify", "tokens"), ("verify", "ledger"), ("verify", "arrays"), ("verify", "cache"),
    ("train", "blocks"), ("train", "ledger"), ("train", "arrays"), ("train", "cache"),
    ("eval", "blocks"), ("eval", "tokens"), ("eval", "ledger"), ("eval", "arrays"), ("eval", "cache"),
    ("resume", "states"), ("resume", "checkpoints"), ("resume", "configurations"), ("resume", "curves"),
    ("eval", "checkpoints"), ("eval", "configurations"),
]  # fmt: skip


@pytest.mark.parametrize(("use", "kind"), [USES[0], *(pytest.param(*use, marks=pytest.mark.slow) for use in USES[1:])])
def test_a_flipped_byte(sweep: Sweep, use: str, kind: str) -> None:
    scenario = sweep.scenario("eval" if use == "verify" else use)
    files = sorted(path.relative_to(scenario.start) for path in scenario.start.glob(FILES[kind]) if path.is_file())
    place = random.Random(use + kind)
    unnoticed = []
    for _ in range(PLACES):
        file = place.choice(files)
        at = place.randrange((scenario.start / file).stat().st_size)
        if why := harm(sweep, use, file, at):
            unnoticed.append(f"{file} at {at}: {why}")
    assert unnoticed == []


def harm(sweep: Sweep, use: str, file: Path, at: int) -> str:
    """What a flipped byte does; "" if it is noticed by name, or does nothing."""
    scenario = sweep.scenario("eval" if use == "verify" else use)
    with sweep.worker() as worker:
        worker.restore(scenario.start)
        before = contents(worker.folder)
        flip(worker.folder / file, at)
        flipped = contents(worker.folder)
        ended = worker.run(VERIFY if use == "verify" else scenario.argv)
        there = contents(worker.folder)
    if ended.code:
        return "" if names(file, ended.said) else f"not named: {ended.why}"
    if any("damaged" in line and names(file, line) for line in ended.said.splitlines()):
        return ""  # a point of a curve is dropped with a line, and training goes on
    if use == "verify":
        return "not noticed"
    # what the command neither reads nor writes keeps its flipped byte; all else must be as ever
    kept = {k for k in before.keys() | flipped.keys() if before.get(k) != flipped.get(k) == there.get(k)}
    return difference(there, {k: v for k, v in scenario.wanted.items() if k not in kept})


def names(file: Path, said: str) -> bool:
    """Whether one line says which file it was, by path or by what is in it."""
    if "Traceback" in said:
        return False
    number = file.name.split(".")[1] if file.name.startswith("c.") else file.stem.lstrip("0") or "0"
    what = (f"token chunk {number}",) if "tokens" in file.parts else (f"block {number} ",)
    return any(name in said for name in (file.name, str(file.parent), "cache is", *what))
