"""The token array of a cache, written and read in chunks, each with an entry in the ledger."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from residual_saes.shared.cache.spec import CacheSpec
from residual_saes.shared.cache.zarr import stored_token_chunks, token_key
from residual_saes.shared.errors import UserError
from residual_saes.shared.seal import crc32c, from_bytes, to_bytes
from residual_saes.shared.stores import Store, local_path
from residual_saes.shared.typed import Bounds, read


@dataclass(kw_only=True, frozen=True, slots=True)
class TokenChunk:
    """The ledger's entry of one chunk of the token array."""

    crc32c: str
    source: dict[str, Any]  # the text's state before the documents that hold the first token after this chunk
    skip: Annotated[int, Bounds(0, 1 << 62)]  # tokens of those documents that are in this chunk or before it


class TokenArray:
    """The tokens of a cache. No default stands in for a chunk that is missing."""

    def __init__(self, store: Store, spec: CacheSpec) -> None:
        self._store, self._spec, self._digest = store, spec, spec.digest
        self._last: tuple[int, NDArray[Any]] | None = None  # the chunk read last, and its number

    def path(self, chunk: int) -> Path:
        return local_path(self._store, token_key(chunk))

    def entry_path(self, chunk: int) -> Path:
        return local_path(self._store, _entry_key(chunk))

    def missing(self) -> list[int]:
        """The chunks that are not written, by the names of entries and files."""
        written = self.written() & stored_token_chunks(self._store, self._spec)
        return [chunk for chunk in range(self._spec.token_chunks) if chunk not in written]

    def written(self) -> set[int]:
        """The chunks that have an entry."""
        entries = set(self._store.list("ledger/tokens"))
        return {chunk for chunk in range(self._spec.token_chunks) if f"{chunk:08d}.json" in entries}

    def commit(self, chunk: int, data: NDArray[Any], source: dict[str, Any], skip: int) -> None:
        """Write a chunk [token_chunk, context], and then its entry. Raises UserError, with nothing touched, for other tokens
        than the ledger has there: activations are of those."""
        entry = TokenChunk(crc32c=crc32c(data), source=source, skip=skip)
        try:
            known: TokenChunk | None = self.entry(chunk)
        except UserError:
            known = None  # none, or it is damaged and takes what is made now; blocks know their tokens' checksums
        if known is not None and known.crc32c != entry.crc32c:
            raise UserError(
                f"token chunk {chunk} of {self._store.root} came out otherwise than when it was written, so nothing was "
                "changed: use the versions of tokenizers, transformers and datasets that it was harvested with"
            )
        self._last = None
        self._store.write(token_key(chunk), memoryview(data.reshape(-1).view(np.uint8).data))
        if known is None:
            value = {"cache": self._digest, "chunk": chunk, **dataclasses.asdict(entry)}
            self._store.write(_entry_key(chunk), to_bytes(value))

    def entry(self, chunk: int) -> TokenChunk:
        """The ledger's entry of a chunk. Raises UserError if there is none, or it is damaged."""
        try:
            value = from_bytes(self._store.get(_entry_key(chunk)))
            if (value.pop("cache"), value.pop("chunk")) != (self._digest, chunk):
                raise ValueError("it is of another chunk")
            return read(TokenChunk, value)
        except FileNotFoundError:
            raise self._damaged(chunk, "it is not in the ledger") from None
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(chunk, f"its ledger entry is unreadable ({error})") from None

    def read_chunk(self, chunk: int) -> NDArray[Any]:
        """[token_chunk, context] in the token type, checked. Raises UserError naming the chunk."""
        if self._last is not None and self._last[0] == chunk:
            return self._last[1]
        entry, spec = self.entry(chunk), self._spec
        try:
            data = np.frombuffer(self._store.get(token_key(chunk)), np.uint8)
        except OSError as error:
            raise self._damaged(chunk, error.strerror or "unreadable") from None
        if data.size != spec.token_chunk * spec.context * spec.token_dtype.itemsize or crc32c(data) != entry.crc32c:
            raise self._damaged(chunk, "its checksum does not match")
        tokens = data.view(spec.token_dtype).reshape(spec.token_chunk, spec.context)
        self._last = chunk, tokens
        return tokens

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Sequences [start, stop) as int64 [stop - start, context], checked. Raises UserError naming a damaged chunk."""
        out = np.empty((stop - start, self._spec.context), dtype=np.int64)
        at, size = start, self._spec.token_chunk
        while at < stop:
            chunk, first = divmod(at, size)
            n = min(stop - at, size - first)
            out[at - start : at - start + n] = self.read_chunk(chunk)[first : first + n]
            at += n
        return out

    def checksum(self, tokens: NDArray[np.int64]) -> str:
        """What a block's entry holds of the tokens that it was made from."""
        return crc32c(tokens.astype(self._spec.token_dtype))

    def _damaged(self, chunk: int, why: str) -> UserError:
        root = self._store.root
        return UserError(f"token chunk {chunk} of {root} is damaged: {why}; mend it with `rsae harvest repair --cache {root}`")


def _entry_key(chunk: int) -> str:
    return f"ledger/tokens/{chunk:08d}.json"
