"""Several harvesters on one cache at once, one of them killed; then a plain run, and the bytes of an undisturbed one."""

import sys

import pytest

from tests.crash.sweep import Sweep, contents, difference

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the preloaded library is glibc's")


@pytest.mark.parametrize("at", [60, 150])
@pytest.mark.parametrize("layers", [("0-1", "0-1"), ("0-1", "0-1", "0-1", "0-1")])
def test_on_the_same_layers(sweep: Sweep, layers: tuple[str, ...], at: int) -> None:
    together(sweep, layers, at)


@pytest.mark.parametrize("at", [20, 60, 100])
@pytest.mark.parametrize("layers", [("1", "2"), ("1", "2", "1-2"), ("0", "1", "2", "0-2")])
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
