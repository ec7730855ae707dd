"""What a harvest will write, whether there is room for it, and how long the disk takes."""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from residual_saes.shared.cache import LEDGER_BYTES_PER_LAYER, Cache, CacheSpec
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import UNKNOWN_FREE, existing, write_all
from residual_saes.shared.sites import Site
from residual_saes.shared.stores import Location, open_store
from residual_saes.shared.units import format_bytes, format_seconds

_PROBE_BYTES = 64 << 20


@dataclass(kw_only=True, frozen=True, slots=True)
class Plan:
    """Bytes and time of a harvest that has not begun."""

    spec: CacheSpec
    sites: tuple[Site, ...]
    free: int
    write_rate: float | None  # bytes per second, measured; a bucket is not tried

    def __str__(self) -> str:
        s, layer, total = self.spec, _layer_bytes(self.spec), planned_bytes(self.spec, self.sites)
        fits = min(10**6, max(0, (self.free - s.token_bytes) // layer))
        room = f"{format_bytes(self.free)}: room for {fits:,} layers of this size"
        probe = "none: nothing is sent to a bucket to find out"
        if self.write_rate is not None:
            least = format_seconds(total / self.write_rate)
            probe = f"{format_bytes(self.write_rate)}/s: writing takes at least {least}"
        half = replace(s, store="int8")
        return "\n".join(
            (
                f"tokens      {s.n_blocks * s.block_rows:,} ({s.train_tokens:,} to train on, the rest held out)",
                f"blocks      {s.n_blocks:,} of {s.block_rows:,} rows, {format_bytes(s.block_bytes)} a layer",
                f"per layer   {format_bytes(layer)} ({layer:,} bytes)",
                f"in all      {format_bytes(total)} ({total:,} bytes) for {len(self.sites)} layers",
                *[f"--store int8  {format_bytes(planned_bytes(half, self.sites))} in all"] * (s != half),
                f"free disk   {'unknown: the file system does not say' if self.free == UNKNOWN_FREE else room}",
                f"write probe {probe}",
            )
        )


def _layer_bytes(spec: CacheSpec) -> int:
    return spec.n_blocks * (spec.block_bytes + LEDGER_BYTES_PER_LAYER)


def planned_bytes(spec: CacheSpec, sites: tuple[Site, ...]) -> int:
    """Bytes that a harvest of these layers writes, ledger included."""
    return _layer_bytes(spec) * len(sites) + spec.token_bytes


def whole_blocks(tokens: int, holdout_tokens: int, rows: int) -> tuple[int, int]:
    """(blocks in all, blocks held out) of so many rows that hold these tokens."""
    train, holdout = -(-tokens // rows), -(-holdout_tokens // rows)
    return train + holdout, holdout


def prepare_place(place: Location, spec: CacheSpec, sites: tuple[Site, ...]) -> None:
    """Raises UserError where nothing can be written, or where a new cache of these layers does not fit."""
    open_store(place).prepare()
    if not Cache.exists(place):
        require_space(place, planned_bytes(spec, sites))


def make_plan(path: Location, spec: CacheSpec, sites: tuple[Site, ...], threads: int) -> Plan:
    rate = probe_write(path, threads) if isinstance(path, Path) else None
    return Plan(spec=spec, sites=sites, free=open_store(path).free(), write_rate=rate)


def probe_write(path: Path, threads: int, seconds: float = 2.0) -> float:
    """Bytes per second of durable writes by `threads` threads at `path`, over about two seconds.

    Writes to files without a name in the nearest folder that exists, so that nothing of it can stay. Raises UserError.
    """
    data = np.random.default_rng(0).integers(0, 255, _PROBE_BYTES, dtype=np.uint8)
    folder = existing(path)
    began = time.perf_counter()

    def write(_: int) -> int:
        written = 0
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            while not written or time.perf_counter() - began < seconds:
                file.seek(0)
                write_all(file.fileno(), data.data)
                written += data.nbytes
        return written

    try:
        with ThreadPoolExecutor(threads) as pool:
            total = sum(pool.map(write, range(threads)))
        return total / (time.perf_counter() - began)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}; choose another folder") from None


def remaining_bytes(cache: Cache, sites: tuple[Site, ...], *, freed: bool = False) -> int:
    """Bytes that a harvest of these layers still writes; with `freed` those of blocks that were freed as well."""
    spec = cache.spec
    blocks = sum(len(group) * len(blocks) for group, blocks in cache.missing(sites, freed=freed).items())
    tokens = len(cache.tokens.missing()) * spec.token_bytes // spec.token_chunks
    return blocks * (spec.block_bytes + LEDGER_BYTES_PER_LAYER) + tokens


def require_space(path: Location, needed: int) -> None:
    """Raises UserError unless so many bytes are free at `path`."""
    free = open_store(path).free()
    if needed > free:
        raise UserError(
            f"the harvest needs {format_bytes(needed)} more at {path}, and {format_bytes(free)} are free: "
            "harvest fewer --layers or --tokens, or choose a larger disk; `rsae harvest plan` says what fits"
        )
