"""What a cache is made from: a language model reading a text, or a synthetic world."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from residual_saes.harvest.language_model import load_language_model
from residual_saes.harvest.pieces import TextSource
from residual_saes.harvest.source import ActivationSource, Sink
from residual_saes.harvest.tokens import write_tokens
from residual_saes.shared.cache import Cache, CacheSpec
from residual_saes.shared.errors import UserError
from residual_saes.shared.identity import Model, tokenizer_hash
from residual_saes.shared.lm import load_tokenizer
from residual_saes.shared.sites import Site
from residual_saes.shared.synthetic.world import World, world_of


class Origin(Protocol):
    """What a cache was compared with; nothing is loaded from anywhere else."""

    def require_same_tokens(self, cache: Cache) -> None:
        """Raises UserError unless it gives the tokens that the cache was made from."""

    def write_tokens(self, cache: Cache, chunks: Collection[int] | None = None) -> None:
        """Write these chunks of the token array, or all that it lacks. Raises UserError."""

    def source(self, spec: CacheSpec, sites: tuple[Site, ...], device: torch.device) -> ActivationSource:
        """A source of the cache's activations. Raises UserError."""


@dataclass(kw_only=True, frozen=True, slots=True)
class ReadText:
    """A language model that reads a text: an `Origin`."""

    text: TextSource
    model: Model

    def require_same_tokens(self, cache: Cache) -> None:
        tokenizer = load_tokenizer(str(self.model.folder), None)
        given = replace(
            cache.spec,
            dataset=self.text.dataset,
            dataset_revision=self.text.pinned_revision(),
            tokenizer_sha256=tokenizer_hash(tokenizer),
        )
        if different := cache.spec.differences(given):
            raise UserError(
                f"{self.text.dataset} is not the text that {cache.path} was made from ({'; '.join(different)}), "
                "so nothing was changed: put it back, or name it with --dataset"
            )

    def write_tokens(self, cache: Cache, chunks: Collection[int] | None = None) -> None:
        write_tokens(cache, self.text, load_tokenizer(str(self.model.folder), None), chunks)

    def source(self, spec: CacheSpec, sites: tuple[Site, ...], device: torch.device) -> ActivationSource:
        return load_language_model(self.model, sites, spec.precision, device)


class Synthetic:
    """A synthetic world: an `Origin` that needs nothing but the cache's spec. Its sequences have one token, again and again."""

    def require_same_tokens(self, cache: Cache) -> None:
        """The spec settles it."""

    def write_tokens(self, cache: Cache, chunks: Collection[int] | None = None) -> None:
        spec = cache.spec
        for chunk in cache.tokens.missing() if chunks is None else chunks:
            cache.tokens.commit(chunk, np.zeros((spec.token_chunk, spec.context), spec.token_dtype), {}, 0)

    def source(self, spec: CacheSpec, sites: tuple[Site, ...], device: torch.device) -> ActivationSource:
        return WorldSource(spec, sites)


class WorldSource:
    """Rows of synthetic worlds, one for each site: an `ActivationSource`, on the CPU whatever trains on them."""

    def __init__(self, spec: CacheSpec, sites: tuple[Site, ...]) -> None:
        self.sites, self.d_model, self.device = sites, spec.d_model, torch.device("cpu")
        self._worlds: dict[Site, World] = {site: world_of(spec, site) for site in sites}

    def run(self, tokens: Tensor, sink: Sink, first: int = 0) -> None:
        """As `ActivationSource.run`: a sequence's rows follow from its number."""
        n, rows = tokens.shape
        for site, world in self._worlds.items():
            sink(site, torch.stack([world.rows(first + i, rows) for i in range(n)]))
