"""One feature of an SAE in a few lines of text, for a model card: what its page shows, where pages were made."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from residual_saes.eval.pages import files
from residual_saes.eval.pages.features import TOP
from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.run import Run, Snapshot
from residual_saes.shared.runs.sae import Sae

_CONTEXTS, _BEFORE, _AFTER, _WORDS = 3, 12, 4, 5
Context = tuple[str, str, str]  # what is before the token of the peak, that token, what is behind it


@dataclass(kw_only=True, frozen=True, slots=True)
class Example:
    """A feature: on which share of tokens it fires, the tokens that it promotes, and its top contexts."""

    feature: int
    density: float
    promoted: list[str]
    contexts: list[Context]


def pages_folder(run: Run, snapshot: Snapshot, out: Path) -> Path | None:
    """The pages in `out` of this checkpoint, None where there are none. Raises UserError for an unreadable checkpoint."""
    file = Sae.checksum(snapshot.path)
    folders = sorted((out / run.name).glob(f"layer{snapshot.site.key}_{snapshot.label}.*"))
    return next((f for f in folders if (facts := files.read_facts(f)) is not None and facts["file"] == file), None)


def example(run: Run, snapshot: Snapshot, out: Path) -> Example | None:
    """The feature that the page's list, sorted by interest, has first; None without whole pages, or one that fires enough."""
    try:
        folder = pages_folder(run, snapshot, out)
        return None if folder is None else _example(files.Pages.open(folder), folder, out)
    except (UserError, OSError):  # damaged: a card can do without
        return None


def _example(pages: files.Pages, folder: Path, out: Path) -> Example | None:
    text = out / pages.facts["text"]
    if (of_text := files.whole_facts(text)) is None:
        return None
    count, peaks = pages.columns["count"], files.read_columns(folder / "index.js")["peaks"]
    density = count.double() / pages.facts["tokens"]
    best = int(_interest(density, peaks.view(len(count), TOP).long()).argmax())
    if count[best] < TOP:
        return None
    words: list[str] = files.read_script(text / "vocabulary.js")

    def around(row: int) -> Context:
        number, at = divmod(row - pages.facts["first_row"], of_text["chunk"])
        tokens = files.read_columns(text / f"{number:03d}.js")["tokens"].long()
        start = at - at % of_text["context"]
        end = min(start + of_text["context"], at + 1 + _AFTER)
        parts = tokens[max(start, at - _BEFORE) : at], tokens[at : at + 1], tokens[at + 1 : end]
        before, peak, after = ("".join(words[t] for t in part.tolist()) for part in parts)
        return before, peak, after

    return Example(
        feature=best,
        density=float(density[best]),
        promoted=[words[t] for t in pages.columns["promoted"][best, :_WORDS].tolist()],
        contexts=[around(row) for row in pages.columns["row"][best, :_CONTEXTS].tolist()],
    )


def _interest(density: Tensor, peaks: Tensor) -> Tensor:
    """As the page has it: rare, about a token in a thousand, with top contexts that peak on the same token; [F]."""
    agreement = torch.stack([(peaks == one[:, None]).double().mean(1) for one in peaks.unbind(1)]).mean(0)
    rare = torch.exp(-((density.clamp(min=1e-9).log10() + 3).square()) / 2)
    return (0.25 + agreement) * rare * (peaks > 0).all(1)
