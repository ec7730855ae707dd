"""Text → tokens: documents from any `datasets` source, one after the other, cut into contexts.

The whole token array is written before any activation, so that every later block can be computed by anybody, in any
order. It is written chunk by chunk, and after each chunk a ledger remembers where in the source the next one begins:
a killed run continues there without tokenising anything twice.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from shared.cache import Cache, crc32c
from shared.cli import UserError
from shared.files import publish_json, sync_dir, write_file
from shared.lm import hash_files, unreachable
from shared.progress import Progress

if TYPE_CHECKING:  # imported where text is read: whoever harvests from tokens that are there needs no `datasets`
    from datasets import IterableDataset

_DOCUMENTS = 256  # documents tokenised in one call; the tokeniser spreads them over all cores
_BUILDERS = {"jsonl": "json", "json": "json", "parquet": "parquet", "txt": "text", "text": "text"}
_COMPRESSIONS = ("gz", "xz", "zst", "bz2")


@dataclass(kw_only=True, frozen=True, slots=True)
class TextSource:
    """A dataset and the column of it that holds the text."""

    dataset: str
    revision: str | None
    split: str
    column: str

    @property
    def local_files(self) -> list[Path]:
        path = Path(self.dataset)
        if path.is_file():
            return [path]
        if path.is_dir():
            return sorted(p for p in path.rglob("*") if p.is_file() and _builder(p))
        return []

    def pinned_revision(self) -> str:
        """The hub's commit, or a hash of local files. Raises UserError if the source cannot be reached."""
        if self.local_files:
            return hash_files(self.local_files)
        if self.revision is not None:
            return self.revision
        from huggingface_hub import HfApi

        try:
            return str(HfApi().dataset_info(self.dataset).sha)
        except Exception as error:
            raise unreachable(f"the dataset {self.dataset}", error) from None

    def documents(self) -> "IterableDataset":
        """A resumable stream of rows. Raises UserError for a missing source, an empty one, or a missing column."""
        from datasets.exceptions import DatasetNotFoundError

        try:
            # A stream's state follows the iterator made last, so the row that is looked at comes from a stream of its own.
            first = next(iter(self._open()), None)
        except (DatasetNotFoundError, ConnectionError, FileNotFoundError, OSError, ValueError) as error:
            raise unreachable(f"the dataset {self.dataset}", error) from None
        if first is None:
            raise UserError(f"the dataset {self.dataset} is empty")
        if self.column not in first:
            raise UserError(
                f"the dataset {self.dataset} has no column {self.column!r}; it has {', '.join(sorted(first))}: "
                "name one with --text-column"
            )
        return self._open()

    def _open(self) -> "IterableDataset":
        from datasets import load_dataset

        if Path(self.dataset).exists():
            return self._open_local()
        return load_dataset(self.dataset, revision=self.revision, split=self.split, streaming=True)

    def _open_local(self) -> "IterableDataset":
        from datasets import load_dataset

        files = self.local_files
        builders = {_builder(f) for f in files}
        if len(builders) != 1 or None in builders:
            raise UserError(f"{self.dataset}: expected files of one kind out of {', '.join(_BUILDERS)} (compressed or not)")
        if not any(f.stat().st_size for f in files):
            raise UserError(f"the dataset {self.dataset} is empty")
        return load_dataset(builders.pop(), data_files=[str(f) for f in files], split="train", streaming=True)


def _builder(path: Path) -> str | None:
    suffixes = [s.lstrip(".") for s in path.suffixes if s.lstrip(".") not in _COMPRESSIONS]
    return _BUILDERS.get(suffixes[-1]) if suffixes else None


def load_tokenizer(model: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, use_fast=True)
    except (OSError, ValueError) as error:
        raise unreachable(f"the tokenizer of {model}", error) from None
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model} is not a fast tokenizer with an end-of-text token; use another model")
    # Contexts are cut here, so a document longer than the model's own limit is nothing to warn about.
    tokenizer.model_max_length = 1 << 62
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


def require_one_context(source: TextSource, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    """Raises UserError unless the text fills at least one context; reads no further than that."""
    n = 0
    for _, tokens in _token_batches(source, tokenizer, None):
        n += len(tokens)
        if n >= context:
            return
    raise UserError(f"the text of {source.dataset} is {n} tokens, shorter than one context of {context}; lower --context")


def write_tokens(cache: Cache, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Fill the token array, continuing where the ledger says. Raises UserError if the text runs out."""
    spec, ledger = cache.spec, TokenLedger.load(cache)
    if ledger.sequences == spec.sequences:
        return
    pending = np.empty(0, dtype=spec.token_dtype)
    with Progress("tokenising", spec.sequences * spec.context, "tokens", start=ledger.sequences * spec.context) as progress:
        for state, batch in _token_batches(source, tokenizer, ledger.source):
            tokens = batch.astype(spec.token_dtype)[ledger.skip :]
            ledger.skip = 0
            pending = np.concatenate([pending, tokens])
            while ledger.sequences < spec.sequences:
                n = min(spec.token_chunk, spec.sequences - ledger.sequences)
                if pending.size < n * spec.context:
                    break
                _write_chunk(cache, ledger, pending[: n * spec.context])
                pending = pending[n * spec.context :]
                position = TokenLedger(
                    sequences=ledger.sequences, chunks=ledger.chunks, source=state, skip=len(batch) - pending.size
                )
                publish_json(cache.token_ledger, asdict(position))
            if ledger.sequences == spec.sequences:
                progress.update(ledger.sequences * spec.context)
                return
            progress.update(ledger.sequences * spec.context + pending.size)
        _refuse_short_text(cache, source, ledger.sequences * spec.context + pending.size)


def _token_batches(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, state: dict[str, Any] | None
) -> Iterator[tuple[dict[str, Any], NDArray[np.int64]]]:
    """(state of the stream before the batch, its documents' tokens each followed by the separator)."""
    stream = source.documents()
    if state is not None:
        stream.load_state_dict(state)
    rows = iter(stream)
    while True:
        before = stream.state_dict()
        texts = [str(row[source.column] or "") for row in itertools.islice(rows, _DOCUMENTS)]
        if not texts:
            return
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        separator = [tokenizer.eos_token_id]
        yield before, np.fromiter(itertools.chain.from_iterable(doc + separator for doc in ids), dtype=np.int64)


def _write_chunk(cache: Cache, ledger: TokenLedger, tokens: NDArray[Any]) -> None:
    """Write the next chunk file, padded to the chunk's full size as Zarr requires, and count it."""
    chunk = np.zeros((cache.spec.token_chunk, cache.spec.context), dtype=cache.spec.token_dtype)
    chunk.reshape(-1)[: tokens.size] = tokens
    path = cache.token_chunk_path(len(ledger.chunks))
    write_file(path, chunk.data)
    sync_dir(path.parent)
    ledger.chunks.append(crc32c(chunk))
    ledger.sequences += tokens.size // cache.spec.context


def _refuse_short_text(cache: Cache, source: TextSource, tokens: int) -> None:
    """The shape of the cache follows from the token count, so a cache that cannot be filled is taken away again."""
    spec = cache.spec
    usable = tokens // spec.block_rows * spec.block_rows - spec.holdout_blocks * spec.block_rows
    shutil.rmtree(cache.path / "activations.zarr")
    shutil.rmtree(cache.path / "ledger")
    advice = f"ask for at most --tokens {usable}" if usable > 0 else "lower --tokens, --holdout-tokens and --block-sequences"
    raise UserError(f"{source.dataset} ends after {tokens} tokens, {spec.sequences * spec.context} are wanted; {advice}")
