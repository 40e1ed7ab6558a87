"""Pareto frontiers of task score against kept score, and metrics that compare them.

A method is the set of points of its arms: every reading during training is a model that could be used.
Frontiers are step functions without interpolation. Methods are compared at a matched task score, kept score
or norm of the update, or by the area under the frontier; confidence intervals are over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from folora.errors import ConfigError
from folora.runtime.extras import needed_by

with needed_by("comparing", "compare"):
    import numpy as np
    from scipy import stats

ROUNDING = 1e-9  # tolerance when a score is compared with a level


@dataclass(frozen=True)
class Point:
    """One model: task score, kept score, and distance from the base.

    Attributes:
        task: Score on the task; higher is better.
        kept: Score on abilities of the base model; higher is better.
        kl: KL(base || adapted) in nats per token.
        frobenius: ||dW||_F over all layers.
        h_norm: sqrt(trace(dW H dW')) over all layers.
        step: Number of optimizer steps.
    """

    task: float
    kept: float
    kl: float = math.nan
    frobenius: float = math.nan
    h_norm: float = math.nan
    step: int = 0


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its confidence interval; `low` and `high` are NaN for fewer than two values."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the length of the interval; NaN for fewer than two values."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval; False for fewer than two values."""
        return self.low > 0 or self.high < 0


class Averages(NamedTuple):
    """Averages of one model's scores: Avg1 is the mean kept score, also as a percentage of the base's; Avg2
    and GM are the arithmetic and the geometric mean of Avg1 and the task score.
    """

    avg1: float
    avg1_percent: float
    avg2: float
    gm: float


def pareto(points: Iterable[Point]) -> list[Point]:
    """The Pareto-optimal points, by ascending task score.

    Points without a finite task and kept score are ignored. Of points with equal scores, the one with the
    smallest KL is used, so that the order of `points` does not matter.
    """
    front: list[Point] = []
    for point in sorted(_finite(points), key=_best_first):
        if not front or point.kept > front[-1].kept:
            front.append(point)
    return front[::-1]


def kept_at(points: Iterable[Point], level: float) -> float:
    """Best kept score among points with a task score of at least `level`; NaN if there is none."""
    return max((p.kept for p in _finite(points) if _reaches(p.task, level)), default=math.nan)


def task_at(points: Iterable[Point], level: float) -> float:
    """Best task score among points with a kept score of at least `level`; NaN if there is none."""
    return max((p.task for p in _finite(points) if _reaches(p.kept, level)), default=math.nan)


def kl_at(points: Iterable[Point], level: float) -> float:
    """Smallest KL (nats per token) among points with a task score of at least `level`; NaN if there is none."""
    found = (p.kl for p in points if math.isfinite(p.kl) and _reaches(p.task, level))
    return min(found, default=math.nan)


def dominated_area(
    points: Iterable[Point], start: tuple[float, float], best: tuple[float, float] = (1.0, 1.0)
) -> float:
    """Area under the frontier of `points`, as a fraction of the rectangle from `start` to `best`.

    `points` include the base model. `start`, the lower corner (task, kept), is usually the base's task score
    and 0. NaN if the rectangle is empty.
    """
    width, height = best[0] - start[0], best[1] - start[1]
    if not (width > 0 and height > 0):
        return math.nan
    area, left = 0.0, start[0]
    for point in pareto(points):  # each step extends from the previous task score to this one
        right = min(max(point.task, start[0]), best[0])
        area += (right - left) * min(max(point.kept - start[1], 0.0), height)
        left = right
    return min(area / (width * height), 1.0)


def at_norm(
    paths: Iterable[Sequence[Point]], norm: float, which: Literal["frobenius", "h_norm"]
) -> float:
    """Kept score at a given norm of the update, averaged over the paths that reach it.

    The kept score is interpolated linearly in log(norm) where a path (the points of an arm in order of
    step) first crosses `norm`. NaN if none does. Points without a positive norm (the base) are ignored.

    Raises:
        ConfigError: `norm` is not above 0, or `which` is not a norm.
    """
    if which not in ("frobenius", "h_norm"):
        raise ConfigError(f"unknown norm {which!r}; there are 'frobenius' and 'h_norm'")
    if not norm > 0:
        raise ConfigError(f"norm {norm} must be above 0")
    found = [_first_crossing(path, norm, which) for path in paths]
    return _mean([value for value in found if not math.isnan(value)])


def interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """Mean and Student's t interval of independent values (one per seed); NaN values are ignored.

    Raises:
        ConfigError: `confidence` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence {confidence} must be between 0 and 1")
    kept = [value for value in values if not math.isnan(value)]
    mean, count, half = _mean(kept), len(kept), math.nan
    if count > 1:
        half = float(stats.t.ppf((1 + confidence) / 2, count - 1) * stats.sem(kept))
    return Interval(mean, mean - half, mean + half, count)


def paired(a: Mapping[int, float], b: Mapping[int, float], confidence: float = 0.95) -> Interval:
    """Interval of the paired differences a - b over the seeds that have both values; see `interval`."""
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], confidence)


def averages(kept: Iterable[float], base_kept: Iterable[float], task: float) -> Averages:
    """Averages of a model's kept and task scores in [0, 1]; NaN where a score is missing."""
    avg1, base = _mean(list(kept)), _mean(list(base_kept))
    product = avg1 * task
    return Averages(
        avg1=avg1,
        avg1_percent=100 * avg1 / base if base > 0 else math.nan,
        avg2=(avg1 + task) / 2,
        gm=math.sqrt(product) if product >= 0 else math.nan,
    )


def _finite(points: Iterable[Point]) -> list[Point]:
    return [p for p in points if math.isfinite(p.task) and math.isfinite(p.kept)]


def _reaches(score: float, level: float) -> bool:
    return score >= level - ROUNDING


def _best_first(point: Point) -> tuple[float, ...]:
    """Sort key: best scores first; ties are broken by the other values, NaN last."""
    rest = (point.kl, point.frobenius, point.h_norm)
    return (-point.task, -point.kept, *(math.inf if math.isnan(x) else x for x in rest), point.step)


def _first_crossing(path: Sequence[Point], norm: float, which: str) -> float:
    sizes = [(float(getattr(p, which)), p.kept) for p in path if math.isfinite(p.kept)]
    usable = [(size, kept) for size, kept in sizes if math.isfinite(size) and size > 0]
    for (size, kept), (next_size, next_kept) in pairwise(usable):
        if min(size, next_size) <= norm <= max(size, next_size):
            length = math.log(next_size) - math.log(size)
            share = (math.log(norm) - math.log(size)) / length if length else 0.0
            return kept + share * (next_kept - kept)
    return math.nan


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
