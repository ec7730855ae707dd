"""`rsae harvest import`: fill an activation cache from activations that another tool left in files."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residual_saes.harvest.arrays import Piece, Pieces, open_folder, read_tokens, token_file
from residual_saes.harvest.fill import FILLING, fill_cache
from residual_saes.harvest.plan import prepare_place
from residual_saes.harvest.run import HarvestConfig
from residual_saes.harvest.source import Sink
from residual_saes.harvest.writer import WriterConfig
from residual_saes.shared.cache import Cache, CacheSpec, Imported, Stored
from residual_saes.shared.cli import CACHE, COUNT, SEED, options
from residual_saes.shared.errors import UserError
from residual_saes.shared.identity import hash_files
from residual_saes.shared.presets import DATA, short_name
from residual_saes.shared.progress import say
from residual_saes.shared.sites import Site, format_sites, parse_sites
from residual_saes.shared.stores import Location, parse_folder
from residual_saes.shared.typed import read
from residual_saes.shared.units import Shard, parse_count

_CONTEXT = 64  # rows that are kept together where nothing says which belong together
_BLOCK_ROWS, _BLOCKS = 32_768, 64  # a block is as large, or a share of the rows as small
_TOKENS_AT_ONCE = 1 << 24


@dataclass(kw_only=True, frozen=True, slots=True)
class Rows:
    """Activations in files, row by row the same for every site: an `Origin` and what the spec says of it."""

    folder: Path
    sites: dict[Site, list[Piece]]
    tensor: str | None
    token_numbers: NDArray[Any] | None  # [rows], of a file of their own
    context: int | None  # rows of a sequence, where it is known

    @classmethod
    def open(cls, folder: Path, tensor: str | None, named: Site | None, context: int | None) -> "Rows":
        """Raises UserError for what does not fit together."""
        sites = _named(folder, open_folder(folder, tensor), named)
        (first, pieces), *others = sorted(sites.items())
        width, rows = pieces[0].d_model, sum(p.rows for p in pieces)
        for piece in (p for each in sites.values() for p in each):
            if piece.d_model != width:
                raise UserError(
                    f"{piece.name} has rows of {piece.d_model:,} and {pieces[0].name} of {width:,}: import them apart"
                )
        for site, each in others:
            if (n := sum(p.rows for p in each)) != rows:
                raise UserError(
                    f"layer {site} has {n:,} rows and layer {first} {rows:,}: a cache has the same rows at every site, so "
                    "leave out what is not whole, or import them apart"
                )
        path = token_file(folder)
        numbers = None if path is None else read_tokens(path)
        if numbers is not None and len(numbers) != rows:
            raise UserError(f"{path} has {len(numbers):,} token numbers for {rows:,} rows: each row has one")
        return cls(folder=folder, sites=sites, tensor=tensor, token_numbers=numbers, context=_context(sites, context))

    @property
    def rows(self) -> int:
        return sum(piece.rows for piece in next(iter(self.sites.values())))

    @property
    def d_model(self) -> int:
        return next(iter(self.sites.values()))[0].d_model

    @property
    def has_tokens(self) -> bool:
        return self.token_numbers is not None or self._token_pieces()[0].tokens is not None

    def tokens(self, first: int, last: int) -> NDArray[Any]:
        """Token numbers of some rows, zeros where there are none. Raises UserError for what are none."""
        if self.token_numbers is not None:
            numbers: NDArray[Any] = np.asarray(self.token_numbers[first:last])
        elif self.has_tokens:
            numbers = torch.cat([p.token_rows(a, b) for p, a, b in _parts(self._token_pieces(), first, last)]).numpy()
        else:
            return np.zeros(last - first, np.int64)
        if numbers.min() < 0 or numbers.max() >= 1 << 32:
            raise UserError(f"{self.folder} has token numbers from {numbers.min():,} to {numbers.max():,}: none may be below 0")
        return numbers

    def _token_pieces(self) -> list[Piece]:
        """Those of a site that has token numbers, if one has."""
        return next((p for p in self.sites.values() if all(q.tokens for q in p)), next(iter(self.sites.values())))

    def described(self) -> Imported:
        """What fixes the bytes."""
        files = [f for _, pieces in sorted(self.sites.items()) for piece in pieces for f in piece.files]
        numbers = token_file(self.folder)
        if unread := [f for f in files if not f.is_file()]:
            raise UserError(f"cannot read {unread[0]}: it is gone")
        return Imported(
            sites=tuple(sorted(self.sites)),
            rows=self.rows,
            positions=self.context is not None,
            tokens=self.has_tokens,
            tensor=self.tensor or "",
            sha256=hash_files(list(dict.fromkeys([*files, *([numbers] if numbers else [])]))),
        )

    # --- as an `Origin` ---

    def require_same_tokens(self, cache: Cache) -> None:
        """The spec settles it."""

    def write_tokens(self, cache: Cache, chunks: Collection[int] | None = None) -> None:
        spec = cache.spec
        for chunk in cache.tokens.missing() if chunks is None else chunks:
            first = chunk * spec.token_chunk
            data = np.zeros((spec.token_chunk, spec.context), spec.token_dtype)
            n = min(spec.token_chunk, spec.sequences - first)
            data[:n] = self.tokens(first * spec.context, (first + n) * spec.context).reshape(n, spec.context)
            cache.tokens.commit(chunk, data, {}, 0)

    def source(self, spec: CacheSpec, sites: tuple[Site, ...], device: torch.device) -> "FileRows":
        if absent := set(sites).difference(self.sites):
            raise UserError(f"layers {format_sites(absent)} are not in {self.folder}: it has {format_sites(self.sites)}")
        return FileRows(self, sites)


class FileRows:
    """Rows of files: an `ActivationSource`, on the CPU."""

    def __init__(self, rows: Rows, sites: tuple[Site, ...]) -> None:
        self.sites, self.d_model, self.device = sites, rows.d_model, torch.device("cpu")
        self._pieces = {site: rows.sites[site] for site in sites}

    def run(self, tokens: Tensor, sink: Sink, first: int = 0) -> None:
        """As `ActivationSource.run`. Raises UserError for rows with a NaN."""
        n, context = tokens.shape
        for site, pieces in self._pieces.items():
            parts = [p.read(a, b) for p, a, b in _parts(pieces, first * context, (first + n) * context)]
            sink(site, torch.cat(parts).view(n, context, self.d_model))


def imported_again(cache: Cache, folder: str | None) -> Rows:
    """The files that a cache was imported from, where they lay then or where `folder` says. Raises UserError for others."""
    spec, place = cache.spec, Path(folder or cache.spec.dataset)
    assert spec.imported is not None
    tensor = spec.imported.tensor or None
    named = spec.imported.sites[0] if None in open_folder(place, tensor) else None
    rows = Rows.open(place, tensor, named, spec.context if spec.imported.positions else None)
    if spec.differences(replace(spec, imported=rows.described())):
        raise UserError(
            f"{place} does not hold the activations that {cache.path} was made from, so nothing was changed: put them back, or "
            "name their folder with --dataset"
        )
    return rows


def _parts(pieces: list[Piece], first: int, last: int) -> list[tuple[Piece, int, int]]:
    """The pieces that hold rows first to last of all of them, and which of their own rows these are."""
    parts, begin = [], 0
    for piece in pieces:
        a, b = max(first - begin, 0), min(last - begin, piece.rows)
        if a < b:
            parts.append((piece, a, b))
        begin += piece.rows
    return parts


def _named(folder: Path, pieces_of: Pieces, named: Site | None) -> dict[Site, list[Piece]]:
    """By site. Raises UserError where names say it of some files and of others not."""
    sites = {site: pieces for site, pieces in pieces_of.items() if site is not None}
    unnamed = pieces_of.get(None)
    if sites and (unnamed or named is not None):
        what = f"{unnamed[0].name} has no site in its name" if unnamed else "--as names one more"
        raise UserError(
            f"{folder} has layers {format_sites(sites)} by their names, and {what}: put that into a folder of its own"
        )
    return {Site(0) if named is None else named: unnamed} if unnamed else sites


def _context(sites: dict[Site, list[Piece]], given: int | None) -> int | None:
    """Rows of a sequence: what the files say, or whoever knows. Raises UserError where these differ."""
    pieces = [p for each in sites.values() for p in each]
    known = {p.context: p for p in pieces if p.known}
    if len(known) > 1:
        a, b = list(known.values())[:2]
        raise UserError(f"{a.name} has sequences of {a.context:,} rows and {b.name} of {b.context:,}: import them apart")
    context = next(iter(known), given)
    if given not in (None, context):
        raise UserError(f"{next(iter(known.values())).name} has sequences of {context:,} rows: leave --context out")
    if context is not None and (odd := [p for p in pieces if p.rows % context]):
        raise UserError(
            f"{odd[0].name} has {odd[0].rows:,} rows, which are no whole sequences of {context:,}: leave --context out"
        )
    return context


def spec_of(rows: Rows, *, name: str, holdout: int | None, block_sequences: int | None, store: Stored, seed: int) -> CacheSpec:
    """The spec of a cache of these rows. Raises UserError where they are too few."""
    context = rows.context or _CONTEXT
    sequences = rows.rows // context
    largest = max(1, _BLOCK_ROWS // context)
    per_block = block_sequences or min(largest, max(1, sequences // _BLOCKS))
    n_blocks = sequences // per_block
    held = -(-(min(2_000_000, rows.rows // 10) if holdout is None else holdout) // (per_block * context))
    if n_blocks - held < 1:
        raise UserError(
            f"{rows.folder} has {rows.rows:,} rows, too few for blocks of {per_block * context:,}, {held} of them held out: "
            "lower --holdout-tokens or --block-sequences"
        )
    spec = CacheSpec(
        model=name, dataset=str(rows.folder), context=context, d_model=rows.d_model, n_layers=max(rows.sites).layer + 1,
        vocab_size=_vocabulary(rows), block_sequences=per_block, n_blocks=n_blocks, holdout_blocks=held, seed=seed,
        imported=rows.described(), store=store,
    )  # fmt: skip
    try:
        return read(CacheSpec, spec.to_dict())
    except ValueError as error:
        raise UserError(f"{rows.folder} makes no cache: {error}") from None


def _vocabulary(rows: Rows) -> int:
    """One more than the largest token number."""
    if not rows.has_tokens:
        return 1
    steps = range(0, rows.rows, _TOKENS_AT_ONCE)
    return 1 + max(int(rows.tokens(a, min(a + _TOKENS_AT_ONCE, rows.rows)).max()) for a in steps)


def _one_site(text: str) -> Site:
    sites = parse_sites(text)
    if len(sites) != 1:
        raise UserError(f"{text} is not one site: write 12 or 12.mlp_out")
    return sites[0]


@click.command("import")
@click.option("--from", "folder", type=parse_folder, metavar="PLACE", required=True, help="File or folder of activations.")
@options(CACHE)
@click.option("--layers", help="Sites to import now, such as 0-5 or 3,8.mlp_out [default: all there are].")
@click.option("--as", "named", type=_one_site, metavar="SITE", help="What files are whose names name no site [default: 0].")
@click.option("--tensor", help="Which tensor of .safetensors files that have several.")
@click.option("--context", type=click.IntRange(1, 1 << 24), help="Rows of a sequence, where files have rows alone.")
@click.option("--holdout-tokens", type=parse_count, help="Rows held out for evaluation [default: a tenth, at most 2M].")
@click.option("--block-sequences", type=COUNT, help="Sequences in a block [default: 32,768 rows, fewer of few].")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the order inside blocks.")
@FILLING
def import_command(
    folder: Path,
    cache: Location | None,
    layers: str | None,
    named: Site | None,
    tensor: str | None,
    context: int | None,
    holdout_tokens: int | None,
    block_sequences: int | None,
    store: Stored,
    seed: int,
    threads: int,
    shard: Shard,
) -> None:
    """Fill a cache from activations of another tool: .npy, .safetensors, Zarr, SAELens', saev's. Run it again to continue."""
    rows = Rows.open(folder, tensor, named, context)
    name = short_name(str(folder))
    spec = spec_of(rows, name=name, holdout=holdout_tokens, block_sequences=block_sequences, store=store, seed=seed)
    sites = parse_sites(layers, spec.n_layers) if layers else tuple(sorted(rows.sites))
    rows.source(spec, sites, torch.device("cpu"))
    place = DATA / name if cache is None else cache
    prepare_place(place, spec, sites)
    if left := rows.rows - spec.n_blocks * spec.block_rows:
        say(f"note: the last {left:,} of {rows.rows:,} rows do not fill a block and are left out", err=True)
    if rows.context is None:
        say("note: which rows belong together is not known, so positions mean nothing; --context says it", err=True)
    config = HarvestConfig(device=torch.device("cpu"), writer=WriterConfig(threads=threads), shard=shard)
    fill_cache(place, spec, sites, rows, config, again=layers is not None)
