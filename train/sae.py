"""The SAE as a function, and the file it is published in.

z = relu(W_enc (x − b_pre) + b_enc)        x̂ = W_dec z + b_dec + b_pre
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.cli import UserError
from shared.files import replacing

_SHAPES = {
    "b_pre": ("d",),
    "encoder.weight": ("F", "d"),
    "encoder.bias": ("F",),
    "decoder.weight": ("d", "F"),
    "decoder.bias": ("d",),
}


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

    def encode(self, x: Tensor) -> Tensor:
        """x [..., d] → z [..., F] ≥ 0."""
        return torch.relu((x - self.b_pre) @ self.w_enc.t() + self.b_enc)

    def decode(self, z: Tensor) -> Tensor:
        """z [..., F] → x̂ [..., d]."""
        return z @ self.w_dec + (self.b_dec + self.b_pre)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("w_enc", "w_dec", "b_enc", "b_pre", "b_dec")}

    def to(self, device: torch.device) -> "Sae":
        return Sae(**{k: v.to(device) for k, v in self.tensors().items()}, config=self.config, stats=self.stats)

    def save(self, path: Path) -> None:
        """Write the published form: `model_state`, `config`, `stats`, readable with weights_only=True."""
        state = {
            "b_pre": self.b_pre,
            "encoder.weight": self.w_enc,
            "encoder.bias": self.b_enc,
            "decoder.weight": self.w_dec.t(),
            "decoder.bias": self.b_dec,
        }
        # A clone holds its own numbers only; saving a view would write the whole storage behind it.
        state = {k: v.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format) for k, v in state.items()}
        with replacing(path) as temporary:
            try:
                with temporary.open("wb") as file:
                    torch.save({"model_state": state, "config": self.config, "stats": self.stats}, file)
            except RuntimeError as error:  # torch hides the error of a full disk behind one of its own
                raise (error.__context__ or error) from None

    @classmethod
    def load(cls, path: Path, d_model: int | None = None) -> "Sae":
        """Raises UserError for a file that is no SAE, is damaged, or is not over `d_model` dimensions."""
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            state, config, stats = content["model_state"], content["config"], content["stats"]
            tensors = {name: state[name] for name in _SHAPES}
        except FileNotFoundError:
            raise UserError(f"no checkpoint at {path}") from None
        except Exception as error:  # a damaged zip, pickle or dictionary fails in too many ways to name them
            raise UserError(f"{path} is not a readable SAE checkpoint ({type(error).__name__}); train it again") from None
        sizes = {"d": tensors["b_pre"].numel(), "F": tensors["encoder.bias"].numel()}
        for name, shape in _SHAPES.items():
            if tuple(tensors[name].shape) != tuple(sizes[axis] for axis in shape):
                raise UserError(f"{path}: {name} is {tuple(tensors[name].shape)}, which does not fit the other weights")
        if d_model is not None and sizes["d"] != d_model:
            raise UserError(
                f"{path} is an SAE over {sizes['d']} dimensions, the cache has {d_model}; use the cache it was trained on"
            )
        return cls(
            w_enc=tensors["encoder.weight"].float(),
            w_dec=tensors["decoder.weight"].t().contiguous().float(),
            b_enc=tensors["encoder.bias"].float(),
            b_pre=tensors["b_pre"].float(),
            b_dec=tensors["decoder.bias"].float(),
            config=config,
            stats=stats,
        )
