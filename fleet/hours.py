"""Hours of harvest and training, from the rates that machines were measured to reach.

rates.json holds them and comes with the package; `python -m bench tables` writes it from bench/results.
"""

import json
import os
import platform
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from residual_saes.shared.typed import read

RATES = Path(__file__).with_name("rates.json")


@dataclass(kw_only=True, frozen=True, slots=True)
class Work:
    """What a window of layers takes, or a whole job."""

    forward: float  # tokens through all layers of the language model
    bytes: int  # of activations, written once and read once
    training: int  # tokens x SAEs


@dataclass(kw_only=True, frozen=True, slots=True)
class Times:
    """Seconds of each part of some work. Training begins dense and turns sparse as L0 falls, so it lies between the bounds."""

    forward: float
    write: float
    read: float
    dense: float  # training, every step dense
    sparse: float  # training, every step sparse
    overlap: bool  # forward and write, read and training, hide behind one another: the slower of each pair counts

    @property
    def harvest(self) -> float:
        return self._together(self.forward, self.write)

    @property
    def train_dense(self) -> float:
        return self._together(self.read, self.dense)

    @property
    def train_sparse(self) -> float:
        return self._together(self.read, self.sparse)

    def _together(self, *parts: float) -> float:
        return max(parts) if self.overlap else sum(parts)


@dataclass(kw_only=True, frozen=True, slots=True)
class Rates:
    """What a machine was measured to reach, with SAEs of one shape."""

    machine: str  # the GPU, else the processor
    cores: int | None  # of it, where the rates are of that machine alone; None: of a GPU, for whoever plans to use one
    date: str
    d_model: int
    features: int
    forward: float  # tokens a second through the language model
    write: float  # bytes a second
    read: float
    dense: float  # tokens a second of one SAE's training
    sparse: float
    overlap: bool

    def times(self, work: Work) -> Times:
        return Times(
            forward=work.forward / self.forward,
            write=work.bytes / self.write,
            read=work.bytes / self.read,
            dense=work.training / self.dense,
            sparse=work.training / self.sparse,
            overlap=self.overlap,
        )


def measured_rates(d_model: int, features: int) -> list[Rates]:
    """Of SAEs of this shape: the rates of this machine, if it was measured, and of a GPU."""
    return for_this_machine([one for one in stored(RATES) if (one.d_model, one.features) == (d_model, features)])


def stored(file: Path) -> list[Rates]:
    return read(list[Rates], json.loads(file.read_bytes())["rates"])


def for_this_machine(rates: Iterable[Rates]) -> list[Rates]:
    return [one for one in rates if one.cores is None or (one.machine, one.cores) == this_machine()]


def this_machine() -> tuple[str, int]:
    """(GPU, or the processor where there is none; cores that this process may use)."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else processor(), cores


def processor() -> str:
    """Its name, as Linux has it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    named = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()
