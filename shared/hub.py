"""Asking the hub: where it is busy or a connection breaks, wait and ask again, and say so in one line."""

import contextlib
import functools
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from residual_saes.shared.progress import say

_WAITS = (1.0, 2.0, 4.0, 8.0, 8.0)  # seconds before each further try, as the hub's own client has them
_LONGEST_WAIT = 300.0  # seconds: the window in which the hub counts requests
_NO_ANSWER = 60.0  # seconds without a byte, after which a connection has broken
_SILENCE = 60.0  # seconds in which waiting is said once
_BUSY = (408, 429, 500, 502, 503, 504)
# Names of classes: the hub's client stands on requests, httpx or httpx2, as its version has it.
_BROKEN = {"ConnectionError", "TimeoutError", "Timeout", "TimeoutException", "NetworkError", "RemoteProtocolError"}
# Functions of huggingface_hub and datasets that warn before they try again.
_RETRYING = ("_should_retry", "_http_backoff_base", "http_backoff", "http_get", "xopen", "read_with_retries")

T = TypeVar("T")


def retried(what: str, ask: Callable[[], T]) -> T:
    """What `ask` returns, tried up to six times while the hub is busy or the connection breaks. Raises what it raises."""
    waiting_for(what)
    for wait in _WAITS:
        try:
            return ask()
        except Exception as error:
            if not _passes(error):
                raise
            _NOTICE.waiting(_status(error))
            time.sleep(max(wait, min(_wanted_wait(error), _LONGEST_WAIT)))
    return ask()


def waiting_for(what: str) -> None:
    """Ask the hub for this from now on: say in one line that it waits, and take a minute without a byte for a failure."""
    _NOTICE.take_over(what)
    _limit_silence()


@functools.cache
def _limit_silence() -> None:
    """The hub's client waits for ever where it is not told how long, which most of its calls cannot be."""
    with contextlib.suppress(ImportError):  # a version that stands on requests
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils._http import default_client_factory

        def limit(request: Any) -> None:
            times = request.extensions.get("timeout", {})
            request.extensions["timeout"] = {step: _NO_ANSWER if t is None else t for step, t in times.items()}

        def client() -> Any:
            client = default_client_factory()
            client.event_hooks = {"request": [*client.event_hooks["request"], limit]}
            return client

        set_client_factory(client)


def _passes(error: BaseException) -> bool:
    """Whether this failure may be gone in a moment."""
    names = {kind.__name__ for e in _chain(error) for kind in type(e).__mro__}
    status = _status(error)
    return "OfflineModeIsEnabled" not in names and (status in _BUSY if status else bool(names & _BROKEN))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response(error: BaseException) -> Any:
    return next((response for e in _chain(error) if (response := getattr(e, "response", None)) is not None), None)


def _status(error: BaseException) -> int | None:
    return getattr(_response(error), "status_code", None)


def _wanted_wait(error: BaseException) -> float:
    """Seconds that the hub asks to be left alone, in either of its two headers; 0 where it does not."""
    headers = getattr(_response(error), "headers", {})
    seconds = re.search(r"^\s*(\d+)\s*$", headers.get("Retry-After", "")) or re.search(r"t=(\d+)", headers.get("ratelimit", ""))
    return float(seconds[1]) if seconds else 0.0


class _Notice:
    """One line for everything that waits for the hub: these look-ups, and what the client itself does again."""

    def __init__(self) -> None:
        self._what = ""  # the model, tokenizer or dataset that is asked for
        self._said = float("-inf")  # when the line was printed

    def waiting(self, status: int | None = None) -> None:
        if time.monotonic() - self._said > _SILENCE:
            self._said = time.monotonic()
            why = f"the hub answers {status}" if status else "the hub is busy, or the connection broke"
            say(f"note: {self._what}: {why}; waiting, and asking again up to {len(_WAITS)} times", err=True)

    def take_over(self, what: str) -> None:
        """From now on the client's warnings before each new try are said in that line; its others are printed as before."""
        self._what = what
        for library in ("huggingface_hub", "datasets"):
            for handler in logging.getLogger(library).handlers:
                handler.addFilter(self._passed_on)

    def _passed_on(self, record: logging.LogRecord) -> bool:
        if record.funcName not in _RETRYING:
            return True
        self.waiting()
        return False


_NOTICE = _Notice()
