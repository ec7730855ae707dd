"""One page of a text: its tokens, and of each the strongest features of some SAEs, with links to their pages."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from residual_saes.eval.measure.activations import SiteReader
from residual_saes.eval.measure.runs import Skipped
from residual_saes.eval.pages import files
from residual_saes.eval.pages.example import pages_folder
from residual_saes.eval.pages.spell import spell
from residual_saes.shared.cli import option
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import make_dir, publish_text
from residual_saes.shared.identity import model_of
from residual_saes.shared.lm import encode_text, load_tokenizer
from residual_saes.shared.runs.run import FINAL, Run, Snapshot
from residual_saes.shared.sites import Site, parse_sites

TOP = 5  # features of a token
_PROMOTED = 4  # tokens that stand for what a feature is about, where its page was made


@dataclass(kw_only=True, frozen=True, slots=True)
class Asked:
    """A text, and which SAEs are asked about it."""

    out: Path
    device: torch.device
    text: str = option("What to look at, up to a context.", required=True)
    layers: tuple[Site, ...] | None = option("Such as 0-5,12 [default: the middle one of each run].", None, type=parse_sites)
    model: str | None = None


def ask(runs: Sequence[Run], asked: Asked, skipped: Skipped) -> Path:
    """Write the page. Raises UserError where the text has no token or is longer than a context, or no SAE is there."""
    chosen = [(run, s) for run in runs for s in _chosen(run, asked.layers)]
    if not chosen:
        raise UserError("there is no finished SAE of these layers: name others with --layers, or train them to their end")
    spec = chosen[0][0].config.cache.spec
    model = model_of(spec, chosen[0][0].name, asked.model)
    tokenizer = load_tokenizer(str(model.folder), None)
    first, *tokens = encode_text(tokenizer, spec, asked.text)
    if not 0 < len(tokens) < spec.context:
        raise UserError(f"the text has {len(tokens)} tokens: give it from 1 to {spec.context - 1}")
    targets = [run.config.target_at(s.site) for run, s in chosen]
    sites = {site for target in targets for site in target.inputs}
    activations = SiteReader(str(model.folder), spec, sites, asked.device).read(torch.tensor([[first, *tokens]]))
    words = spell(tokenizer, len(tokenizer))
    shown = []
    for (run, snapshot), target in zip(chosen, targets, strict=True):
        with skipped.leaving_out():
            sae = run.load(snapshot, spec.d_model).to(asked.device)
            z = sae.encode(torch.cat([activations[site][0, 1:].float() for site in target.inputs], dim=1))
            shown.append(_section(run, snapshot, z, tokens, words, asked.out))
    page = files.templates().get_template("ask.html").render(text=asked.text, saes=shown, style=files.style())
    files.sweep(make_dir(asked.out))
    path = asked.out / "ask.html"
    publish_text(path, page)
    return path


def _chosen(run: Run, layers: tuple[Site, ...] | None) -> list[Snapshot]:
    finals = [s for s in run.snapshots() if s.label == FINAL]
    return [s for s in finals if s.site in layers] if layers else finals[len(finals) // 2 :][:1]


def _section(run: Run, snapshot: Snapshot, z: Tensor, tokens: list[int], words: list[str], out: Path) -> dict[str, Any]:
    """What the page shows of one SAE: each token with its features, the strongest first."""
    promoted = _promoted(run, snapshot, out)
    address = f"index.html#{quote(run.name, safe='')}/{snapshot.label}/{snapshot.site}" if promoted is not None else None
    largest = float(z.max()) or 1.0
    rows = []
    for token, of in zip(tokens, z, strict=True):
        best = of.topk(min(TOP, int((of > 0).sum())))
        features = [
            {
                "number": feature,
                "value": f"{value:.3g}",
                "share": f"{value / largest:.3f}",
                "href": address and f"{address}/{feature}",
                "words": [] if promoted is None else [words[t] for t in promoted[feature, :_PROMOTED].tolist()],
            }
            for value, feature in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        rows.append({"token": words[token], "active": int((of > 0).sum()), "features": features})
    return {"name": run.name, "layer": str(snapshot.site), "rows": rows}


def _promoted(run: Run, snapshot: Snapshot, out: Path) -> Tensor | None:
    """Tokens that each feature promotes, of the pages of this checkpoint; None where there are none."""
    folder = pages_folder(run, snapshot, out)
    return None if folder is None else files.Pages.open(folder).columns["promoted"]
