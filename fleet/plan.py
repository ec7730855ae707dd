"""What a job on a small disk will be: windows, bytes, forward passes, and hours from rates that were measured."""

from dataclasses import dataclass

from residual_saes.fleet.hours import Rates, Work, measured_rates
from residual_saes.fleet.room import Window
from residual_saes.shared.cache import CacheSpec
from residual_saes.shared.sites import format_sites
from residual_saes.shared.units import format_bytes, format_seconds


@dataclass(kw_only=True, frozen=True, slots=True)
class Plan:
    windows: tuple[Window, ...]
    written: int  # bytes, in all windows together
    spec: CacheSpec
    settings: int
    features: int
    so_far: str  # what is left, by the times that this job's own stages took

    def __str__(self) -> str:
        if not self.windows:
            return "nothing is left to be done"
        lines = [
            f"window {i}: layers {format_sites(w.layers)}, up to {format_bytes(w.peak)}" for i, w in enumerate(self.windows, 1)
        ]
        ends = [w.layers[-1].layer + 1 for w in self.windows]
        whole = sum(ends) / self.spec.n_layers
        lines += [
            f"written in all: {format_bytes(self.written)}",
            f"forward passes: {len(ends)}, cut off after {', '.join(map(str, ends))} of {self.spec.n_layers} layers: "
            f"{whole:.3g} whole ones",
            f"left: {self.so_far}",
        ]
        return "\n".join(lines + [self._hours(rates) for rates in measured_rates(self.spec.d_model, self.features)])

    def _hours(self, rates: Rates) -> str:
        """The windows' times, one after the other."""
        times = [rates.times(self._work(window)) for window in self.windows]
        harvest, sparse, dense = (
            format_seconds(sum(each)) for each in zip(*((t.harvest, t.train_sparse, t.train_dense) for t in times), strict=True)
        )
        return (
            f"at the rates of {rates.machine} ({rates.date}): harvest {harvest}, training {sparse} (every step sparse) to "
            f"{dense} (dense)"
        )

    def _work(self, window: Window) -> Work:
        """A window runs the model once more, as far as its last layer."""
        spec, layers = self.spec, len(window.layers)
        tokens = spec.n_blocks * spec.block_rows
        return Work(
            forward=tokens * (window.layers[-1].layer + 1) / spec.n_layers,
            bytes=layers * spec.n_blocks * spec.block_bytes,
            training=layers * self.settings * spec.train_tokens,
        )
