"""How many layers fit: what a window of layers adds to a disk at most, before anything is begun.

Sizes are those that the disk gives, whole pages a file. Of each part the estimate is an upper bound, so that what was found to
fit also fits after a kill, when some of it is there.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from residual_saes.shared.cache import LEDGER_BYTES_PER_LAYER, Cache, CacheSpec
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import PAGE
from residual_saes.shared.runs.run import SNAPSHOTS, made
from residual_saes.shared.sites import Site
from residual_saes.shared.units import format_bytes

_HEADER = 8 << 10  # of a checkpoint or a state: its configuration, and what its format adds
_CURVE = 128 << 10  # a training curve: 300 records
_RECORD = 8 << 10  # of an evaluation, in JSON and CSV, and once more while they are replaced
_OTHER = 256 << 10  # configurations, metadata of arrays, the job's own log


@dataclass(kw_only=True, frozen=True, slots=True)
class Room:
    """Bytes that a window adds: for all of it, and for each of its layers."""

    tokens: int  # once
    states: int  # while a layer is trained
    stays: dict[Site, int]  # {layer: held-out blocks, entries of the ledger, checkpoints, results}
    passes: dict[Site, int]  # {layer: training blocks}
    present: dict[Site, int]  # {layer: those of them that are present already}


@dataclass(kw_only=True, frozen=True, slots=True)
class Window:
    layers: tuple[Site, ...]
    peak: int  # bytes on the disk at most


def room(spec: CacheSpec, cache: Cache | None, runs: Sequence[Path], layers: Sequence[Site], features: int) -> Room:
    """What these layers need beside what is there, of as many settings as there are run folders."""
    weights = 4 * (2 * features * spec.d_model + features + 2 * spec.d_model)
    sae = _pages(weights + _HEADER)
    results = _pages(4 * (5 * features + spec.context) + _HEADER) + _RECORD
    stays, present, block = {}, {}, _pages(spec.block_bytes)
    for layer in layers:
        groups = [range(spec.n_blocks)] if cache is None else cache.missing((layer,), freed=True).values()
        missing = [n for blocks in groups for n in blocks]
        held = sum(n >= spec.train_blocks for n in missing)
        saes = sum(max(0, SNAPSHOTS - made(folder, (layer,))) for folder in runs)
        trained = saes * sae + len(runs) * (SNAPSHOTS * results + _CURVE)
        stays[layer] = held * block + trained + len(missing) * (PAGE + LEDGER_BYTES_PER_LAYER)
        present[layer] = 0 if cache is None else len(cache.freeable(layer)) * block
    chunks = spec.token_chunks if cache is None else len(cache.tokens.missing())
    return Room(
        tokens=chunks * (_pages(spec.token_bytes // spec.token_chunks) + PAGE) + _OTHER,
        states=(len(runs) + 1) * _pages(3 * weights + 8 * features + _HEADER),
        stays=stays,
        passes=dict.fromkeys(layers, spec.train_blocks * block),
        present=present,
    )


def windows(used: int, need: Room, disk: int) -> list[Window]:
    """Each as many layers as fit beside what is there by then; `used` is that without these layers' training blocks, which
    go as soon as a window is done. Raises UserError where not even one fits."""
    found, rest = [], list(need.stays)
    used += need.tokens
    while rest:
        peak, taken = used + need.states + sum(need.present[layer] for layer in rest), list[Site]()
        while rest and (more := peak + need.stays[rest[0]] + need.passes[rest[0]] - need.present[rest[0]]) <= disk:
            peak = more
            taken.append(rest.pop(0))
        if not taken:
            raise UserError(
                f"layer {rest[0]} needs {format_bytes(more)} on the disk with what is there by then, more than the "
                f"{format_bytes(disk)} of --disk: give more, take fewer --tokens, or move finished runs elsewhere"
            )
        found.append(Window(layers=tuple(taken), peak=peak))
        used += sum(need.stays[layer] for layer in taken)
    return found


def used_bytes(cache: Path, runs: Path) -> int:
    """What is on the disk, but for resume states, for which there is room in every window."""
    return _disk_use(cache) + sum(
        _disk_use(path) - _disk_use(path / "state") if path.is_dir() else _size(path)
        for path in (runs.iterdir() if runs.is_dir() else ())
    )


def _disk_use(folder: Path) -> int:
    return sum(_size(Path(where) / name) for where, _, names in os.walk(folder) for name in names)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except OSError:  # gone meanwhile
        return 0


def _pages(n: int) -> int:
    return -(-n // PAGE) * PAGE
