"""Text → tokens: documents from any source, one after the other, cut into contexts.

The whole token array is written before any activation, so that every later block can be computed by anybody, in any
order. It is written chunk by chunk, and after each chunk a ledger remembers where in the source the next one begins:
a killed run continues there without tokenising anything twice.
"""

import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from harvest.source import Piece
from harvest.source import TextSource as TextSource
from shared.cache import Cache, CacheSpec, crc32c
from shared.cli import UserError
from shared.files import publish_json, sync_dir, write_file
from shared.lm import unreachable
from shared.progress import Progress

# Tokenised in one call, over all cores: as many documents as there are in so many characters, and no more than these.
_DOCUMENTS = 256
_CHARACTERS = 2 << 20


def load_tokenizer(model: str, revision: str | None) -> PreTrainedTokenizerBase:
    """A fast tokeniser for whole documents: nothing cut off or added, special tokens quoted in a text are text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, use_fast=True, trust_remote_code=False)
    except Exception as error:  # each kind of tokeniser has its own ways of failing
        raise unreachable(f"the tokenizer of {model}", error) from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model} is not a fast tokenizer with an end-of-text token; use another model")
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


@dataclass(kw_only=True, slots=True)
class TokenLedger:
    """How far the token array is written, and where in the source the next token is."""

    sequences: int = 0
    chunks: list[str] = field(default_factory=list)  # crc32c of each chunk file
    source: dict[str, Any] | None = None  # the stream's state before the batch of documents that holds the next token
    skip: int = 0  # tokens of that batch already written

    @classmethod
    def load(cls, cache: Cache) -> "TokenLedger":
        if not cache.token_ledger.exists():
            return cls()
        return cls(**json.loads(cache.token_ledger.read_text()))


def require_one_context(source: TextSource, tokenizer: PreTrainedTokenizerBase, spec: CacheSpec) -> None:
    """Raises UserError unless tokeniser and model fit and the text fills at least one context; reads no further than that."""
    special = [tokenizer.eos_token_id, *_context_start(tokenizer, spec)]
    _require_known(np.array(special), tokenizer, spec)
    if not spec.bos and tokenizer.bos_token_id in tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids[:1]:
        print(
            f"note: the tokenizer of {spec.model} puts {tokenizer.bos_token} before a text; contexts here begin without it. "
            "Models that expect it at each context's start (Llama, Gemma) are harvested with --bos",
            file=sys.stderr,
        )
    n = 0
    for _, tokens in _token_batches(source, tokenizer, spec, None):
        n += len(tokens)
        if n >= _text_tokens(spec):
            return
    raise UserError(f"the text of {source.dataset} is {n} tokens, shorter than one context of {spec.context}; lower --context")


def _context_start(tokenizer: PreTrainedTokenizerBase, spec: CacheSpec) -> list[int]:
    """The tokens that every context begins with: BOS, or none. Raises UserError where the tokeniser has no BOS to give."""
    if spec.bos and tokenizer.bos_token_id is None:
        raise UserError(f"the tokenizer of {spec.model} has no token for the beginning of a text: leave out --bos")
    return [tokenizer.bos_token_id] if spec.bos else []


def _text_tokens(spec: CacheSpec) -> int:
    """Tokens of text in a context."""
    return spec.context - int(spec.bos)


def write_tokens(cache: Cache, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill the token array, continuing where the ledger says. Raises UserError if the text runs out."""
    spec, ledger = cache.spec, TokenLedger.load(cache)
    if ledger.sequences == spec.sequences:
        return
    start, per_context = _context_start(tokenizer, spec), _text_tokens(spec)
    pending = np.empty(0, dtype=spec.token_dtype)
    with Progress("tokenising", spec.sequences * spec.context, "tokens", start=ledger.sequences * spec.context) as progress:
        for state, batch in _token_batches(source, tokenizer, spec, ledger.source):
            tokens = batch.astype(spec.token_dtype)[ledger.skip :]
            ledger.skip = 0
            pending = np.concatenate([pending, tokens])
            while ledger.sequences < spec.sequences:
                n = min(spec.token_chunk, spec.sequences - ledger.sequences)
                if pending.size < n * per_context:
                    break
                _write_chunk(cache, ledger, pending[: n * per_context].reshape(n, per_context), start)
                pending = pending[n * per_context :]
                position = TokenLedger(
                    sequences=ledger.sequences, chunks=ledger.chunks, source=state, skip=len(batch) - pending.size
                )
                publish_json(cache.token_ledger, asdict(position))
            if ledger.sequences == spec.sequences:
                progress.update(ledger.sequences * spec.context)
                return
            progress.update(ledger.sequences * spec.context + pending.size)
        _refuse_short_text(cache, source, ledger.sequences + pending.size // per_context)


def _token_batches(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, spec: CacheSpec, state: dict[str, Any] | None
) -> Iterator[tuple[dict[str, Any], NDArray[np.int64]]]:
    """(where the source is to be opened for this batch, its documents' tokens each followed by the separator).

    A state holds a checksum of the text that it leads to. Raises UserError if it leads to another.
    """
    pieces = source.pieces(state and state["place"])
    while batch := _take(pieces):
        found = {"place": batch[0].place, "text": crc32(batch[0].text.encode())}
        if state is not None and found["text"] != state["text"]:
            raise UserError(
                f"{source.dataset} does not go on where tokenising stopped ({batch[0].where}): it has changed, or this version "
                "of `datasets` resumes wrongly; put the text back, install another version, or harvest into another folder"
            )
        state = None
        separator = [tokenizer.eos_token_id]
        ids = (doc + separator if piece.ends else doc for piece, doc in zip(batch, _encode(tokenizer, batch), strict=True))
        tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int64)
        _require_known(tokens, tokenizer, spec)
        yield found, tokens


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
        return [found.ids for found in encode([piece.text for piece in batch], add_special_tokens=False)]
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


def _write_chunk(cache: Cache, ledger: TokenLedger, text: NDArray[Any], start: list[int]) -> None:
    """Write the next chunk file, padded to the chunk's full size as Zarr requires, and count it.

    text [contexts, tokens of text]; every context begins with `start`.
    """
    chunk = np.zeros((cache.spec.token_chunk, cache.spec.context), dtype=cache.spec.token_dtype)
    chunk[: len(text), : len(start)] = start
    chunk[: len(text), len(start) :] = text
    path = cache.token_chunk_path(len(ledger.chunks))
    write_file(path, chunk.data)
    sync_dir(path.parent)
    ledger.chunks.append(crc32c(chunk))
    ledger.sequences += len(text)


def _refuse_short_text(cache: Cache, source: TextSource, contexts: int) -> None:
    """A cache's shape follows from the token count, so one that cannot be filled, and never was, is taken away again."""
    spec = cache.spec
    usable = (contexts // spec.block_sequences - spec.holdout_blocks) * spec.block_rows
    if not any(cache.committed(layer) for layer in cache.layers):
        shutil.rmtree(cache.path / "activations.zarr")
        shutil.rmtree(cache.path / "ledger")
    advice = f"ask for at most --tokens {usable}" if usable > 0 else "lower --tokens, --holdout-tokens and --block-sequences"
    raise UserError(
        f"{source.dataset} ends after {contexts * spec.context} tokens, {spec.sequences * spec.context} are wanted; {advice}"
    )
