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

from residual_saes.shared.lm import find_blocks, hook_module, load_model, widen
from residual_saes.shared.runs.rows import Rows
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site

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
        self._base = cast(nn.Module, self._lm.base_model)
        self._blocks = find_blocks(self._base)[1]

    @torch.inference_mode()
    def losses(self, site: Site, replacements: Sequence[Replacement]) -> tuple[float, list[Loss]]:
        """The model's own cross-entropy, and for each replacement its loss after the activations [n, context, d] of the site
        went through it."""
        sequences, context = self._tokens.shape
        vocabulary = int(cast(Any, self._lm).config.vocab_size)
        earlier, module = self._blocks[: site.layer], hook_module(self._base, site)
        clean, ce, kl = 0.0, [0.0] * len(replacements), [0.0] * len(replacements)
        for tokens in torch.split(self._tokens, max(1, min(_SEQUENCES, _LOGITS // (context * vocabulary)))):
            with _reading([*earlier[-1:], module]) as outputs:
                log_p = self._log_probabilities(tokens)
            *before, output = outputs
            clean += _nats(log_p, tokens)
            p = log_p.exp()
            for i, replace in enumerate(replacements):
                given = {block: stream for stream in before for block in earlier} | {module: replaced(output, replace)}
                with _giving(given):
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


def replaced(output: Output, replace: Replacement) -> Output:
    """A module's output with another first part."""
    return replace(output) if isinstance(output, Tensor) else (replace(output[0]), *output[1:])


@contextlib.contextmanager
def _reading(modules: Sequence[nn.Module]) -> Iterator[list[Output]]:
    """The outputs of these modules, as a list that grows in the order in which a pass comes to them."""
    outputs: list[Output] = []
    handles = [m.register_forward_hook(lambda _module, _args, output: outputs.append(output)) for m in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _giving(outputs: dict[nn.Module, Output]) -> Iterator[None]:
    """These modules compute nothing: each gives its output here."""
    for module, output in outputs.items():
        module.__dict__["forward"] = lambda *_args, output=output, **_kwargs: output  # found before the class's own
    try:
        yield
    finally:
        for module in outputs:
            del module.__dict__["forward"]
