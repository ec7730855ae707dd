"""Use caches and SAEs from Python: find, load, encode, look at a sentence, patch the model; harvest and train."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import click
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from residual_saes.eval.measure.runs import runs_in
from residual_saes.eval.pages.spell import spell
from residual_saes.harvest.language_model import load_language_model
from residual_saes.shared.cache import Cache, CacheSpec
from residual_saes.shared.errors import UserError
from residual_saes.shared.hub import retried
from residual_saes.shared.identity import Model, model_of, unreachable
from residual_saes.shared.lm import Unembedding, changing, encode_text, load_model, load_tokenizer
from residual_saes.shared.presets import cache_place
from residual_saes.shared.runs.run import FINAL, snapshot_name
from residual_saes.shared.runs.sae import Sae
from residual_saes.shared.sites import Site, format_sites
from residual_saes.shared.stop import SIGNALS
from residual_saes.shared.stores import Location, parse_folder, parse_location, parse_name

CPU = torch.device("cpu")
Edit = Callable[[Tensor], Tensor]


@dataclass(kw_only=True, frozen=True, slots=True)
class Activation:
    """A feature on a token of a text."""

    feature: int
    position: int
    token: str
    value: float


class Features:
    """The features of a text: `tokens`, and their activations `z` float32 [tokens, F]."""

    def __init__(self, tokens: list[str], z: Tensor) -> None:
        self.tokens, self.z = tokens, z

    def top(self, n: int = 10) -> list[Activation]:
        """The n features with the largest activations, each at the token where it is largest."""
        values, positions = self.z.max(dim=0)
        best = values.topk(min(n, int((values > 0).sum())))
        return [self._activation(int(feature), int(positions[feature])) for feature in best.indices]

    def at(self, position: int, n: int = 5) -> list[Activation]:
        """The n features with the largest activations on one token."""
        best = self.z[position].topk(min(n, int((self.z[position] > 0).sum())))
        return [self._activation(int(feature), position) for feature in best.indices]

    def _activation(self, feature: int, position: int) -> Activation:
        value = float(self.z[position, feature])
        return Activation(feature=feature, position=position, token=self.tokens[position], value=value)

    def __str__(self) -> str:
        """A line a token, with its strongest features."""
        width = max(map(len, map(repr, self.tokens)))
        lines = [(repr(token), self.at(i, 4)) for i, token in enumerate(self.tokens)]
        return "\n".join(f"{t:<{width}}  " + "  ".join(f"{a.feature}:{a.value:.2f}" for a in top) for t, top in lines)

    def __repr__(self) -> str:
        return f"<features of {len(self.tokens)} tokens: {int((self.z > 0).any(dim=0).sum()):,} of {self.z.shape[1]:,} active>"


class LoadedSae:
    """An SAE with the names of its model, layer and setting. Its language model is loaded when it is first needed."""

    def __init__(self, sae: Sae, name: str, model: str | None = None) -> None:
        """`model` is the folder of the language model, where it lies elsewhere than at the harvest."""
        self.sae, self.name, self._where = sae, name, None if model is None else parse_name(model)
        self.site = Site.of(sae.config["layer"])  # what it writes, or the first of them
        self.spec = CacheSpec.from_dict(sae.config["cache"]["spec"])

    # --- rows ---

    def encode(self, x: Any) -> Tensor:
        """Activations x [..., d], of NumPy, PyTorch or lists, in any float type → z float32 [..., F]."""
        return self.sae.encode(self._rows(x))

    def decode(self, z: Any) -> Tensor:
        """z [..., F] → x̂ float32 [..., d]."""
        return self.sae.decode(self._rows(z))

    def __call__(self, x: Any) -> Tensor:
        """x [..., d] → its reconstruction, float32 [..., d]."""
        return self.sae.reconstruct(self._rows(x), self.encode(x))

    def _rows(self, x: Any) -> Tensor:
        return torch.as_tensor(x).to(self.sae.w_enc)

    def to(self, device: str | torch.device) -> "LoadedSae":
        """The same SAE on another device."""
        return LoadedSae(self.sae.to(torch.device(device)), self.name, self._where)

    @property
    def d(self) -> int:
        return self.sae.w_enc.shape[1]

    @property
    def n_features(self) -> int:
        return self.sae.w_enc.shape[0]

    def __repr__(self) -> str:
        return f"<SAE {self.name}, layer {self.site}: {self.n_features:,} features of {self.d} dimensions>"

    # --- the language model ---

    @cached_property
    def model(self) -> Model:
        """The language model's files. Raises UserError where they are not those that were harvested."""
        return model_of(self.spec, self.name, self._where)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(str(self.model.folder), None)

    @cached_property
    def _words(self) -> list[str]:
        return spell(self.tokenizer, len(self.tokenizer))

    @cached_property
    def _source(self) -> Any:
        return load_language_model(self.model, self.sae.target.inputs, self.spec.precision, CPU)

    @cached_property
    def _unembedding(self) -> Unembedding:
        return Unembedding(load_model(str(self.model.folder), None, "fp32", head=True))

    def language_model(self) -> nn.Module:
        """The causal language model that was harvested, float32, as transformers has it."""
        return load_model(str(self.model.folder), None, "fp32", head=True)

    def tokens(self, text: str) -> list[int]:
        """Token numbers of a text, behind what begins a document in the cache: the BOS token or the separator."""
        return encode_text(self.tokenizer, self.spec, text)

    def activations(self, text: str) -> Tensor:
        """Activations of what is read on the tokens of a text, float32 [tokens, d], computed as the harvest does."""
        taken: dict[Site, Tensor] = {}
        self._source.run(torch.tensor([self.tokens(text)]), lambda site, x: taken.update({site: x[0, 1:].float()}))
        return torch.cat([taken[site] for site in self.sae.target.inputs], dim=1)

    def features(self, text: str) -> Features:
        """The features of a text. Its first token is the second that the model reads, see `tokens`."""
        words = [self._words[token] for token in self.tokens(text)[1:]]
        return Features(words, self.encode(self.activations(text)))

    def promoted(self, feature: int, n: int = 10) -> list[str]:
        """The n tokens whose logits a feature raises most: the direct path from its decoder row, less that from zero."""
        with torch.inference_mode():
            row = self.sae.parts()[-1].w_dec[feature].cpu()
            logits = self._unembedding(torch.stack([row, torch.zeros_like(row)]))
        best = (logits[0] - logits[1])[: len(self._words)].topk(n).indices
        return [self._words[int(token)] for token in best]

    @contextlib.contextmanager
    def patched(self, lm: nn.Module, edit: Edit | None = None, *, keep_error: bool = False) -> Iterator[None]:
        """Within, a language model's activations at this site are their reconstructions.

        `edit` changes z [batch, tokens, F] before it is decoded, to ablate or steer; with `keep_error` what the SAE does not
        reconstruct is added back, so that the edit is all that changes. Raises UserError for a transcoder or crosscoder.
        """
        if self.sae.target.fields():
            raise UserError(f"{self.name} does not write what it reads alone: `patched` is of SAEs of one site")

        def reconstruct(x: Tensor) -> Tensor:
            z = self.encode(x)
            new = self.decode(z if edit is None else edit(z.clone())) + (self._rows(x) - self.decode(z) if keep_error else 0)
            return new.to(x)

        with changing(cast(nn.Module, lm.base_model), self.site, reconstruct):
            yield


@dataclass(kw_only=True, frozen=True)
class SaeFile:
    """A checkpoint in a run folder."""

    run: str
    layer: str
    snapshot: str
    path: Path

    def load(self, model: str | None = None) -> LoadedSae:
        return LoadedSae(Sae.load(self.path).at(Site.of(self.layer)), self.run, model)

    def __repr__(self) -> str:
        return f"<{self.run}, layer {self.layer}, {self.snapshot}>"


def saes(runs: str | Path = "runs", *, snapshot: str = FINAL) -> list[SaeFile]:
    """List the SAEs of a run folder, or of all runs in a folder. Raises UserError where there are no runs."""
    return [
        SaeFile(run=run.name, layer=str(each.site), snapshot=each.label, path=each.path)
        for run in runs_in(parse_folder(runs))
        for each in run.snapshots()
        if each.label == snapshot
    ]


def load(place: str | Path, layer: int | str | None = None, *, snapshot: str = FINAL, model: str | None = None) -> LoadedSae:
    """Load the SAE of a checkpoint file, a run folder, or a repository on the hub, owner/name.

    `layer` is needed where there are several. `model` is the folder of the language model, if it lies elsewhere than at the
    harvest. Raises UserError.
    """
    path = parse_folder(place)
    if path.is_file():
        return LoadedSae(_at(Sae.load(path), layer, place), path.parent.name, model)
    if path.is_dir():
        of_site = {site: name for name in (p.name for p in path.iterdir()) if (site := _site_of(name, snapshot))}
        return LoadedSae(_at(Sae.load(path / _chosen(of_site, layer, place)), layer, place), path.resolve().name, model)
    if path.is_absolute() or str(place).count("/") != 1:
        raise UserError(f"there is no SAE at {place}: name a .pt file, a run folder, or a repository on the hub as owner/name")
    from huggingface_hub import hf_hub_download, list_repo_files

    repository = str(place)
    try:
        names = retried(f"the SAEs of {repository}", lambda: list_repo_files(repository))
        of_site = {site: name for name in names if (site := _site_of(name, snapshot))}
        name = _chosen(of_site, layer, place)
        file = retried(f"{name} of {repository}", lambda: hf_hub_download(repository, name))
    except UserError:
        raise
    except Exception as error:  # the hub's client has a dozen kinds
        raise unreachable(f"the SAEs of {repository}", error) from None
    return LoadedSae(_at(Sae.load(Path(file)), layer, place), repository.split("/")[1], model)


def _site_of(name: str, snapshot: str) -> Site | None:
    named = snapshot_name(name)
    return named[0] if named and named[1] == snapshot else None


def _chosen(of_site: dict[Site, str], layer: int | str | None, place: str | Path) -> str:
    """The name of a file. Where there is one, what it holds says of which layers it is."""
    return next(iter(of_site.values())) if len(of_site) == 1 else of_site[_named(of_site, layer, place)]


def _at(sae: Sae, layer: int | str | None, place: str | Path) -> Sae:
    """The SAE of a layer in a checkpoint, which may be of several that share it."""
    target = sae.target
    sites = target.inputs if target.shared else (target.place,)
    return sae.at(sites[0] if layer is None and len(sites) == 1 else _named(sites, layer, place))


def _named(sites: Iterable[Site], layer: int | str | None, place: str | Path) -> Site:
    if layer is None or Site.of(layer) not in sites:
        raise UserError(f"{place} has SAEs of layers {format_sites(sites) or '(none)'}: choose one with layer=")
    return Site.of(layer)


def open_cache(place: str | Path | None = None) -> Cache:
    """Open an activation cache; without a place the only one in data/. Raises UserError."""
    return Cache.open(cache_place(parse_location(str(place)) if place is not None else None, None))


# --- the commands ---


def harvest(**options: Any) -> Cache:
    """Run `rsae harvest`, whose options the arguments are, such as tokens="10M", and open the cache. Raises UserError."""
    from residual_saes.harvest.__main__ import fill, run_command

    with _stoppable():
        return fill(**_values(run_command, options))


def train(
    cache: Cache | str | Path, settings: str, *, layers: Iterable[int | str] | None = None, **options: Any
) -> list[SaeFile]:
    """Run `rsae train` on a cache and list the final SAEs of these settings and layers.

    `settings` are as for --l1, such as "batchtopk:64,3e-4/best"; further options are the command's, such as batch=4096. Raises
    UserError.
    """
    from residual_saes.train.__main__ import main, prepare

    place: Location | str | Path = cache.path if isinstance(cache, Cache) else cache
    named = {} if layers is None else {"layers": ",".join(map(str, layers))}
    values = _values(main, {"cache": place, "l1": settings, **named, **options})
    values.pop("listing")
    job = prepare(**values)
    if job is None:
        return []
    with _stoppable():
        job.train()
    written = {site for target in job.targets for site in target.outputs}
    return [sae for run in job.runs for sae in saes(run.path) if Site.of(sae.layer) in written]


def _values(command: click.Command, options: dict[str, Any]) -> dict[str, Any]:
    """The values of all options of a command, for those that are given: True is a flag, None is left out. Raises UserError."""
    flags: list[str] = []
    for name, value in options.items():
        if value is not None and value is not False:
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    try:
        return dict(command.make_context(str(command.name), flags).params)
    except click.ClickException as error:
        raise UserError(error.format_message()) from None


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Within, an interrupted kernel saves its state, as Ctrl-C does on a command line."""
    if threading.current_thread() is threading.main_thread():
        with SIGNALS.handled():
            yield
    else:
        yield
