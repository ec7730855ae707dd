"""Stopping on request: SIGTERM, SIGHUP and Ctrl-C wait for the step in hand where work says so, and act at once elsewhere.

What is interrupted elsewhere leaves nothing half-written, for every file is put in its place whole. A second signal acts at
once everywhere; but Slurm sends SIGTERM twice to what it preempts or cancels, so those that come within seconds are one.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM, as batch systems send it before they take a machine back, or SIGHUP, as a terminal sends it that is closed.
    Whatever handles Ctrl-C handles it as well."""


_ONE_REQUEST = 10.0  # seconds: seen were up to one between the two of Slurm 22.05, to a step and then to its job


class Signals:
    """Requests to stop this process, which takes each signal in one place."""

    def __init__(self) -> None:
        self.asked: type[KeyboardInterrupt] | None = None
        self.patient = False
        self.since = 0.0  # when it was asked

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        self.asked, self.patient = None, False
        before = {}
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # whoever started us may have decided that
                before[number] = signal.signal(number, self._take)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.asked = None

    def _take(self, number: int, frame: FrameType | None) -> None:
        error = KeyboardInterrupt if number == signal.SIGINT else Terminated
        second, now = self.asked is not None, time.monotonic()
        if second and number != signal.SIGINT and now - self.since < _ONE_REQUEST:
            return
        self.asked, self.since = error, now
        if not self.patient or second:  # a second one means now
            raise error


SIGNALS = Signals()


def stopping() -> bool:
    """Whether somebody has asked this process to stop: for threads that would wait for something otherwise."""
    return SIGNALS.asked is not None


@contextlib.contextmanager
def finishing() -> Iterator[Callable[[], bool]]:
    """Within, the first SIGTERM or Ctrl-C only makes the function this gives return True: finish the step in hand, save, and
    leave; it is raised on leaving. A second one (SIGTERM: after ten seconds) is raised where it comes. For the main thread, and
    not nested."""
    SIGNALS.patient = True
    try:
        yield lambda: SIGNALS.asked is not None
    finally:
        SIGNALS.patient = False
    if SIGNALS.asked is not None:
        raise SIGNALS.asked
