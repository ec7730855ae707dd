"""A run folder, format 1: one L1 setting over any number of layers.

runs/<model>-saes-x<expansion>-l1-<setting>/
    config.json                              everything needed to repeat the run, the cache's identity included
    sae_layer00_50M.pt … sae_layer00_final.pt    snapshots
    metrics/layer00.jsonl                    the training curve
    state/layer00/                           resume only; removed when the layer is done
"""

import dataclasses
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shared.cache import CacheSpec
from shared.cli import UserError, format_count
from shared.files import make_dir, publish_json, replacing

FORMAT = 1
SNAPSHOTS = 6


def snapshot_tokens(tokens: int) -> dict[str, int]:
    """{label: tokens after which the snapshot is due}: five at sixths of the run, and 'final'. 300M → 50M … 250M, final."""
    marks = [tokens * k // SNAPSHOTS for k in range(1, SNAPSHOTS)]
    return {format_count(mark): mark for mark in marks} | {"final": tokens}


@dataclass(kw_only=True, frozen=True, slots=True)
class Snapshot:
    """A checkpoint file and what its name says."""

    path: Path
    layer: int
    label: str


class Run:
    """One run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @classmethod
    def open_or_create(cls, path: Path, config: dict[str, Any], cache: CacheSpec) -> "Run":
        """Raises UserError if the folder holds a run with another configuration, naming what differs."""
        run = cls(path)
        wanted = {"format": FORMAT, "train": config, "cache": dataclasses.asdict(cache)}
        if run.config_path.exists():
            run._require_same(run.config(), wanted)
        else:
            make_dir(path)
            publish_json(run.config_path, wanted)
        for folder in ("metrics", "state"):
            (path / folder).mkdir(exist_ok=True)
        return run

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    def config(self) -> dict[str, Any]:
        """Raises UserError unless this is a run of a format that can be read."""
        try:
            config: dict[str, Any] = json.loads(self.config_path.read_text())
        except FileNotFoundError:
            raise UserError(
                f"{self.path} is not a run folder: it has no config.json; train one with `python -m train`"
            ) from None
        except ValueError:
            raise UserError(
                f"{self.config_path} is not readable JSON; restore it or train into another --runs folder"
            ) from None
        if config.get("format") != FORMAT:
            raise UserError(f"{self.path} is a run of format {config.get('format')}, this program reads {FORMAT}")
        return config

    def _require_same(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        different = [
            f"{key} is {there[part].get(key)!r} there, {here[part].get(key)!r} here"
            for part in ("train", "cache")
            for key in sorted({*there[part], *here[part]})
            if there[part].get(key) != here[part].get(key)
        ]
        if different:
            raise UserError(
                f"{self.path} was trained with other settings ({'; '.join(different)}): "
                "repeat those or choose another --runs folder"
            )

    def snapshot_path(self, layer: int, label: str) -> Path:
        return self.path / f"sae_layer{layer:02d}_{label}.pt"

    def snapshots(self) -> list[Snapshot]:
        """All checkpoints, by layer and then by age."""
        labels = list(snapshot_tokens(self.config()["train"]["tokens"]))
        matches = [(path, re.fullmatch(r"sae_layer(\d+)_(\w+)\.pt", path.name)) for path in self.path.glob("sae_layer*.pt")]
        found = [Snapshot(path=path, layer=int(m[1]), label=m[2]) for path, m in matches if m and m[2] in labels]
        return sorted(found, key=lambda s: (s.layer, labels.index(s.label)))

    def metrics_path(self, layer: int) -> Path:
        return self.path / "metrics" / f"layer{layer:02d}.jsonl"

    def metrics(self, layer: int) -> list[dict[str, Any]]:
        path = self.metrics_path(layer)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def append_metrics(self, layer: int, record: dict[str, Any]) -> None:
        with self.metrics_path(layer).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def rewind_metrics(self, layer: int, step: int) -> None:
        """Drop the records after `step`, which a resumed run writes again, and a last line cut short by a crash."""
        path, kept = self.metrics_path(layer), []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if record["step"] <= step:
                kept.append(line + "\n")
        path.write_text("".join(kept))

    # --- resume state ---

    def state_path(self, layer: int) -> Path:
        return self.path / "state" / f"layer{layer:02d}" / "state.safetensors"

    def save_state(self, layer: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replace the resume state in one move: tensors, and a small JSON of everything else."""
        path = self.state_path(layer)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            try:
                save_file({k: v.cpu() for k, v in tensors.items()}, temporary, metadata={"facts": json.dumps(facts)})
            except SafetensorError as error:
                raise OSError(f"{path}: {error}") from None

    def load_state(self, layer: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self.state_path(layer)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (not a dict)
        except Exception as error:  # safetensors raises its own type, and OSError, and KeyError
            raise UserError(f"{path} is damaged ({error}); delete it to train this layer from the start") from None

    def drop_state(self, layer: int) -> None:
        folder = self.state_path(layer).parent
        if folder.exists():
            shutil.rmtree(folder)  # a kill may have left half a state beside the last whole one
