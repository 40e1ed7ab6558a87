"""Ctrl-C and SIGTERM end the work at once; in training the step is finished and a checkpoint written first."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from folora import ranks

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the work.

    Args:
        signum: Which.
    """

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class StopAfterStep(TrainerCallback):
    """Has the Trainer save and stop after the step in which a signal came to one of the processes.

    Attributes:
        own: The signal that came to this process.
        signum: The signal that all stop for.
        began: Whether a step has begun: what was there to be resumed is loaded by then.
    """

    def __init__(self) -> None:
        self.own: int | None = None
        self.signum: int | None = None
        self.began = False

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer before every step."""
        self.began = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer after every step."""
        # All processes stop after the same step, or some would wait for the others for ever.
        self.signum = ranks.largest(self.own or 0) or None
        if self.signum is not None:
            control.should_save = control.should_training_stop = True


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

    with _handled_by(stop):
        try:
            yield
        except Exception as error:
            if came:
                raise Interrupted(came[0]) from error
            raise


@contextmanager
def finishing_step(stop: StopAfterStep) -> Iterator[None]:
    """Have signals ask for the end of training instead of ending it; a second one does not wait.

    Raises:
        Interrupted: At the end of the block, if a signal came.
    """

    def ask(signum: int, frame: Any) -> None:
        if stop.own is not None:  # not what another process was sent a moment before
            raise Interrupted(signum)
        stop.own = signum
        logger.warning("stopping after this step, with a checkpoint; once more to stop at once")

    with _handled_by(ask):
        yield
    if (signum := stop.signum or stop.own) is not None:
        raise Interrupted(signum)


@contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
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
