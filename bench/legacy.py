"""Tables of one GPU from results in the form that `python -m bench gpu` wrote until 2026-11-26: figures by name, and rows.

They are shown until a GPU is measured in the form that every machine has now.
"""

import math
from collections.abc import Mapping
from typing import Any

from bench.report import format_rate, markdown

STEPS = {  # figure, and what it is called
    "dense step": "SAE step, dense",
    "three dense settings": "three dense SAEs on one batch",
    "sparse step": "SAE step, sparse, L0 150, all features equally frequent",
    "sparse step, uneven": "SAE step, sparse, L0 150, as uneven as trained SAEs are",
    "three sparse settings": "three sparse SAEs on one batch",
    "three settings, one dense at L0 1000, two sparse": "the same, one of them dense at L0 1,000",
}
PEERS = {
    "autograd_bf16": "all-bf16 autograd, fused Adam",
    "sae_lens": "SAELens, standard SAE",
    "sparsify": "sparsify, TopK-128, its Triton kernels",
}
STREAMS = {  # figure: what it is called, what it stands beside
    "harvest to disk, tokens/s": ("harvest, 24 layers to disk", "harvest to disk, bytes/s", ""),
    "harvest to disk, bytes/s": ("the same in bytes", "raw write bytes/s", "raw write {}"),
    "harvest to memory, tokens/s": ("harvest, 24 layers to memory", "forward tokens/s", "forward alone {}"),
    "loader from disk, bytes/s": ("loader, from disk", "raw read bytes/s", "raw read {}"),
    "loader from memory, bytes/s": ("loader, from memory", "", ""),
}


def summary(raw: Mapping[str, Any]) -> str:
    """Rates of the steps beside the matrix rate and the peers, of harvest and loader; and the goals."""
    figures: Mapping[str, float] = raw["figures"]
    matrix = f"of {figures['bf16 FLOP/s'] / 1e12:.0f} TFLOP/s" if "bf16 FLOP/s" in figures else ""
    rows = []
    for key, name in STEPS.items():
        if seconds := figures.get(f"{key}, seconds"):
            share = figures.get(f"{key}, share of the matrix rate", math.nan)
            rate = format_rate(figures[f"{key}, tokens/s"], "tokens")
            rows.append((name, rate, f"{1e3 * seconds:.1f} ms, {share:.0%} {matrix}"))
    for key, name in PEERS.items():
        if peer := figures.get(f"peer {key}, tokens/s"):
            both = ((way, figures.get(f"{way} step, tokens/s", math.nan)) for way in ("dense", "sparse"))
            ours = ", ".join(f"{way} {own / peer:.2f} ×" for way, own in both)
            rows.append((name, format_rate(peer, "tokens"), f"ours {ours}"))
    for key, (name, beside, note) in STREAMS.items():
        if stream := figures.get(key):
            unit = "bytes" if key.endswith("bytes/s") else "tokens"
            shown = note.format(format_rate(figures[beside], unit)) if beside in figures else ""
            rows.append((name, format_rate(stream, unit), shown))
    if peak := figures.get("peak GPU bytes"):
        rows.append(("memory at its peak, three dense settings", f"{peak / 1e9:.1f} GB", "the loader's windows included"))
    goals = [(g["name"], g["note"].partition(";")[0].removeprefix("goal "), _figure(g), g["verdict"]) for g in raw["goals"]]
    table = markdown(("goal", "", "measured", ""), "-lr-", goals)
    return "\n\n".join([_about(raw), markdown(("", "rate", ""), "-r-", rows), table])


def details(raw: Mapping[str, Any]) -> str:
    parts = [f"**{part['title']}**: {part['status']}, {part['seconds']:.0f} s\n\n{_rows(part)}" for part in raw["parts"]]
    return "\n\n".join([f"## {raw['machine']['gpu']}", _about(raw), *parts])


def _rows(part: Mapping[str, Any]) -> str:
    rows = [(row["name"], _figure(row), row["verdict"], row["note"]) for row in part["rows"]]
    return markdown(("", "", "", ""), "-r--", rows) if rows else ""


def _figure(row: Mapping[str, Any]) -> str:
    """Three or four digits that can be read: 1,234,567 and 0.0123 and 1.2e-07."""
    if (value := row["value"]) is None:
        return ""
    whole = value != value or value == 0 or abs(value) >= 1000
    return f"{f'{value:,.0f}' if whole else f'{value:.2e}' if abs(value) < 1e-3 else f'{value:.4g}'} {row['unit']}".strip()


def _about(raw: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {raw['versions'][name]}" for name in ("torch", "triton"))
    s = raw["sizes"]
    return (
        f"Measured on one {raw['machine']['gpu']}, {raw['machine']['cores']} cores, {versions}, {raw['date']}, in one call of "
        f"{raw['seconds']:.0f} s: d {s['d']}, F {s['features']:,}, {s['tokens']:,} tokens a step, all random. "
        "Shares of the matrix rate count the dense arithmetic, of which sparse steps do a part."
    )
