"""The given tokens of a batch's sequences, their turns and ends, as tensors on the model's device.

A row's opening is decoded as if the model had written it, so that rows with openings of any lengths decode
together, without padding: what a row holds does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folora.calibration.sources import Script
from folora.config import SamplingConfig

NONE = -1  # where no token is given


class Turns:
    """What has been written of each row.

    Args:
        scripts: Of each row.
        ends: Tokens that end a turn.
        config: Lengths.
        device: Of the tensors.

    Attributes:
        ended: Whether a row is complete, (rows,) bool.
    """

    def __init__(
        self,
        scripts: Sequence[Script],
        ends: Sequence[int],
        config: SamplingConfig,
        device: torch.device,
    ) -> None:
        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device)

        self.ends = tensor([*ends])
        self.openings = _table([script.opening[1:] for script in scripts]).to(device)
        self.inserts = _table([script.insert for script in scripts]).to(device)
        self.insert_lengths = tensor([len(script.insert) for script in scripts])
        least = [config.min_new_tokens if s.least is None else s.least for s in scripts]
        self.least = tensor(least)
        # From this step on no row with a single turn is too short.
        self.long_enough = max(len(s.opening) - 1 + n for s, n in zip(scripts, least, strict=True))
        self.starts = tensor([len(script.opening) - 1 for script in scripts])  # step of a turn
        self.last_step = tensor([script.given + config.max_new_tokens - 1 for script in scripts])
        self.first_ends = torch.full_like(self.starts, NONE)  # step at which the first turn ended
        self.ended = torch.zeros_like(self.starts, dtype=torch.bool)

    def forbid_ends(self, step: int, scores: Tensor) -> None:
        """Set the scores of ends to -inf in rows whose turn is too short to end, in place."""
        if len(self.ends) and (step < self.long_enough or self.inserts.shape[1]):
            short = (step - self.starts < self.least)[:, None]
            scores[:, self.ends] = scores[:, self.ends].masked_fill(short, -float("inf"))

    def follow(self, step: int, choice: Tensor) -> Tensor:
        """The token of each row at a step, counted from the second token: as sampled, (rows,), or as given."""
        is_end = torch.isin(choice, self.ends) & (step >= self.starts)
        if step < self.openings.shape[1]:
            given = self.openings[:, step]
            choice = torch.where(given == NONE, choice, given)
        if self.inserts.shape[1]:
            first = is_end & (self.first_ends == NONE) & (self.insert_lengths > 0)
            is_end &= ~first
            self.first_ends = torch.where(first, step, self.first_ends)
            self.starts = torch.where(first, step + self.insert_lengths, self.starts)
            inside = (self.first_ends != NONE) & (step < self.starts)
            place = (step - self.first_ends).clamp(0, self.inserts.shape[1] - 1)
            choice = torch.where(inside, self.inserts.gather(1, place[:, None])[:, 0], choice)
        self.ended |= is_end | (step >= self.last_step)
        return choice


def _table(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of different lengths in one int64 tensor, filled up with `NONE`."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[NONE] * (longest - len(row))] for row in rows], dtype=torch.int64)
