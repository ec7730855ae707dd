"""Tokens → residual activations: the language model without its head, cut off after the last wanted layer.

Activations are the outputs of decoder blocks or of modules in them, taken by forward hooks. (`output_hidden_states` will not
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

from harvest.neox import neox_forward
from shared.device import send
from shared.lm import find_blocks, hook_module, widen
from shared.sites import RESID_POST, Site

Sink = Callable[[Site, Tensor], None]

_FINAL_NORMS = ("final_layer_norm", "norm", "ln_f")


class ResidualModel:
    """Runs a base model (which it cuts short in place) and hands each wanted block's output to a sink."""

    def __init__(self, base: nn.Module, sites: tuple[Site, ...], device: torch.device) -> None:
        self.device, self.sites = device, sites
        self._sink: Sink | None = None
        name, blocks = find_blocks(base)
        for site in sites:
            hook_module(base, site).register_forward_hook(self._hook(site))
        kept = blocks[: max(sites).layer + 1]
        setattr(base, name, kept)
        config = cast(PretrainedConfig, base.config)
        config.num_hidden_layers, self.d_model = len(kept), int(config.hidden_size)
        for norm in _FINAL_NORMS:
            if isinstance(getattr(base, norm, None), nn.Module):
                setattr(base, norm, nn.Identity())
        self.model = base.to(device).eval().requires_grad_(False)
        self.fast = neox_forward(self.model) if all(site.hook == RESID_POST for site in sites) else None
        if self.fast is None:
            widen(self.model)

    def _hook(self, site: Site) -> Callable[..., None]:
        def take(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            # transformers 5 returns a tensor from a block, transformers 4 a tuple that begins with it
            if self._sink is not None:
                self._sink(site, output if isinstance(output, Tensor) else output[0])

        return take

    @torch.inference_mode()
    def run(self, tokens: Tensor, sink: Sink) -> None:
        """tokens int64 [sequences, context] → sink(layer, float [sequences, context, d_model]) in layer order."""
        if self.fast is not None:
            self.fast.run(tokens, lambda layer, output: sink(Site(layer), output) if Site(layer) in self.sites else None)
            return
        self._sink = sink
        try:
            with _never_packed():
                self.model(input_ids=send(tokens, self.device), use_cache=False)
        finally:
            self._sink = None


@contextlib.contextmanager
def _never_packed() -> Iterator[None]:
    """Before every pass transformers asks the device whether several texts are packed into a context with positions of their
    own, and waits for all that is queued to hear it. They are not; where it does not ask (before 4.53) nothing is changed."""
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
