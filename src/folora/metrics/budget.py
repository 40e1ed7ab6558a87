"""A budget for forgetting: the largest scale of an adapter whose held-out KL is within it.

The KL of an update that is scaled by s in [0, 1] falls to 0 with s. The largest s is searched for at which an upper
confidence bound of the mean KL is within the budget. Because KL and bound rise with s, the bound's confidence
holds for the s that is found, too (arXiv:2101.02703, theorem 1). A few sequences show that an adapter is far below
its budget; how far it has to be scaled down, only more can tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import NormalDist

from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer

from folora.data.rows import batches, text_examples
from folora.errors import DataError
from folora.metrics.meter import Texts, by_source, sequence_kl
from folora.runtime.contexts import evaluating, without_adapter
from folora.runtime.progress import progress

FEWEST = 16  # sequences: fewer give no interval to rely on
ENOUGH = 160  # sequences: the KL of one has a standard deviation of 0.9 to 1.4 times the mean
CONFIDENCE = 0.95  # one-sided
FIRST, SECOND = 0.99, 0.96  # of two bounds, which together err no more often than one at CONFIDENCE
CLOSE = 0.97  # part of the budget that ends the search
MOST_READINGS = 12

More = Callable[[], Texts]
"""Generates further held-out text."""

Scaled = Callable[[PeftModel, float], AbstractContextManager[None]]
"""Scales a model's update while a block runs: 1 is the update as it is, 0 none."""


@dataclass(frozen=True)
class Bound:
    """A mean KL in nats per token, and the upper end of its confidence interval.

    Attributes:
        mean: Over tokens.
        upper: One-sided; the spread is that among sequences.
        by_source: The mean on the text of each source, if there are several.
        sequences: Number of sequences.
        tokens: Number of their tokens that have a KL.
    """

    mean: float
    upper: float
    by_source: dict[str, float] = field(default_factory=dict)
    sequences: int = 0
    tokens: int = 0


class ByScale(dict[float, Bound]):
    """The KL by the scale of the update; a scale is measured when it is first asked for."""

    def __init__(self, measure: Callable[[float], Bound]) -> None:
        super().__init__()
        self._measure = measure

    def __missing__(self, scale: float) -> Bound:
        found = self[scale] = self._measure(scale)
        return found


@dataclass(frozen=True)
class BudgetFit:
    """A scale for the update, and the KL there.

    Attributes:
        budget: In nats per token.
        scale: In [0, 1]; 1 leaves the adapter as it was trained.
        trained: The KL as trained.
        kept: The KL at `scale`, whose upper end is within the budget.
        task_loss: Task loss at `scale`, in nats per response token; NaN if not measured.
        readings: Number of scales at which the KL has been measured, on the text of `trained`.
    """

    budget: float
    scale: float
    trained: Bound
    kept: Bound
    task_loss: float = math.nan
    readings: int = 1


def bound(sums: Sequence[float], tokens: Sequence[int], confidence: float = CONFIDENCE) -> Bound:
    """The mean over all tokens and its upper confidence bound, from sums over sequences.

    The variance is that of a ratio estimator; Student's t is approximated by Cornish and Fisher's expansion.

    Args:
        sums: Summed KL of each sequence; at least two.
        tokens: Number of tokens of each.
        confidence: Of the bound, in (0, 1).
    """
    n, total = len(sums), sum(tokens)
    mean = math.fsum(sums) / total
    if not math.isfinite(mean) or n < 2:
        return Bound(mean, math.inf, sequences=n, tokens=total)
    squares = math.fsum((s - mean * t) ** 2 for s, t in zip(sums, tokens, strict=True))
    error = math.sqrt(squares * n / (n - 1)) / total
    return Bound(mean, mean + _student(confidence, n - 1) * error, sequences=n, tokens=total)


def _student(level: float, freedom: int) -> float:
    """Quantile of Student's t; within 2 % from 3 degrees of freedom on."""
    z = NormalDist().inv_cdf(level)
    first = (z**3 + z) / (4 * freedom)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return z + first + second + third


def largest_scale(kl: ByScale, budget: float) -> BudgetFit:
    """Search for the largest scale in [0, 1] whose bound is within the budget.

    Args:
        kl: The KL by scale. What it has measured already is used.
        budget: In nats per token, > 0.

    Returns:
        The scale found, with a bound in [`CLOSE` * budget, budget] unless it is 1 or the search took
        `MOST_READINGS` readings. Scale 0 if no tested scale is within the budget.
    """
    before = len(kl)
    trained = kl[1.0]
    if trained.upper <= budget:
        return BudgetFit(budget, 1.0, trained, trained, readings=len(kl))
    while True:
        high = min(scale for scale, found in kl.items() if not found.upper <= budget)
        low = max((scale for scale in kl if scale < high), default=0.0)
        kept = kl[low] if low else Bound(0.0, 0.0)
        if kept.upper >= CLOSE * budget or len(kl) - before >= MOST_READINGS:
            return BudgetFit(budget, low, trained, kept, readings=len(kl))
        guess = _guess(kl, (1 + CLOSE) / 2 * budget)
        if not low < guess < high:
            guess = math.sqrt(low * high) if low else high / 2
        _ = kl[guess]


def _guess(kl: Mapping[float, Bound], target: float) -> float:
    """The scale with a bound of `target`, if bounds are a power of the scale; 0 if none is finite and positive."""
    known = [(math.log(s), math.log(b.upper)) for s, b in kl.items() if 0 < b.upper < math.inf]
    near = sorted(known, key=lambda point: abs(point[1] - math.log(target)))[:2]
    if not near:
        return 0.0
    scale, level = near[0]
    power = 2.0  # near 0
    if len(near) == 2:
        power = min(8.0, max(1.0, (near[1][1] - level) / (near[1][0] - scale)))
    return math.exp(scale + (math.log(target) - level) / power)


def check_sequences(texts: Texts) -> None:
    """Refuse too few sequences for a confidence interval. Raises DataError."""
    if (count := sum(map(len, by_source(texts).values()))) < FEWEST:
        raise DataError(
            f"a budget needs at least {FEWEST} held-out sequences for a confidence interval, but there are "
            f"{count}; sample more (sampling.num_sequences)"
        )


def kl_by_scale(
    model: PeftModel,
    sequences: Texts,
    batch_size: int = 8,
    confidence: float = CONFIDENCE,
    scaled: Scaled = rescale_adapter_scale,
) -> ByScale:
    """The KL of a model's active adapter by the scale of its update.

    Args:
        model: Any PEFT model with a LoRA adapter, or with another that `scaled` scales.
        sequences: Token ids of held-out calibration text, not used in training; or by source, in
            proportion to the shares that the budget weighs them by.
        batch_size: Sequences in a forward pass.
        confidence: Of the bounds.
        scaled: Scales the update.

    Raises:
        DataError: There are fewer than `FEWEST` sequences.
    """
    check_sequences(sequences)
    examples = {name: text_examples(rows) for name, rows in by_source(sequences).items()}

    def at(scale: float) -> Bound:
        sums: list[float] = []
        tokens: list[int] = []
        means: dict[str, float] = {}
        batch_count = sum(-(-len(part) // batch_size) for part in examples.values())
        with (
            evaluating(model),
            scaled(model, scale),
            progress(f"measuring KL at scale {scale:.2f} (batches)", batch_count) as tick,
        ):
            for name, part in examples.items():
                start = len(sums)
                for batch in batches(part, batch_size):
                    found = sequence_kl(model, batch)
                    sums += found[0]
                    tokens += found[1]
                    tick()
                means[name] = math.fsum(sums[start:]) / sum(tokens[start:])
        whole = bound(sums, tokens, confidence)
        return replace(whole, by_source=means if len(means) > 1 else {})

    return ByScale(at)


def kl_for_budget(
    model: PeftModel,
    sequences: Texts,
    budget: float,
    more: More | None,
    batch_size: int = 8,
    scaled: Scaled = rescale_adapter_scale,
) -> ByScale:
    """`kl_by_scale`, on more text if the first does not show that the adapter is within the budget as it is.

    Args:
        model: As for `kl_by_scale`, and so are `sequences`, `batch_size` and `scaled`.
        sequences: Held-out text.
        budget: In nats per token.
        more: Generates further text of the same sources; called without the adapter, only if it is needed.
    """
    measured = partial(kl_by_scale, model, batch_size=batch_size, scaled=scaled)
    if more is None:
        return measured(sequences)
    first = measured(sequences, confidence=FIRST)
    if first[1.0].upper <= budget:
        return first
    with without_adapter(model):
        further = by_source(more())
    if not further:
        return measured(sequences)
    known = by_source(sequences)
    names = {**known, **further}
    together = {name: [*known.get(name, ()), *further.get(name, ())] for name in names}
    return measured(together, confidence=SECOND)


def apply_scale(model: PeftModel, scale: float) -> None:
    """Multiply the ``scaling`` of every LoRA layer's active adapter, in place; weights are not changed."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(scale)


def fit_budget(
    model: PeftModel,
    sequences: Texts,
    budget: float,
    batch_size: int = 8,
    more: More | None = None,
) -> BudgetFit:
    """Scale a model's active LoRA adapter in place, if need be, so that its KL is within a budget.

    Args:
        model: As for `kl_by_scale`, and so are `sequences` and `batch_size`.
        sequences: Held-out text.
        budget: KL(base || adapted) in nats per token, > 0.
        batch_size: Sequences in a forward pass.
        more: As for `kl_for_budget`.

    Raises:
        DataError: There are fewer than `FEWEST` sequences.
    """
    fit = largest_scale(kl_for_budget(model, sequences, budget, more, batch_size), budget)
    apply_scale(model, fit.scale)
    return fit
