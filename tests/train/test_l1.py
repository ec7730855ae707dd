import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.cli import UserError
from train.l1 import ControllerConfig, L1Controller, L1Setting, format_l1, parse_l1


def test_settings_as_people_write_them() -> None:
    assert parse_l1("3e-4,8e-5,adaptive,adaptive:1e-3@64") == (
        L1Setting(init=3e-4),
        L1Setting(init=8e-5),
        L1Setting(init=5e-4, target=150),
        L1Setting(init=1e-3, target=64),
    )
    labels = [s.label for s in parse_l1("3e-4,0.00008,adaptive,adaptive:1e-3@64")]
    assert labels == ["3e-4-fixed", "8e-5-fixed", "adaptive", "adaptive-1e-3-l0-64"]


@given(st.floats(1e-9, 1e3))
def test_a_label_names_one_value(value: float) -> None:
    assert float(format_l1(value)) == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    "text", ["abc", "-1", "0", "adaptive:x", "adaptive:1e-3", "1e-3@5", "", "3e-4,", "nan", "inf", "1.2.3"]
)
def test_what_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not an L1 setting"):
        parse_l1(text)


def test_a_setting_named_twice_is_refused() -> None:
    with pytest.raises(UserError, match="twice"):
        parse_l1("3e-4,0.0003")


def test_a_fixed_setting_stays() -> None:
    controller = L1Controller(L1Setting(init=3e-4), 100, ControllerConfig())
    for step in range(100):
        controller.update(step, 1e4)
    assert controller.value == 3e-4


@given(st.floats(5, 200), st.floats(-3, 3))
def test_steers_a_simple_system_to_its_target(target: float, log_start: float) -> None:
    """L0 answers to λ as L0 = target · (λ/λ*)^-0.7, with a lag; at the end L0 is at its target and λ at rest."""
    steps, right = 2000, 1e-3
    controller = L1Controller(L1Setting(init=right * 2.718**log_start, target=target), steps, ControllerConfig())
    l0, values = 4 * target, []
    for step in range(steps):
        l0 += 0.05 * (target * (controller.value / right) ** -0.7 - l0)
        controller.update(step, l0)
        values.append(controller.value)
    assert l0 == pytest.approx(target, rel=0.05)
    assert len(set(values[int(steps * 5 / 6) + 1 :])) == 1
