"""What of a run is published: which files, whether they are as they were written, and in which form others get them.

No link is followed, for what it points at is not the run's. In the published form the run's configuration, which every
checkpoint repeats, names a model and a text that lay in folders by the last part of their paths. Whatever carries a checksum is
sealed again then, and where a checkpoint is told by its checksum, the published one's stands: the run opens elsewhere as here.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from residual_saes.eval.measure.features import load_features
from residual_saes.eval.publish.card import REGISTRY
from residual_saes.eval.report.pictures import picture_is_whole
from residual_saes.shared.errors import UserError
from residual_saes.shared.files import publish_file, publish_json, read_if_there
from residual_saes.shared.progress import Progress, say
from residual_saes.shared.runs.run import FINAL, Run
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.seal import SEAL, parse_json, parse_sealed, seal, sealed, unsealed
from residual_saes.shared.sites import Site

_PUBLISHED = (
    "sae_layer*.pt",
    "layer_*/cfg.json",
    "layer_*/*.safetensors",
    "metrics/layer*.jsonl",
    "plots/*.png",
    "plots/*.svg",
    "results/*.json",
    "results/*.csv",
    "results/*.jsonl",
    "results/features/*.safetensors",
    REGISTRY,
    "config.json",
    "README.md",  # the last, so that a repository with a card is whole
)


def published_files(run: Run) -> dict[str, Path]:
    """{name in the repository: file}, in the order in which they are sent. Raises UserError for links."""
    paths = [
        path
        for pattern in _PUBLISHED
        for path in sorted(run.path.glob(pattern))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(run.path).parts)
    ]
    for path in paths:
        for part in (path, *path.parents[: len(path.relative_to(run.path).parts) - 1]):
            if part.is_symlink():
                raise UserError(f"{part} is a link, and what it points at is not sent: put the file itself there, or remove it")
    return {str(path.relative_to(run.path)): path for path in paths}


def check(run: Run, files: dict[str, Path]) -> None:
    """Read every file that carries a checksum. Raises UserError for one that is not as it was written."""
    snapshots = {s.path: s for s in run.snapshots()}
    with Progress("checking", sum(path.stat().st_size for path in files.values()), "bytes") as progress:
        for name, path in files.items():
            if path.suffix == ".pt":
                label = snapshots.get(path)
                Sae.check(path, belongs=run.belongs(label.site, label.label) if label else {"digest": run.config.digest})
            elif name.startswith("results/features/"):
                load_features(path)
            elif name.startswith("results/match_") and not _match_is_whole(path):
                raise UserError(f"{path} is damaged: remove it, or run `rsae eval match` again")
            elif path.suffix in (".png", ".svg") and not picture_is_whole(path):
                raise UserError(f"{path} is damaged: run `rsae eval` to have it drawn again")
            progress.advance(path.stat().st_size)
    for site in sorted({s.site for s in snapshots.values() if s.label == FINAL}) if run.config.train.source is None else ():
        if why := _curve_fault(run, site):
            say(f"note: the training curve of layer {site} of {run.path} {why}; nothing but training makes it again", err=True)


def _match_is_whole(path: Path) -> bool:
    """Whether its records are as they were written; those of earlier versions had no checksums."""
    try:
        records = parse_json(path.read_bytes())
        return all(map(sealed, records)) or not any(SEAL in record for record in records)
    except (ValueError, TypeError):
        return False


def _curve_fault(run: Run, site: Site) -> str:
    """What a finished layer's curve lacks, in words. Raises UserError for one that is damaged."""
    path, points, train = run.metrics_path(site), run.metrics(site), run.config.train
    if (read_if_there(path) or b"\n")[-1:] != b"\n":
        raise UserError(f"{path} ends in half a line: remove that to use the others")
    if not points:
        return "is gone"
    end = (train.tokens or 0) // (train.batch or 1) * (train.batch or 1)
    return f"ends at {points[-1].tokens:,} of {end:,} tokens" if points[-1].tokens < end else ""


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """A run's or checkpoint's configuration with the last part of each path of this machine. What its digests are of stays."""
    spec = config["cache"]["spec"]
    in_folders = {"model": not spec["model_commit"], "dataset": str(spec["dataset_revision"]).startswith("sha256:")}
    named = {key: PurePath(spec[key]).name or key for key, local in in_folders.items() if local}
    cache = {key: value for key, value in config["cache"].items() if key != "place"} | {"spec": spec | named}
    return {key: value if key == "train" else _cut(value) for key, value in (config | {"cache": cache}).items()}


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cut(each) for key, each in value.items()}
    if isinstance(value, list):
        return list(map(_cut, value))
    return PurePath(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


class PublishedForm:
    """Files of one run as others get them. Checkpoints are asked for first, since other files name them."""

    def __init__(self, run: Run, folder: Path) -> None:
        """`folder` takes what is not sent as it is."""
        self._folder, config = folder, run.config.stored
        self._config = without_paths(config)
        self._checksums: dict[str, str] = {}  # of checkpoints: {here: published}
        self._sha256: dict[str, str] = {}  # of published checkpoints, by name
        ways: dict[str, Callable[[Path, Path], None]] = {
            r"sae_layer.*\.pt": self._checkpoint,
            r"layer_[^/]*/cfg\.json": self._export,
            r"results/metrics\.json": self._records,
            r"results/probes\.jsonl": self._probes,
            r"results/features/.*": self._features,
            r"config\.json": lambda _, target: publish_json(target, seal(self._config)),
        }
        self._ways = ways if self._config != config else {}

    def file(self, name: str, path: Path) -> Path:
        """The file to send under this name: `path` itself, or one in the folder."""
        target = self._folder / name.replace("/", "-")
        for pattern, write in self._ways.items():
            if re.fullmatch(pattern, name):
                write(path, target)
                return target
        return path

    def _checkpoint(self, path: Path, target: Path) -> None:
        sae = Sae.load(path)
        replace(sae, config=without_paths(sae.config)).save(target)
        self._checksums[sae.stats[SEAL]] = Sae.checksum(target)
        with target.open("rb") as file:
            self._sha256[path.name] = hashlib.file_digest(file, "sha256").hexdigest()

    def _export(self, path: Path, target: Path) -> None:
        config = json.loads(path.read_bytes())
        config["metadata"]["source"]["sha256"] = self._sha256[config["metadata"]["source"]["file"]]
        publish_json(target, config)

    def _records(self, path: Path, target: Path) -> None:
        records = {}
        for name, record in json.loads(path.read_bytes()).items():
            file = self._checksums.get(record["file"], record["file"])
            records[name.replace(f"#{record['file']}", f"#{file}")] = seal(record | {"file": file})
        publish_json(target, records)

    def _probes(self, path: Path, target: Path) -> None:
        records = [unsealed(record) for line in path.read_bytes().splitlines() if (record := parse_sealed(line))]
        files = [self._checksums.get(record["file"], record["file"]) for record in records]
        lines = [json.dumps(seal(record | {"file": file})) + "\n" for record, file in zip(records, files, strict=True)]
        publish_file(target, "".join(lines).encode())

    def _features(self, path: Path, target: Path) -> None:
        """Only two values of the header change, in their places: safetensors itself would write it in any order."""
        features, facts = load_features(path)
        file = self._checksums.get(facts["file"], facts["file"])
        content = path.read_bytes()
        for key, value in seal(facts | {"file": file}, features.tensors()).items():
            content = content.replace(f'"{key}":"{facts[key]}"'.encode(), f'"{key}":"{value}"'.encode(), 1)
        publish_file(target, content)
