"""Several commands on one cache or run at once, one of them killed; then a plain run, and what an undisturbed one makes."""

import sys

import pytest

from tests.crash.sweep import Sweep, contents, difference

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the preloaded library is glibc's")


@pytest.mark.parametrize("at", [60, 150])
@pytest.mark.parametrize("layers", [("0-1", "0-1"), ("0-1", "0-1", "0-1", "0-1")])
@pytest.mark.slow
def test_on_the_same_layers(sweep: Sweep, layers: tuple[str, ...], at: int) -> None:
    together(sweep, layers, at)


@pytest.mark.parametrize("at", [20, 60, 100])
@pytest.mark.parametrize("layers", [("1", "2"), ("1", "2", "1-2"), ("0", "1", "2", "0-2")])
@pytest.mark.slow
def test_on_different_layers(sweep: Sweep, layers: tuple[str, ...], at: int) -> None:
    together(sweep, layers, at)


def together(sweep: Sweep, layers: tuple[str, ...], at: int) -> None:
    """On a cache that has layer 0 already; the last harvester is killed."""
    wanted = sweep.scenario("layers").wanted
    commands = [(sweep.harvest_args(some, 5), {}) for some in layers]
    with sweep.worker() as worker:
        worker.restore(sweep.scenario("layers").start)
        *others, killed = worker.together([*commands[:-1], (commands[-1][0], {"FAULT": "kill", "AT": at})])
        assert killed.code in (-9, 0), killed.why
        assert [ended.why for ended in others if ended.code] == []
        again = worker.run(sweep.harvest_args("0-2", 5))
        assert again.code == 0, again.why
        assert difference(contents(worker.folder), wanted) == ""


@pytest.mark.parametrize("at", [10, 100])
@pytest.mark.slow
def test_trainers_of_the_same_layers_and_an_evaluation_beside_them(sweep: Sweep, at: int) -> None:
    """One trainer has the layer, and is killed; the other is refused, or comes after it. What is measured meanwhile stays."""
    start, evaluation = sweep.scenario("resume").start, sweep.scenario("eval")
    with sweep.worker() as worker:
        worker.restore(start)
        killed, other, beside = worker.together(
            [(Sweep.TRAIN, {"FAULT": "kill", "AT": at}), (Sweep.TRAIN, {}), (evaluation.argv, {})]
        )
        assert killed.code in (-9, 0, 2, 3), killed.why  # it may be the one that comes second
        for ended in (other, beside):
            assert ended.code in (0, 2, 3), ended.why
            assert "Traceback" not in ended.said
        for argv in (Sweep.TRAIN, evaluation.argv):
            again = worker.run(argv)
            assert again.code == 0, again.why
        assert difference(contents(worker.folder), evaluation.wanted) == ""


def test_eight_shards_of_which_five_are_killed(sweep: Sweep) -> None:
    """The one that tokenises too, whose work another does; what comes of it are the bytes of one process."""
    scenario = sweep.scenario("harvest")
    shards = [(0, 25), (0, None), (1, 40), (2, 90), (3, 140), (4, 190), (5, None), (6, None), (7, None)]
    with sweep.worker() as worker:
        worker.restore(scenario.start)
        ended = worker.together(
            [((*scenario.argv, "--shard", f"{i}/8"), {"FAULT": "kill", "AT": at} if at else {}) for i, at in shards]
        )
        assert [e.why for e, (_, at) in zip(ended, shards, strict=True) if e.code not in ((-9, 0) if at else (0,))] == []
        assert ended[0].code == -9
        assert difference(contents(worker.folder), scenario.wanted) == ""  # already, for four were left to the end
        again = worker.run(scenario.argv)  # what the killed left half-written goes
        assert again.code == 0, again.why
        assert contents(worker.folder) == scenario.wanted


def test_two_shards_train_and_one_is_killed(sweep: Sweep) -> None:
    scenario = sweep.scenario("train")
    with sweep.worker() as worker:
        worker.restore(scenario.start)
        whole, killed = worker.together(
            [((*scenario.argv, "--shard", "0/2"), {}), ((*scenario.argv, "--shard", "1/2"), {"FAULT": "kill", "AT": 60})]
        )
        assert (whole.code, killed.code) == (0, -9), (whole.why, killed.why)
        again = worker.run((*scenario.argv, "--shard", "1/2"))
        assert again.code == 0, again.why
        assert difference(contents(worker.folder), scenario.wanted) == ""
