"""What a layer's activations are like, before SAEs are trained on them: whether a few rows or one direction own the error.

Real residual streams have first positions and a few tokens a hundred times as long as the median row (Sun et al.,
arXiv:2402.17762). They hold most of the variance, so that FVU is small whatever an SAE makes of the other rows.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from residual_saes.shared.cache import Cache
from residual_saes.shared.runs.rows import Rows, norms, nothing_left
from residual_saes.shared.shuffle import epoch_slices
from residual_saes.shared.sites import Site

LONG = 10  # times the median norm
FLATTERS = 0.5  # share of variance in one direction, in first positions or in long rows, from which FVU says little
_FLOAT16 = 65_504.0


def read_rows(cache: Cache, site: Site, seed: int) -> tuple[Tensor, Tensor]:
    """As many rows as a block has, float16 [n, d], from slices with which training begins, and for each its position in its
    context [n]: a pure function of the cache and these numbers. Raises UserError for what cannot be read."""
    spec = cache.spec
    numbers = epoch_slices(spec.train_blocks, spec.slices, seed=seed, epoch=0)[: spec.slices]
    rows, positions = [], []
    for block, index in (divmod(number, spec.slices) for number in numbers.tolist()):
        places = cache.block_order(block)[index * spec.slice_rows : (index + 1) * spec.slice_rows]
        data = spec.stored_rows(len(places))
        cache.read_slice(site, block, index, data)
        cache.check_slice(site, block, index, data, cache.stats(site, block))
        rows.append(torch.from_numpy(cache.values(site, data)))
        positions.append(torch.from_numpy(places % spec.context))
    return torch.cat(rows), torch.cat(positions)


def deviation(x: Tensor, positions: Tensor, skip_positions: int = 0) -> float:
    """√(mean ‖x − mean‖²) of those rows [n, d] that are trained on."""
    rows = x[positions >= skip_positions].double()
    return float((rows - rows.mean(0)).square().sum(1).mean().sqrt())


@dataclass(kw_only=True, frozen=True, slots=True)
class Look:
    """Shares are of Σ‖x − mean‖² over the rows looked at that are trained on, but for `long_rows` and `left_out`."""

    mean_over_std: float  # ‖mean‖ / √(mean ‖x − mean‖²)
    top_direction: float
    first_positions: float  # of contexts
    long_rows: float  # share of rows
    long_rows_variance: float
    float16_used: float  # largest |value| over the largest that float16 holds
    median_norm: float  # of all rows looked at: what --max-norm is a multiple of
    left_out: float  # share of all rows looked at that are not trained on

    @classmethod
    def of(cls, x: Tensor, positions: Tensor, skip_positions: int = 0, max_norm: float | None = None) -> Self:
        """x float16 [n, d], and for each its position in its context [n]. Raises UserError where no row would be left."""
        length = norms(x)
        median = float(length.median())
        kept = Rows.of({"skip_positions": skip_positions, "max_norm": max_norm}, {"median_norm": median}).kept(x, positions)
        if not kept.any():
            raise nothing_left()
        wide, positions, long = x[kept].float(), positions[kept], length[kept] > LONG * median
        mean = wide.mean(0)
        centred = wide - mean
        squares = centred.double().square().sum(1)
        total = float(squares.sum()) or 1.0
        largest = float(torch.linalg.eigvalsh(centred.t() @ centred)[-1])
        return cls(
            mean_over_std=float(mean.norm()) / (total / len(wide)) ** 0.5,
            top_direction=largest / total,
            first_positions=float(squares[positions == 0].sum()) / total,
            long_rows=float(long.double().mean()),
            long_rows_variance=float(squares[long].sum()) / total,
            float16_used=float(wide.abs().max()) / _FLOAT16,
            median_norm=median,
            left_out=1 - len(wide) / len(x),
        )

    @property
    def warning(self) -> str:
        """What is wrong in a line, with what to do; empty where nothing is."""
        shares = {
            "lies in one direction": (self.top_direction, ""),
            "lies in first positions": (self.first_positions, "--skip-positions 1"),
            f"lies in rows longer than {LONG} medians": (self.long_rows_variance, f"--max-norm {LONG}"),
        }
        flattering = {where: share for where, (share, _) in shares.items() if share > FLATTERS}
        if not flattering:
            return ""
        options = " or ".join(option for where, (_, option) in shares.items() if where in flattering and option)
        advice = f", or train without those rows ({options})" if options else ""
        return (
            f"{', '.join(f'{share:.0%} of the variance {where}' for where, share in flattering.items())}, so FVU will flatter: "
            f"judge these SAEs by fvu_without_first, fvu_without_top3 and CE recovered{advice}"
        )

    def __str__(self) -> str:
        """The figures."""
        text = (
            f"mean over deviation {self.mean_over_std:.2g}; of the variance {self.top_direction:.0%} in one direction, "
            f"{self.first_positions:.0%} in first positions, {self.long_rows_variance:.0%} in the {self.long_rows:.2%} of rows "
            f"above {LONG} × the median norm; largest value {self.float16_used:.1%} of float16's"
        )
        if self.left_out:
            text = f"{self.left_out:.2%} of rows are not trained on; in the others {text}"
        return text
