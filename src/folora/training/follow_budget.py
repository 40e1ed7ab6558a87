"""The anchor's weight follows a budget, and training ends when the budget allows no more."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState

from folora.training.anchor import Anchor, BudgetWeight

logger = logging.getLogger(__name__)


class FollowBudget:
    """Calls `Anchor.step` after every step of a Trainer, with the step's task loss.

    Args:
        anchor: The anchor, whose loss the Trainer adds to the task's.
        saves: Whether a checkpoint is written when training ends early.
    """

    def __init__(self, anchor: Anchor, saves: bool) -> None:
        self.anchor, self.saves = anchor, saves
        self._task_loss = torch.zeros(())  # of the step so far

    def add(self, loss: Tensor) -> None:
        """Count a micro-batch's part of the step's task loss, (), without the anchor's."""
        self._task_loss = self._task_loss.to(loss.device) + loss.detach()

    def after_step(self, state: TrainerState, control: TrainerControl) -> None:
        """Adjust the weight, and end training if the budget allows no more."""
        loss, self._task_loss = self._task_loss, torch.zeros(())
        if self.anchor.step(loss):
            control.should_training_stop = True
            control.should_save |= self.saves
            logger.info("training ends early, %s", self.ended_early(state))

    def ended_early(self, state: TrainerState) -> str | None:
        """After which step training ended early, and why; None if it did not."""
        weight = self.anchor.weight
        if not isinstance(weight, BudgetWeight) or weight.stop.reason is None:
            return None
        return f"after step {state.global_step} of {state.max_steps}: {weight.stop.reason}"
