"""SIGTERM, SIGINT and SIGUSR1: they end a script at once, and a training after the step under way."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cmrssp.hardware import distributed

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """A signal has ended the training, and everything is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def interrupting() -> Iterator[None]:
    """In it a signal raises KeyboardInterrupt(number), so files are cleaned up. A second ends the process."""

    def interrupt(number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    with _handling(interrupt):
        yield


@contextmanager
def holding() -> Iterator[list[int]]:
    """Within, the first signal goes to the list, so that the step can end. A second one ends the process."""
    received: list[int] = []

    def hold(number: int, frame) -> None:
        if not received:
            received.append(number)
        elif distributed.world_size() == 1:  # torchrun forwards signals that a process has received already
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    with _handling(hold):
        yield received


@contextmanager
def _handling(handler: Callable) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in WATCHED}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
