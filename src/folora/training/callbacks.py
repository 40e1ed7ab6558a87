"""Callbacks of the Trainer: after each step, and intervals that are not a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class AfterStep(TrainerCallback):
    """Calls `act` after every step of a Trainer.

    Args:
        act: Called with the Trainer's state and control.
    """

    def __init__(self, act: Callable[[TrainerState, TrainerControl], None]) -> None:
        self.act = act

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer."""
        self.act(state, control)


class OwnIntervals(TrainerCallback):
    """Makes a resumed training log, save and evaluate at today's intervals, not the checkpoint's."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer, with the state of the checkpoint."""
        state.compute_steps(args, state.max_steps)
