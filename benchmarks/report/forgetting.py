"""Forgetting relative to LoRA, or another method, at matched task loss: one table per target.

Every method may stop at any measurement of any arm that has reached the loss; its forgetting is the smallest
KL, the best retained score and the best log-probability of right answers among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from folora.compare.tables import (
    BASELINE,
    COMPUTE,
    NONE,
    Cell,
    Column,
    Table,
    compute_cells,
    matched_levels,
)

BITS = ".bits_per_byte"
FAR = 10.0  # times the baseline's

Reading = Mapping[str, Any]
Loss = Callable[[Reading, Reading], float]

LOSSES: Mapping[str, Loss] = {
    "KL": lambda base, reading: reading["kl"],
    "score lost": lambda base, reading: mean_score(base["kept"]) - mean_score(reading["kept"]),
    "nats lost": lambda base, reading: _other(base, ".nats") - _other(reading, ".nats"),
    "bits lost": lambda base, reading: _other(reading, BITS) - _other(base, BITS),
}
"""What a measurement has lost relative to its base."""


def forgetting_table(results: Sequence[Result], baseline: str = BASELINE) -> Table:
    """Table of each method's forgetting, and its ratio to the baseline's.

    Args:
        results: Of one task, with a task loss and retained scores.
        baseline: A method; without its results there are no comparisons.
    """
    scores, levels = scores_of(results), levels_of(results)
    arms = grouped(results)
    titles = {r.method: r.title for r in results}
    cells: list[tuple[str, Cell]] = []
    for title, loss in LOSSES.items():
        column = Column(title, 4, {m: _least(a, loss, scores, levels) for m, a in arms.items()})
        cells.append((title, column.cell))
        if baseline in arms and title == "KL":
            cells.append((f"of {titles[baseline]}'s", partial(_part, column, baseline)))
        elif baseline in arms:
            difference = partial(column.difference, reference=baseline)
            cells.append((f"minus {titles[baseline]}'s", difference))
    if tokens := compute_cells(arms):
        cells.append(tokens)
    cells.append(("arms", lambda method: str(sum(map(len, arms[method].values())))))
    cells.append(("seeds", lambda method: str(len(arms[method]))))
    stated = ", ".join(f"{-level:.3f}" for _, level in sorted(levels.items()))
    base = interval([-scores.point(r.base).task for r in results]).mean
    caption = (
        f"{results[0].task}, at a task loss of at most {stated} nats per token by seed (base: "
        f"{base:.3f} on average), which every method reaches that gets at least halfway to that seed's best. KL to the "
        f"base in nats per token; its ratio to {titles.get(baseline, 'the baseline')}'s is the geometric mean over seeds, with its 95 % "
        "interval. Score lost: decrease of the mean retained score. Nats lost: decrease of the log-probability of "
        "right answers, mean over the tasks that have one. Bits lost: increase of bits per byte on plain text. ± "
        "is half of the 95 % interval over seeds; *: the interval excludes zero difference. "
        f"{NONE}: no seed reaches the loss.{f' {COMPUTE}' * bool(tokens)}"
    )
    return Table.by_method(titles, cells, caption)


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
    """The smallest loss among a method's measurements, each seed at its own level; NaN without any."""
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
    """Scores of the models by benchmark at matched loss: a column per method.

    For each method and seed: the model with the smallest KL among those that were evaluated and have
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
    for kind, suffix in (("kept", " (retained)"), ("other", "")):
        for name in results[0].base[kind]:
            values = {
                title: {seed: r[kind].get(name, math.nan) for seed, r in of_seeds.items()}
                for title, of_seeds in models.items()
            }
            column = Column(name, 3, values)
            rows.append((name + suffix, *map(column.cell, models)))
    caption = (
        "Mean over seeds ± half of the 95 % interval, on the same questions before and after. "
        "retained: counts towards the retained score; here the probability of the right answer, among the "
        "choices if there are any. nats: its log-probability. acc: accuracy. "
        f"{NONE}: no evaluated model has reached the loss."
    )
    return Table(("benchmark", *models), tuple(rows), caption)


def without_scores(result: Result) -> Result:
    """The same arm without benchmark scores, so that points are loss and KL."""
    base, *readings = ({**r, "task": {}, "kept": {}} for r in (result.base, *result.readings))
    return replace(result, base=base, readings=tuple(readings))


def _asked(reading: Reading, scores: Scores, level: float) -> bool:
    return bool(reading["kept"]) and scores.point(reading).task >= level


def _other(reading: Reading, metric: str) -> float:
    return mean_score({k: v for k, v in reading["other"].items() if k.endswith(metric)})


def _part(column: Column, baseline: str, method: str) -> str:
    """Ratio of a method's value to the baseline's: geometric mean over seeds."""
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
    """The upper end of an interval; beyond a limit only that, because two seeds can leave it almost unbounded."""
    return f"{share:.1%}" if share < FAR else f"over {FAR:.0%}"


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan
