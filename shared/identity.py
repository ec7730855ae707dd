"""Which model, text and tokenizer: identity is content, wherever it lies and whatever it is called."""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from residual_saes.shared.cache import Cache, CacheSpec
from residual_saes.shared.errors import UserError
from residual_saes.shared.hub import retried
from residual_saes.shared.seal import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HASHED_WHOLE = 1 << 32  # bytes: files of no more together are hashed whole, larger ones in samples
_PIECE = 8 << 20  # bytes read at a time
_SAMPLES, _SAMPLE = 64, 1 << 20  # number and bytes of the samples of a large file that is not weights
_TENSOR_SAMPLE = 4 << 10  # bytes at the beginning, middle and end of every tensor: a fine-tuned layer shows
_LONGEST_HEADER = 100 << 20  # of a safetensors file, by its definition
_COMMIT = re.compile("[0-9a-f]{40}")
_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SHARDS = "model-*-of-*.safetensors"  # as they are called, though an index may name others
_EARLIER = (_CONFIG, "*.safetensors", "*.safetensors.index.json")  # of which the identity was before: adapters and copies, too
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")


def hash_files(files: list[Path]) -> str:
    """Hash files by content, in this order: 'sha256:' and 64 hexadecimal digits. Raises UserError.

    Of large files samples are read: the header of weights and parts of each tensor, or places spread over the file.
    """
    digest = hashlib.sha256()
    try:
        whole = sum(f.stat().st_size for f in files) <= _HASHED_WHOLE
        for path in files:
            kind = "".join(suffix for suffix in path.suffixes[-2:] if suffix[1:].isalpha())
            digest.update(f"{kind} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                for start, size in [(0, path.stat().st_size)] if whole else _sampled(path):
                    file.seek(start)
                    while size > 0 and (piece := file.read(min(size, _PIECE))):
                        digest.update(piece)
                        size -= len(piece)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; put that right and run again") from None
    return f"sha256:{digest.hexdigest()}"


def _sampled(path: Path) -> Iterator[tuple[int, int]]:
    """The samples of a large file, as (start, bytes)."""
    size = path.stat().st_size
    tensors = _tensors(path, size) if path.suffix == ".safetensors" else None
    if tensors is None:
        yield from ((i * max(0, size - _SAMPLE) // (_SAMPLES - 1), _SAMPLE) for i in range(_SAMPLES))
        return
    header, spans = tensors
    yield 0, header
    for start, end in spans:
        n = min(_TENSOR_SAMPLE, end - start)
        yield from ((header + at, n) for at in sorted({start, (start + end - n) // 2, end - n}))


def _tensors(path: Path, size: int) -> tuple[int, list[tuple[int, int]]] | None:
    """(bytes before the first tensor, start and end of each tensor after that); None where the file is no safetensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            entries = parse_json(file.read(length)) if length <= min(size, _LONGEST_HEADER) else {}
            spans = [tuple(map(int, v["data_offsets"])) for k, v in entries.items() if k != "__metadata__"]
            return (8 + length, sorted((start, end) for start, end in spans)) if spans else None
        except (ValueError, AttributeError, TypeError, KeyError):
            return None


def unpin(revision: str) -> str | None:
    """A recorded revision as the hub takes it; None for local files, which are recorded by their hash."""
    return None if revision.startswith("sha256:") else revision


@dataclass(kw_only=True, frozen=True, slots=True)
class Model:
    """A language model's files, and their hash: it is loaded from this folder."""

    name: str  # as given: hub id or folder
    folder: Path
    commit: str  # the hub's; "" for a local folder
    sha256: str  # hash of configuration and weights, 'sha256:…'


def open_model(model: str, revision: str | None) -> Model:
    """Find and hash a local model, or download one from the hub at a revision. Raises UserError."""
    folder, commit = Path(model), ""
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith((".", "~")):
            raise UserError(f"there is no model at {model}: name the folder where it lies now with --model")
        folder = _download(model, revision)
        commit = folder.name
    files = sorted(path for path in (folder / name for name in _loaded(folder)) if path.is_file())
    return Model(name=model, folder=folder, commit=commit, sha256=hash_files(files))


def _loaded(folder: Path) -> set[str]:
    """The names of the files that transformers loads: configuration and weights, not what else lies beside them."""
    first = _first(folder)
    return {_CONFIG, first, *(_indexed(folder / first) if first.endswith(".index.json") else ())}


def _first(folder: Path) -> str:
    """The name of the weights, or of the index of their shards: one that the configuration gives goes before the usual ones."""
    named = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        named = parse_json((folder / _CONFIG).read_bytes()).get("transformers_weights")
    return str(named) if named else _WEIGHTS if (folder / _WEIGHTS).is_file() else _INDEX


def _indexed(index: Path) -> set[str]:
    """The shards that an index names."""
    try:
        return {str(name) for name in parse_json(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or one that transformers will refuse
        return set()


def _every_file(folder: Path) -> list[Path]:
    return sorted({f for pattern in _EARLIER for f in folder.glob(pattern) if f.is_file() and not f.name.startswith(".")})


def _download(model: str, revision: str | None, weights: Iterable[str] = (_WEIGHTS, _INDEX, _SHARDS)) -> Path:
    """The folder of a hub model at one commit, named after that. Raises UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    patterns = [_CONFIG, *weights, *_TOKENIZER]

    def download() -> Path:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
        # A hub that does not answer leaves what there is in the cache, which may be the configuration alone.
        usual = _first(folder) in (_WEIGHTS, _INDEX)
        if usual and not any(folder.glob("*.safetensors")) and not _indexed(folder / _INDEX) and not HF_HUB_OFFLINE:
            raise ConnectionError("it has no weights in *.safetensors, or the hub does not answer")
        return folder

    try:
        folder = retried(f"the model {model}", download)
    except Exception as error:  # the hub's client has a dozen kinds
        raise unreachable(f"the model {model}", error) from None
    others = {name for name in _loaded(folder) if not (folder / name).exists() and name not in {*weights, _CONFIG, _INDEX}}
    return _download(model, folder.name, weights=others) if others and not HF_HUB_OFFLINE else folder


def as_harvested(spec: CacheSpec, model: Model) -> Model:
    """The model by the identity that a cache knows it by, where earlier versions made that of all weights beside it as well."""
    wanted = spec.model_revision
    if model.sha256 == wanted or hash_files(_every_file(model.folder)) != wanted:
        return model
    return replace(model, sha256=wanted)


def harvested_model(cache: Cache, model: str | None = None, revision: str | None = None) -> Model:
    """The model that a cache was harvested from, where it lay then or where `model` says. Raises UserError for another one."""
    return model_of(cache.spec, str(cache.path), model, revision)


def model_of(spec: CacheSpec, whose: str, model: str | None = None, revision: str | None = None) -> Model:
    """As `harvested_model`, of a cache by its spec; `whose` is what an error calls it."""
    if not spec.has_model:
        of = f"the synthetic world {spec.model}" if spec.world else f"activations that were imported from {spec.dataset}"
        raise UserError(f"{whose} is of {of}: there is no language model or text to do this with")
    opened = as_harvested(spec, open_model(model or spec.model, revision if model else spec.model_branch or None))
    if spec.differences(replace(spec, model_revision=opened.sha256)):
        commit = f" (that was commit {spec.model_commit})" if spec.model_commit else ""
        raise UserError(f"{opened.name} is not the model {whose} was harvested from{commit}: name its folder with --model")
    return opened


def dataset_commit(dataset: str, revision: str | None) -> str:
    """The commit of a hub dataset at a revision (None: its main branch) now. Raises UserError."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        return str(retried(f"the dataset {dataset}", lambda: HfApi().dataset_info(dataset, revision=revision).sha))
    except Exception as error:
        raise unreachable(f"the dataset {dataset}", error) from None


def unreachable(what: str, error: Exception) -> UserError:
    """The error for a model, tokenizer or dataset that a library cannot load."""
    reason = str(error).strip().split("\n")[0][:200]
    return UserError(f"cannot load {what}: {reason}; give a local path, or check the name, revision and connection")


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of a fast tokenizer's JSON, 64 hexadecimal digits."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
