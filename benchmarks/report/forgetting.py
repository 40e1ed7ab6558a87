"""How much less is forgotten than by LoRA, or another method, at matched task loss: one table a target.

Every method may stop at any reading of any arm that has reached the loss; of these, what it forgot is
the smallest KL, the best kept score and the best log-probability of right answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from folora.compare.frontier import interval, paired
from folora.compare.results import (
    Result,
    Scores,
    grouped,
    mean_score,
    point_sets,
    scores_of,
)
from folora.compare.tables import NONE, Column, Table, matched_levels

BASELINE = "lora"
BITS = ".bits_per_byte"
FAR = 10.0  # times the baseline's

Reading = Mapping[str, Any]
Loss = Callable[[Reading, Reading], float]

LOSSES: Mapping[str, Loss] = {
    "KL": lambda base, reading: reading["kl"],
    "kept lost": lambda base, reading: mean_score(base["kept"]) - mean_score(reading["kept"]),
    "nats lost": lambda base, reading: _other(base, ".nats") - _other(reading, ".nats"),
    "bits lost": lambda base, reading: _other(reading, BITS) - _other(base, BITS),
}
"""What a reading has lost against its base."""


def forgetting_table(results: Sequence[Result], baseline: str = BASELINE) -> Table:
    """Table of what each method forgot, and what part that is of the baseline's.

    Args:
        results: Of one task, with a task loss and kept scores.
        baseline: A method; without results of it nothing is compared.
    """
    scores, levels = scores_of(results), levels_of(results)
    arms = grouped(results)
    titles = {r.method: r.title for r in results}
    header, rows = ["method"], {method: [titles[method]] for method in arms}
    for title, loss in LOSSES.items():
        column = Column(title, 4, {m: _least(a, loss, scores, levels) for m, a in arms.items()})
        compare = _part if title == "KL" else Column.difference
        header.append(title)
        if baseline in arms:
            header.append(f"{'of' if title == 'KL' else 'minus'} {titles[baseline]}'s")
        for method, row in rows.items():
            row.append(column.cell(method))
            if baseline in arms:
                row.append(compare(column, method, baseline))
    for method, row in rows.items():
        row += [str(sum(map(len, arms[method].values()))), str(len(arms[method]))]
    stated = ", ".join(f"{-level:.3f}" for _, level in sorted(levels.items()))
    base = interval([-scores.point(r.base).task for r in results]).mean
    caption = (
        f"{results[0].task}, at a task loss of at most {stated} nats per token, by seed (base: "
        f"{base:.3f} on average): reached by every method that gets halfway to that seed's best. KL to the base "
        f"in nats per token; its ratio to {titles.get(baseline, 'the baseline')}'s is a geometric mean over seeds, with its 95 % "
        "confidence interval. Kept lost: decrease of the mean kept score. Nats lost: decrease of the "
        "log-probability of right answers, mean over the tasks that report it. Bits lost: increase of the bits "
        "per byte on running text. ± is the half-width of the 95 % confidence interval over seeds; *: the "
        f"interval excludes no difference. {NONE}: reached by no seed."
    )
    return Table((*header, "arms", "seeds"), tuple(map(tuple, rows.values())), caption)


def levels_of(results: Sequence[Result]) -> dict[int, float]:
    """The matched task score (minus the loss) of each seed, whose held-out rows are its own."""
    scores = scores_of(results)
    return {
        seed: matched_levels(
            point_sets(r for r in results if r.seed == seed),
            {r.seed: scores.point(r.base) for r in results if r.seed == seed},
            scores,
        ).task
        for seed in sorted({r.seed for r in results})
    }


def _least(
    arms: Mapping[int, Sequence[Result]], loss: Loss, scores: Scores, levels: Mapping[int, float]
) -> dict[int, float]:
    """The smallest loss among a method's readings, each seed at its own level; NaN without any."""
    return {
        seed: min(
            (
                value
                for arm in group
                for reading in (arm.base, *arm.readings)
                if scores.point(reading).task >= levels[seed]
                and math.isfinite(value := loss(arm.base, reading))
            ),
            default=math.nan,
        )
        for seed, group in arms.items()
    }


def answers_table(results: Sequence[Result]) -> Table:
    """What the models answer, question by question, at matched loss: a column a method.

    Of a method and seed, the model is that with the smallest KL among those that were asked and have
    reached the loss.
    """
    scores, levels = scores_of(results), levels_of(results)
    titles = {r.method: r.title for r in results}
    models: dict[str, dict[int, Reading]] = {"base": {r.seed: r.base for r in results}}
    for method, seeds in grouped(results).items():
        models[titles[method]] = {
            seed: min(
                (r for arm in arms for r in arm.readings if _asked(r, scores, levels[seed])),
                key=lambda r: r["kl"],
                default={"kept": {}, "other": {}},
            )
            for seed, arms in seeds.items()
        }
    rows = []
    for kind, suffix in (("kept", " (kept)"), ("other", "")):
        for name in results[0].base[kind]:
            values = {
                title: {seed: r[kind].get(name, math.nan) for seed, r in of_seeds.items()}
                for title, of_seeds in models.items()
            }
            column = Column(name, 3, values)
            rows.append((name + suffix, *map(column.cell, models)))
    caption = (
        "Mean over seeds ± half of the 95 % interval, of the same questions before and after. "
        "kept: what counts as the kept score, here the probability of the right answer, among the "
        "choices where there are some. nats: its log-probability. acc: share that is right. "
        f"{NONE}: no model that was asked has reached the loss."
    )
    return Table(("asked", *models), tuple(rows), caption)


def without_scores(result: Result) -> Result:
    """The same arm by its meter alone, so that points are loss and KL."""
    base, *readings = ({**r, "task": {}, "kept": {}} for r in (result.base, *result.readings))
    return replace(result, base=base, readings=tuple(readings))


def _asked(reading: Reading, scores: Scores, level: float) -> bool:
    return bool(reading["kept"]) and scores.point(reading).task >= level


def _other(reading: Reading, metric: str) -> float:
    return mean_score({k: v for k, v in reading["other"].items() if k.endswith(metric)})


def _part(column: Column, method: str, baseline: str) -> str:
    """What part of the baseline's value a method's is: the geometric mean over seeds of the ratio."""
    if method == baseline:
        return NONE
    mine, other = ({s: _log(v) for s, v in column.values[m].items()} for m in (method, baseline))
    logs = paired(mine, other)
    if not logs.n:
        return NONE
    text = f"{math.exp(logs.mean):.1%}"
    if logs.n > 1:
        text += f" ({math.exp(logs.low):.1%} to {_up_to(math.exp(logs.high))})"
    return text + " *" * logs.excludes_zero


def _up_to(share: float) -> str:
    """Two seeds can leave an interval whose end says nothing but that."""
    return f"{share:.1%}" if share < FAR else f"over {FAR:.0%}"


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan
