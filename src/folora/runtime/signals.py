"""Ctrl-C and SIGTERM raise `Interrupted`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal was received."""

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted on a signal, even if the interrupted code raises another error instead.

    A C library may turn the exception of a signal handler into one of its own.

    Raises:
        Interrupted: A signal was received.
    """
    received: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        received.append(signum)
        raise Interrupted(signum)

    with handled_by(stop):
        try:
            yield
        except Exception as error:
            if received:
                raise Interrupted(received[0]) from error
            raise


@contextmanager
def handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Install a handler for both signals; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signum: signal.signal(signum, handler) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, restored in previous.items():
            signal.signal(signum, restored)
