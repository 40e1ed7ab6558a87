"""Ctrl-C and SIGTERM while training: the step is finished, a checkpoint is written, and then it ends."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
    """Has the Trainer save and stop after the step in which `signum` was set.

    Attributes:
        began: Whether a step has begun: what was there to be resumed is loaded by then.
    """

    def __init__(self) -> None:
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
        if self.signum is not None:
            control.should_save = control.should_training_stop = True


@contextmanager
def finishing_step(stop: StopAfterStep) -> Iterator[None]:
    """Have signals ask for the end of training instead of ending it; a second one does not wait.

    Signals belong to the main thread; on another one nothing is changed.

    Raises:
        Interrupted: At the end of the block, if a signal came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: Any) -> None:
        if stop.signum is not None:
            raise Interrupted(signum)
        stop.signum = signum
        logger.warning("stopping after this step, with a checkpoint; once more to stop at once")

    former = {signum: signal.signal(signum, ask) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
    if stop.signum is not None:
        raise Interrupted(stop.signum)
