"""What is known of each feature of an SAE, in a file of the run: results/features/layer12_final.safetensors."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from residual_saes.shared.errors import UserError
from residual_saes.shared.files import make_dir, publish_file
from residual_saes.shared.runs.run import Run
from residual_saes.shared.seal import read_tensors, seal, sealed
from residual_saes.shared.sites import Site


@dataclass(kw_only=True, frozen=True, slots=True)
class Features:
    """Statistics of each feature, float32 [F], and of each position of a context, float32 [context]; on the CPU."""

    density: Tensor
    mean: Tensor  # E[z]
    mean_square: Tensor  # E[z²]
    max_decoder_cosine_sim: Tensor
    encoder_decoder_cosine_sim: Tensor
    l0_by_position: Tensor
    decoder_share: Tensor | None = None  # of the squared decoder norm, this layer's of a crosscoder's

    def tensors(self) -> dict[str, Tensor]:
        return {name: value.contiguous() for name in self.__slots__ if (value := getattr(self, name)) is not None}


def features_path(run: Run, site: Site, label: str) -> Path:
    """The file of the statistics of each feature of an SAE; see `load_features`."""
    return run.path / "results" / "features" / f"layer{site.key}_{label}.safetensors"


def save_features(path: Path, features: Features, *, tokens: int, file: str) -> None:
    """Publish as safetensors, with the number of tokens that it rests on and the checksum `file` of the checkpoint. Statistics
    of the same checkpoint from more tokens stay. Raises UserError where nothing can be written."""
    _, old = _read(path)
    if old.get("file") == file and int(old.get("tokens", 0)) > tokens:
        return
    tensors = features.tensors()
    facts = seal({"tokens": str(tokens), "file": file}, tensors)
    make_dir(path.parent)
    publish_file(path, save(tensors, metadata=facts))


def load_features(path: Path) -> tuple[Features, dict[str, str]]:
    """Features, and what they rest on: `tokens` and `file`. Raises UserError if the file is missing or damaged."""
    tensors, facts = _read(path)
    tensors = {name: tensors[name] for name in Features.__slots__ if name in tensors}
    if not tensors.keys() >= {*Features.__slots__} - {"decoder_share"} or not sealed(facts, tensors):
        raise UserError(f"{path} is missing or damaged: delete what is there, and run `rsae eval` again")
    return Features(**tensors), facts


def measured_features(run: Run, site: Site, label: str, file: str) -> tuple[Features, int] | None:
    """The statistics of each feature of the checkpoint with the checksum `file`, and of how many tokens; None where it was not
    evaluated. Raises UserError where they are damaged."""
    path = features_path(run, site, label)
    if not path.exists():
        return None
    features, facts = load_features(path)
    return (features, int(facts["tokens"])) if facts["file"] == file else None  # else of an earlier checkpoint of that name


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        tensors, facts = read_tensors(path)
        return (tensors, facts) if 0 < int(facts["tokens"]) <= 10**15 else ({}, {})
    except Exception:  # safetensors raises its own type, and OSError, ValueError and KeyError
        return {}, {}
