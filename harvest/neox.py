"""GPT-NeoX blocks in bfloat16 on a CPU, the harvest's hot path there.

The model's own weights, oneDNN's products, and neox.c for all that lies between. There transformers makes some twenty
passes a block, most of them into fresh memory; here it is five, over buffers that stay. Arithmetic between the products is
float32, so this rounds less often than the model it stands in for.
"""

import ctypes
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residual_saes.shared.compile import arguments, load
from residual_saes.shared.lm import wide_weights
from residual_saes.shared.progress import say
from residual_saes.shared.sites import ATTN_OUT, MLP_IN, MLP_OUT, Site

_CHECKED_TOKENS = 64
_TOLERANCE = 0.05  # relative, between two bfloat16 forwards of all layers: 0.014 apart for Pythia-410M with random weights


class NeoxForward:
    """Runs the decoder blocks of a transformers GPTNeoXModel on a CPU."""

    def __init__(self, base: nn.Module, library: ctypes.CDLL) -> None:
        self._base: Any = base
        self._c = library
        self._rows = 0
        self._wide = wide_weights(base)

    def run(self, tokens: Tensor, sites: Collection[Site]) -> Iterator[tuple[Site, Tensor]]:
        """tokens int64 [sequences, context] → each site and its activations [sequences, context, d_model].

        Those of the stream and its norms are bfloat16. What is added to the stream is float32: rounded once, in the product.
        """
        sequences, context = tokens.shape
        x = self._base.embed_in(tokens)
        rows, d, heads = sequences * context, x.shape[-1], self._base.config.num_attention_heads
        cos, sin = self._angles(context)
        shape = (sequences, context, heads, d // heads, cos.shape[1])
        self._reserve(rows, d)
        a, b, qkv, turned, hidden = self._a, self._b, self._qkv, self._turned, self._hidden
        for layer, block in enumerate(self._base.layers):
            first, second, attention, mlp = block.input_layernorm, block.post_attention_layernorm, block.attention, block.mlp
            affine = (first.weight, first.bias, second.weight, second.bias)
            _call(self._c.norms, x, *affine, a, b, first.eps, rows, d)
            self._product(a, attention.query_key_value, qkv)
            _call(self._c.rotate, qkv, attention.query_key_value.bias, cos, sin, turned, *shape)
            query, key, value = turned.view(3, sequences, heads, context, -1)  # a head's rows together: attention is faster
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).reshape(rows, d)
            self._product(mixed, attention.dense, a)
            if (site := Site(layer, ATTN_OUT)) in sites:
                yield site, torch.add(a.float(), attention.dense.bias).view_as(x)
            if (site := Site(layer, MLP_IN)) in sites:
                yield site, b.clone().view_as(x)
            self._product(b, mlp.dense_h_to_4h, hidden)
            _call(self._c.gelu, hidden, mlp.dense_h_to_4h.bias, *hidden.shape)
            self._product(hidden, mlp.dense_4h_to_h, b)
            if (site := Site(layer, MLP_OUT)) in sites:
                yield site, torch.add(b.float(), mlp.dense_4h_to_h.bias).view_as(x)
            after = torch.empty_like(x)  # whoever is given it may keep it
            _call(self._c.residual, x, a, attention.dense.bias, b, mlp.dense_4h_to_h.bias, after, rows, d)
            x = after
            if (site := Site(layer)) in sites:
                yield site, x

    def _product(self, x: Tensor, linear: nn.Linear, out: Tensor) -> None:
        """x · weightᵀ, all of them bfloat16; the bias is added by whoever reads `out`."""
        if linear in self._wide:
            out.copy_(x.float() @ self._wide[linear].t())
        else:
            torch.mm(x, linear.weight.t(), out=out)

    def _angles(self, context: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [context, half of the rotated values], from the model's own module."""
        both = self._base.rotary_emb(torch.empty(0), torch.arange(context)[None])
        cos, sin = (angle[0, :, : angle.shape[-1] // 2].contiguous() for angle in both)
        return cos, sin

    def _reserve(self, rows: int, d: int) -> None:
        """Make buffers for `rows` tokens, unless they are there: fresh ones for every product would cost page faults."""
        if rows != self._rows:
            widths = (d, d, 3 * d, 3 * d, self._base.config.intermediate_size)
            buffers = (torch.empty(rows, width, dtype=torch.bfloat16) for width in widths)
            self._a, self._b, self._qkv, self._turned, self._hidden = buffers
            self._rows = rows


def neox_forward(base: nn.Module) -> NeoxForward | None:
    """The fast way through a base model whose final norm is gone; None where there is none or it does not agree."""
    library = load(Path(__file__).with_name("neox.c")) if _is_known(base) else None
    if library is None:
        return None
    fast = NeoxForward(base, library)
    try:
        apart = _difference(base, fast)
    except (AttributeError, RuntimeError, TypeError, ValueError, AssertionError) as error:  # a transformers we do not know
        apart, reason = float("inf"), f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        reason = f"results {apart:.1%} apart"
    if apart <= _TOLERANCE:
        return fast
    say(f"note: the fast forward does not fit this model ({reason}); the model's own, slower one is used", err=True)
    return None


def _is_known(base: Any) -> bool:
    """A GPT-NeoX in bfloat16 on a CPU, with parallel residual, exact gelu and biases everywhere, as Pythia is."""
    if type(base).__name__ != "GPTNeoXModel":
        return False
    parameters, config = list(base.parameters()), base.config
    return (
        all(p.device.type == "cpu" and p.dtype == torch.bfloat16 and p.is_contiguous() for p in parameters)
        and all(m.bias is not None for m in base.layers.modules() if isinstance(m, nn.Linear))
        and bool(config.use_parallel_residual)
        and config.hidden_act == "gelu"
    )


@torch.inference_mode()
def _difference(base: Any, fast: NeoxForward) -> float:
    """How far the last layer's outputs are apart, relative to the model's own."""
    tokens = torch.arange(_CHECKED_TOKENS)[None] % base.get_input_embeddings().num_embeddings
    ((_, last),) = fast.run(tokens, (Site(len(base.layers) - 1),))
    want = base(input_ids=tokens, use_cache=False).last_hidden_state.float()
    return float((last.float() - want).norm() / want.norm())


def _call(function: Any, *values: Tensor | int | float) -> None:
    function(*arguments(*values))
