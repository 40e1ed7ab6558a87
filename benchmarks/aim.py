"""How much less is forgotten than by LoRA, at matched task loss: one table a target.

Every method may stop at any reading of any arm that has reached the loss; of these, what it forgot is
the smallest KL, the best kept score and the best log-probability of right answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from folora.frontier import Interval, interval, paired
from folora.report import NONE, Table, matched_levels
from folora.results import Result, Scores, by_method, grouped, mean_score, point_sets, scores_of

BASELINE = "lora"
BITS = ".bits_per_byte"
MEASURES = {
    "KL": "of LoRA's",
    "kept lost": "minus LoRA's",
    "nats lost": "minus LoRA's",
    "bits lost": "minus LoRA's",
}

BySeed = Mapping[int, float]


@dataclass(frozen=True)
class Forgotten:
    """What one method forgot at matched loss, by seed; NaN where it never got there.

    Attributes:
        kl: KL to the base, nats a token.
        kept: Loss of the kept score.
        nats: Loss of log-probability of the right answer, mean over tasks that tell it.
        bits: Rise of the bits a byte on running text.
    """

    kl: BySeed
    kept: BySeed
    nats: BySeed
    bits: BySeed


def aim_table(results: Sequence[Result]) -> Table:
    """Table of what each method forgot, and what part that is of LoRA's.

    Args:
        results: Of one task, with a task loss and kept scores.
    """
    scores, levels = scores_of(results), levels_of(results)
    arms = by_method(grouped(results))
    titles = {r.method: r.title for r in results}
    found = {m: forgotten(seeds, scores, levels) for m, seeds in arms.items()}
    against = found.get(BASELINE)
    header = ["method"]
    for measure, compared in MEASURES.items():
        header += [measure, compared] if against else [measure]
    rows = []
    for method, mine in found.items():
        row = [titles[method], _stated(interval(mine.kl.values()), 4)]
        row += [_ratio(mine.kl, against.kl)] if against else []
        for name in ("kept", "nats", "bits"):
            row.append(_stated(interval(getattr(mine, name).values()), 4))
            if against:
                row.append(_difference(getattr(mine, name), getattr(against, name)))
        count = sum(len(group) for group in arms[method].values())
        rows.append((*row, str(count), str(len(arms[method]))))
    stated = ", ".join(f"{-level:.3f}" for _, level in sorted(levels.items()))
    base = interval([-scores.point(r.base).task for r in results]).mean
    caption = (
        f"{results[0].task}, at a task loss of at most {stated} nats a token, by seed (base: "
        f"{base:.3f} on average): what every method reaches that gets halfway to that seed's best. KL to the base "
        "in nats a token; its part of LoRA's is the geometric mean over seeds of the ratio, with its 95 % "
        "interval. Kept lost: fall of the mean kept score. Nats lost: fall of the log-probability of right "
        "answers, mean over the tasks that tell it. Bits lost: rise of the bits a byte on running text. ± "
        "is half of the 95 % interval over seeds; *: the interval excludes no difference. "
        f"{NONE}: no seed gets there."
    )
    return Table((*header, "arms", "seeds"), tuple(rows), caption)


def levels_of(results: Sequence[Result]) -> dict[int, float]:
    """The matched task score (minus the loss) of each seed, whose held-out rows are its own."""
    scores = scores_of(results)
    return {
        seed: matched_levels(
            by_method(point_sets(r for r in results if r.seed == seed)),
            {r.seed: scores.point(r.base) for r in results if r.seed == seed},
            scores,
        ).task
        for seed in sorted({r.seed for r in results})
    }


def forgotten(arms: Mapping[int, Sequence[Result]], scores: Scores, levels: BySeed) -> Forgotten:
    """What one method forgot, each seed at its own level: see the module."""

    def best(
        value: Callable[[Mapping[str, Any], Mapping[str, Any]], float],
    ) -> dict[int, float]:
        return {
            seed: _least(
                value(arm.base, reading)
                for arm in group
                for reading in (arm.base, *arm.readings)
                if scores.point(reading).task >= levels[seed]
            )
            for seed, group in arms.items()
        }

    return Forgotten(
        kl=best(lambda base, reading: reading["kl"]),
        kept=best(lambda base, reading: mean_score(base["kept"]) - mean_score(reading["kept"])),
        nats=best(lambda base, reading: _other(base, ".nats") - _other(reading, ".nats")),
        bits=best(lambda base, reading: _other(reading, BITS) - _other(base, BITS)),
    )


def kept_table(results: Sequence[Result]) -> Table:
    """What the models answer, question by question, at matched loss: a column a method.

    Of a method and seed, the model is that with the smallest KL among those that were asked and have
    reached the loss.
    """
    scores, levels = scores_of(results), levels_of(results)
    titles = {r.method: r.title for r in results}
    columns: dict[str, dict[int, Mapping[str, Any]]] = {"base": {r.seed: r.base for r in results}}
    for method, seeds in by_method(grouped(results)).items():
        chosen = {
            seed: min(
                (r for arm in arms for r in arm.readings if _asked(r, scores, levels[seed])),
                key=lambda r: r["kl"],
                default=None,
            )
            for seed, arms in seeds.items()
        }
        columns[titles[method]] = {s: r for s, r in chosen.items() if r is not None}
    kinds = [("kept", name) for name in results[0].base["kept"]]
    kinds += [("other", name) for name in results[0].base["other"]]
    rows = [
        (
            f"{name} (kept)" if kind == "kept" else name,
            *[
                _stated(interval(r[kind].get(name, math.nan) for r in readings.values()), 3)
                for readings in columns.values()
            ],
        )
        for kind, name in kinds
    ]
    caption = (
        "Mean over seeds ± half of the 95 % interval, of the same questions before and after. "
        "kept: what counts as the kept score, here the probability of the right answer, among the "
        "choices where there are some. nats: its log-probability. acc: share that is right. "
        f"{NONE}: no model that was asked has reached the loss."
    )
    return Table(("asked", *columns), tuple(rows), caption)


def without_scores(result: Result) -> Result:
    """The same arm by its meter alone, so that points are loss and KL."""
    base, *readings = ({**r, "task": {}, "kept": {}} for r in (result.base, *result.readings))
    return replace(result, base=base, readings=tuple(readings))


def _asked(reading: Mapping[str, Any], scores: Scores, level: float) -> bool:
    return bool(reading["kept"]) and scores.point(reading).task >= level


def _other(reading: Mapping[str, Any], metric: str) -> float:
    return mean_score({k: v for k, v in reading["other"].items() if k.endswith(metric)})


def _least(values: Iterable[float]) -> float:
    return min((v for v in values if math.isfinite(v)), default=math.nan)


def _ratio(mine: BySeed, other: BySeed) -> str:
    if mine is other:
        return NONE
    logs = paired(_logs(mine), _logs(other))
    if not logs.n:
        return NONE
    text = f"{math.exp(logs.mean):.1%}"
    if logs.n > 1:
        text += f" ({math.exp(logs.low):.1%} to {math.exp(logs.high):.1%})"
    return text + " *" * logs.excludes_zero


def _logs(values: BySeed) -> dict[int, float]:
    return {seed: math.log(v) if v > 0 else math.nan for seed, v in values.items()}


def _difference(mine: BySeed, other: BySeed) -> str:
    if mine is other:
        return NONE
    found = paired(mine, other)
    return _stated(found, 4, "+") + " *" * found.excludes_zero


def _stated(found: Interval, digits: int, sign: str = "-") -> str:
    if not found.n:
        return NONE
    text = f"{found.mean:{sign}.{digits}f}"
    return f"{text} ± {found.half_width:.{digits}f}" if found.n > 1 else text
