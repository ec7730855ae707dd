"""Targets: which sites a dictionary reads and which it writes. An SAE reads and writes one."""

from dataclasses import dataclass
from typing import Any, Self

from residual_saes.shared.sites import Site


@dataclass(frozen=True, slots=True)
class Target:
    """The sites that are encoded, and those that are reconstructed from it; rows of all of them are of the same tokens."""

    inputs: tuple[Site, ...]
    outputs: tuple[Site, ...]

    @classmethod
    def itself(cls, site: Site) -> Self:
        return cls((site,), (site,))

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site once, in order."""
        return tuple(sorted({*self.inputs, *self.outputs}))

    @property
    def place(self) -> Site:
        """The site that names of files have."""
        return self.inputs[0]

    def fields(self) -> dict[str, Any]:
        """What a config says of it beside "layer": nothing for one site to itself, as it was before there were targets."""
        if self == Target.itself(self.place):
            return {}
        return {"inputs": [site.json for site in self.inputs], "outputs": [site.json for site in self.outputs]}
