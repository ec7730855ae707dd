"""Score the demo language model on text it was not trained on, beside models without a neural network.

Everything is in bits per byte of UTF-8 text, so that models over tokens and compressors over bytes
can be put in one table. The separators between documents are context, and are not counted.
"""

import gzip
import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

Tokens = NDArray[np.uint16]
Floats = NDArray[np.float64]
Keys = NDArray[np.uint64]
END = "<|endoftext|>"  # id 0
BITS = 12  # of a token, the vocabulary being 4096: five tokens fit an integer of 64 bits


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    context: int = 256
    batch: int = 8
    ngram: int = 5
    # So many tokens in a row that are also in the training text count as a copy.
    copied: int = 20
    # Contexts that are scored again by the model written out in numpy.
    again: int = 12


def read_documents(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def encode(tokenizer: Tokenizer, texts: list[str], *, batch: int = 500) -> Tokens:
    """All texts as one stream of tokens, with `<|endoftext|>` before each."""
    parts: list[Tokens] = []
    for start in range(0, len(texts), batch):
        encodings = tokenizer.encode_batch(texts[start : start + batch], add_special_tokens=False)
        parts += [np.array([0, *encoding.ids], dtype=np.uint16) for encoding in encodings]
    return np.concatenate(parts)


def model_bits(model: GPTNeoXForCausalLM, stream: Tokens, config: ScoreConfig, stride: int) -> Floats:
    """Bits of each token of the stream but the first; contexts start `stride` tokens apart."""
    device = next(model.parameters()).device
    bits = np.zeros(len(stream) - 1)
    starts = range(0, max(1, len(stream) - 1 - config.context + stride), stride)
    for first in range(0, len(starts), config.batch):
        chosen = starts[first : first + config.batch]
        # The last context is short; what fills it up comes after it, and is not counted.
        padded = torch.zeros(len(chosen), config.context + 1, dtype=torch.int64)
        for row, at in zip(padded, chosen, strict=True):
            window = stream[at : at + config.context + 1].astype(np.int64)
            row[: len(window)] = torch.from_numpy(window)
        padded = padded.to(device)
        with torch.inference_mode():
            logits = model(input_ids=padded[:, :-1]).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), reduction="none").view(
                len(chosen), -1
            )
        for nats, at in zip(loss.double().cpu().numpy(), chosen, strict=True):
            new = 0 if at == 0 else config.context - stride
            end = min(at + config.context, len(bits))
            bits[at + new : end] = nats[new : end - at] / np.log(2)
    return bits


def numpy_bits(model: GPTNeoXForCausalLM, window: Tokens) -> Floats:
    """The same bits for one context, from the architecture's definition and not from the library's code."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    heads, size = model.config.num_attention_heads, len(window) - 1
    width = model.config.hidden_size // heads
    turned = width // 4
    angles = np.outer(np.arange(size), 10000.0 ** (-np.arange(0, turned, 2) / turned))
    cos, sin = (np.concatenate([part, part], 1)[:, None] for part in (np.cos(angles), np.sin(angles)))

    def erf(x: Floats) -> Floats:
        values: Floats = torch.erf(torch.from_numpy(x)).numpy()
        return values

    def linear(name: str, x: Floats) -> Floats:
        y: Floats = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        return y

    def norm(name: str, x: Floats) -> Floats:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        y: Floats = x * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return y

    def turn(x: Floats) -> Floats:
        front, half = x[..., :turned], turned // 2
        swapped = np.concatenate([-front[..., half:], front[..., :half]], -1)
        return np.concatenate([front * cos + swapped * sin, x[..., turned:]], -1)

    x = weights["gpt_neox.embed_in.weight"][window[:-1].astype(np.int64)]
    for layer in range(model.config.num_hidden_layers):
        name = f"gpt_neox.layers.{layer}"
        mixed = linear(f"{name}.attention.query_key_value", norm(f"{name}.input_layernorm", x))
        query, key, value = np.split(mixed.reshape(size, heads, 3 * width), 3, axis=-1)
        scores = np.einsum("ihd,jhd->hij", turn(query), turn(key)) / np.sqrt(width)
        scores = np.where(np.tri(size, dtype=bool), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), value).reshape(size, -1)
        inner = linear(f"{name}.mlp.dense_h_to_4h", norm(f"{name}.post_attention_layernorm", x))
        inner = linear(f"{name}.mlp.dense_4h_to_h", inner * 0.5 * (1 + erf(inner / np.sqrt(2))))
        x = x + linear(f"{name}.attention.dense", attended) + inner
    (head,) = (name for name in weights if name.startswith(("embed_out", "lm_head")))
    logits = norm("gpt_neox.final_layer_norm", x) @ weights[head].T
    logits -= logits.max(-1, keepdims=True)
    chosen = logits[np.arange(size), window[1:].astype(np.int64)]
    result: Floats = (np.log(np.exp(logits).sum(-1)) - chosen) / np.log(2)
    return result


def grams(stream: Tokens, order: int) -> Keys:
    """Every run of `order` tokens as one integer, the last token in the lowest bits."""
    keys = np.zeros(len(stream) - order + 1, dtype=np.uint64)
    for i in range(order):
        keys = (keys << np.uint64(BITS)) | stream[i : i + len(keys)]
    return keys


def kneser_ney_bits(train: Tokens, test: Tokens, order: int) -> Floats:
    """Bits of each test token but the first, under an interpolated n-gram (modified Kneser-Ney).

    The longest runs are counted as they occur; a shorter run counts in how many different places
    it ends a longer one. At each length three discounts, from the counts of counts, are taken off
    and given to the shorter run.
    """
    levels = []
    keys, counts = np.unique(grams(train, order), return_counts=True)
    for length in range(order, 0, -1):
        levels.append((length, keys, counts))
        if length > 1:
            keys, counts = np.unique(keys & np.uint64((1 << BITS * (length - 1)) - 1), return_counts=True)
    padded = np.concatenate([np.zeros(order, dtype=np.uint16), test])
    probability = np.full(len(test), 1.0 / (1 << BITS))
    for length, keys, counts in reversed(levels):
        seen = [float((counts == k).sum()) for k in range(1, 5)]
        scale = seen[0] / (seen[0] + 2 * seen[1])
        # Short runs have few small counts; there the estimate can leave [0, k], hence the limits.
        three = [min(max(k - (k + 1) * scale * seen[k] / max(seen[k - 1], 1.0), 0.1), k) for k in (1, 2, 3)]
        taken = np.array([0.0, *three])[np.minimum(counts, 3)]
        histories = keys >> np.uint64(BITS)
        firsts = np.flatnonzero(np.concatenate([[True], histories[1:] != histories[:-1]]))
        totals = np.add.reduceat(counts, firsts)
        given = np.add.reduceat(taken, firsts) / totals
        histories = histories[firsts]
        wanted = grams(padded, length)[-len(test) :]
        before = wanted >> np.uint64(BITS)
        group = np.minimum(np.searchsorted(histories, before), len(histories) - 1)
        known = histories[group] == before
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        own = np.where(keys[place] == wanted, counts[place] - taken[place], 0.0)
        probability = np.where(known, own / totals[group] + given[group] * probability, probability)
    result: Floats = -np.log2(probability[1:])
    return result


def unigram_bits(train: Tokens, test: Tokens) -> Floats:
    counts = np.bincount(train, minlength=1 << BITS) + 1.0
    result: Floats = -np.log2(counts / counts.sum())[test[1:]]
    return result


def copied_share(train: Tokens, test: Tokens, length: int) -> NDArray[np.bool_]:
    """Which test tokens lie in a run of `length` tokens that the training text has too."""
    factors = np.random.default_rng(0).integers(1, 2**63, length, dtype=np.uint64) * np.uint64(2)
    factors += np.uint64(1)

    def hashes(stream: Tokens) -> Keys:
        total = np.zeros(len(stream) - length + 1, dtype=np.uint64)
        for i, factor in enumerate(factors):
            total += (stream[i : i + len(total)].astype(np.uint64) + np.uint64(1)) * factor
        return total

    found = np.isin(hashes(test), np.unique(hashes(train)))
    covered = np.zeros(len(test), dtype=bool)
    for i in range(length):
        covered[i : i + len(found)] |= found
    return covered


def sample_text(model: GPTNeoXForCausalLM, tokenizer: Tokenizer, prompt: str, *, length: int = 120, seed: int) -> str:
    torch.manual_seed(seed)
    ids = [0, *tokenizer.encode(prompt).ids]
    with torch.inference_mode():
        for _ in range(length):
            logits = model(input_ids=torch.tensor([ids[-256:]])).logits[0, -1].float() / 0.8
            ids.append(int(torch.multinomial(logits.softmax(-1), 1)))
    return tokenizer.decode(ids)


def pack_gzip(text: bytes) -> bytes:
    return gzip.compress(text, 9)


def pack_xz(text: bytes) -> bytes:
    return lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)


def score(work: Path, out: Path, train: Tokens, exact: GPTNeoXForCausalLM, config: ScoreConfig) -> dict[str, object]:
    """Bits per byte of every model on the validation text, by kind of source, and the checks on them.

    `exact` is the model as it was trained; what is scored is what was saved of it, in half precision.
    """
    documents = read_documents(work / "validation.jsonl.gz")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    stream = encode(tokenizer, [d["text"] for d in documents])
    place = np.cumsum(stream == 0)[1:] - 1  # the document of each token
    lengths = np.array([len(d["text"].encode()) for d in documents])
    kinds = np.array([d["source"] for d in documents])
    text = stream[1:] != 0  # the separators are not text
    every = np.ones(len(documents), dtype=bool)
    chosen = {"all": every, **{str(kind): kinds == kind for kind in sorted(set(kinds))}}

    def per_byte(values: Floats, wanted: NDArray[np.bool_]) -> float:
        return float(values[text & wanted[place]].sum() / lengths[wanted].sum())

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    plain = model_bits(model, stream, config, config.context)
    bits = {
        "language model": plain,
        "language model, overlapping contexts": model_bits(model, stream, config, config.context // 2),
        f"{config.ngram}-gram": kneser_ney_bits(train, stream, config.ngram),
        "3-gram": kneser_ney_bits(train, stream, 3),
        "unigram": unigram_bits(train, stream),
    }
    table = {name: {kind: per_byte(values, wanted) for kind, wanted in chosen.items()} for name, values in bits.items()}
    for name, pack in (("xz -9e", pack_xz), ("gzip -9", pack_gzip)):
        table[name] = {}
        for kind, wanted in chosen.items():
            joined = "".join(d["text"] for d, use in zip(documents, wanted, strict=True) if use).encode()
            table[name][kind] = 8 * len(pack(joined)) / len(joined)

    # Could the figures be wrong? The same contexts by other code; the weights before they were
    # narrowed; and what is left of the gap without documents that the training text has pieces of.
    starts = np.linspace(0, len(stream) // config.context - 2, config.again).astype(int) * config.context
    again = np.concatenate([numpy_bits(model, stream[at : at + config.context + 1]) for at in starts])
    first = np.concatenate([plain[at : at + config.context] for at in starts])
    unsaved = model_bits(exact, stream, config, config.context)
    copied = copied_share(train, stream, config.copied)[1:]
    shares = np.array([copied[place == i].mean() for i in every.nonzero()[0]])
    return {
        "bits_per_byte": table,
        "validation": {
            "documents": len(documents),
            "tokens": int(text.sum()),
            "bytes": {kind: int(lengths[wanted].sum()) for kind, wanted in chosen.items()},
            "nats_per_token": float(plain[text].mean() * np.log(2)),
            "nats_per_token_before_float16": float(unsaved[text].mean() * np.log(2)),
        },
        "checks": {
            "numpy_model_largest_difference_bits": float(np.abs(again - first).max()),
            f"tokens_in_runs_of_{config.copied}_also_in_training_text": float(copied[text].mean()),
            "documents_with_a_tenth_of_such_tokens": int((shares >= 0.1).sum()),
            "bits_per_byte_without_those": {name: per_byte(values, shares < 0.1) for name, values in bits.items()},
        },
        "samples": [
            sample_text(model, tokenizer, prompt, seed=i)
            for i, prompt in enumerate(("The history of", "func (r *Reader) Read", "Mr. Speaker,"))
        ],
    }
