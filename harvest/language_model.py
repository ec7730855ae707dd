"""The language model as a source of activations: without its head, and cut off after the last wanted layer.

Activations are what goes into decoder blocks and modules in them or comes out, taken by hooks. (`output_hidden_states` will not
do: the last of them is taken after the final layer norm.) One pass serves all wanted sites. Pythia in bfloat16 on a CPU takes
a faster way to the same values (harvest/neox.py); every other model, precision and device takes the hooks.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from residual_saes.harvest.neox import neox_forward
from residual_saes.harvest.source import Sink
from residual_saes.shared.device import announce, send
from residual_saes.shared.identity import Model
from residual_saes.shared.lm import Values, find_blocks, first, hook_of, load_model, widen
from residual_saes.shared.sites import Site


class LanguageModel:
    """The `ActivationSource` of a base model, which it cuts short in place. Raises UserError for sites that the model lacks."""

    def __init__(self, base: nn.Module, sites: tuple[Site, ...], device: torch.device) -> None:
        self.device, self.sites = device, sites
        self._sink: Sink | None = None
        name, blocks = find_blocks(base)
        for site in sites:
            hook_of(base, site).take(self._taking(site))
        kept = blocks[: max(sites).layer + 1]
        setattr(base, name, kept)
        config = cast(PretrainedConfig, base.config)
        config.num_hidden_layers, self.d_model = len(kept), int(config.hidden_size)
        if config.model_type == "gpt_neox":  # whose fast way ends there; in another family a norm may be in front as well
            base.final_layer_norm = nn.Identity()
        self.model = base.to(device).eval().requires_grad_(False)
        self.fast = neox_forward(self.model)
        if self.fast is None:
            widen(self.model)

    def _taking(self, site: Site) -> Callable[[Values], None]:
        def take(values: Values) -> None:
            if self._sink is not None:
                self._sink(site, first(values))

        return take

    @torch.inference_mode()
    def run(self, tokens: Tensor, sink: Sink, first: int = 0) -> None:
        """As `ActivationSource.run`, in the order in which the model comes to the sites."""
        if self.fast is not None:
            for site, output in self.fast.run(tokens, self.sites):
                sink(site, output)
            return
        self._sink = sink
        try:
            with _never_packed():
                self.model(input_ids=send(tokens, self.device), use_cache=False)
        finally:
            self._sink = None


def load_language_model(model: Model, sites: tuple[Site, ...], precision: str, device: torch.device) -> LanguageModel:
    """Raises UserError where the model cannot be loaded or lacks a site."""
    source = LanguageModel(load_model(str(model.folder), None, precision, head=False), sites, device)
    announce(device)
    return source


@contextlib.contextmanager
def _never_packed() -> Iterator[None]:
    """Keep transformers from asking the device, before every pass, whether several texts are packed into a context with
    positions of their own: it waits for all that is queued to hear that they are not. Before 4.53 it did not ask."""
    name = "find_packed_sequence_indices"
    try:
        masks: Any = importlib.import_module("transformers.masking_utils")
        ask = getattr(masks, name)
    except (ImportError, AttributeError):
        yield
        return
    setattr(masks, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masks, name, ask)
