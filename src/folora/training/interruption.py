"""Graceful stop: on Ctrl-C or SIGTERM the step is finished and a checkpoint written before training ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from folora.runtime import distributed
from folora.runtime.signals import Interrupted, handled_by

logger = logging.getLogger(__name__)


class StopAfterStep(TrainerCallback):
    """Makes the Trainer save and stop after the step in which any process received a signal.

    Attributes:
        received: The signal that this process received.
        signum: The signal for which all processes stop.
        began: Whether a step has begun, so that a checkpoint to resume from has been loaded.
    """

    def __init__(self) -> None:
        self.received: int | None = None
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
        self.signum = distributed.all_reduce_max(self.received or 0) or None
        if self.signum is not None:
            control.should_save = control.should_training_stop = True


@contextmanager
def finishing_step(stop: StopAfterStep) -> Iterator[None]:
    """Stop training after the current step on a signal; a second signal stops at once.

    Raises:
        Interrupted: At the end of the block, if a signal was received.
    """

    def ask(signum: int, frame: Any) -> None:
        if stop.received is not None:  # a signal to another process does not count as the first
            raise Interrupted(signum)
        stop.received = signum
        logger.warning("stopping after this step, with a checkpoint; send it again to stop at once")

    with handled_by(ask):
        yield
    if (signum := stop.signum or stop.received) is not None:
        raise Interrupted(signum)
