"""Train the demo language model: a byte-level BPE and a small GPT-NeoX, from scratch.

`make_text.py` writes what is read here. The result is a Hugging Face folder (`demo/neox-2m`) and a
report of how well the model predicts text that it was not trained on, beside models that need
no neural network.
"""

import copy
import ctypes
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from demo.score_lm import END, ScoreConfig, encode, read_documents, score


def train_tokenizer(documents: list[dict[str, str]], *, vocab: int, characters: int, seed: int) -> Tokenizer:
    """A byte-level BPE on a sample of the training text; `<|endoftext|>` is id 0."""

    def sample() -> Iterator[str]:
        left = characters
        for document in random.Random(seed).sample(documents, len(documents)):
            if left <= 0:
                return
            left -= len(document["text"])
            yield document["text"]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention as two plain products: at 256 positions this is twice as fast on a CPU as torch's kernel."""
    size = query.shape[-2]
    future = torch.full((size, size), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    weights = (query * scaling @ key.transpose(-1, -2) + future).softmax(-1)
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("causal_products", causal_attention)


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of the output layer, its gradient made in the same pass.

    Rows are taken a few at a time, so that the logits (4096 a token) never leave the processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        hidden, narrow = hidden.to(torch.bfloat16), weight.to(torch.bfloat16)
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        loss = weight.new_zeros(())
        for start in range(0, len(hidden), rows):
            part, target = hidden[start : start + rows], targets[start : start + rows, None]
            logits = (part @ narrow.t()).float()
            logits -= logits.amax(-1, keepdim=True)
            chosen = logits.gather(1, target)
            total = logits.exp_().sum(-1, keepdim=True)
            loss += (total.log() - chosen).sum()
            logits /= total
            logits.scatter_add_(1, target, -torch.ones_like(total))
            slope = logits.to(torch.bfloat16)
            hidden_grad[start : start + rows] = slope @ narrow
            weight_grad += slope.t() @ part
        ctx.save_for_backward(hidden_grad / len(hidden), weight_grad / len(hidden))
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grads[0], weight_grad * grads[0], None, None


def batch_loss(model: GPTNeoXForCausalLM, windows: Tensor, rows: int) -> Tensor:
    with torch.autocast(windows.device.type, torch.bfloat16):
        hidden = model.gpt_neox(input_ids=windows[:, :-1]).last_hidden_state
    weight = model.get_output_embeddings().weight
    return cast(
        Tensor,
        HeadLoss.apply(hidden.flatten(0, 1), weight, windows[:, 1:].flatten(), rows),  # type: ignore[no-untyped-call]
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    tokens: int = 30_000_000
    context: int = 256
    vocab: int = 4096
    width: int = 128
    layers: int = 6
    heads: int = 4
    # Contexts in an optimiser step, over all workers; and how many go through the model at once.
    batch: int = 32
    micro_batch: int = 4
    head_rows: int = 256
    learning_rate: float = 2.5e-3
    warmup: int = 50
    # The share of the steps in which the rate falls, and the share of the peak it falls to.
    falling: float = 0.3
    final_rate: float = 0.03
    weight_decay: float = 0.1
    clip: float = 1.0
    # One-threaded processes that average gradients: they bear a busy machine better than one
    # process with threads that wait for each other at every operation.
    workers: int = 2
    device: str = "cpu"
    seed: int = 0

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / (self.batch * self.context))

    def rate(self, step: int) -> float:
        """Linear warm-up, a level stretch, half a cosine down.

        Counted in steps, so that a pause changes nothing; and level in the middle, so that a run
        can be stopped there and resumed towards another number of tokens.
        """
        falling = int(self.falling * self.steps)
        left = min(1.0, (self.steps - step) / max(1, falling))
        low = self.final_rate + (1 - self.final_rate) * 0.5 * (1 - math.cos(math.pi * left))
        return self.learning_rate * min((step + 1) / self.warmup, low)


def make_model(config: TrainConfig) -> GPTNeoXForCausalLM:
    torch.manual_seed(config.seed)
    shape = GPTNeoXConfig(
        vocab_size=config.vocab,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
        max_position_embeddings=config.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=True,
    )
    shape._attn_implementation = "causal_products"
    return GPTNeoXForCausalLM(shape)


def context_starts(config: TrainConfig, length: int) -> NDArray[np.int64]:
    """Where the contexts of the run start in the training text, in the order in which they are taken."""
    places = np.random.default_rng(config.seed).permutation((length - 1) // config.context)
    if config.steps * config.batch > len(places):
        raise click.ClickException(f"{config.tokens} tokens asked for; the training text has {length}")
    return places[: config.steps * config.batch] * config.context


def save_model(model: GPTNeoXForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights in float16 (half the size; what that costs is measured), no pickles."""
    narrow = copy.deepcopy(model).to(torch.float16)
    narrow.config._attn_implementation = "sdpa"
    narrow.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END).save_pretrained(folder)
    # Version 5 of transformers writes a class name that version 4 does not know; both know this one.
    settings = folder / "tokenizer_config.json"
    known = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(known, indent=2) + "\n")


def save_state(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float, path: Path) -> None:
    tensors = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    save_file(tensors, path.with_suffix(".new"), metadata={"step": str(step), "seconds": str(seconds)})
    path.with_suffix(".new").replace(path)


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> tuple[int, float]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
        }
    return int(metadata["step"]), float(metadata["seconds"])


def keep_memory() -> None:
    """Have glibc keep freed memory: handing it back after every operation costs a third of the time."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1)):
            library.mallopt(option, value)


def average_gradients(model: nn.Module, loss: float, workers: int) -> float:
    """Put the workers' mean gradient in place of each one's own; returns their mean loss."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor([loss])]) / workers
    dist.all_reduce(flat)
    at = 0
    for grad in grads:
        grad.copy_(flat[at : at + grad.numel()].view_as(grad))
        at += grad.numel()
    return flat[-1].item()


def train(rank: int, config: TrainConfig, work: Path, out: Path, rendezvous: str) -> None:
    """One worker: its share of every batch, gradients averaged over the workers, the same update in each."""
    device = torch.device(config.device)
    keep_memory()
    if config.workers > 1:
        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=config.workers)
    stream = np.load(work / "train.npy", mmap_mode="r")
    starts = context_starts(config, len(stream))
    model = make_model(config).to(device)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    state, log = work / "state.safetensors", work / "loss.jsonl"
    first, before = load_state(model, optimizer, state) if state.exists() else (0, 0.0)
    share, began, recent = config.batch // config.workers, time.monotonic(), []
    for step in range(first, config.steps):
        mine = starts[step * config.batch + rank * share : step * config.batch + (rank + 1) * share]
        total = 0.0
        for micro in range(0, share, config.micro_batch):
            chosen = mine[micro : micro + config.micro_batch]
            windows = np.stack([stream[at : at + config.context + 1] for at in chosen]).astype(np.int64)
            part = len(chosen) / share
            loss = batch_loss(model, torch.from_numpy(windows).to(device), config.head_rows) * part
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        if config.workers > 1:
            total = average_gradients(model, total, config.workers)
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        recent.append(total)
        done = step + 1
        if rank == 0 and (done % 25 == 0 or done == config.steps):
            seconds = time.monotonic() - began
            speed = (done - first) * config.batch * config.context / seconds
            left = (config.steps - done) * config.batch * config.context / speed
            mean_loss = sum(recent) / len(recent)
            tokens = done * config.batch * config.context
            click.echo(
                f"{tokens / 1e6:.2f}M/{config.tokens / 1e6:.0f}M tokens  loss {mean_loss:.4f}  "
                f"rate {config.rate(step):.2e}  {speed:,.0f} tokens/s  {left / 60:.1f} min left"
            )
            with log.open("a") as file:
                line = {"tokens": tokens, "loss": mean_loss, "seconds": before + seconds}
                file.write(json.dumps(line) + "\n")
            recent = []
        if rank == 0 and (done % 100 == 0 or done == config.steps):
            save_state(model, optimizer, done, before + time.monotonic() - began, state)
            save_model(model, Tokenizer.from_file(str(work / "tokenizer.json")), out)
    if config.workers > 1:
        dist.destroy_process_group()


def prepare(config: TrainConfig, work: Path) -> None:
    """Tokenizer and token streams, unless an earlier run left them."""
    names = ("train", "validation")
    if all((work / f"{name}.npy").exists() for name in names):
        return
    documents = {name: read_documents(work / f"{name}.jsonl.gz") for name in names}
    tokenizer = train_tokenizer(documents["train"], vocab=config.vocab, characters=20_000_000, seed=config.seed)
    tokenizer.save(str(work / "tokenizer.json"))
    for name in names:
        stream = encode(tokenizer, [document["text"] for document in documents[name]])
        np.save(work / f"{name}.npy", stream)
        click.echo(f"{name}: {len(stream):,} tokens")


def report(config: TrainConfig, work: Path, out: Path) -> None:
    """Score the saved model and put the figures beside it, in report.json."""
    stream = np.load(work / "train.npy")
    starts = np.sort(context_starts(config, len(stream)))
    seen = np.concatenate([stream[at : at + config.context] for at in starts])
    log = [json.loads(line) for line in (work / "loss.jsonl").read_text().splitlines()]
    weights = np.diff([0, *(line["tokens"] for line in log)])[-10:]
    exact = make_model(config)
    with safe_open(work / "state.safetensors", framework="pt") as file:
        exact.load_state_dict({name: file.get_tensor(f"model.{name}") for name in exact.state_dict()})
    training = {
        "tokens": log[-1]["tokens"],
        "seconds": round(log[-1]["seconds"]),
        "tokens_per_second": round(log[-1]["tokens"] / log[-1]["seconds"]),
        # The loss of one batch says little; this is over the last ten lines, about two million tokens.
        "final_train_loss": float(np.average([line["loss"] for line in log[-10:]], weights=weights)),
        "parameters": sum(parameter.numel() for parameter in exact.parameters()),
        "config": asdict(config),
    }
    scores = score(work, out, seen, exact.eval(), ScoreConfig(context=config.context))
    path = out.parent / "report.json"
    path.write_text(json.dumps({"training": training, **scores}, indent=1, ensure_ascii=False) + "\n")
    click.echo(json.dumps(scores["bits_per_byte"], indent=1))


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/demo"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "neox-2m")
@click.option("--tokens", type=int, default=TrainConfig.tokens, show_default=True)
@click.option("--learning-rate", type=float, default=TrainConfig.learning_rate, show_default=True)
@click.option("--batch", type=int, default=TrainConfig.batch, show_default=True)
@click.option("--workers", type=int, default=TrainConfig.workers, show_default=True)
@click.option("--device", default=TrainConfig.device, show_default=True)
def main(
    work: Path,
    out: Path,
    tokens: int,
    learning_rate: float,
    batch: int,
    workers: int,
    device: str,
) -> None:
    """Make tokenizer and model from the text in WORK, write them to OUT, and score them.

    A run that was stopped goes on from its last checkpoint in WORK.
    """
    disable_progress_bar()
    config = TrainConfig(
        tokens=tokens,
        learning_rate=learning_rate,
        batch=batch,
        micro_batch=TrainConfig.micro_batch if device == "cpu" else batch,
        workers=workers if device == "cpu" else 1,
        device=device,
    )
    prepare(config, work)
    rendezvous = work.absolute() / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    # This process is worker 0, so that pausing it pauses them all.
    arguments = (config, work, out, f"file://{rendezvous}")
    spawn = torch.multiprocessing.get_context("spawn")
    for rank in range(1, config.workers):
        spawn.Process(target=train, args=(rank, *arguments), daemon=True).start()
    train(0, *arguments)
    report(config, work, out)


if __name__ == "__main__":
    main()
