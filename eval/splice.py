"""The language model's loss when one layer's output is replaced."""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from shared.lm import find_blocks, load_model
from train.sae import Sae

Replacement = Callable[[Tensor], Tensor]

_SEQUENCES = 16  # in one forward pass; logits are [sequences, context, vocabulary]


class SplicedModel:
    """A causal language model and the cross-entropy of fixed sequences under changes to its residual stream."""

    def __init__(self, model: str, revision: str | None, precision: str, device: torch.device, tokens: Tensor) -> None:
        """tokens int64 [sequences, context] are the text on which everything is measured."""
        self._lm = load_model(model, revision, precision, head=True).to(device)
        self._tokens = tokens.to(device)
        base = cast(nn.Module, self._lm.base_model)
        self._blocks = find_blocks(base)[1]

    @torch.inference_mode()
    def cross_entropy(self, layer: int | None = None, replace: Replacement | None = None) -> float:
        """Mean nats per predicted token; with `layer`, after its block's output [n, context, d] went through `replace`."""
        handle = None
        if layer is not None and replace is not None:
            handle = self._blocks[layer].register_forward_hook(_replacing(replace))
        try:
            total = math.fsum(self._nats(part) for part in torch.split(self._tokens, _SEQUENCES))
        finally:
            if handle is not None:
                handle.remove()
        return total / (self._tokens.shape[0] * (self._tokens.shape[1] - 1))

    def _nats(self, tokens: Tensor) -> float:
        logits = self._lm(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return float(loss.sum(dtype=torch.float64))


def through(sae: Sae) -> Replacement:
    """x → x̂ in float32."""
    return lambda x: sae.decode(sae.encode(x.float())).to(x.dtype)


def _replacing(replace: Replacement) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(output, Tensor):
            return replace(output)
        return (replace(output[0]), *output[1:])

    return hook
