"""Ctrl-C and SIGTERM end the work at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the work.

    Args:
        signum: Which.
    """

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


@contextmanager
def interruptible() -> Iterator[None]:
    """Have signals raise Interrupted, whatever the code makes of it that they come in.

    A library in C may turn what a signal handler raises into an error of its own.

    Raises:
        Interrupted: A signal came.
    """
    came: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        came.append(signum)
        raise Interrupted(signum)

    with handled_by(stop):
        try:
            yield
        except Exception as error:
            if came:
                raise Interrupted(came[0]) from error
            raise


@contextmanager
def handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle both signals; they belong to the main thread, on another one nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {signum: signal.signal(signum, handler) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, restored in former.items():
            signal.signal(signum, restored)
