"""The language model's loss when its activations at one site are replaced.

Everything before the layer is the same for every replacement, so each batch of text goes through the whole model once and from
the layer on once for each replacement: half of the blocks, averaged over layers.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from residual_saes.eval.measure.active import Encoder
from residual_saes.shared.lm import Hook, Values, changed, find_blocks, first, hook_of, load_model, widen
from residual_saes.shared.runs.rows import Rows
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import ATTN_OUT, RESID_MID, Site

Replacement = Callable[[Tensor, Tensor], Tensor]  # what is read, and the site's own, [n, context, d] → what takes its place

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
    def losses(self, site: Site, replacements: Sequence[Replacement], inputs: Sequence[Site] = ()) -> tuple[float, list[Loss]]:
        """The model's own cross-entropy, and for each replacement its loss with that in place of the site's activations. Those
        are read, or those of `inputs` beside each other, as they are before anything is replaced."""
        sequences, context = self._tokens.shape
        vocabulary = int(cast(Any, self._lm).config.vocab_size)
        earlier, hooks = self._blocks[: site.layer], self._hooks(site)
        sources = [hook_of(self._base, of) for of in inputs] or hooks[:1]
        before = Hook(earlier[-1], "output") if len(earlier) else None
        clean, ce, kl = 0.0, [0.0] * len(replacements), [0.0] * len(replacements)
        for tokens in torch.split(self._tokens, max(1, min(_SEQUENCES, _LOGITS // (context * vocabulary)))):
            with _reading({*hooks, *sources, *([before] if before else [])}) as seen:
                log_p = self._log_probabilities(tokens)
            read, given = [first(seen[source]) for source in sources], {}
            x = read[0] if len(read) == 1 else torch.cat(read, dim=-1)
            if before:
                given = {Hook(block, "output"): seen[before] for block in earlier}
            clean += _nats(log_p, tokens)
            p = log_p.exp()
            for i, replace in enumerate(replacements):
                with _giving(given | _spliced(hooks, seen, replace(x, first(seen[hooks[0]])))):
                    log_q = self._log_probabilities(tokens)
                ce[i] += _nats(log_q, tokens)
                kl[i] += float(torch.linalg.vecdot(p, torch.sub(log_p, log_q, out=log_q)).sum(dtype=torch.float64))
        predicted, positions = sequences * (context - 1), sequences * context
        losses = [Loss(ce=c / predicted, kl=k / positions) for c, k in zip(ce, kl, strict=True)]
        return clean / predicted, losses

    def _hooks(self, site: Site) -> list[Hook]:
        """Where the site's activations are, and after it all else that is given when they are replaced.

        The stream inside a block is read by its MLP and goes around it. It is replaced for both, without a rounding, where
        the block is given the replacement and its attention adds nothing.
        """
        if site.hook != RESID_MID:
            return [hook_of(self._base, site)]
        block = Hook(self._blocks[site.layer], "input")
        return [hook_of(self._base, site), block, hook_of(self._base, Site(site.layer, ATTN_OUT))]

    def _log_probabilities(self, tokens: Tensor) -> Tensor:
        """Of every next token, float32 [n, context, vocabulary]."""
        logits = self._lm(input_ids=tokens, use_cache=False).logits
        return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def through(sae: Sae) -> Replacement:
    """x → x̂ in float32."""
    encoder = Encoder(sae)
    return lambda x, output: encoder.reconstruct(x.float()).to(output.dtype)


def zeros(_: Tensor, output: Tensor) -> Tensor:
    """Zero ablation."""
    return torch.zeros_like(output)


def constant(value: Tensor) -> Replacement:
    """Value [d] at every position: mean ablation, where it is the mean."""
    return lambda _, output: value.to(output).expand_as(output)


def only(rows: Rows, replace: Replacement) -> Replacement:
    """At these rows alone; the others stay as the model has them."""

    def where(x: Tensor, output: Tensor) -> Tensor:
        kept = rows.kept(x, torch.arange(x.shape[1], device=x.device))
        return torch.where(kept[..., None], replace(x, output), output)

    return replace if rows.all else where


def _nats(log_p: Tensor, tokens: Tensor) -> float:
    return -float(log_p[:, :-1].gather(2, tokens[:, 1:, None]).sum(dtype=torch.float64))


def _spliced(hooks: Sequence[Hook], seen: dict[Hook, Values], x: Tensor) -> dict[Hook, Values]:
    """What is given at these hooks, see `_hooks`, where the activations are x."""
    at, *others = hooks
    if not others:
        return {at: changed(seen[at], lambda _: x)}
    block, attention = others
    return {block: changed(seen[block], lambda _: x), attention: changed(seen[attention], torch.zeros_like)}


@contextlib.contextmanager
def _reading(hooks: Iterable[Hook]) -> Iterator[dict[Hook, Values]]:
    """What a pass comes to at these hooks."""
    seen: dict[Hook, Values] = {}
    handles = [hook.take(partial(seen.__setitem__, hook)) for hook in hooks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _other(given: Values, _values: Values) -> Values:
    return given


@contextlib.contextmanager
def _giving(values: dict[Hook, Values]) -> Iterator[None]:
    """These modules read what is given here, or compute nothing and give it themselves."""
    handles = [hook.take(partial(_other, given)) for hook, given in values.items() if hook.side == "input"]
    outputs = {hook.module: given for hook, given in values.items() if hook.side == "output"}
    for module, output in outputs.items():
        module.__dict__["forward"] = lambda *_args, output=output, **_kwargs: output  # found before the class's own
    try:
        yield
    finally:
        for module in outputs:
            del module.__dict__["forward"]
        for handle in handles:
            handle.remove()
