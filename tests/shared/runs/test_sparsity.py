import pytest

from residual_saes.shared.errors import UserError
from residual_saes.shared.runs.sparsity import Reading, held_fields, holds_l0, reading

OLD = {"tokens": 100, "batch": 1, "l1": {"init": 1e-3, "target": None}}  # of before L0 could be held


@pytest.mark.parametrize(("share", "held"), [(0.0, False), (0.001, False), (0.2, True)])
def test_a_config_says_whether_l0_is_held(share: float, held: bool) -> None:
    """A thousandth of a hundred steps is none."""
    train = OLD | held_fields(share)
    assert holds_l0(train) is held
    assert not holds_l0(train | {"refit_kind": "decoder"})  # which an earlier version had
    end = ", then L0 held by keeping the largest activations of each batch (last 20% of training)" if held else ""
    assert reading({"train": train}) == Reading(words="λ = 0.001" + end, rule="threshold" if held else "relu")
    batchtopk = "BatchTopK, the 64 largest activations a token"
    assert reading({"train": train | {"l1": {"k": 64}}}) == Reading(words=batchtopk + end, rule="threshold")


def test_what_runs_say_of_their_kind() -> None:
    assert reading({"train": OLD}) == Reading(words="λ = 0.001", rule="relu")
    steered = OLD | {"l1": {"init": 5e-4, "target": 150.0}}
    assert reading({"train": steered}).words == "λ = 0.0005, steered to an L0 of 150"
    said = {"words": "a kind of next year", "rule": "topk", "k": 3}
    assert reading({"train": OLD | {"l1": {"kind": "new", "k": 3}}, "sparsity": said}) == Reading(**said)
    with pytest.raises(UserError, match="a setting of kind, k is not known here"):
        reading({"train": OLD | {"l1": {"kind": "new", "k": 3}}})
