"""Nearest features in other SAEs: of the same layer in other runs, and of the next layers on both sides in the same run.

A pair of SAEs is one file in the folder of the first, near-<digest of the second>.js: of each feature that fires the feature of
the second with the largest cosine of decoder rows, among those that fire. It is not in the facts of the folder, for it depends
on what else has pages: its last line is a checksum of the others.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from residual_saes.eval.measure.metrics import nearest_rows, unit
from residual_saes.eval.pages import files
from residual_saes.shared.files import publish_file, read_if_there
from residual_saes.shared.progress import Progress
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.seal import crc32c, read_tensors
from residual_saes.shared.sites import Site


@dataclass(kw_only=True, frozen=True, slots=True)
class Shown:
    """An SAE that has pages."""

    run: str
    site: Site
    folder: Path
    checkpoint: Path

    def directions(self, device: torch.device) -> "_Directions":
        """Raises UserError for a checkpoint that cannot be read."""
        fires = read_tensors(self.folder / "columns.safetensors")[0]["count"] > 0
        return unit(Sae.load(self.checkpoint).at(self.site).parts()[0].w_dec).to(device), fires.to(device)


_Directions = tuple[Tensor, Tensor]  # decoder rows of unit norm, float32 [F, d], and which features fire, bool [F]


def write_nearest(shown: Sequence[Shown], device: torch.device) -> None:
    """Write what is missing of all pairs. Raises UserError for a checkpoint that cannot be read."""
    missing = [(a, b) for a, b in _pairs(shown) if not (_is_whole(_path(a, b)) and _is_whole(_path(b, a)))]
    if not missing:
        return
    opened: dict[Path, _Directions] = {}
    with Progress("nearest features elsewhere", len(missing), "pairs of SAEs") as progress:
        for pair in missing:
            opened = {one.folder: opened.get(one.folder) or one.directions(device) for one in pair}  # no more than two at once
            for one, other in (pair, pair[::-1]):
                neighbours = nearest(opened[one.folder], opened[other.folder])
                key = f"{one.run}/{one.folder.name}/{_path(one, other).stem}"
                publish_file(_path(one, other), _sealed(files.columns_script(key, neighbours)))
            progress.advance(1, f"layer {pair[0].site}")


def forget(out: Path, gone: Sequence[Path]) -> None:
    """Remove what leads to folders that are about to go."""
    for folder in gone:
        for path in out.glob(f"*/*/near-{_digest(folder)}.js"):
            path.unlink(missing_ok=True)


def _pairs(shown: Sequence[Shown]) -> Iterator[tuple[Shown, Shown]]:
    """Two runs at one site, and one run at two sites between which it has none of the same hook."""
    yield from ((a, b) for a, b in itertools.combinations(shown, 2) if a.site == b.site and a.run != b.run)
    by_stream = sorted(shown, key=lambda one: (one.run, one.site.hook, one.site.layer))
    for _, stream in itertools.groupby(by_stream, key=lambda one: (one.run, one.site.hook)):
        yield from itertools.pairwise(stream)


def _path(one: Shown, other: Shown) -> Path:
    return one.folder / f"near-{_digest(other.folder)}.js"


def _sealed(script: bytes) -> bytes:
    return script + f"// crc32c:{crc32c(np.frombuffer(script, np.uint8))}\n".encode()


def _is_whole(path: Path) -> bool:
    content = read_if_there(path) or b""
    script, line, _ = content.rpartition(b"// crc32c:")
    return line != b"" and content == _sealed(script)


def _digest(folder: Path) -> str:
    return folder.name.rpartition(".")[2]


def nearest(one: _Directions, other: _Directions) -> files.Columns:
    """`feature` int32 [F], −1 where there is none, and its `cosine` float32 [F]."""
    (rows, fires), (others, others_fire) = one, other
    own_feature, others_feature = (which.nonzero()[:, 0] for which in (fires, others_fire))
    feature, nearness = torch.full_like(fires, -1, dtype=torch.int32), torch.zeros_like(fires, dtype=torch.float32)
    if len(others_feature):
        cosine, place = nearest_rows(rows, others[others_feature], rows=own_feature)
        feature[own_feature], nearness[own_feature] = others_feature[place].int(), cosine
    return {"feature": feature.cpu(), "cosine": nearness.cpu()}
