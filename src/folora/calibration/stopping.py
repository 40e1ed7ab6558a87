"""Early stopping of sampling, by cross-validation of the leading eigenvectors on two halves of the text.

On the text that C_pre was measured on, every column v of T has v'Hv = 1 by construction. On other text
v'Hv is larger, and more so the fewer tokens there were: among many directions some have a small variance
by chance. Sampling has converged when v'Hv on the other half is close to 1.

The first check measures C_pre in the same pass: if it finds convergence, no further pass is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from folora.calibration.moments import passes, room_for_moments, second_moments
from folora.config import FoLoraConfig, SpectrumConfig
from folora.data.rows import batches, text_examples
from folora.runtime.progress import progress
from folora.spectral.eigenproblem import checked_moment, generalized_eigenbasis, spectral_gate
from folora.spectral.groups import InputGroup
from folora.spectral.moments import Moments

logger = logging.getLogger(__name__)

WATCHED = 8  # layer inputs, evenly over the model; a sample represents all


@dataclass(frozen=True)
class Agreement:
    """How well eigenvectors computed on one text generalize to another.

    Attributes:
        penalty: Mean of v'Hv over the eigenvectors with H of the other text; 1 on the same text.
        gate: Mean absolute change of their gate when gamma is divided by v'Hv.
    """

    penalty: float
    gate: float


def agreement(
    chosen_on: Tensor,
    c_pre: Tensor,
    c_task: Tensor,
    *,
    directions: int,
    options: SpectrumConfig | None = None,
    name: str = "layer",
) -> Agreement:
    """Compute leading eigenvectors with the C_pre `chosen_on`, and evaluate v'Hv with `c_pre`.

    Raises:
        NumericsError: See `generalized_eigenbasis`.
    """
    options = options or SpectrumConfig()
    tau, lam, s_min = options.tau, options.lam, options.s_min
    found = generalized_eigenbasis(chosen_on, c_task, tau=tau, name=name, directions=directions)
    tried, v = checked_moment(c_pre, f"C_pre of {name}"), found.basis
    ridge = tau * tried.diagonal().mean()
    penalties = (v * (tried @ v)).sum(0) + ridge * (v * v).sum(0)
    there = spectral_gate(found.gamma / penalties, lam, s_min)
    moved = (there - spectral_gate(found.gamma, lam, s_min)).abs().mean()
    return Agreement(float(penalties.mean()), float(moved))


@dataclass
class EarlyStopping:
    """The criterion: called with a growing list of sequences, returns whether it has converged.

    Args:
        measure: Returns second moments on sequences with `Moments.halves` of the watched inputs: of all
            inputs if its second argument is true, else of the watched ones.
        c_task: C_task of the watched inputs, by group name.
        options: Ridge and gate.
        directions: Number of leading eigenvectors to test.
        tolerance: Largest mean of v'Hv - 1 on the other half at convergence. The gate converges earlier.
        fits_in_memory: Whether the matrices of all inputs fit into memory at once.
    """

    measure: Callable[[Sequence[list[int]], bool], Moments]
    c_task: Mapping[str, Tensor]
    options: SpectrumConfig
    directions: int
    tolerance: float
    fits_in_memory: bool = False
    _result: tuple[Sequence[list[int]], Moments] | None = None
    _seen: set[tuple[int, ...]] = field(default_factory=set)
    _sums: tuple[dict[str, Tensor], dict[str, Tensor]] = field(default_factory=lambda: ({}, {}))
    _tokens: list[int] = field(default_factory=lambda: [0, 0])

    def __call__(self, sequences: Sequence[list[int]]) -> bool:
        """Whether sampling has converged on these sequences, which include those of the last call."""
        all_inputs = self.fits_in_memory and not self._seen
        new = [row for row in sequences if tuple(row) not in self._seen]
        moments = self.measure(new, all_inputs)
        self._seen.update(map(tuple, new))
        for half, (part, sums) in enumerate(zip(moments.halves, self._sums, strict=True)):
            self._tokens[half] += part.tokens
            for name, matrix in part.matrices.items():
                sums[name] = sums.get(name, 0) + matrix * part.tokens
        found = self.agreement()
        logger.info(
            "after %d sequences: v'Hv of the leading eigenvectors is %.2f on the other half (converged: at "
            "most %.2f), their gate changes by %.2f",
            len(sequences), found.penalty, 1 + self.tolerance, found.gate,
        )  # fmt: skip
        converged = found.penalty <= 1 + self.tolerance
        self._result = (list(sequences), moments) if all_inputs and converged else None
        return converged

    def moments_of(self, sequences: Sequence[list[int]]) -> Moments | None:
        """C_pre on exactly these sequences, if the last check measured it; otherwise None."""
        return self._result[1] if self._result and self._result[0] == list(sequences) else None

    def agreement(self) -> Agreement:
        """The mean over the watched inputs and both roles of the halves."""
        one, other = (
            {name: total / tokens for name, total in sums.items()}
            for sums, tokens in zip(self._sums, self._tokens, strict=True)
        )
        found = [
            agreement(
                a[name], b[name], self.c_task[name],
                directions=self.directions, options=self.options, name=name,
            )
            for a, b in ((one, other), (other, one))
            for name in a
        ]  # fmt: skip
        return Agreement(
            sum(a.penalty for a in found) / len(found), sum(a.gate for a in found) / len(found)
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The options that the decision depends on, for manifests."""
        return {
            "tau": self.options.tau,
            "directions": self.directions,
            "tolerance": self.tolerance,
            "watched": sorted(self.c_task),
        }


def watched(groups: Sequence[InputGroup]) -> list[InputGroup]:
    """`WATCHED` of the groups, evenly spaced."""
    count = min(WATCHED, len(groups))
    return [groups[(2 * i + 1) * len(groups) // (2 * count)] for i in range(count)]


def early_stopping(
    model: PreTrainedModel,
    groups: Sequence[InputGroup],
    c_task: Mapping[str, Tensor],
    config: FoLoraConfig,
) -> EarlyStopping | None:
    """The criterion for a model and C_task; None if sampling always runs to ``sampling.num_sequences``."""
    tolerance = config.sampling.tolerance
    if tolerance is None or not config.sampling.may_end_early:
        return None
    chosen = watched(groups)

    def measured(sequences: Sequence[list[int]], all_groups: bool) -> Moments:
        examples = text_examples(sequences)
        texts = batches(examples, config.statistics.batch_size)
        where = groups if all_groups else chosen
        with progress("checking (tokens)", sum(map(len, sequences))) as tick:
            return second_moments(model, where, texts, lambda n: tick(n, n), apart=chosen)

    room = room_for_moments(model.device, config.statistics.memory_gb)
    return EarlyStopping(
        measured,
        {group.name: c_task[group.name] for group in chosen},
        config.spectrum,
        config.directions or config.adapter.r,
        tolerance,
        fits_in_memory=len(passes(groups, room)) == 1,
    )
