import threading
import time

import pytest
import torch

from residual_saes.train.saver import Saver

CPU = torch.device("cpu")


def test_what_is_written_is_what_was_there_when_it_was_asked_for_and_in_that_order() -> None:
    x, go, written = torch.zeros(4), threading.Event(), []

    def write(host: dict[str, torch.Tensor]) -> None:
        assert go.wait(20)
        assert threading.current_thread().name.startswith("saver")
        written.append(host["x"].tolist())

    with Saver(CPU, most=3) as saver:
        for _ in range(3):
            saver.submit({"x": x}, write)
            x += 1  # in place, as weights change
        go.set()
    assert written == [[0.0] * 4, [1.0] * 4, [2.0] * 4]


def test_no_more_than_so_many_are_on_their_way() -> None:
    go, asked = threading.Event(), threading.Event()
    with Saver(CPU, most=2) as saver:
        for _ in range(2):
            assert saver.has_room()
            saver.submit({}, lambda _: go.wait(20) and None)
        assert not saver.has_room()
        third = threading.Thread(target=lambda: (saver.submit({}, lambda _: None), asked.set()))
        third.start()
        time.sleep(0.1)
        assert not asked.is_set()
        go.set()
        assert asked.wait(20)
        third.join()


def test_an_error_is_the_callers_and_nothing_is_written_after_it() -> None:
    error, later = OSError(28, "No space left on device"), []

    def fail(_: object) -> None:
        raise error

    with pytest.raises(OSError, match="No space left") as caught, Saver(CPU, most=2) as saver:
        saver.submit({}, fail)
        saver.submit({}, later.append)  # taken before, or refused because, the first has failed
        saver.submit({}, later.append)
        saver.submit({}, later.append)
    assert caught.value is error
    assert later == []


def test_leaving_waits_for_every_file_even_when_interrupted() -> None:
    written: list[float] = []

    def slow(host: dict[str, torch.Tensor]) -> None:
        time.sleep(0.05)
        written.append(host["x"].item())

    with pytest.raises(KeyboardInterrupt), Saver(CPU, most=2) as saver:
        for i in range(2):
            saver.submit({"x": torch.tensor(float(i))}, slow)
        raise KeyboardInterrupt
    assert written == [0.0, 1.0]
