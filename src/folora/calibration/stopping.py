"""When is it enough text? When directions found on one half of it cost no more on the other.

On the text that C_pre was measured on every column v of T costs v'Hv = 1, by construction. On text that
it was not chosen on it costs more, and the more so the fewer tokens there were: among many directions
some look unused by chance. Half against half shows how much, long before the ceiling is reached.

The pass over the text that the first look takes measures C_pre as well: if that much is enough, it is done.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from folora.calibration.moments import Moments
from folora.spectral.eigenproblem import Agreement, agreement
from folora.spectral.groups import InputGroup

logger = logging.getLogger(__name__)

WATCHED = 8  # shared inputs, evenly over the model; all of them would say the same


@dataclass
class Convergence:
    """Called with more and more sequences; says whether they are enough.

    Args:
        measure: Second moments on sequences, with `Moments.halves` of the watched inputs. Also asked for
            those of all inputs if its second argument is true, otherwise for no more than it needs.
        c_task: C_task of the watched inputs, by group name.
        tau: Ridge.
        lam: Gate's lambda, for what is said of the gate.
        s_min: Gate's floor, likewise.
        directions: How many leading directions must hold.
        tolerance: What they may cost on the other half beyond 1. Their gate settles long before.
        keeps: Whether the matrices of all inputs fit the memory.

    Attributes:
        pre: What `measure` found of all inputs, if the sequences of the first call were enough and `keeps`.
    """

    measure: Callable[[Sequence[list[int]], bool], Moments]
    c_task: Mapping[str, Tensor]
    tau: float
    lam: float
    s_min: float
    directions: int
    tolerance: float
    keeps: bool = False
    pre: Moments | None = None
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
            "after %d sequences: on the other half the leading directions cost %.2f times as much "
            "(enough: %.2f), their gate moves by %.2f",
            len(sequences), found.penalty, 1 + self.tolerance, found.gate,
        )  # fmt: skip
        is_enough = found.penalty <= 1 + self.tolerance
        self.pre = moments if keeps and is_enough else None
        return is_enough

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
