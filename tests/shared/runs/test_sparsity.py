from pathlib import Path
from typing import Any

import pytest

from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.config import RunConfig
from residual_saes.shared.runs.sparsity import Reading, held_fields
from tests.shared.runs.test_run import CACHE

# of before L0 could be held
OLD: dict[str, Any] = {"tokens": 100, "batch": 1, "expansion": 1, "l1": {"init": 1e-3, "target": None}}


def config(train: dict[str, Any], **more: Any) -> RunConfig:
    return RunConfig.of({"digest": "d", "train": train, "cache": CACHE, **more}, Path("config.json"))


@pytest.mark.parametrize(("share", "held"), [(0.0, False), (0.001, False), (0.2, True)])
def test_a_config_says_whether_l0_is_held(share: float, held: bool) -> None:
    """A thousandth of a hundred steps is none."""
    train = OLD | held_fields(share)
    assert config(train).train.holds_l0 is held
    assert not config(train | {"refit_kind": "decoder"}).train.holds_l0  # which an earlier version had
    end = ", then L0 held by keeping the largest activations of each batch (last 20% of training)" if held else ""
    assert config(train).reading == Reading(words="λ = 0.001" + end, rule="threshold" if held else "relu")
    batchtopk = "BatchTopK, the 64 largest activations a token"
    assert config(train | {"l1": {"k": 64}}).reading == Reading(words=batchtopk + end, rule="threshold")


def test_what_runs_say_of_their_kind() -> None:
    assert config(OLD).reading == Reading(words="λ = 0.001", rule="relu")
    steered = OLD | {"l1": {"init": 5e-4, "target": 150.0}}
    assert config(steered).reading.words == "λ = 0.0005, steered to an L0 of 150"
    said = {"words": "a kind of next year", "rule": "topk", "k": 3}
    new = OLD | {"l1": {"kind": "new", "k": 3}}
    assert config(new, sparsity=said).reading == Reading(words="a kind of next year", rule="topk", k=3)
    with pytest.raises(UserError, match="a setting of kind, k is not known here"):
        _ = config(new).reading
