"""In training Ctrl-C and SIGTERM wait for the end of the step, and a checkpoint is written first."""

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
        self.signum = distributed.all_reduce_max(self.own or 0) or None
        if self.signum is not None:
            control.should_save = control.should_training_stop = True


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

    with handled_by(ask):
        yield
    if (signum := stop.signum or stop.own) is not None:
        raise Interrupted(signum)
