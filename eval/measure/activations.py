"""What a language model's sites give for tokens that are in no cache."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from residual_saes.shared.cache import CacheSpec
from residual_saes.shared.lm import Values, first, hook_of, load_model, widen
from residual_saes.shared.sites import Site


class SiteReader:
    """A language model without its head, in the precision of a harvest, and its activations at some sites."""

    def __init__(self, folder: str, spec: CacheSpec, sites: Collection[Site], device: torch.device) -> None:
        """Raises UserError where the model cannot be loaded or has no such site."""
        self._model, self._device = load_model(folder, None, spec.precision, head=False).to(device), device
        self._taken: dict[Site, Tensor] = {}
        widen(self._model)
        for site in sites:
            hook_of(self._model, site).take(self._taking(site))

    def _taking(self, site: Site) -> Callable[[Values], None]:
        def take(values: Values) -> None:
            self._taken[site] = first(values)

        return take

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> dict[Site, Tensor]:
        """Tokens [n, length] → activations [n, length, d] of each site, in the model's precision and on its device."""
        self._taken = {}
        self._model(input_ids=tokens.to(self._device), use_cache=False)
        return self._taken
