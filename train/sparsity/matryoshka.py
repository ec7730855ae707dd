"""Matryoshka BatchTopK (Bussmann, Nabeshima, Karvonen & Nanda 2025, arXiv:2503.17547): BatchTopK over nested dictionaries.

    z as BatchTopK's        loss = mean over prefixes p of mean((x̂_p − x)²)        x̂_p = the first p features' part of x̂

The first features must do without the later ones, which keeps them general where a dictionary is large. Where features end is
said in widths or in shares of the dictionary; the whole of it is always the last prefix.
"""

import re
from dataclasses import dataclass
from typing import ClassVar, Self

from residual_saes.shared.runs.sparsity import Reading, prefix_ends
from residual_saes.train.sparsity.base import Control, ControllerConfig, Sparsity, parse_k
from residual_saes.train.sparsity.batchtopk import BatchTopKControl, LargestOfBatch

SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32)  # groups that double, as the paper has them


@dataclass(frozen=True, slots=True)
class LargestNested(LargestOfBatch):
    widths: tuple[float, ...] = SHARES

    def prefixes(self, n_features: int) -> tuple[int, ...]:
        return prefix_ends(self.widths, n_features)


@dataclass(kw_only=True, frozen=True, slots=True)
class Matryoshka(Sparsity):
    FORMS: ClassVar[str] = "matryoshka:64, matryoshka:64@256+1024"
    KIND: ClassVar[str | None] = "matryoshka"

    k: int
    prefixes: tuple[float, ...] = SHARES  # but the last; from 1 on widths, below it shares of the dictionary

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefixes", tuple(self.prefixes))  # JSON has made a list of it

    @property
    def name(self) -> str:
        own = "" if self.prefixes == SHARES else f"-of-{'-'.join(f'{width:g}' for width in self.prefixes)}"
        return f"matryoshka-{self.k}{own}"

    @property
    def target(self) -> float:
        return self.k

    @property
    def widest(self) -> float:
        return self.prefixes[-1]

    @property
    def reading(self) -> Reading:
        words = f"Matryoshka BatchTopK, the {self.k} largest activations a token"
        return Reading(words=words, rule="threshold", prefixes=self.prefixes)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        first, at, last = text.partition("@")
        if (k := parse_k("matryoshka", first)) is None:
            return None
        if not at:
            return cls(k=k)
        if re.fullmatch(r"(?:[1-9][0-9]{0,8}|0\.[0-9]{1,6})(?:\+(?:[1-9][0-9]{0,8}|0\.[0-9]{1,6}))*", last) is None:
            return None
        prefixes = tuple(map(float, last.split("+")))
        one_unit = (prefixes[0] < 1) is (prefixes[-1] < 1)
        return cls(k=k, prefixes=prefixes) if one_unit and prefixes[0] > 0 and sorted(set(prefixes)) == [*prefixes] else None

    def control(self, steps: int, config: ControllerConfig, hold: bool = False) -> Control:
        return BatchTopKControl(LargestNested(self.k, self.prefixes), steps)
