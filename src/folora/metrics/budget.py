"""A budget for forgetting: the largest scale of an adapter whose held-out KL is within it.

The KL of an update that is scaled by s in [0, 1] falls to 0 with s. The largest s is searched for at which an upper
confidence bound of the mean KL is within the budget. Because KL and bound rise with s, the bound's confidence
holds for the s that is found, too (arXiv:2101.02703, theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import NormalDist

from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer

from folora.data.rows import batches, text_examples
from folora.errors import DataError
from folora.metrics.meter import Texts, by_source, sequence_kl
from folora.runtime.contexts import evaluating
from folora.runtime.progress import progress

FEWEST = 16  # sequences: fewer give no interval to rely on
CONFIDENCE = 0.95  # one-sided
CLOSE = 0.97  # part of the budget that ends the search
MOST_READINGS = 12


@dataclass(frozen=True)
class Bound:
    """A mean KL in nats per token, and the upper end of its confidence interval.

    Attributes:
        mean: Over tokens.
        upper: One-sided, at `CONFIDENCE`; the spread is that among sequences.
        by_source: The mean on the text of each source, if there are several.
    """

    mean: float
    upper: float
    by_source: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class BudgetFit:
    """A scale for the update, and the KL there.

    Attributes:
        budget: In nats per token.
        scale: In [0, 1]; 1 leaves the adapter as it was trained.
        trained: The KL as trained.
        kept: The KL at `scale`, whose upper end is within the budget.
        task_loss: Task loss at `scale`, in nats per response token; NaN if not measured.
        readings: Number of scales at which the KL was measured.
    """

    budget: float
    scale: float
    trained: Bound
    kept: Bound
    task_loss: float = math.nan
    readings: int = 1


def bound(sums: Sequence[float], tokens: Sequence[int]) -> Bound:
    """The mean over all tokens and its upper confidence bound, from sums over sequences.

    The variance is that of a ratio estimator; Student's t is approximated by Cornish and Fisher's expansion.

    Args:
        sums: Summed KL of each sequence; at least two.
        tokens: Number of tokens of each.
    """
    n = len(sums)
    mean = math.fsum(sums) / sum(tokens)
    if not math.isfinite(mean) or n < 2:
        return Bound(mean, math.inf)
    squares = math.fsum((s - mean * t) ** 2 for s, t in zip(sums, tokens, strict=True))
    error = math.sqrt(squares * n / (n - 1)) / sum(tokens)
    return Bound(mean, mean + _student(CONFIDENCE, n - 1) * error)


def _student(level: float, freedom: int) -> float:
    """Quantile of Student's t; within 2 % from 3 degrees of freedom on."""
    z = NormalDist().inv_cdf(level)
    first = (z**3 + z) / (4 * freedom)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return z + first + second + third


def largest_scale(bound_at: Callable[[float], Bound], budget: float) -> BudgetFit:
    """Search for the largest scale in [0, 1] whose bound is within the budget.

    Args:
        bound_at: The KL at a scale.
        budget: In nats per token, > 0.

    Returns:
        The scale found, with a bound in [`CLOSE` * budget, budget] unless it is 1 or the search took
        `MOST_READINGS` readings. Scale 0 if no tested scale is within the budget.
    """
    trained = found = bound_at(1.0)
    low, high, kept = 0.0, 1.0, Bound(0.0, 0.0)
    if trained.upper <= budget:
        return BudgetFit(budget, 1.0, trained, trained)
    readings = 1
    while readings < MOST_READINGS:
        # Near 0 the KL is quadratic in the scale.
        at = high if found.upper > budget else low
        guess = at * math.sqrt((1 + CLOSE) / 2 * budget / max(found.upper, 1e-30))
        if not low < guess < high:  # also if the bound is not finite
            guess = math.sqrt(low * high) if low else high / 2
        found = bound_at(guess)
        readings += 1
        if found.upper > budget or math.isnan(found.upper):
            high = guess
            continue
        low, kept = guess, found
        if found.upper >= CLOSE * budget:
            break
    return BudgetFit(budget, low, trained, kept, readings=readings)


def check_sequences(texts: Texts) -> None:
    """Refuse too few sequences for a confidence interval. Raises DataError."""
    if (count := sum(map(len, by_source(texts).values()))) < FEWEST:
        raise DataError(
            f"a budget needs at least {FEWEST} held-out sequences for a confidence interval, but there are "
            f"{count}; sample more (sampling.num_sequences)"
        )


def kl_by_scale(
    model: PeftModel, sequences: Texts, batch_size: int = 8
) -> Callable[[float], Bound]:
    """The KL of a model's active LoRA adapter as a function of the scale of its update, each measured once.

    Args:
        model: Any PEFT model with a LoRA adapter.
        sequences: Token ids of held-out calibration text, not used in training; or by source, in
            proportion to the shares that the budget weighs them by.
        batch_size: Sequences in a forward pass.

    Raises:
        DataError: There are fewer than `FEWEST` sequences.
    """
    check_sequences(sequences)
    examples = {name: text_examples(rows) for name, rows in by_source(sequences).items()}

    @cache
    def at(scale: float) -> Bound:
        sums: list[float] = []
        tokens: list[int] = []
        means: dict[str, float] = {}
        batch_count = sum(-(-len(part) // batch_size) for part in examples.values())
        with (
            evaluating(model),
            rescale_adapter_scale(model, scale),
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
        return replace(bound(sums, tokens), by_source=means if len(means) > 1 else {})

    return at


def apply_scale(model: PeftModel, scale: float) -> None:
    """Multiply the ``scaling`` of every LoRA layer's active adapter, in place; weights are not changed."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(scale)


def fit_budget(model: PeftModel, sequences: Texts, budget: float, batch_size: int = 8) -> BudgetFit:
    """Scale a model's active LoRA adapter in place, if need be, so that its KL is within a budget.

    Args:
        model: As for `kl_by_scale`, and so are `sequences` and `batch_size`.
        sequences: Held-out text.
        budget: KL(base || adapted) in nats per token, > 0.
        batch_size: Sequences in a forward pass.

    Raises:
        DataError: There are fewer than `FEWEST` sequences.
    """
    fit = largest_scale(kl_by_scale(model, sequences, batch_size), budget)
    apply_scale(model, fit.scale)
    return fit
