"""Which failures of the hub are tried again, how often, and after how long."""

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from residual_saes.shared.hub import retried


class Refused(Exception):
    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(f"status {status}")
        self.response = SimpleNamespace(status_code=status, headers={k.replace("_", "-"): v for k, v in headers.items()})


def wrapped(cause: Exception) -> Exception:
    """As the libraries above the hub's client raise it."""
    error = OSError("we could not connect")
    error.__cause__ = cause
    return error


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr("residual_saes.shared.hub._NOTICE._said", float("-inf"))
    return waits


def answers(*each: Any) -> Any:
    left = list(each)

    def ask() -> Any:
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask


def test_what_passes_is_asked_for_again(waits: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    errors = (
        Refused(503),
        wrapped(Refused(429, Retry_After="20")),
        ConnectionResetError(),
        Refused(429, ratelimit='"api";r=0;t=55'),
    )
    assert retried("the model x", answers(*errors, TimeoutError(), "it")) == "it"
    assert waits == [1, 20, 4, 55, 8]
    assert capsys.readouterr().err == "note: the model x: the hub answers 503; waiting, and asking again up to 5 times\n"


def test_five_times(waits: list[float]) -> None:
    with pytest.raises(Refused, match="503"):
        retried("the model x", answers(*[Refused(503)] * 6, "too late"))
    assert waits == [1, 2, 4, 8, 8]


@pytest.mark.parametrize("error", [Refused(404), wrapped(Refused(401)), OfflineModeIsEnabled("offline"), ValueError()])
def test_what_does_not_pass_is_raised_at_once(waits: list[float], error: Exception) -> None:
    with pytest.raises(type(error)):
        retried("the model x", answers(error, "never"))
    assert waits == []
