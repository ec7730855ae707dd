"""The metrics that people read, each once: what it is called, how it is written and drawn, and where it is shown."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from residual_saes.eval.measure.result import Result


@dataclass(frozen=True, slots=True)
class Column:
    """A metric of a table or an axis of a picture."""

    key: str | int  # field of a Result, or the width of a student, whose predicted floor it is
    title: str
    form: str
    shown: str = ""  # in which tables and pictures; "more": folded
    group: str = ""  # of the page's table
    best: Literal[0, 1, None] = None  # the best that it can be; None where neither more nor less is better
    cell: str = ""  # how a heat map writes it
    axis: str = ""  # label; "" for the title
    scale: Literal["log", "rises", "rare", ""] = ""  # of an axis: logarithmic, up to 1, from 0 to a tenth at least
    card_title: str = ""
    card_form: str = ""

    def value(self, result: Result) -> Any:
        return result.floors.get(self.key) if isinstance(self.key, int) else getattr(result, self.key)

    @property
    def label(self) -> str:
        return self.axis or self.title

    @property
    def folded(self) -> bool:
        """Whether a table that folds shows it only when it is asked to."""
        return "more" in self.shown.split()

    def known(self, results: Iterable[Result]) -> bool:
        """Whether it is to be shown of these: a language model's metrics where there is one, the truth's where it is known."""
        return self.group not in _OF_SOME or not (values := list(map(self.value, results))) or any(values)

    def text(self, result: Result) -> str:
        return written(self.value(result), self.form)

    def merit(self, value: float | None) -> float | None:
        """From 0, poor, to 1, good: −log10 of the distance to the best, over two decades, so that .870 and .985 differ as .13
        and .015 do. None where there is no better or worse."""
        if self.best is None or value is None or not math.isfinite(value):
            return None
        return min(1.0, max(0.0, -math.log10(max(1e-9, abs(value) if self.best == 0 else 1 - value)) / 2))


_SPARSITY, _FIDELITY, _FLOORS, _BASIS = "sparsity", "reconstruction", "floors", "measured on"
_MODEL, _TRUTH, _LAYERS, _PROBES = "language model", "truth", "crosscoder", "probes"
_OF_SOME = (_MODEL, _TRUTH, _LAYERS, _PROBES)  # groups that some caches or runs have nothing of
_COLUMNS = (
    Column("site", "layer", "{}", "terminal truth page card floors"),
    Column("l0", "L0", "{:.1f}", "terminal truth page card means map snapshots", _SPARSITY, cell="{:.0f}",
           axis="L0, features a token", scale="log"),
    Column("dead_share", "dead", "{:.2%}", "terminal truth page card means map snapshots", _SPARSITY, 0, "{:.2f}",
           "dead features, share", "rare"),
    Column("l1_weight", "λ", "{:.3g}", "terminal page more", _SPARSITY),
    Column("freq_over_1_percent", "denser than 1\u00a0%", "{:.2%}", "page more map", _SPARSITY, cell="{:.2f}"),
    Column("freq_over_10_percent", "denser than 10\u00a0%", "{:.2%}", "page more map", _SPARSITY, cell="{:.3f}"),
    Column("average_max_decoder_cosine_sim", "nearest decoder row, cosine", "{:.2f}", "map", cell="{:.2f}"),
    Column("f1", "F1", "{:.3f}", "terminal truth page card means map snapshots fidelity", _TRUTH, 1, "{:.2f}",
           "F1 as detectors of true features", "rises"),
    Column("precision", "precision", "{:.3f}", "truth page card more", _TRUTH, 1),
    Column("recall", "recall", "{:.3f}", "truth page card more", _TRUTH, 1),
    Column("mcc", "MCC", "{:.3f}", "terminal truth page card means map", _TRUTH, 1, "{:.2f}"),
    Column("uniqueness", "unique", "{:.3f}", "truth page card more map", _TRUTH, 1, "{:.2f}"),
    Column("true_l0", "true L0", "{:.1f}", "truth page more", _TRUTH),
    Column("fvu", "FVU", "{:.4f}", "terminal truth page card means map snapshots fidelity", _FIDELITY, 0, "{:.3f}",
           "FVU, fraction of variance unexplained", "log"),
    Column("fvu_without_top3", "FVU outside top 3 directions", "{:.4f}", "page card map", _FIDELITY, 0, "{:.3f}",
           card_title="outside top 3 directions"),
    Column("fvu_without_first", "FVU, no first positions", "{:.4f}", "page card more map", _FIDELITY, 0, "{:.3f}",
           card_title="no first positions"),
    Column("cosine", "cosine", "{:.4f}", "terminal page more map", _FIDELITY, 1, "{:.3f}"),
    Column("explained_variance", "explained", "{:.4f}", "truth"),
    Column("mse", "MSE", "{:.3g}", "terminal page more", _FIDELITY),
    Column("decoder_share", "decoder here", "{:.1%}", "page card", _LAYERS),
    Column("largest_here", "features largest here", "{:.1%}", "page card", _LAYERS),
    Column("layers_spanned", "layers these span", "{:.2f}", "page card", _LAYERS),
    Column("ce_recovered", "CE recovered", "{:.4f}", "terminal page card means map snapshots fidelity", _MODEL, 1, "{:.3f}",
           "CE recovered, share", "rises"),
    Column("kl_div_score", "KL score", "{:.4f}", "page card means map", _MODEL, 1, "{:.3f}"),
    Column("ce", "CE", "{:.4f}", "terminal page card more", _MODEL),
    Column("ce_spliced", "CE spliced", "{:.4f}", "terminal page card more", _MODEL),
    Column("ce_zero", "CE zero", "{:.3f}", "terminal page more", _MODEL),
    Column("kl_div_with_sae", "KL", "{:.4f}", "page more", _MODEL),
    Column("ce_tokens", "CE and KL on", "{:,}", "page more", _MODEL),
    Column("probe_1", "probe AUC, k=1", "{:.3f}", "page card means", _PROBES, 1),
    Column("probe_5", "k=5", "{:.3f}", "page card more", _PROBES, 1, card_title="probe AUC, k=5"),
    Column("probe_16", "k=16", "{:.3f}", "page card more", _PROBES, 1, card_title="probe AUC, k=16"),
    Column("probe_sets", "probed sets", "{:,}", "page more", _PROBES),
    Column("alive", "F", "{:,}", "page more floors", _FLOORS),
    Column("alpha", "α", "{:.5f}", "page more floors", _FLOORS),
    Column("capacity", "g", "{:.2f}", "page more floors capacity", _FLOORS, axis="g(α), features a dimension"),
    Column("critical_width", "d*", "{:.1f}", "page more floors card map capacity", _FLOORS, cell="{:.0f}",
           axis="d* = F/g(α), dimensions", card_form="{:.0f}"),
    Column("tokens", "activations", "{:,}", "terminal page more", _BASIS),
)  # fmt: skip


def columns(place: str, results: Iterable[Result] = ()) -> tuple[Column, ...]:
    """The columns of a table or picture of these results, in order."""
    results = list(results)
    return tuple(column for column in _COLUMNS if place in column.shown.split() and column.known(results))


def student_widths(results: Iterable[Result]) -> list[int]:
    """Those for which floors are predicted."""
    return sorted({width for r in results for width in r.floors})


def floor_columns(results: Iterable[Result]) -> tuple[Column, ...]:
    """A column for each student width."""
    return tuple(Column(width, f"L*({width})", "{:.4g}") for width in student_widths(results))


def written(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)
