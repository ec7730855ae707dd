"""What a job on a small disk will be: windows, bytes, forward passes, and hours from rates that were measured."""

from dataclasses import dataclass

from bench import project, report, table
from fleet.room import Window
from shared.cache import CacheSpec
from shared.units import format_bytes, format_layers, format_seconds


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
            f"window {i}: layers {format_layers(w.layers)}, up to {format_bytes(w.peak)}" for i, w in enumerate(self.windows, 1)
        ]
        ends = [w.layers[-1] + 1 for w in self.windows]
        whole = sum(ends) / self.spec.n_layers
        lines += [
            f"written in all: {format_bytes(self.written)}",
            f"forward passes: {len(ends)}, cut off after {', '.join(map(str, ends))} of {self.spec.n_layers} layers: "
            f"{whole:.3g} whole ones",
            f"left: {self.so_far}",
        ]
        return "\n".join(lines + [self._hours(parts) for parts in self._measured()])

    def _measured(self) -> list[project.Parts]:
        """The rates of this machine, and of the latest GPU, that `python -m bench` has measured at the job's shape."""
        if (self.spec.d_model, self.features) != (project.D, project.FEATURES):
            return []
        machines, gpus = table.found(report.RESULTS)
        here = [one for one in machines if one.machine.slug == report.machine().slug]
        parts = [project.from_results(one) for one in here[-1:]]
        return parts + [
            project.from_figures(one["figures"], machine=one["machine"]["gpu"], date=one["date"]) for one in gpus[-1:]
        ]

    def _hours(self, parts: project.Parts) -> str:
        """Windows repeat the forward pass; of two things that go on together the longer counts, as in bench.project."""
        spec, together = self.spec, max if parts.overlap else lambda *of: sum(of)
        tokens = spec.n_blocks * spec.block_rows
        harvest = train_dense = train_sparse = 0.0
        for window in self.windows:
            forward = tokens * (window.layers[-1] + 1) / spec.n_layers / parts.forward
            size = len(window.layers) * spec.n_blocks * spec.block_bytes
            harvest += together(forward, size / parts.write)
            saes = len(window.layers) * self.settings * spec.train_tokens
            train_dense += together(size / parts.read, saes / parts.dense)
            train_sparse += together(size / parts.read, saes / parts.sparse)
        return (
            f"at the rates of {parts.machine} ({parts.date}): harvest {format_seconds(harvest)}, training "
            f"{format_seconds(train_sparse)} (every step sparse) to {format_seconds(train_dense)} (dense)"
        )
