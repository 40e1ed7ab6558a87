"""Early stopping of sampling: it has converged when the leading eigenvectors of one half hold on the other.

On the text that C_pre was measured on every column v of T has v'Hv = 1, by construction. On other text it
has more, and the more so the fewer tokens there were: among many directions some look unused by chance. The
two halves of the text show how much, long before the largest number of sequences is reached.

The pass over the text that the first check takes measures C_pre as well: if that much text is enough, C_pre
is done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from folora.config import LAMBDA, S_MIN, TAU
from folora.spectral.eigenproblem import checked_moment, generalized_eigenbasis, spectral_gate
from folora.spectral.groups import InputGroup
from folora.spectral.moments import Moments

logger = logging.getLogger(__name__)

WATCHED = 8  # shared inputs, evenly over the model; all of them would say the same


@dataclass(frozen=True)
class Agreement:
    """How well directions chosen on one text hold on another.

    Attributes:
        penalty: Mean of v'Hv over the directions, with H of the other text; 1 on their own.
        gate: Mean change of their gate when gamma is taken with that penalty.
    """

    penalty: float
    gate: float


def agreement(
    chosen_on: Tensor,
    c_pre: Tensor,
    c_task: Tensor,
    *,
    tau: float = TAU,
    lam: float = LAMBDA,
    s_min: float = S_MIN,
    directions: int,
    name: str = "layer",
) -> Agreement:
    """Solve on one C_pre, and see what the leading directions cost on another.

    Args:
        chosen_on: C_pre of the text that the directions are chosen on, (d, d).
        c_pre: C_pre of the text that they are tried on, (d, d).
        c_task: C_task, (d, d).
        tau: Ridge, in both.
        lam: Gate's lambda.
        s_min: Gate's floor.
        directions: How many leading directions; all if there are not so many.
        name: Layer to name in messages.

    Raises:
        NumericsError: See `generalized_eigenbasis`.
    """
    found = generalized_eigenbasis(chosen_on, c_task, tau=tau, name=name, directions=directions)
    tried, v = checked_moment(c_pre, f"C_pre of {name}"), found.basis
    ridge = tau * tried.diagonal().mean()
    penalties = (v * (tried @ v)).sum(0) + ridge * (v * v).sum(0)
    there = spectral_gate(found.gamma / penalties, lam, s_min)
    moved = (there - spectral_gate(found.gamma, lam, s_min)).abs().mean()
    return Agreement(float(penalties.mean()), float(moved))


@dataclass
class EarlyStopping:
    """Called with more and more sequences; returns whether they are enough.

    Args:
        measure: Second moments on sequences, with `Moments.halves` of the watched inputs. Also asked for
            those of all inputs if its second argument is true, otherwise for no more than it needs.
        c_task: C_task of the watched inputs, by group name.
        tau: Ridge.
        lam: Gate's lambda, for the log.
        s_min: Gate's floor, likewise.
        directions: Number of leading eigenvectors that must hold.
        tolerance: Largest excess of v'Hv over 1 on the other half. The gate converges long before.
        keeps: Whether the matrices of all inputs fit the memory.
    """

    measure: Callable[[Sequence[list[int]], bool], Moments]
    c_task: Mapping[str, Tensor]
    tau: float
    lam: float
    s_min: float
    directions: int
    tolerance: float
    keeps: bool = False
    _kept: tuple[Sequence[list[int]], Moments] | None = None
    _seen: int = 0
    _halves: tuple[dict[str, Tensor], dict[str, Tensor]] = field(default_factory=lambda: ({}, {}))
    _tokens: list[int] = field(default_factory=lambda: [0, 0])

    def __call__(self, sequences: Sequence[list[int]]) -> bool:
        """Whether these, which begin with those of the last call, are enough."""
        keeps = self.keeps and self._seen == 0
        moments = self.measure(sequences[self._seen :], keeps)
        self._seen = len(sequences)
        for half, part in enumerate(moments.halves):
            self._tokens[half] += part.tokens
            for name, matrix in part.matrices.items():
                total = matrix * part.tokens
                sums = self._halves[half]
                sums[name] = sums[name] + total if name in sums else total
        found = self.agreement()
        logger.info(
            "after %d sequences: v'Hv of the leading eigenvectors is %.2f on the other half (converged: "
            "%.2f), their gate moves by %.2f",
            len(sequences), found.penalty, 1 + self.tolerance, found.gate,
        )  # fmt: skip
        is_enough = found.penalty <= 1 + self.tolerance
        self._kept = (list(sequences), moments) if keeps and is_enough else None
        return is_enough

    def moments_of(self, sequences: Sequence[list[int]]) -> Moments | None:
        """C_pre on just these sequences, if the check that ended the sampling measured it."""
        return self._kept[1] if self._kept and self._kept[0] == list(sequences) else None

    def agreement(self) -> Agreement:
        """The mean over the watched inputs, and over which half is which."""
        means = [
            {name: total / self._tokens[half] for name, total in self._halves[half].items()}
            for half in (0, 1)
        ]
        found = [
            agreement(
                means[half][name], means[1 - half][name], self.c_task[name],
                tau=self.tau, lam=self.lam, s_min=self.s_min, directions=self.directions, name=name,
            )
            for half in (0, 1)
            for name in means[half]
        ]  # fmt: skip
        return Agreement(
            sum(a.penalty for a in found) / len(found), sum(a.gate for a in found) / len(found)
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What the decision depends on beside the sequences and the task, for manifests."""
        names = ("tau", "directions", "tolerance")
        return {**{name: getattr(self, name) for name in names}, "watched": sorted(self.c_task)}


def watched(groups: Sequence[InputGroup]) -> list[InputGroup]:
    """`WATCHED` of the groups, evenly."""
    count = min(WATCHED, len(groups))
    return [groups[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count)]
