"""A source that is no language model, from its rows to a cache that is whole."""

import threading
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor

from residual_saes.harvest.care import verify
from residual_saes.harvest.run import HarvestConfig, harvest_blocks
from residual_saes.harvest.source import ActivationSource, Sink
from residual_saes.shared.cache import Cache
from residual_saes.shared.errors import UserError
from residual_saes.shared.sites import Site, parse_sites
from tests.devices import DEVICES
from tests.shared.cache.test_cache import SPEC

CPU = torch.device("cpu")
SITES = parse_sites("0,2,2.mlp_out")


class RandomRows:
    """A synthetic world: rows are drawn by site and number of the sequence, whatever its tokens are."""

    def __init__(self, d_model: int = SPEC.d_model, device: torch.device = CPU) -> None:
        self.sites, self.d_model, self.device = SITES, d_model, device

    def run(self, tokens: Tensor, sink: Sink, first: int = 0) -> None:
        for site in self.sites:
            rows = [self.rows(site, n) for n in range(first, first + len(tokens))]
            sink(site, torch.stack(rows).to(self.device))

    def rows(self, site: Site, sequence: int) -> Tensor:
        generator = torch.Generator().manual_seed(crc32(f"{site} {sequence}".encode()))
        return torch.randn(SPEC.context, self.d_model, generator=generator)


@pytest.fixture
def world(tmp_path: Path) -> Cache:
    """A cache with the tokens of a world that has none."""
    cache = Cache.create(tmp_path / "c", SPEC, SITES)
    for chunk in cache.tokens.missing():
        cache.tokens.commit(chunk, np.zeros((SPEC.token_chunk, SPEC.context), SPEC.token_dtype), {}, 0)
    return cache


def fill(cache: Cache, source: ActivationSource, *blocks: int, sequences: int = 1, replace: bool = False) -> None:
    harvest_blocks(cache, source, list(blocks), HarvestConfig(device=CPU, forward_sequences=sequences), replace=replace)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_lie_where_their_sequences_are(world: Cache, device: str) -> None:
    source = RandomRows(device=torch.device(device))
    fill(world, source, *range(SPEC.n_blocks))
    assert world.missing(SITES) == {} and verify(world, SITES, 1).lines == []
    for site in SITES:
        drawn = torch.cat([source.rows(site, n) for n in range(SPEC.sequences)])
        assert torch.equal(torch.from_numpy(world.layer(site)[:]), drawn.half())
    files = [world.block_path(site, 3) for site in SITES]
    whole = [file.read_bytes() for file in files]
    files[2].write_bytes(bytes(SPEC.block_bytes))
    assert list(verify(world, SITES, 1).blocks) == [(SITES[2], 3)]
    fill(world, source, 3, sequences=2, replace=True)
    assert [file.read_bytes() for file in files] == whole and verify(world, SITES, 1).lines == []


def test_the_next_block_is_read_while_one_runs(world: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    read, following = Cache.block_tokens, threading.Event()

    def watched(self: Cache, block: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
        assert threading.current_thread().name.startswith("inputs")
        if block == 1:
            following.set()
        return read(self, block)

    class Patient(RandomRows):
        def run(self, tokens: Tensor, sink: Sink, first: int = 0) -> None:
            assert following.wait(20), "nothing was read ahead"
            super().run(tokens, sink, first)

    monkeypatch.setattr(Cache, "block_tokens", watched)
    fill(world, Patient(), 3, 1)
    assert world.committed(SITES[0]) == {1, 3}


def test_activations_of_another_width_are_refused(world: Cache) -> None:
    with pytest.raises(UserError, match="activations are 4 wide, the cache expects 3"):
        fill(world, RandomRows(d_model=4), 0)
