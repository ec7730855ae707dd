"""The metrics that people read, each once: what it is called, how it is written and drawn, and where it is shown."""

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
    shown: str = ""  # in which tables and pictures
    cell: str = ""  # how a heat map writes it
    axis: str = ""  # label; "" for the title
    scale: Literal["log", "rises", "rare", ""] = ""  # of an axis: logarithmic, up to 1, from 0 to a tenth at least
    share: bool = False  # coloured from 0 to 1 whatever its values
    card_title: str = ""
    card_form: str = ""

    def value(self, result: Result) -> Any:
        return result.floors.get(self.key) if isinstance(self.key, int) else getattr(result, self.key)

    @property
    def label(self) -> str:
        return self.axis or self.title

    def text(self, result: Result) -> str:
        return written(self.value(result), self.form)


_COLUMNS = (
    Column("site", "layer", "{}", "terminal page card floors"),
    Column("l1_weight", "λ", "{:.3g}", "terminal page card map", "{:.2g}"),
    Column("l0", "L0", "{:.1f}", "terminal page card means map snapshots", "{:.0f}", "L0, features a token", "log"),
    Column("mse", "MSE", "{:.3g}", "terminal page map", "{:.2g}"),
    Column("fvu", "FVU", "{:.4f}", "terminal page card means map snapshots fidelity", "{:.3f}", "", "log", True),
    Column("fvu_without_first", "FVU, no first positions", "{:.4f}", "page card means map fidelity", "{:.3f}",
           "FVU without first positions", "log", True, "no first positions"),
    Column("fvu_without_top3", "FVU outside top 3 directions", "{:.4f}", "page card means map snapshots fidelity", "{:.3f}",
           "FVU outside the top 3 directions", "log", True, "outside top 3 directions"),
    Column("cosine", "cosine", "{:.4f}", "terminal page map", "{:.3f}", share=True),
    Column("ce", "CE", "{:.4f}", "terminal page card"),
    Column("ce_spliced", "CE spliced", "{:.4f}", "terminal page card"),
    Column("ce_zero", "CE zero", "{:.3f}", "terminal page"),
    Column("ce_recovered", "CE recovered", "{:.4f}", "terminal page card means map snapshots fidelity", "{:.3f}",
           "CE recovered, share", "rises", True),
    Column("kl_div_with_sae", "KL", "{:.4f}", "page"),
    Column("kl_div_score", "KL score", "{:.4f}", "page card means map snapshots", "{:.3f}", "KL score, share", "rises", True),
    Column("dead_share", "dead", "{:.2%}", "terminal page card means map snapshots", "{:.2f}", "dead features, share", "rare",
           True),
    Column("freq_over_1_percent", "denser than 1\u00a0%", "{:.2%}", "page map", "{:.2f}", share=True),
    Column("freq_over_10_percent", "denser than 10\u00a0%", "{:.2%}", "page map", "{:.3f}", share=True),
    Column("average_max_decoder_cosine_sim", "nearest decoder row, cosine", "{:.2f}", "map", "{:.2f}", share=True),
    Column("average_encoder_decoder_cosine_sim", "encoder·decoder cosine", "{:.2f}", "map", "{:.2f}", share=True),
    Column("alive", "F", "{:,}", "page floors capacity", axis="F, alive features"),
    Column("alpha", "α", "{:.5f}", "page floors map capacity", "{:.4f}", "α = 1 − L0/F", share=True),
    Column("capacity", "g", "{:.2f}", "page floors capacity", axis="g(α), features a dimension"),
    Column("critical_width", "d*", "{:.1f}", "page card means map capacity", "{:.0f}", "d* = F/g(α), dimensions",
           card_form="{:.0f}"),
    Column("tokens", "measured on", "{:,}", "terminal page"),
    Column("ce_tokens", "CE and KL on", "{:,}", "page"),
)  # fmt: skip


def columns(place: str) -> tuple[Column, ...]:
    """The columns of a table or picture, in order."""
    return tuple(column for column in _COLUMNS if place in column.shown.split())


def student_widths(results: Iterable[Result]) -> list[int]:
    """Those for which floors are predicted."""
    return sorted({width for r in results for width in r.floors})


def floor_columns(results: Iterable[Result]) -> tuple[Column, ...]:
    """A column for each student width."""
    return tuple(Column(width, f"L*({width})", "{:.4g}") for width in student_widths(results))


def written(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)
