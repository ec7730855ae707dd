import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from residual_saes.train.sparsity.base import RELU, ControllerConfig
from residual_saes.train.sparsity.batchtopk import LargestOfBatch
from residual_saes.train.sparsity.l1 import ControllerState, L1Controller, L1Setting, format_l1


@given(st.floats(1e-9, 1e3))
def test_a_label_names_one_value(value: float) -> None:
    assert float(format_l1(value)) == pytest.approx(value, rel=1e-6)


def test_a_fixed_setting_stays() -> None:
    controller = L1Controller(L1Setting(init=3e-4), 100, ControllerConfig())
    for step in range(100):
        controller.update(step, 1e4)
    assert controller.value == 3e-4


def test_l1_has_no_say_after_its_steps() -> None:
    """Where L0 is held from then on."""
    controller = L1Controller(L1Setting(init=3e-4, target=64), 400, ControllerConfig())
    for step in range(400):
        controller.update(step, 100)
    before = dataclasses.asdict(controller.state)
    controller.update(400, 1e4)
    assert dataclasses.asdict(controller.state) == before and before["value"] > 3e-4


def test_held_l0_is_the_target_or_what_it_was() -> None:
    for target, l0 in ((64, 64), (None, 100)):
        controller = L1Controller(L1Setting(init=3e-4, target=target), 400, ControllerConfig(), hold=True)
        for step in range(400):
            assert controller.hidden_at(step) is RELU and controller.threshold is None and controller.l1_at(step) > 0
            controller.update(step, 100)
        held = controller.hidden_at(400)
        assert isinstance(held, LargestOfBatch) and held.per_token == pytest.approx(l0) and controller.l1_at(400) == 0
        for step, least in ((400, 2.0), (401, 4.0)):
            controller.update(step, 64, least)
        assert controller.threshold == 3
        assert controller.hidden_at(402) == held


def simulate(
    controller: L1Controller, *, steps: int, target: float, lag: float, noise: float = 0.0, bend: float = 0.0
) -> list[float]:
    """L0 answers to λ as (λ/λ*)^-0.7 with a lag of so many steps, where λ* falls by a factor e over the run, or, with `bend`,
    by e^bend and ever more slowly: L0 falls at one λ as long as an SAE learns. It begins at four times the target. Returns L0
    without the noise that the controller meets."""
    rng = np.random.default_rng(0)
    level, found = math.log(4), []
    for step in range(steps):
        done = step / steps
        fallen = bend * (2 * done - done**2) if bend else done
        level += (-0.7 * (math.log(controller.value / 1e-3) + fallen) - level) / lag
        found.append(target * math.exp(level))
        controller.update(step, found[-1] * math.exp(noise * rng.standard_normal()))
    return found


@pytest.mark.parametrize(("steps", "log_start"), [(400, -2.5), (400, 1.0), (937, 0.0), (9000, -2.5), (9000, 1.0)])
@pytest.mark.parametrize("late", [0.001, 0.03, 0.06])
@pytest.mark.parametrize("target", [16.0, 300.0])
def test_l0_ends_at_its_target_though_the_right_l1_is_a_ramp(steps: int, target: float, log_start: float, late: float) -> None:
    """Two percent would be the whole of what is allowed; an integrator alone ends 5 % off this ramp."""
    controller = L1Controller(L1Setting(init=1e-3 * math.exp(log_start), target=target), steps, ControllerConfig())
    l0 = simulate(controller, steps=steps, target=target, lag=max(1.0, late * steps))
    assert l0[-1] == pytest.approx(target, rel=0.015)


@pytest.mark.parametrize("steps", [400, 9000])
def test_a_bend_of_the_ramp_costs_two_percent(steps: int) -> None:
    """L0 is off by the second derivative of ln λ* over slope · gain². In short runs to large targets ln λ* falls by two, and
    ever more slowly."""
    config = ControllerConfig()
    controller = L1Controller(L1Setting(init=1e-3, target=300), steps, config)
    off = math.log(simulate(controller, steps=steps, target=300, lag=0.02 * steps, bend=2)[-1] / 300)
    assert off == pytest.approx(2 * 2 / (config.slope * config.gain**2), rel=0.2)
    assert off < 0.02


def test_l1_stops_above_the_target_where_the_rest_of_the_run_holds_it() -> None:
    controller = L1Controller(L1Setting(init=1e-3, target=20), 937, ControllerConfig(above=3.0), hold=True)
    assert simulate(controller, steps=937, target=60, lag=30)[-1] == pytest.approx(60, rel=0.01)
    assert controller.hidden_at(937) == LargestOfBatch(20)


def test_l1_hardly_overshoots() -> None:
    """Where it begins at a third of what is right, and L0 answers after a twentieth of the run."""
    controller = L1Controller(L1Setting(init=3e-4, target=64), 1000, ControllerConfig())
    l0 = simulate(controller, steps=1000, target=64, lag=50)
    assert min(l0) > 0.85 * 64


def test_noise_of_the_batches_does_not_reach_the_mean_of_l0() -> None:
    controller = L1Controller(L1Setting(init=1e-3, target=64), 2000, ControllerConfig())
    l0 = simulate(controller, steps=2000, target=64, lag=40, noise=0.1)
    assert l0[-1] == pytest.approx(64, rel=0.02)


def test_a_controller_goes_on_from_its_state() -> None:
    whole, half = (L1Controller(L1Setting(init=1e-3, target=64), 500, ControllerConfig()) for _ in range(2))
    l0 = [64 * (2 - step / 400) for step in range(500)]
    for step in range(500):
        whole.update(step, l0[step])
        if step == 250:  # through JSON, as a state is
            half.state = ControllerState(**json.loads(json.dumps(dataclasses.asdict(half.state))))
        half.update(step, l0[step])
        assert half.state == whole.state
    assert whole.state.slope != 0
