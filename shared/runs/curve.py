"""A training curve: a sealed line for each record in metrics/layerNN.jsonl."""

from dataclasses import dataclass, field
from typing import Any

from residual_saes.shared.records import Record


@dataclass(kw_only=True, frozen=True)
class Point(Record):
    """One step on its batch; what a line does not say is None. The last of an SAE that failed says why it stopped."""

    step: int  # steps taken, this one included
    tokens: int
    loss: float | None = None
    mse: float | None = None
    l1: float | None = None  # the L1 term of the loss, λ included
    l0: float | None = None
    l1_weight: float | None = field(default=None, metadata={"key": "lambda"})
    alive: int | None = None  # features
    grad_norm: float | None = None
    sparse_step: bool | None = None
    tokens_per_second: float | None = None
    wait_share: float | None = None  # of the time, for activations
    stopped: str | None = None

    def values(self) -> dict[str, Any]:
        return {key: value for key, value in super().values().items() if value is not None}
