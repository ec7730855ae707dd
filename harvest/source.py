"""The seam to whatever gives activations: a language model, files of another tool, a synthetic world."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from residual_saes.shared.sites import Site

Sink = Callable[[Site, Tensor], None]


class ActivationSource(Protocol):
    """Activations of a cache's sequences at some sites.

    A row follows from its sequence alone, from the tokens or from the sequence's number, so that a block comes out the same
    whoever makes it, when, and in passes of whatever size. Tokens lie in the cache first; a source without a text invents them.
    """

    sites: tuple[Site, ...]  # ascending
    d_model: int
    device: torch.device  # of the activations

    def run(self, tokens: Tensor, sink: Sink, first: int = 0) -> None:
        """tokens int64 [sequences, context] → sink(site, float [sequences, context, d_model]), once for each site.

        `first` is the number in the cache of the first of these sequences, for a source that reads or draws rows by number.
        """
