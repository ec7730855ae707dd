"""What a run was trained with, as people read it: its setting in three words, what others do not share, its command."""

import dataclasses
import shlex
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from residual_saes.shared.runs.config import RunConfig
from residual_saes.shared.runs.curve import Point
from residual_saes.shared.seal import canonical
from residual_saes.shared.sites import Site, format_sites

Record = dict[str, Any]

_NAMES = {"k": "BatchTopK", "topk": "TopK", "jumprelu": "JumpReLU", "matryoshka": "Matryoshka"}
# Options of `rsae train` by the fields of config.json that they set, and what needs no saying. None: always said.
_OPTIONS = {
    "expansion": None, "tokens": None, "batch": None, "lr": None, "lr_warmup": None, "lr_decay": 0.0, "seed": 0,
    "window_blocks": None, "skip_positions": 0, "max_norm": None, "l1_reduction": "sum", "precision": "bf16",
    "sparse_below": None, "decoder": "trained", "decoder_norm": "unit",
}  # fmt: skip


def setting(train: Record) -> str:
    """'λ 3e-2', 'λ → L0 32', 'BatchTopK 32'."""
    l1 = train["l1"]
    if l1.keys() == {"init", "target"}:
        return f"λ {_short(l1['init'])}" if l1["target"] is None else f"λ → L0 {_short(l1['target'])}"
    name = str(l1.get("kind", "k"))
    return f"{_NAMES.get(name, name)} {_numbers(l1)}".rstrip()


def family(train: Record) -> str:
    """What its features compete by: 'L1', 'BatchTopK', …"""
    return "L1" if train["l1"].keys() == {"init", "target"} else setting(train).split()[0]


def kind(train: Record) -> str:
    """How a run was trained but for the numbers in its setting."""
    fields = sorted(f"kind {value}" if name == "kind" else name for name, value in train["l1"].items())
    return canonical(train | {"l1": fields}).decode()


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, int | float) else str(value)
    mantissa, e, exponent = (f"{value:e}" if isinstance(value, float) and 0 < value < 0.05 else text).partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if e else text


def differences(configs: list[RunConfig]) -> list[dict[str, str]]:
    """Of each run the settings that not all of them share, but for the setting itself, which has a column of its own."""
    flat = [{name: value for name, value in settings(config) if not name.startswith("l1 ")} for config in configs]
    names = dict.fromkeys(name for each in flat for name in each)
    unlike = [name for name in names if len({each.get(name, "–") for each in flat}) > 1]
    return [{name: each.get(name, "–") for name in unlike} for each in flat]


def command(train: Record, sites: Iterable[Site]) -> str:
    """The command that trains such a run on the same cache, whose place it leaves open; or takes it over from elsewhere."""
    if source := train.get("source"):
        return f"rsae eval --cache CACHE --saes {shlex.quote(source['name'])} --from {source['tool']}"
    values, flags = train | train["step"], []
    for name, plain in _OPTIONS.items():
        if (value := values.get(name)) is not None and value != plain:
            flags.append(f"--{name.replace('_', '-')} {value}")
    if train.get("refit_kind") == "topk" and train.get("refit"):
        flags.append(f"--hold-l0 {train['refit']:g}")
    flags += [f"--{flag}" for flag in ("revive", "skip") if train.get(flag)]
    l1, form = shlex.quote(_flag(train["l1"])), train.get("target", "")
    target = f" --target {shlex.quote(form)}" if form else ""
    layers = f" --layers {format_sites(sites)}" if not form or ">" in form else ""  # a crosscoder's form names them
    return f"rsae train --cache CACHE --l1 {l1}{target}{layers} {' '.join(flags)}"


def _flag(l1: Record) -> str:
    """How `--l1` writes a setting."""
    if l1.keys() == {"init", "target"}:
        return _short(l1["init"]) if l1["target"] is None else f"adaptive:{_short(l1['init'])}@{_short(l1['target'])}"
    return f"{l1.get('kind', 'batchtopk')}:{_numbers(l1)}"


def _numbers(l1: Record) -> str:
    """'64', or '64@256+1024' of a setting with prefixes; where these are shares of the dictionary they are the default."""
    values = [value for key, value in l1.items() if key != "kind" and value is not None]
    values = [value for value in values if not (isinstance(value, list | tuple) and min(value) < 1)]
    parts = ["+".join(f"{w:g}" for w in value) if isinstance(value, list | tuple) else _short(value) for value in values]
    return "@".join(parts)


def rate(curves: dict[Site, list[Point]]) -> tuple[str, str]:
    """(time of a layer, rate) by a run's curves, those of the runs that were trained beside it included; dashes if unknown."""
    rates = [p.tokens_per_second for curve in curves.values() for p in curve if p.tokens_per_second]
    tokens = [curve[-1].tokens for curve in curves.values() if curve]
    if not rates or not tokens:
        return "–", "–"
    per_second = statistics.median(rates)
    return _duration(statistics.median(tokens) / per_second), f"{per_second / 1000:.3g}k tokens/s"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def settings(config: RunConfig) -> list[tuple[str, str]]:
    """What the SAEs were trained with, as pairs of name and value."""
    pairs = []
    for name, value in config.stored["train"].items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        pairs += [(f"{name} {part}".strip(), "–" if v is None else str(v)) for part, v in parts]
    return pairs


def provenance(config: RunConfig) -> list[tuple[str, str]]:
    """What the SAEs were trained on, and by what."""
    spec = config.cache.spec
    cached = ("cached tokens", f"{spec.train_tokens:,} to train on, {spec.holdout_tokens:,} held out")
    ends = [
        cached,
        ("cache", config.cache.digest),
        ("run", config.digest),
        ("machine", ", ".join(f"{name} {value}" for name, value in config.machine.items())),
    ]
    if spec.world is not None:
        law = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in dataclasses.asdict(spec.world).items())
        return [("synthetic world", spec.model), ("law", law), ("seed", str(spec.seed)), *ends]
    if (of := spec.imported) is not None:
        known = f"positions {'known' if of.positions else 'unknown'}, tokens {'known' if of.tokens else 'unknown'}"
        return [("activations", place(spec.dataset)), ("content", of.sha256), ("rows", f"{of.rows:,}, {known}"), *ends]
    return [
        ("language model", place(spec.model)),
        ("model commit", spec.model_commit or "–"),
        ("model content", spec.model_revision),
        ("text", place(spec.dataset)),
        ("text revision", spec.dataset_revision),
        ("split, column", f"{spec.split}, {spec.text_column}"),
        ("context", f"{spec.context} tokens, {'with' if spec.bos else 'without'} BOS"),
        ("forward pass", spec.precision),
        *ends,
    ]


def place(name: str) -> str:
    """A name on the hub as it is; of a path on somebody's disk the last part."""
    return Path(name).name if Path(name).is_absolute() or name.startswith(".") else name
