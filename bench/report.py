"""Results and the files they lie in: of which machine, when, and what every contender took in every round."""

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.harness import Comparison, Entry
from bench.peers import ROOT
from residual_saes.fleet.hours import processor
from residual_saes.shared.compile import cpu_flags

RESULTS = Path(__file__).resolve().parent / "results"
UNPUBLISHED = ROOT / "build" / "bench" / "results"  # unless somebody asks for more
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


@dataclass(frozen=True, kw_only=True)
class Machine:
    slug: str
    cpu: str
    cores: int
    memory_gib: float
    flags: tuple[str, ...]
    gpu: str | None
    system: str
    python: str
    torch: str
    threads: int


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


@dataclass(frozen=True, kw_only=True)
class Results:
    machine: Machine
    settings: Mapping[str, object]
    comparisons: tuple[Comparison, ...]
    busy: float = 0.0  # share of the processors that other work held just before
    date: str = field(default_factory=today)
    format: int = 2

    def path(self, key: str) -> Comparison | None:
        return next((comparison for comparison in self.comparisons if comparison.key == key), None)


def machine() -> Machine:
    cpu, flags = processor(), cpu_flags()
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    cores = len(os.sched_getaffinity(0))
    return Machine(
        slug=slug(f"{gpu or cpu} {cores}c"), cpu=cpu, cores=cores, gpu=gpu, threads=torch.get_num_threads(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        flags=tuple(flag for flag in FLAGS if flag in flags), system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(), torch=torch.__version__,
    )  # fmt: skip


def slug(text: str) -> str:
    """A machine's name as that of a file."""
    text = re.sub(r"\((r|tm)\)|\b(cpu|processor|nvidia)\b|@.*?ghz", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def write(results: Results, folder: Path, *, whole: bool = True) -> Path:
    """Under the machine's name; a part takes no whole one's place."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results.machine.slug}{'' if whole else '-part'}.json"
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")
    return path


def read(folder: Path) -> list[Results]:
    """All results, the latest last."""
    raws = sorted((json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))), key=lambda raw: str(raw["date"]))
    return [parse(raw) for raw in raws if "comparisons" in raw]


def parse(raw: Mapping[str, Any]) -> Results:
    """Results as they were before they were written."""
    machine = Machine(**raw["machine"] | {"flags": tuple(raw["machine"]["flags"])})
    comparisons = tuple(
        Comparison(**one | {"entries": tuple(_entry(entry) for entry in one["entries"])}) for one in raw["comparisons"]
    )
    return Results(**{**raw, "machine": machine, "comparisons": comparisons})


def _entry(raw: dict[str, Any]) -> Entry:
    return Entry(**raw | {name: tuple(raw[name]) for name in ("seconds", "against") if name in raw})


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles between which half of the rounds lie: how far noise reaches, without its outliers."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def busy_share(seconds: float = 2.0) -> float:
    """How much of the processors other work holds now: what would make every figure here too low."""
    before = _ticks()
    time.sleep(seconds)
    idle, total = (after - first for after, first in zip(_ticks(), before, strict=True))
    return 1 - idle / total if total else 0.0


def format_rate(rate: float, unit: str) -> str:
    return f"{rate / 1e9:.2f} GB/s" if unit == "bytes" else f"{rate:,.0f} {unit}/s"


def markdown(head: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> str:
    """A table; `sides` has an r for each column that stands to the right."""
    lines = [head, ["---:" if side == "r" else "---" for side in sides], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _ticks() -> tuple[int, int]:
    """Idle and all processor time since boot."""
    try:
        counts = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0, 0
    return counts[3] + counts[4], sum(counts)
