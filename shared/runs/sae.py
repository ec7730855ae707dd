"""The SAE as a function, and the file it is published in.

z = relu(W_enc (x − b_pre) + b_enc)        x̂ = W_dec z + b_dec + b_pre

A transcoder, whose config says other outputs than inputs, gives W_dec z + b_dec, with a skip connection + W_skip (x − b_pre).

With thresholds θ [F] (settings that choose among a batch's activations have them), z_i is 0 unless it is above θ_i. Where the
config says k, a token's z is 0 but for its k largest entries.
"""

import contextlib
import dataclasses
import errno
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from residual_saes.shared.errors import UserError
from residual_saes.shared.files import replacing
from residual_saes.shared.runs.rows import Rows
from residual_saes.shared.runs.target import Target
from residual_saes.shared.seal import SEAL, seal, sealed
from residual_saes.shared.sites import Site
from residual_saes.shared.typed import Bounds, Count, read

_SHAPES = {
    "b_pre": ("d",),
    "encoder.weight": ("F", "d"),
    "encoder.bias": ("F",),
    "decoder.weight": ("d", "F"),
    "decoder.bias": ("d",),
}
_THRESHOLD = "threshold"  # [F], in the files of some
_SKIP = "skip.weight"  # [d, d]: y from x − b_pre
_SOME = {_THRESHOLD: ("F",), _SKIP: ("d", "d")}  # that some files have
Rule = Literal["relu", "threshold", "topk"]  # how z follows from relu's values


@dataclass(kw_only=True, frozen=True, slots=True)
class _Train:
    skip_positions: Annotated[int, Bounds(0, 1 << 30)] = 0
    max_norm: float | None = None


@dataclass(kw_only=True, frozen=True, slots=True)
class _Kind:
    k: Count | None = None
    prefixes: tuple[float, ...] = ()


@dataclass(kw_only=True, frozen=True, slots=True)
class _Look:
    median_norm: float = 0.0


@dataclass(kw_only=True, frozen=True, slots=True)
class _Config:
    """What is asked of a file's config."""

    layer: Site | None = None
    inputs: tuple[Site, ...] = ()
    outputs: tuple[Site, ...] = ()
    shared: bool = False
    train: _Train = _Train()
    sparsity: _Kind = _Kind()


@dataclass(kw_only=True, frozen=True, slots=True)
class _Stats:
    """What is asked of a file's stats."""

    tokens: Count | None = None
    l1_weight: float | None = dataclasses.field(default=None, metadata={"key": "lambda"})
    l0: float | None = None
    scales: tuple[float, ...] = ()
    activations: _Look = _Look()


class Damaged(UserError):
    """A file of a run that is missing or not as it was written: nothing is lost by making it again."""


@dataclass(kw_only=True, slots=True)
class Sae:
    """A trained SAE in float32. `w_dec` is held as [F, d]: a row is a feature's direction."""

    w_enc: Tensor  # [F, d]
    w_dec: Tensor  # [F, d]
    b_enc: Tensor  # [F]
    b_pre: Tensor  # [d]
    b_dec: Tensor  # [d]
    config: dict[str, Any]
    stats: dict[str, Any]
    threshold: Tensor | None = None  # [F]
    skip: Tensor | None = None  # [d, d]

    def encode(self, x: Tensor) -> Tensor:
        """x [..., d] → z [..., F] ≥ 0."""
        h = torch.nn.functional.linear(x - self.b_pre, self.w_enc, self.b_enc)
        z = h.relu_() if self.threshold is None else h.masked_fill(h <= self.threshold.clamp(min=0), 0.0)
        return z if self.k is None else keep_top_k_(z, self.k)

    def decode(self, z: Tensor) -> Tensor:
        """z [..., F] → x̂ [..., d], but for what a skip connection adds."""
        return z @ self.w_dec + self._bias

    def reconstruct(self, x: Tensor, z: Tensor) -> Tensor:
        """x̂ [..., d] of x [..., d] with these activations."""
        return self.completed(x, z @ self.w_dec)

    def completed(self, x: Tensor, decoded: Tensor) -> Tensor:
        """x̂ [..., d] of x [..., d] with activations that decode to z W_dec."""
        given = decoded + self._bias
        return given if self.skip is None else given + (x - self.b_pre) @ self.skip.t()

    @property
    def _bias(self) -> Tensor:
        return self.b_dec if self.transcodes else self.b_dec + self.b_pre

    @property
    def target(self) -> Target:
        """What it reads and writes."""
        return Target.of(self.config)

    @property
    def transcodes(self) -> bool:
        return self.target.transcodes

    def at(self, site: Site) -> "Sae":
        """Of a dictionary that sites share, whose rows are divided by a scale of each, the SAE of this one's rows as they are;
        any other as it is."""
        target = self.target
        if not target.shared:
            return self
        scale = dict(zip(target.inputs, self.stats.get("scales") or [1.0] * len(target.inputs), strict=True))[site]
        config = {name: value for name, value in self.config.items() if name not in target.fields()}
        return dataclasses.replace(self.of_scaled([scale]), config=config | {"layer": site.json})

    def parts(self) -> list["Sae"]:
        """One for each site that it writes, with the same encoder, as transcoders; itself where it writes one."""
        outputs = self.target.outputs
        if len(outputs) == 1:
            return [self]
        bias = self.b_dec + self.b_pre
        rows = zip(outputs, self.w_dec.chunk(len(outputs), 1), bias.chunk(len(outputs)), strict=True)
        return [
            dataclasses.replace(self, w_dec=w_dec, b_dec=b_dec, config=self.config | {"outputs": [site.json]})
            for site, w_dec, b_dec in rows
        ]

    def shares(self) -> Tensor:
        """Of each feature's squared decoder norm those of the sites that it writes, [F, sites], with rows over their scales."""
        n = len(self.target.outputs)
        scales = self.w_dec.new_tensor(self.stats.get("scales", [1.0] * n))
        squares = self.w_dec.view(len(self.w_dec), n, -1).square().sum(2) / scales.square()
        return squares / squares.sum(1, keepdim=True).clamp(min=1e-30)

    def of_scaled(self, scales: Sequence[float]) -> "Sae":
        """One of rows whose equal parts were each divided by one of `scales`, as the same function of the rows as they were."""
        by = self.b_pre.new_tensor(scales).repeat_interleave(len(self.b_pre) // len(scales))
        return dataclasses.replace(
            self, w_enc=self.w_enc / by, w_dec=self.w_dec * by, b_pre=self.b_pre * by, b_dec=self.b_dec * by
        )

    @property
    def k(self) -> int | None:
        """How many of its activations a token keeps, where its kind says so."""
        k: int | None = self.config.get("sparsity", {}).get("k")
        return k

    @property
    def prefixes(self) -> list[float]:
        """Of the dictionary, that were trained to reconstruct by themselves, as its kind says them."""
        return list(self.config.get("sparsity", {}).get("prefixes", ()))

    @property
    def rule(self) -> Rule:
        return "threshold" if self.threshold is not None else "relu" if self.k is None else "topk"

    @property
    def rows(self) -> Rows:
        """Such as it was trained on, and is measured on."""
        return Rows.of(self.config.get("train", {}), self.stats.get("activations", {}))

    def tensors(self) -> dict[str, Tensor]:
        names = ("w_enc", "w_dec", "b_enc", "b_pre", "b_dec", "threshold", "skip")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def to(self, device: torch.device) -> "Sae":
        return Sae(**{k: v.to(device) for k, v in self.tensors().items()}, config=self.config, stats=self.stats)

    def save(self, path: Path) -> None:
        """Write the published form: `model_state`, `config`, `stats`, readable with weights_only=True. Raises OSError."""
        state = {
            "b_pre": self.b_pre,
            "encoder.weight": self.w_enc,
            "encoder.bias": self.b_enc,
            "decoder.weight": self.w_dec.t(),
            "decoder.bias": self.b_dec,
        } | {name: tensor for name, tensor in ((_THRESHOLD, self.threshold), (_SKIP, self.skip)) if tensor is not None}
        # A clone holds its own numbers only; saving a view would write the whole storage behind it.
        state = {k: v.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format) for k, v in state.items()}
        stats = self.stats | {SEAL: seal(_facts(self.config, self.stats), state)[SEAL]}
        content = io.BytesIO()  # written by torch, a full disk would be an error that tells nothing
        torch.save({"model_state": state, "config": self.config, "stats": stats}, content)
        with replacing(path) as temporary:
            temporary.write_bytes(content.getbuffer())

    @classmethod
    def load(cls, path: Path, d_model: int | None = None, *, belongs: dict[str, Any] | None = None) -> "Sae":
        """Raises `Damaged` for a file that is missing, is no SAE or has changed since it was written, and UserError for one
        that is not over `d_model` dimensions or does not belong here: whose config has other values than `belongs`."""
        state, config, stats = _read(path, belongs)
        sizes = {"d": state["b_pre"].numel(), "F": state["encoder.bias"].numel()}
        if 0 in sizes.values():
            raise Damaged(f"{path} holds no weights")
        for name, shape in (_SHAPES | {name: axes for name, axes in _SOME.items() if name in state}).items():
            if tuple(state[name].shape) != tuple(sizes[axis] for axis in shape):
                raise Damaged(f"{path}: {name} is {tuple(state[name].shape)}, which does not fit the other weights")
        sites = Target.of(config).row_sites
        if d_model is not None and sizes["d"] != sites * d_model:
            raise UserError(
                f"{path} is an SAE over {sizes['d'] // sites} dimensions, the cache has {d_model}; use the cache it was "
                "trained on"
            )
        return cls(
            w_enc=state["encoder.weight"].float(),
            w_dec=state["decoder.weight"].t().contiguous().float(),
            b_enc=state["encoder.bias"].float(),
            b_pre=state["b_pre"].float(),
            b_dec=state["decoder.bias"].float(),
            config=config,
            stats=stats,
            **{name: state[key].float() for name, key in (("threshold", _THRESHOLD), ("skip", _SKIP)) if key in state},
        )

    @staticmethod
    def check(path: Path, *, belongs: dict[str, Any]) -> None:
        """Read every byte as `load` does, keep none. Raises what `load` raises."""
        _read(path, belongs)

    @staticmethod
    def checksum(path: Path) -> str:
        """The checksum that the file carries, which tells it from every other; the tensors are not read. Raises as `load`."""
        return str(_open(path, tensors=False)[2][SEAL])


def keep_top_k_(z: Tensor, k: int) -> Tensor:
    """z [..., F] ≥ 0 keeps the k largest entries of each row and becomes 0 elsewhere; returns it."""
    largest = z.topk(min(k, z.shape[-1]), sorted=False)
    return z.zero_().scatter_(-1, largest.indices, largest.values)


_Content = tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]  # model_state, config, stats


def _read(path: Path, belongs: dict[str, Any] | None) -> _Content:
    state, config, stats = _open(path)
    if not sealed(_facts(config, stats) | {SEAL: stats[SEAL]}, state):
        raise Damaged(f"{path} is damaged: its checksum does not match; train again to make it again")
    try:
        read(_Config, config), read(_Stats, stats)
    except ValueError as error:
        raise UserError(f"{path} is not of an SAE that can be: {error}; get it again") from None
    if different := [k for k, v in (belongs or {}).items() if config.get(k) != v]:
        is_, wanted = ({k: c.get(k) for k in different} for c in (config, belongs or {}))
        raise UserError(
            f"{path} does not belong here: it says {_words(is_)}, not {_words(wanted)}; put it back where it belongs"
        )
    return state, config, stats


def _open(path: Path, *, tensors: bool = True) -> _Content:
    """The content of a file, as it stands there; without `tensors` their values are not read."""
    try:
        with path.open("rb") as file, contextlib.nullcontext() if tensors else torch.serialization.skip_data():
            # not mapped: a bad block, or a file that is cut meanwhile, would end the process
            content = torch.load(io.BytesIO(file.read()) if tensors else file, map_location="cpu", weights_only=True)
        state, config, stats = content["model_state"], dict(content["config"]), dict(content["stats"])
        state = {name: state[name] for name in (*_SHAPES, *(name for name in _SOME if name in state))}
        if any(t.layout != torch.strided or not t.is_floating_point() or t.is_meta for t in state.values()):
            raise ValueError("no plain numbers")
        return state, config, stats | {SEAL: stats[SEAL]}
    except FileNotFoundError:
        raise Damaged(f"no checkpoint at {path}") from None
    except Exception as error:  # a damaged zip, pickle or dictionary fails in too many ways to name them
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which torch meets where a zip ends before its end
            raise UserError(f"cannot read {path}: {error.strerror or error}; put that right and try again") from None
        raise Damaged(
            f"{path} is not a readable SAE checkpoint ({type(error).__name__}); train again to make it again"
        ) from None


def _facts(config: dict[str, Any], stats: dict[str, Any]) -> dict[str, Any]:
    return {"config": config, "stats": {k: v for k, v in stats.items() if k != SEAL}}


def _words(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
