"""The summary people read: a table for the terminal, and one page with every run's table and pictures."""

import html
from pathlib import Path
from typing import Any

from shared.cli import format_count
from shared.files import replacing
from train.runs import Run, alone_in

Record = dict[str, Any]

_COLUMNS = (
    ("layer", "layer", "{:d}"),
    ("λ", "lambda", "{:.2e}"),
    ("L0", "l0", "{:.1f}"),
    ("MSE", "mse", "{:.3g}"),
    ("FVU", "fvu", "{:.4f}"),
    ("cosine", "cosine", "{:.4f}"),
    ("CE", "ce", "{:.4f}"),
    ("CE spliced", "ce_spliced", "{:.4f}"),
    ("CE zero", "ce_zero", "{:.3f}"),
    ("CE recovered", "ce_recovered", "{:.4f}"),
    ("dead", "dead_share", "{:.2%}"),
    ("measured on", "tokens", "{:,}"),
)
_HEADS = [title for title, _, _ in _COLUMNS] + ["trained on"]


def _rows(run: Run, records: list[Record]) -> list[list[str]]:
    """The final snapshot of each layer, formatted; a layer without one is shown by its latest, and says so."""
    latest, whole = {r["layer"]: r for r in records}, format_count(run.config()["train"]["tokens"])
    return [
        ["–" if r[key] is None else form.format(r[key]) for _, key, form in _COLUMNS]
        + [whole if r["snapshot"] == "final" else f"{r['snapshot']} of {whole}, unfinished"]
        for r in latest.values()
    ]


def text_table(runs: list[Run], results: dict[str, list[Record]]) -> str:
    """For a terminal: every run's latest SAEs, columns aligned."""
    lines = []
    for run in runs:
        rows = _rows(run, results[run.name])
        widths = [max(len(cell) for cell in column) for column in zip(_HEADS, *rows, strict=True)]
        lines.append(f"\n{run.name}")
        lines += ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [_HEADS, *rows]]
    return "\n".join(lines)


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:1rem 0}th,td{padding:.2rem .7rem;text-align:right}
th{border-bottom:2px solid #888}tr:nth-child(even){background:#f4f4f4}img{max-width:100%}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}tr:nth-child(even){background:#242424}}"""


def write_report(folder: Path, runs: list[Run], results: dict[str, list[Record]]) -> Path:
    """One page beside the run folders, which shows their pictures from where they lie."""
    parts = []
    for run in runs:
        head = "".join(f"<th>{html.escape(title)}</th>" for title in _HEADS)
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in _rows(run, results[run.name]))
        prefix = "" if run.path == folder else f"{run.name}/"
        pictures = "".join(
            f'<img src="{prefix}plots/{p.name}" alt="{p.stem}">' for p in sorted((run.path / "plots").glob("*.png"))
        )
        parts.append(f"<h2>{html.escape(run.name)}</h2><table><tr>{head}</tr>{body}</table>{pictures}")
    note = "Held-out tokens only, each layer's latest snapshot, CE in nats per token. All snapshots are in results/metrics.csv."
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>SAE runs</title><style>{_STYLE}</style><h1>SAE runs</h1><p>{note}</p>{''.join(parts)}</html>\n"
    )
    path = folder / "report.html"
    with alone_in(folder), replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
