"""Text → tokens: documents from any source, one after the other, cut into contexts.

The whole token array is written before any activation, so that every later block can be computed by anybody, in any
order. It is written chunk by chunk, and each chunk's ledger entry holds the resume point of the next: a killed run continues
there without tokenising anything twice.
"""

import itertools
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from residual_saes.harvest.pieces import Piece, ResumePoint, TextSource, resume_point
from residual_saes.shared.cache import Cache, CacheSpec
from residual_saes.shared.errors import UserError
from residual_saes.shared.progress import Progress, say

# Tokenised in one call, over all cores: as many documents as there are in so many characters, and no more than these.
_DOCUMENTS = 256
_CHARACTERS = 2 << 20


@dataclass(kw_only=True, frozen=True, slots=True)
class _BatchStart:
    """Where a batch of pieces begins, as ledger entries hold it: the resume point, and a checksum of the piece there."""

    point: ResumePoint
    checksum: int  # CRC-32

    @classmethod
    def of(cls, piece: Piece) -> Self:
        return cls(point=piece.point, checksum=crc32(piece.text.encode()))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(point=resume_point(value.get("place")), checksum=value.get("text", 0))

    def to_json(self) -> dict[str, Any]:
        return {"place": asdict(self.point), "text": self.checksum}


def require_one_context(source: TextSource, tokenizer: PreTrainedTokenizerBase, spec: CacheSpec) -> None:
    """Raises UserError unless tokeniser and model fit and the text fills at least one context; reads no further than that."""
    special = [spec.separator, *_context_start(tokenizer, spec)]
    _require_known(np.array(special), tokenizer, spec)
    if not spec.bos and tokenizer.bos_token_id in tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids[:1]:
        say(
            f"note: the tokenizer of {spec.model} puts {tokenizer.bos_token} before a text; contexts here begin without it. "
            "Models that expect it at each context's start (Llama, Gemma) are harvested with --bos",
            err=True,
        )
    n = 0
    for _, tokens in _token_batches(source, tokenizer, spec, None):
        n += len(tokens)
        if n >= _text_tokens(spec):
            return
    raise UserError(f"the text of {source.dataset} is {n} tokens, shorter than one context of {spec.context}; lower --context")


def separator_id(tokenizer: PreTrainedTokenizerBase, name: str | None) -> int:
    """The token that ends a document: the tokeniser's end-of-text, or the one of this name or number. Raises UserError."""
    token = tokenizer.eos_token_id if name is None else tokenizer.get_vocab().get(name)
    if token is None and name is not None and name.isdecimal() and len(name) < 10:
        token = int(name)
    if token is None:
        special = ", ".join(map(str, tokenizer.all_special_tokens[:5]))
        raise UserError(f"the tokenizer has no token {name!r} to end documents with: name one, such as {special}")
    return int(token)


def _context_start(tokenizer: PreTrainedTokenizerBase, spec: CacheSpec) -> list[int]:
    """The tokens that every context begins with: BOS, or none. Raises UserError where the tokeniser has no BOS to give."""
    if spec.bos and tokenizer.bos_token_id is None:
        raise UserError(f"the tokenizer of {spec.model} has no token for the beginning of a text: leave out --bos")
    return [tokenizer.bos_token_id] if spec.bos else []


def _text_tokens(spec: CacheSpec) -> int:
    """Tokens of text in a context."""
    return spec.context - int(spec.bos)


def write_tokens(
    cache: Cache, source: TextSource, tokenizer: PreTrainedTokenizerBase, chunks: Collection[int] | None = None
) -> None:
    """Write these chunks of the token array, or all that it lacks. Raises UserError if the text runs out."""
    spec, wanted = cache.spec, sorted(cache.tokens.missing() if chunks is None else chunks)
    done = max(0, spec.sequences - len(wanted) * spec.token_chunk) * spec.context
    with Progress("tokenising", spec.sequences * spec.context, "tokens", start=done) as progress:
        while wanted:
            first = last = wanted.pop(0)
            while wanted and wanted[0] == last + 1:
                last = wanted.pop(0)
            _write_chunks(cache, source, tokenizer, range(first, last + 1), progress)


def _write_chunks(
    cache: Cache, source: TextSource, tokenizer: PreTrainedTokenizerBase, chunks: range, progress: Progress
) -> None:
    """Write consecutive chunks, reading from the last resume point before them that the ledger knows."""
    spec, per_context = cache.spec, _text_tokens(cache.spec)
    at, start, skip = _resume(cache, chunks.start)
    pending = np.empty(0, dtype=spec.token_dtype)
    for batch, tokens in _token_batches(source, tokenizer, spec, start):
        pending = np.concatenate([pending, tokens.astype(spec.token_dtype)[skip:]])
        skip = 0
        while at < chunks.stop:
            n = min(spec.token_chunk, spec.sequences - at * spec.token_chunk)
            if pending.size < n * per_context:
                break
            text, pending = pending[: n * per_context].reshape(n, per_context), pending[n * per_context :]
            if at in chunks:
                data = _chunk(cache, text, _context_start(tokenizer, spec))
                cache.tokens.commit(at, data, batch.to_json(), len(tokens) - pending.size)
            at += 1
            progress.update(min(at * spec.token_chunk, spec.sequences) * spec.context)
        if at == chunks.stop:
            return
    _refuse_short_text(cache, source, at * spec.token_chunk + pending.size // per_context)


def _resume(cache: Cache, chunk: int) -> tuple[int, _BatchStart | None, int]:
    """(chunk, where to read, tokens to skip there): the nearest start at or before `chunk` that the ledger knows."""
    for before in range(chunk - 1, -1, -1):
        try:
            entry = cache.tokens.entry(before)
            return before + 1, _BatchStart.from_json(entry.source), entry.skip
        except UserError:  # damaged; the one before it will do
            continue
    return 0, None, 0


def _token_batches(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, spec: CacheSpec, start: _BatchStart | None
) -> Iterator[tuple[_BatchStart, NDArray[np.int64]]]:
    """(start of a batch of documents, their tokens with the separator after each). Raises UserError if the text at `start` is
    another than when it was written down."""
    pieces = source.pieces(start.point if start else None)
    while batch := _take(pieces):
        began = _BatchStart.of(batch[0])
        if start is not None and began.checksum != start.checksum:
            raise UserError(
                f"{source.dataset} does not go on where tokenising stopped ({batch[0].where}): it has changed, or this version "
                "of `datasets` resumes wrongly; put the text back, install another version, or harvest into another folder"
            )
        start = None
        separator = [spec.separator]
        ids = (doc + separator if piece.ends else doc for piece, doc in zip(batch, _encode(tokenizer, batch), strict=True))
        tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int64)
        _require_known(tokens, tokenizer, spec)
        yield began, tokens


def _take(pieces: Iterator[Piece]) -> list[Piece]:
    batch: list[Piece] = []
    characters = 0
    while len(batch) < _DOCUMENTS and characters < _CHARACTERS and (piece := next(pieces, None)) is not None:
        batch.append(piece)
        characters += len(piece.text)
    return batch


def _encode(tokenizer: PreTrainedTokenizerBase, batch: list[Piece]) -> list[list[int]]:
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    try:
        return [encoding.ids for encoding in encode([piece.text for piece in batch], add_special_tokens=False)]
    except Exception as error:  # whatever a tokeniser cannot take
        if len(batch) == 1:
            raise UserError(f"{batch[0].where}: the tokenizer fails on it ({error}); leave that row out") from None
    return [ids for piece in batch for ids in _encode(tokenizer, [piece])]


def _require_known(tokens: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase, spec: CacheSpec) -> None:
    """Raises UserError for a token that the model does not have."""
    if tokens.size and (largest := int(tokens.max())) >= spec.vocab_size:
        raise UserError(
            f"the tokenizer of {spec.model} gives token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), the model "
            f"has {spec.vocab_size:,} tokens, counted from 0: the two do not belong together"
        )


def _chunk(cache: Cache, text: NDArray[Any], start: list[int]) -> NDArray[Any]:
    """The content of a chunk file, padded to the chunk's full size as Zarr requires.

    text [contexts, tokens of text]; every context begins with `start`.
    """
    chunk = np.zeros((cache.spec.token_chunk, cache.spec.context), dtype=cache.spec.token_dtype)
    chunk[: len(text), : len(start)] = start
    chunk[: len(text), len(start) :] = text
    return chunk


def _refuse_short_text(cache: Cache, source: TextSource, contexts: int) -> None:
    """A cache's shape follows from the token count, so one that cannot be filled, and never was, is taken away again."""
    spec = cache.spec
    usable = (contexts // spec.block_sequences - spec.holdout_blocks) * spec.block_rows
    cache.discard()
    advice = f"ask for at most --tokens {usable}" if usable > 0 else "lower --tokens, --holdout-tokens and --block-sequences"
    raise UserError(
        f"{source.dataset} ends after {contexts * spec.context} tokens, {spec.sequences * spec.context} are wanted; {advice}"
    )
