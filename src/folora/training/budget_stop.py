"""Early stop of a training whose budget binds: neither the KL nor the task's loss falls any more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 20  # steps
FEWEST = 8  # blocks


class BudgetStop:
    """Compares the last quarter of the steps with the two before, at the end of every block of `BLOCK` steps.

    Training may end if over the last quarter the weight of the KL was above its least in every step (the budget
    binds), the mean KL was not below that of the quarter before (a KL that falls is a gain, as less of the adapter
    will be scaled away), and the mean loss was below that of neither. The quarters grow with the training, because
    the noise of single steps hides a slow fall in short windows.

    Attributes:
        reason: Why training may end, in words; None as long as it may not.
        means: Of every complete block the mean loss, KL, and share of steps in which the budget binds.
        rest: The same of each step since then, float64 (3,); kept on the accelerator.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.means: list[list[float]] = []
        self.rest: list[Tensor] = []

    def update(self, step_loss: Tensor, average_kl: Tensor, binds: Tensor) -> None:
        """Add a step: its loss, the average KL, and 1 if the budget binds, else 0; float (), on one device.

        They are the same in all processes.
        """
        values = torch.stack([step_loss, average_kl, binds]).double()
        self.rest.append(values)
        if len(self.rest) < BLOCK:
            return
        self.means.append(torch.stack([v.to(values.device) for v in self.rest]).mean(0).tolist())
        self.rest = []
        if len(self.means) >= FEWEST:
            n = len(self.means) // 4
            means = torch.tensor(self.means[-3 * n :], dtype=torch.float64)
            first, second, last = means.unflatten(0, (3, n)).mean(1).tolist()
            if last[0] >= max(first[0], second[0]) and last[1] >= second[1] and last[2] == 1:
                self.reason = (
                    f"the budget binds (average KL {last[1]:.4f}), and over {n * BLOCK} steps the training loss was "
                    f"{last[0]:.4f}, after {first[0]:.4f} and {second[0]:.4f}"
                )

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        rest = [values.tolist() for values in self.rest]
        return {"reason": self.reason, "means": self.means, "rest": rest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.reason, self.means = state["reason"], [[*block] for block in state["means"]]
        self.rest = [torch.tensor(values, dtype=torch.float64) for values in state["rest"]]
