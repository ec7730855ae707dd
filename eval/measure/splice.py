"""The language model's loss when one layer's output is replaced.

Everything before the layer is the same for every replacement, so each batch of text goes through the whole model once and from
the layer on once for each replacement: half of the blocks, averaged over layers.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from shared.lm import find_blocks, load_model, widen
from shared.runs.rows import Rows
from shared.runs.sae import Sae

Replacement = Callable[[Tensor], Tensor]
Output = Tensor | tuple[Tensor, ...]  # of a block: some families wrap it

_SEQUENCES = 16  # in one forward pass at most; logits are [sequences, context, vocabulary], and there are
_LOGITS = 1 << 27  # values of them at most (half a gigabyte, and four such matrices), or one sequence


@dataclass(kw_only=True, frozen=True, slots=True)
class Loss:
    """Of the spliced model, in nats."""

    ce: float  # mean next-token cross-entropy over predicted tokens
    kl: float  # mean KL(model ‖ spliced model) over all positions


class SplicedModel:
    """A causal language model and its loss on fixed sequences under changes to its residual stream."""

    def __init__(self, model: str, revision: str | None, precision: str, device: torch.device, tokens: Tensor) -> None:
        """tokens int64 [sequences, context] are the text on which everything is measured."""
        self._lm = load_model(model, revision, precision, head=True).to(device)
        widen(self._lm)
        self._tokens = tokens.to(device)
        base = cast(nn.Module, self._lm.base_model)
        self._blocks = find_blocks(base)[1]

    @torch.inference_mode()
    def losses(self, layer: int, replacements: Sequence[Replacement]) -> tuple[float, list[Loss]]:
        """The model's own cross-entropy, and for each replacement its loss after the output [n, context, d] of block `layer`
        went through it."""
        sequences, context = self._tokens.shape
        vocabulary = int(cast(Any, self._lm).config.vocab_size)
        clean, ce, kl = 0.0, [0.0] * len(replacements), [0.0] * len(replacements)
        for tokens in torch.split(self._tokens, max(1, min(_SEQUENCES, _LOGITS // (context * vocabulary)))):
            with _reading(self._blocks[layer]) as outputs:
                log_p = self._log_probabilities(tokens)
            (output,) = outputs
            clean += _nats(log_p, tokens)
            p = log_p.exp()
            for i, replace in enumerate(replacements):
                with _starting_after(self._blocks[: layer + 1], _replaced(output, replace)):
                    log_q = self._log_probabilities(tokens)
                ce[i] += _nats(log_q, tokens)
                kl[i] += float(torch.linalg.vecdot(p, torch.sub(log_p, log_q, out=log_q)).sum(dtype=torch.float64))
        predicted, positions = sequences * (context - 1), sequences * context
        losses = [Loss(ce=c / predicted, kl=k / positions) for c, k in zip(ce, kl, strict=True)]
        return clean / predicted, losses

    def _log_probabilities(self, tokens: Tensor) -> Tensor:
        """Of every next token, float32 [n, context, vocabulary]."""
        logits = self._lm(input_ids=tokens, use_cache=False).logits
        return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def through(sae: Sae) -> Replacement:
    """x → x̂ in float32."""
    return lambda x: sae.decode(sae.encode(x.float())).to(x.dtype)


def constant(value: Tensor) -> Replacement:
    """x → value [d] at every position: mean ablation, where it is the mean."""
    return lambda x: value.to(x).expand_as(x)


def only(rows: Rows, replace: Replacement) -> Replacement:
    """At these rows alone; the others stay as the model has them."""

    def where(x: Tensor) -> Tensor:
        return torch.where(rows.kept(x, torch.arange(x.shape[1], device=x.device))[..., None], replace(x), x)

    return replace if rows.all else where


def _nats(log_p: Tensor, tokens: Tensor) -> float:
    return -float(log_p[:, :-1].gather(2, tokens[:, 1:, None]).sum(dtype=torch.float64))


def _replaced(output: Output, replace: Replacement) -> Output:
    return replace(output) if isinstance(output, Tensor) else (replace(output[0]), *output[1:])


@contextlib.contextmanager
def _reading(block: nn.Module) -> Iterator[list[Output]]:
    """What the block gives, as a list that grows with every pass."""
    outputs: list[Output] = []
    handle = block.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextlib.contextmanager
def _starting_after(blocks: nn.ModuleList, output: Output) -> Iterator[None]:
    """The blocks compute nothing; the last of them gives `output`."""

    def give(*_args: object, **_kwargs: object) -> Output:
        return output

    for block in blocks:
        block.__dict__["forward"] = give  # found before the class's own
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]
