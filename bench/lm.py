"""The language model's hot paths: the harvest's forward pass beside plain transformers, and the whole harvest. Weights are
random, drawn where they are to lie, of Pythia-410M at d = 1024 and 24 layers; other sizes keep its proportions."""

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import caches
from bench.harness import Comparison, Contender, Run, timed
from bench.limits import quick_type
from bench.setup import Setup
from residual_saes.harvest.language_model import LanguageModel
from residual_saes.harvest.rows import put_rows
from residual_saes.harvest.run import HarvestConfig, Shares, harvest_blocks
from residual_saes.harvest.writer import WriterConfig
from residual_saes.shared.cache import Cache
from residual_saes.shared.sites import Site


def lm_config(setup: Setup) -> Any:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        hidden_size=setup.d, num_hidden_layers=setup.layers, num_attention_heads=setup.d // 64, intermediate_size=4 * setup.d,
        vocab_size=setup.vocab, max_position_embeddings=2048, rotary_pct=0.25,
    )  # fmt: skip


def causal_lm(setup: Setup) -> Any:
    from transformers import AutoModelForCausalLM

    with setup.device:
        model = AutoModelForCausalLM.from_config(lm_config(setup), dtype=quick_type(setup.name))
    return model.eval().requires_grad_(False)


def residual_model(setup: Setup, like: nn.Module | None = None) -> LanguageModel:
    """As the harvest runs it, with weights of its own or those of another base model."""
    from transformers import AutoModel

    with setup.device:
        base = AutoModel.from_config(lm_config(setup), dtype=torch.bfloat16)
    if like is not None:
        base.load_state_dict(like.state_dict())
    return LanguageModel(base, tuple(map(Site, range(setup.layers))), setup.device)


def forward(setup: Setup) -> Comparison:
    """The language model: as the harvest runs it, and as plain transformers does. No copy off the device, no writing."""
    causal = causal_lm(setup)
    model = residual_model(setup, like=causal.gpt_neox)
    rows, context = setup.forward_tokens, setup.context
    data = torch.empty(setup.layers, rows, setup.d, dtype=torch.float16, device=setup.device)

    def tokens() -> Tensor:
        return torch.randint(0, setup.vocab, (rows // context, context))

    def ours() -> float:
        """The model, float16, rows to their places."""
        batch, place = tokens(), torch.randperm(rows).to(setup.device)
        nonfinite = torch.zeros(setup.layers, dtype=torch.int64, device=setup.device)

        def store(site: Site, output: Tensor) -> None:
            nonfinite[site.layer] += put_rows(output.reshape(-1, setup.d), place, data[site.layer])

        return timed(lambda: model.run(batch, store), setup.device)

    @torch.inference_mode()
    def plain(model: nn.Module) -> float:
        """What anyone would write first: all hidden states, kept as they come."""
        batch = tokens().to(setup.device)
        return timed(lambda: model(input_ids=batch, output_hidden_states=True, use_cache=False), setup.device)

    note = f"{setup.layers} layers, d {setup.d}, vocabulary {setup.vocab}, the same random weights, products in {causal.dtype}"
    contenders: list[tuple[str, str, str, Run]] = [
        ("ours, every layer to float16 in the writer's order", "ours", "", ours),
        ("its linear layers alone", "limit", "", _products(model.model, rows, setup.device)),
        ("transformers base model, output_hidden_states", "peer", "", partial(plain, causal.gpt_neox)),
        ("transformers causal LM, output_hidden_states", "peer", "causal", partial(plain, causal)),
    ]
    return setup.compare(
        "forward", f"Harvest forward, {rows} tokens", "tokens",
        [Contender(name=name, role=role, key=key, run=run, work=rows) for name, role, key, run in contenders], note=note,
    )  # fmt: skip


def _products(model: nn.Module, rows: int, device: torch.device) -> Run:
    """The decoder blocks' linear layers alone, on ready inputs."""
    weights = [module.weight.to(quick_type(device.type)) for module in model.modules() if isinstance(module, nn.Linear)]
    widths = {weight.shape[1] for weight in weights}
    inputs = {width: torch.randn(rows, width, device=device).to(weights[0].dtype) for width in widths}

    @torch.inference_mode()
    def products() -> None:
        for weight in weights:
            nn.functional.linear(inputs[weight.shape[1]], weight)

    return lambda: timed(products, device)


def harvest(setup: Setup) -> Comparison:
    """End to end, as `rsae harvest` runs it: forward, checksums, durable files, ledger."""
    model, context = residual_model(setup), setup.context
    spec = caches.cache_spec(
        d=setup.d, n_layers=setup.layers, context=context, sequences=setup.harvest_sequences, blocks=setup.harvest_blocks,
        vocab=setup.vocab,
    )  # fmt: skip
    writer = WriterConfig(threads=setup.threads)
    config = HarvestConfig(device=setup.device, forward_sequences=setup.harvest_sequences, writer=writer)
    shares: dict[str, Shares] = {}  # of the last round

    def run(where: str, cache: Cache) -> float:
        caches.empty(cache)
        start = time.perf_counter()
        shares[where] = harvest_blocks(cache, model, list(range(spec.n_blocks)), config)
        return time.perf_counter() - start

    def note(where: str) -> str:
        return f"{spec.n_blocks} blocks of {spec.block_bytes / 1e6:.1f} MB a layer; {shares[where]}"

    contenders = [
        Contender(
            name=f"ours, the whole harvest to {where}", role="ours", key=where, work=spec.n_blocks * spec.block_rows,
            run=partial(run, where, caches.cache_with_tokens(folder / "harvested", spec)), note=partial(note, where),
        )
        for where, folder in setup.folders
    ]  # fmt: skip
    name = f"Harvest, {setup.harvest_blocks} blocks of {spec.block_rows} tokens"
    return setup.compare("harvest", name, "tokens", contenders, min(2, setup.rounds) if setup.gpu else 0)
