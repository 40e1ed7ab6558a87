"""Frontiers by hand, properties for any points, and intervals against SciPy's."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from folora.compare.frontier import (
    Interval,
    Point,
    at_norm,
    averages,
    dominated_area,
    interval,
    kept_at,
    kl_at,
    paired,
    pareto,
    task_at,
)
from folora.errors import ConfigError

NAN = math.nan
BASE = Point(0.0, 1.0, kl=0.0)
# By hand: (.3, .7) and (.5, .6) are beaten by (.5, .8); (.9, .2) and (.5, .8) are not.
POINTS = [
    BASE,
    Point(0.5, 0.8, kl=0.10),
    Point(0.3, 0.7, kl=0.02),
    Point(0.5, 0.6, kl=0.05),
    Point(0.9, 0.2, kl=0.40),
    Point(NAN, 0.9, kl=NAN),
    Point(0.95, NAN, kl=NAN),
]

score = st.integers(0, 20).map(lambda i: i / 20)  # a coarse grid, so that ties happen
point = st.builds(Point, task=score, kept=score, kl=st.one_of(score, st.just(NAN)))
points = st.lists(point, max_size=12)
quick = settings(max_examples=60, derandomize=True)


def test_pareto_by_hand() -> None:
    assert pareto(POINTS) == [BASE, POINTS[1], POINTS[4]]
    assert pareto([]) == []
    assert pareto([Point(NAN, NAN), Point(math.inf, 0.5)]) == []


def test_of_equal_points_the_one_with_the_smallest_kl_stays() -> None:
    same = [Point(0.5, 0.5, kl=NAN), Point(0.5, 0.5, kl=0.2), Point(0.5, 0.5, kl=0.1)]
    assert pareto(same) == [same[2]]


def test_levels_by_hand() -> None:
    assert kept_at(POINTS, 0.0) == 1.0
    assert kept_at(POINTS, 0.3) == 0.8  # the better point further on counts
    assert kept_at(POINTS, 0.5) == 0.8
    assert kept_at(POINTS, 0.51) == 0.2  # nothing is assumed between .5 and .9
    assert math.isnan(kept_at(POINTS, 0.91))
    assert task_at(POINTS, 0.8) == 0.5
    assert task_at(POINTS, 0.81) == 0.0
    assert math.isnan(task_at(POINTS[1:], 0.81))
    assert kl_at(POINTS, 0.3) == 0.02
    assert kl_at(POINTS, 0.4) == 0.05
    assert kl_at(POINTS, 0.6) == 0.40
    assert math.isnan(kl_at(POINTS, 0.92))


def test_a_level_that_is_met_exactly_survives_rounding() -> None:
    assert 0.1 + 0.2 > 0.3
    assert kept_at([Point(0.3, 0.5)], 0.1 + 0.2) == 0.5
    assert math.isnan(kept_at([Point(0.3, 0.5)], 0.3001))


def test_area_by_hand() -> None:
    # Steps: up to .5 at .8, from .5 to .9 at .2.
    assert dominated_area(POINTS, (0.0, 0.0)) == pytest.approx(0.5 * 0.8 + 0.4 * 0.2)
    # From (.2, .5) to (.8, 1): .3 wide and .3 high of .6 times .5; the last point is below .5.
    assert dominated_area(POINTS, (0.2, 0.5), (0.8, 1.0)) == pytest.approx(0.09 / 0.3)
    assert dominated_area([BASE], (0.0, 0.0)) == 0.0
    assert dominated_area([], (0.0, 0.0)) == 0.0
    assert dominated_area([Point(2.0, 2.0)], (0.0, 0.0)) == 1.0
    assert math.isnan(dominated_area(POINTS, (1.0, 0.0)))
    assert math.isnan(dominated_area(POINTS, (NAN, 0.0)))


def test_area_of_losses_and_kl() -> None:
    # Scores -loss and -KL: from (-2, -.5) to (-.5, 0); the point is 1 of 1.5 wide, .4 of .5 high.
    area = dominated_area([Point(-2.0, 0.0), Point(-1.0, -0.1)], (-2.0, -0.5), (-0.5, 0.0))
    assert area == pytest.approx(1.0 * 0.4 / (1.5 * 0.5))


@quick
@given(points)
def test_no_point_of_the_front_is_beaten_and_every_other_is(many: list[Point]) -> None:
    def beats(a: Point, b: Point) -> bool:
        return a.task >= b.task and a.kept >= b.kept

    front = pareto(many)
    assert [p.task for p in front] == sorted({p.task for p in front})
    assert not any(beats(a, b) for a in front for b in front if a is not b)
    assert all(any(beats(a, b) for a in front) for b in many)


@quick
@given(points, point, score, score)
def test_a_dominated_point_changes_nothing(
    many: list[Point], top: Point, down: float, level: float
) -> None:
    below = Point(top.task * down, top.kept * down, kl=top.kl)
    before, after = [*many, top], [*many, top, below]
    assert [(p.task, p.kept) for p in pareto(before)] == [(p.task, p.kept) for p in pareto(after)]
    assert same(kept_at(before, level), kept_at(after, level))
    assert same(task_at(before, level), task_at(after, level))
    assert dominated_area(before, (0.0, 0.0)) == dominated_area(after, (0.0, 0.0))


@quick
@given(points, st.integers(0, 9), score)
def test_the_order_of_points_does_not_matter(many: list[Point], seed: int, level: float) -> None:
    shuffled = random.Random(seed).sample(many, len(many))
    assert repr(pareto(shuffled)) == repr(pareto(many))  # by text, since NaN is not equal to NaN
    for measure in (kept_at, task_at, kl_at):
        assert same(measure(shuffled, level), measure(many, level))
    assert dominated_area(shuffled, (0.0, 0.0)) == dominated_area(many, (0.0, 0.0))


@quick
@given(points, points)
def test_area_is_a_share_and_grows_with_points(many: list[Point], more: list[Point]) -> None:
    small, large = (dominated_area(p, (0.1, 0.2)) for p in (many, many + more))
    assert 0.0 <= small <= large + 1e-12
    assert large <= 1.0


@quick
@given(points)
def test_area_is_the_share_of_a_grid_below_some_point(many: list[Point]) -> None:
    middles = (np.arange(20) + 0.5) / 20  # scores lie on multiples of 1/20
    covered = [any(p.task > x and p.kept > y for p in many) for x in middles for y in middles]
    assert dominated_area(many, (0.0, 0.0)) == pytest.approx(np.mean(covered))


@quick
@given(points, score, score)
def test_retention_decreases_with_the_level(many: list[Point], a: float, b: float) -> None:
    low, high = sorted((a, b))
    for measure, better in ((kept_at, 1), (task_at, 1), (kl_at, -1)):
        at_high = measure(many, high)
        if not math.isnan(at_high):
            assert better * measure(many, low) >= better * at_high


def test_at_norm_interpolates_in_the_logarithm() -> None:
    def path(slope: float, norms: list[float]) -> list[Point]:
        return [
            BASE,
            *[Point(0.5, 1 - slope * math.log10(n), frobenius=n, h_norm=n**2) for n in norms],
        ]

    one, two = path(0.2, [1, 10, 100]), path(0.4, [1, 1000])
    assert at_norm([one], 10**0.5, "frobenius") == pytest.approx(0.9)
    assert at_norm([one], 10.0, "frobenius") == pytest.approx(0.8)
    assert at_norm([one], 10.0, "h_norm") == pytest.approx(0.9)
    assert at_norm([one, two], 50.0, "frobenius") == pytest.approx(1 - 0.3 * math.log10(50))
    assert at_norm([one, two], 500.0, "frobenius") == pytest.approx(1 - 0.4 * math.log10(500))
    for beyond in (0.5, 2000.0):
        assert math.isnan(at_norm([one, two], beyond, "frobenius"))
    assert math.isnan(at_norm([], 1.0, "frobenius"))


def test_at_norm_takes_the_first_crossing_and_skips_missing_numbers() -> None:
    path = [
        Point(0.1, 0.9, frobenius=1.0),
        Point(0.1, NAN, frobenius=3.0),
        Point(0.1, 0.7, frobenius=4.0),
        Point(0.1, 0.1, frobenius=1.0),
        Point(NAN, NAN, frobenius=NAN),
    ]
    assert at_norm([path], 2.0, "frobenius") == pytest.approx(0.8)
    flat = [Point(0.1, 0.9, frobenius=2.0), Point(0.1, 0.5, frobenius=2.0)]
    assert at_norm([flat], 2.0, "frobenius") == 0.9
    assert math.isnan(at_norm([path], 2.0, "h_norm"))


def test_at_norm_refuses_invalid_arguments() -> None:
    with pytest.raises(ConfigError, match="above 0"):
        at_norm([], 0.0, "frobenius")
    with pytest.raises(ConfigError, match="unknown norm"):
        at_norm([], 1.0, "step")  # type: ignore[arg-type]


@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_interval_is_students_t(confidence: float) -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 5)
    found = interval([*values, NAN], confidence)
    expected = stats.t.interval(confidence, 4, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert (found.mean, found.n) == (pytest.approx(values.mean()), 5)
    assert found.half_width == pytest.approx((expected[1] - expected[0]) / 2)


def test_interval_of_three_by_hand() -> None:
    # t(.975, 2) = 4.303; the standard deviation of 1, 2, 3 is 1.
    assert interval([1.0, 2.0, 3.0]).half_width == pytest.approx(4.303 / 3**0.5, rel=1e-4)


def test_interval_of_few_or_equal_values() -> None:
    one, none, equal = interval([0.5, NAN]), interval([]), interval([0.5, 0.5])
    assert (one.mean, one.n) == (0.5, 1)
    assert math.isnan(one.low) and math.isnan(one.high) and not one.excludes_zero
    assert math.isnan(none.mean) and none.n == 0
    assert equal == Interval(0.5, 0.5, 0.5, 2) and equal.excludes_zero
    with pytest.raises(ConfigError, match="confidence"):
        interval([1.0, 2.0], 95)


def test_interval_has_its_nominal_coverage() -> None:
    rng = np.random.default_rng(1)
    hits = [i.low <= 0 <= i.high for i in (interval(rng.normal(size=3)) for _ in range(2000))]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)


def test_paired_uses_seeds_that_both_have() -> None:
    a, b = {0: 0.9, 1: 0.7, 2: 0.5, 7: 0.1}, {2: 0.3, 1: 0.6, 0: 0.6, 8: 0.9}
    assert paired(a, b) == interval([0.9 - 0.6, 0.7 - 0.6, 0.5 - 0.3])
    assert paired(a, {**b, 1: NAN}).n == 2
    assert paired(a, {}).n == 0


def test_a_common_shift_is_detected_despite_the_spread_of_seeds() -> None:
    base = {seed: float(seed) for seed in range(4)}
    higher = {seed: value + 0.1 + 0.01 * (-1) ** seed for seed, value in base.items()}
    assert paired(higher, base).excludes_zero
    assert not interval([*higher.values()]).low > np.mean([*base.values()])


def test_averages_by_hand() -> None:
    found = averages([0.8, 0.6, 0.1], [1.0, 0.9, 0.6], 0.72)
    assert found.avg1 == pytest.approx(0.5)
    assert found.avg1_percent == pytest.approx(60.0)
    assert found.avg2 == pytest.approx(0.61)
    assert found.gm == pytest.approx(0.6)
    missing = averages([0.8, NAN], [1.0, 0.9], 0.5)
    assert all(
        math.isnan(x) for x in (missing.avg1, missing.avg1_percent, missing.avg2, missing.gm)
    )
    assert math.isnan(averages([0.5], [0.0], 0.5).avg1_percent)
    assert math.isnan(averages([], [], 0.5).avg1)


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
