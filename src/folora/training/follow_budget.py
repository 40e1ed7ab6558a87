"""The callback with which the anchor's weight follows a budget, and training ends when the budget allows no more."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from folora.training.anchor import Anchor, BudgetWeight

logger = logging.getLogger(__name__)


class FollowBudget(TrainerCallback):
    """Calls `Anchor.step` after every step of a Trainer.

    Args:
        anchor: The anchor, whose loss the Trainer adds to the task's.
    """

    def __init__(self, anchor: Anchor) -> None:
        self.anchor = anchor
        self._task_loss = torch.zeros(())  # of the step so far

    def add(self, loss: Tensor) -> None:
        """Count a micro-batch's part of the step's task loss, (), without the anchor's."""
        self._task_loss = self._task_loss.to(loss.device) + loss.detach()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer."""
        loss, self._task_loss = self._task_loss, torch.zeros(())
        if self.anchor.step(loss):
            control.should_training_stop = True
            control.should_save |= args.save_strategy != "no"
            logger.info("training ends early, %s", self.ended_early(state))

    def ended_early(self, state: TrainerState) -> str | None:
        """After which step training ended early, and why; None if it did not."""
        weight = self.anchor.weight
        if not isinstance(weight, BudgetWeight) or weight.stop.reason is None:
            return None
        return f"after step {state.global_step} of {state.max_steps}: {weight.stop.reason}"
