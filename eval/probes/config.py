"""What `rsae eval probes` is asked for; read without scikit-learn, which the probes themselves need."""

from dataclasses import dataclass
from pathlib import Path

import torch

from residual_saes.eval.measure.probed import ALL
from residual_saes.shared.cli import option
from residual_saes.shared.errors import UserError
from residual_saes.shared.sites import Site, parse_sites
from residual_saes.shared.stores import parse_folder


def parse_ks(text: str) -> tuple[str, ...]:
    """'1,5,all' → ('1', '5', 'all'). Raises UserError."""
    ks = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(k == ALL or (k.isdecimal() and 0 < int(k) <= 10**6) for k in ks):
        raise UserError(f"{text!r} is not numbers of features: write them such as 1,5,16,all")
    return tuple(k if k == ALL else str(int(k)) for k in ks)


def parse_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


@dataclass(kw_only=True, frozen=True)
class ProbeConfig:
    """Which texts, which SAEs, and how many features a probe may use."""

    device: torch.device
    data: Path = option("Labelled texts: the wheel of sae-probes, or a folder.", required=True, type=parse_folder)
    sets: tuple[str, ...] | None = option("Only these sets, by name: 5_hist_fig_ismale,….", None, type=parse_names)
    k: tuple[str, ...] = option("Features that a probe may use.", "1,2,5,16,all", type=parse_ks)
    layers: tuple[Site, ...] | None = option("Such as 0-5,12 [default: all].", None, type=parse_sites)
    model: str | None = None
