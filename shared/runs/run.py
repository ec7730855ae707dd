"""A run folder, format 2: one L1 setting over any number of layers.

runs/<model>-saes-x<expansion>-l1-<setting>/     …-transcoders-<read>-<written>-x…, …-crosscoder-<layers>-x… (target.py)
    config.json                              everything needed to repeat the run, the cache's identity included
    sae_layer00_50M.pt … sae_layer00_final.pt    snapshots
    metrics/layer00.jsonl                    the training curve
    state/layer00/                           resume only; removed when the layer is done

Three rules. What is written says what it belongs to (the run's digest, the layer, the snapshot) and carries a checksum of
itself (shared/seal.py), and both are checked by whoever reads it: what is damaged is made again, what belongs elsewhere is
refused and left alone. A file takes its place whole and durable, and a state only after the curve and the snapshots before it.
A layer is written by one process, which holds a lock on state/layerNN/owner, and is finished when every snapshot is right.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from residual_saes.shared.cache import ADVICE, Cache
from residual_saes.shared.errors import Busy, UserError
from residual_saes.shared.files import create_file, make_dir, owned, refuse_links, replacing, sync_dir
from residual_saes.shared.progress import say
from residual_saes.shared.records import JsonLines
from residual_saes.shared.runs.config import RunConfig
from residual_saes.shared.runs.curve import Point
from residual_saes.shared.runs.sae import Damaged, Sae
from residual_saes.shared.seal import canonical, load_sealed, parse_json, save_sealed, seal, sealed, unsealed
from residual_saes.shared.sites import Site
from residual_saes.shared.stores import Location, open_store, parse_location
from residual_saes.shared.stores.mirror import Mirror
from residual_saes.shared.temporaries import remove, remove_leftovers
from residual_saes.shared.units import format_count

FORMAT = 2
SNAPSHOTS = 6
FINAL = "final"  # the label of the last
_FOLDERS = ("metrics", "results", "results/features", "plots")  # that commands write to, besides the states
_SNAPSHOT = re.compile(r"sae_layer(\d+(?:\.[a-z_]+)?)_([0-9A-Za-z]+)\.pt")

# Fields that runs had not at first, and what these did: left out where they say no more, so that the digests of such runs stay.
_ADDED: dict[str, Any] = {
    "lr_decay": 0.0, "refit": 0.0, "refit_kind": "decoder", "skip_positions": 0, "max_norm": None, "revive": False,
    "target": "", "skip": False,
    "step": {"decoder_norm": "unit"}, "controller": {"above": 4.0},
}  # fmt: skip


def cache_identity(cache: Cache, run: Path) -> dict[str, Any]:
    """A cache as a run remembers it: the digest that settles whether it is the same, the spec that says what differs, and
    where it lies, seen from the run's folder, so that both may be moved together."""
    place = os.path.relpath(cache.path, run) if isinstance(cache.path, Path) else str(cache.path)
    return {"digest": cache.digest, "spec": cache.spec.to_dict(), "place": place}


def run_config(train: dict[str, Any], cache: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json but for the machine. `digest` is the run's identity: of all its SAEs depend on."""
    train = _without(train, _ADDED)
    digest = _digest({"train": train, "cache": cache["digest"]})
    config: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "digest": digest, "train": train, "cache": cache}))
    return config


def _without(config: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in config.items():
        if isinstance(value, dict) and key in added:
            kept[key] = _without(value, added[key])
        elif key not in added or value != added[key]:
            kept[key] = value
    return kept


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


def snapshot_tokens(tokens: int) -> dict[str, int]:
    """{label: tokens after which the snapshot is due}: five at sixths of the run, and 'final'. 300M → 50M … 250M, final."""
    marks = [tokens * k // SNAPSHOTS for k in range(1, SNAPSHOTS)]
    return {format_count(mark): mark for mark in marks} | {FINAL: tokens}


def snapshot_name(name: str) -> tuple[Site, str] | None:
    """(site, label) of a checkpoint by the name of its file; None for any other name."""
    match = _SNAPSHOT.fullmatch(name)
    try:
        return (Site.of(match[1]), match[2]) if match else None
    except ValueError:  # a hook that is not known here
        return None


def made(run: Location, sites: Iterable[Site]) -> int:
    """How many checkpoints of these layers a run has, by their names: enough for whoever waits for them."""
    wanted, named = set(sites), filter(None, map(snapshot_name, open_store(run).list("")))
    return sum(site in wanted for site, _ in named)


@dataclass(kw_only=True, frozen=True, slots=True)
class Snapshot:
    """A checkpoint file and what its name says; of layers that share a dictionary, one for each of them."""

    path: Path
    site: Site
    label: str


class Run:
    """One run folder."""

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        """With a mirror the folder is its, and what is written is sent."""
        self.path, self._mirror = path, mirror

    @classmethod
    def open(cls, path: Path) -> Self:
        """A run that is there. Raises UserError as `config` does."""
        run = cls(path)
        _ = run.config
        return run

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @functools.cached_property
    def config(self) -> RunConfig:
        """Read once. Raises UserError unless this is a run, of a format that can be read, and as it was written."""
        try:
            config = parse_json(self.config_path.read_bytes())
            whole = sealed(config)
        except FileNotFoundError:
            raise UserError(f"{self.path} is not a run folder: it has no config.json; train one with `rsae train`") from None
        except OSError as error:
            raise UserError(f"cannot read {self.config_path}: {error.strerror}; put that right and run again") from None
        except ValueError:
            raise UserError(
                f"{self.config_path} is not readable JSON; restore it or train into another --runs folder"
            ) from None
        if not isinstance(config, dict) or "format" not in config:
            raise UserError(f"{self.config_path} is not of a run; move that folder away or name another --runs folder")
        if config["format"] != FORMAT:
            raise UserError(
                f"{self.path} is a run of format {config['format']}, this program reads {FORMAT}; use the version that wrote it"
            )
        if not whole:
            raise UserError(f"{self.config_path} was changed: its checksum does not match; restore it or train elsewhere")
        refuse_links(*(self.path / name for name in _FOLDERS))
        return RunConfig.of(unsealed(config), self.config_path)

    @property
    def cache_place(self) -> Location | None:
        """Where its cache lay, seen from where the run lies now; None where the run does not say."""
        place = self.config.cache.place
        if not place or "://" in place:
            return parse_location(place) if place else None
        return Path(os.path.normpath(self.path / place))

    def require_same(self, wanted: dict[str, Any]) -> None:
        """Raises UserError if the folder holds a run with another configuration (`run_config`), naming what differs."""
        if not self.config_path.exists():
            return
        stored = self.config.stored
        if stored["digest"] == wanted["digest"]:
            return
        if gone := self.config.train.removed:
            raise UserError(
                f"{self.path} was trained with {gone}, which this version cannot do: it can be evaluated and published, but "
                "only the version that began it can train it further; choose another --runs folder"
            )
        pairs = [
            ("", _ADDED | stored["train"], _ADDED | wanted["train"]),
            ("the cache's ", stored["cache"]["spec"], wanted["cache"]["spec"]),
        ]
        different = [
            f"{whose}{key} is {a.get(key)!r} there, {b.get(key)!r} here"
            for whose, a, b in pairs
            for key in sorted({*a, *b})
            if a.get(key) != b.get(key) and not (whose and key in ADVICE)
        ]
        raise UserError(
            f"{self.path} was trained with other settings ({'; '.join(different)}): "
            "repeat those or choose another --runs folder"
        )

    def create(self, config: dict[str, Any], machine: dict[str, Any]) -> None:
        """Make it a run, unless it is one. `machine` is recorded only: the last bits of a sum depend on it, nothing else."""
        self.remove_leftovers()
        content = json.dumps(seal(config | {"machine": machine}), indent=1).encode() + b"\n"
        new = not self.config_path.exists() and create_file(self.config_path, content)  # of several at once, one creates it
        if self._mirror is not None:
            self._mirror.settle(self.config_path)
            self.__dict__.pop("config", None)  # the bucket's may have taken its place
        if not new or self._mirror is not None:
            self.require_same(config)

    def remove_leftovers(self) -> None:
        """Remove what killed processes left half-written, anywhere in it."""
        for folder, _, _ in os.walk(self.path):
            remove_leftovers(Path(folder))

    # --- a bucket that holds the same ---

    def pull_config(self) -> None:
        """Before anything else is known of the run."""
        if self._mirror is not None:
            self._mirror.pull(self.name, lambda key: key == f"{self.name}/config.json")

    def pull(self, sites: Iterable[Site]) -> None:
        """All that belongs to these layers, which must be claimed."""
        if self._mirror is not None:
            keys = "|".join(re.escape(site.key) for site in sites)
            of_mine = re.compile(rf"[^/]+/(sae_layer({keys})_\w+\.pt|metrics/layer({keys})\.jsonl|state/layer({keys})/[^/]+)")
            self._mirror.pull(self.name, lambda key: of_mine.fullmatch(key) is not None)

    def push(self, path: Path) -> None:
        """Raises UserError if another process has written that file since."""
        if self._mirror is not None:
            self._mirror.push(path)

    # --- who writes ---

    @contextlib.contextmanager
    def claim(self, sites: Iterable[Site]) -> Iterator[None]:
        """Own these layers until the block or the process ends. Raises UserError naming another owner."""
        new = [path for path in (self.path, *self.path.parents) if not path.exists()]
        make_dir(self.path)
        for path in new:
            sync_dir(path.parent)
        try:
            with contextlib.ExitStack() as stack:
                for site in sites:
                    stack.enter_context(self._claim(site))
                yield
        finally:
            for folder in (self.path / "state", self.path):
                with contextlib.suppress(OSError):
                    folder.rmdir()  # if nothing came of it

    @contextlib.contextmanager
    def _claim(self, site: Site) -> Iterator[None]:
        path = self._owner_path(site)
        refuse_links(self.path / "metrics", path.parent.parent, path.parent)
        try:
            with owned(path) as owner:
                if owner:
                    raise Busy(
                        f"layer {site} of {self.path} is being trained by {owner}: wait until it ends, or train other --layers"
                    )
                self._sweep(site)
                yield
        finally:
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # if there is no state

    def _owner_path(self, site: Site) -> Path:
        return self.state_path(site).parent / "owner"

    def _sweep(self, site: Site) -> None:
        """Remove what a kill left half-written."""
        places = ((self.path, f"*sae_layer{site.key}_*"), (self.path / "metrics", f"*layer{site.key}.jsonl*"))
        for folder, name in (*places, (self._owner_path(site).parent, "*")):
            for path in folder.glob(f"{name}.tmp"):
                remove(path)

    # --- snapshots ---

    @property
    def labels(self) -> list[str]:
        """Of each layer's snapshots, by age. SAEs from elsewhere are final."""
        tokens = self.config.train.tokens
        return [FINAL] if tokens is None else list(snapshot_tokens(tokens))

    def snapshot_path(self, site: Site, label: str) -> Path:
        return self.path / f"sae_layer{site.key}_{label}.pt"

    def snapshots(self) -> list[Snapshot]:
        """All checkpoints that are there, by layer and then by age."""
        labels, of = self.labels, self.config.members
        named = [(path, snapshot_name(path.name)) for path in self.path.glob("sae_layer*.pt")]
        snapshots = [Snapshot(path=p, site=site, label=n[1]) for p, n in named if n and n[1] in labels for site in of(n[0])]
        return sorted(snapshots, key=lambda s: (s.site, labels.index(s.label)))

    def belongs(self, site: Site, label: str) -> dict[str, Any]:
        """What the config of a checkpoint says in its place, and in no other."""
        return {"layer": self.config.members(site)[0].json, "snapshot": label, "digest": self.config.digest}

    def load(self, snapshot: Snapshot, d_model: int | None = None) -> Sae:
        """The SAE of its site. Raises what `Sae.load` raises."""
        return Sae.load(snapshot.path, d_model, belongs=self.belongs(snapshot.site, snapshot.label)).at(snapshot.site)

    def due(self, site: Site) -> list[str]:
        """The labels of a layer's snapshots that are missing or damaged. Reads all there are. Raises UserError for one that is
        whole and belongs elsewhere: it may be the only copy."""
        due = []
        for label in self.labels:
            path = self.snapshot_path(site, label)
            try:
                Sae.check(path, belongs=self.belongs(site, label))
            except Damaged as error:
                due.append(label)
                if path.exists():
                    say(f"{error}: it is made again", err=True)
        return due

    # --- the training curve ---

    def metrics_path(self, site: Site) -> Path:
        return self.path / "metrics" / f"layer{site.key}.jsonl"

    def metrics(self, site: Site) -> list[Point]:
        """Without a last line that is not whole: it is being written, or a crash cut it. Raises UserError if another line is
        damaged."""
        return self._curve(site).read()

    def _curve(self, site: Site) -> JsonLines[Point]:
        return JsonLines(self.metrics_path(site), Point)

    def append_metrics(self, site: Site, point: Point) -> None:
        """Durable after `sync_metrics`."""
        self.metrics_path(site).parent.mkdir(exist_ok=True)
        self._curve(site).append(point)

    def sync_metrics(self, site: Site) -> None:
        path = self.metrics_path(site)
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sync_dir(path.parent)
            sync_dir(self.path)
            self.push(path)

    def rewind_metrics(self, site: Site, step: int) -> None:
        """Drop, in one move, the records after `step`, which a resumed run writes again, and what is damaged."""
        path, kept = self.metrics_path(site), []
        for number, (line, point) in enumerate(self._curve(site).lines(), 1):
            if point is None:
                say(f"line {number} of {path} is damaged, and dropped", err=True)
            elif point.step <= step:
                kept.append(line)
        if path.exists() and path.read_bytes() != b"".join(kept):
            with replacing(path) as temporary:
                temporary.write_bytes(b"".join(kept))

    # --- resume state ---

    def state_path(self, site: Site) -> Path:
        return self.path / "state" / f"layer{site.key}" / "state.safetensors"

    def save_state(self, site: Site, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replace the resume state in one move: tensors, and a small JSON of everything else. The curve is durable before."""
        path = self.state_path(site)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.sync_metrics(site)
        host = {k: v.cpu() for k, v in tensors.items()}
        save_sealed(path, facts | self._state_belongs(site), host)
        sync_dir(path.parent.parent)
        sync_dir(self.path)
        self.push(path)

    def load_state(self, site: Site) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Raises `Damaged` for what is not as it was written, and UserError for the state of another layer or run."""
        path = self.state_path(site)
        if not path.exists():
            return None
        try:
            tensors, facts = load_sealed(path)
        except ValueError as error:
            raise Damaged(f"{path} is damaged ({error})") from None
        belongs = self._state_belongs(site)
        if any(facts.get(k) != v for k, v in belongs.items()):
            whose = "this" if facts.get("run") == belongs["run"] else "another"
            raise UserError(
                f"{path} is the state of layer {facts.get('layer')} of {whose} run, not of layer {site} of this one: "
                "put it back where it belongs, or delete it to train this layer from the start"
            )
        return tensors, {k: v for k, v in facts.items() if k not in belongs}

    def _state_belongs(self, site: Site) -> dict[str, Any]:
        return {"layer": site.json, "run": self.config.digest}

    def drop_state(self, site: Site) -> None:
        """Remove it, half a state that a kill left beside it included."""
        folder = self.state_path(site).parent
        for path in folder.iterdir() if folder.exists() else ():
            if path.name != "owner":
                remove(path)
        self.push(self.state_path(site))
