"""Files written behind the training thread's back, one after the other, in the order in which they were asked for.

The training thread copies tensors where they lie, which takes the GPU a millisecond, and goes on; one thread brings the copies
to the host on a stream of its own and writes them. What the order is good for: a resume state never becomes durable before
the snapshots of the steps before it, and is not dropped before `final` is durable. After an error nothing more is written.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from residual_saes.shared.device import new_event, new_stream


class Saver:
    """Use as a context manager; leaving it waits for all files. An error in the thread reaches the next call."""

    def __init__(self, device: torch.device, most: int) -> None:
        """`most` files may be on their way, each with a copy of its tensors; the next one waits for the first of them."""
        self._device = device
        self._stream = new_stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "saver")
        self._room = threading.Semaphore(most)
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._thread.shutdown(wait=True)  # after an interruption too: a whole state saves that much work
        if kind is None:
            self.check()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def has_room(self) -> bool:
        """Whether a file would be taken without waiting."""
        free = self._room.acquire(blocking=False)
        if free:
            self._room.release()
        return free

    def submit(self, tensors: dict[str, Tensor], write: Callable[[dict[str, Tensor]], None]) -> None:
        """Have `write` called, in the thread, with host copies of the tensors as they are now."""
        self._room.acquire()
        self.check()
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        copied = None
        if self._stream is not None:
            copied = new_event()
            copied.record(torch.cuda.current_stream(self._device))
        self._thread.submit(self._work, copies, copied, write)

    def _work(
        self, copies: dict[str, Tensor], copied: torch.cuda.Event | None, write: Callable[[dict[str, Tensor]], None]
    ) -> None:
        try:
            if self._error is None:
                write(self._to_host(copies, copied))
        except BaseException as error:
            self._error = error
        finally:
            self._room.release()

    def _to_host(self, copies: dict[str, Tensor], copied: torch.cuda.Event | None) -> dict[str, Tensor]:
        if self._stream is None or copied is None:
            return copies
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(copied)
            host = {name: tensor.to("cpu") for name, tensor in copies.items()}  # each waits for this stream alone
        copies.clear()  # the device has its memory back before the file is written
        return host
