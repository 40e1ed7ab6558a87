"""Tables that compare methods on one task, from files of results.

Each value is computed per seed, from the points of all arms of a method, and reported as the mean with the
half-width of its 95 % confidence interval over seeds. The caption states the levels at which methods are
compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple, TypeVar

import rich.table
from rich.text import Text

from folora.compare.frontier import (
    Averages,
    Interval,
    Point,
    averages,
    dominated_area,
    interval,
    kept_at,
    kl_at,
    paired,
    task_at,
)
from folora.compare.results import (
    Result,
    Scores,
    grouped,
    mean_score,
    of_task,
    point_sets,
    scores_of,
)

BASELINE = "lora"  # of relative compute
FORWARD = 0.5  # compute of a forward pass alone: a frozen base's backward pass takes as much as its forward pass
# Default levels: fraction of the best task improvement, and of the base's kept score.
FRACTION = 0.9
KL_LEVEL = 0.05  # nats per token: matched KL, without scorers
KL_FLOOR = 0.5  # nats per token: lower edge of the area, without scorers
NONE = "–"
COMPUTE = (
    "Tokens of LoRA's: tokens that a training processes, on average over arms, relative to LoRA's; in parentheses with set-up and "
    "the search for a budget's scale. A token of a forward pass alone counts half."
)
AVERAGES = {
    "Avg1": ("avg1", 3),
    "Avg1 %": ("avg1_percent", 1),
    "Avg2": ("avg2", 3),
    "GM": ("gm", 3),
}
"""Fields of `Averages` by title, and their decimals."""

T = TypeVar("T")
Cell = Callable[[str], str]
BySeed = Mapping[str, Mapping[int, T]]  # method -> seed -> value
Sets = Mapping[str, Mapping[int, list[Point]]]  # points of the arms and of the base


@dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        header: Titles of the columns; the first column names the rows.
        rows: Cells of each row.
        caption: Explains the values.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str

    @classmethod
    def by_method(
        cls, titles: Mapping[str, str], columns: Sequence[tuple[str, Cell]], caption: str
    ) -> Table:
        """One row for each method; a column is its title and a function from a method to its cell."""
        rows = ((title, *(cell(method) for _, cell in columns)) for method, title in titles.items())
        return cls(("method", *(title for title, _ in columns)), tuple(rows), caption)

    def markdown(self) -> str:
        """The table in GitHub Markdown, followed by the caption."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        cells = [[cell.replace("|", r"\|") for cell in row] for row in (self.header, *self.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]
        return "\n".join([*lines, "", self.caption, ""])

    def rich(self) -> rich.table.Table:
        """The table for a terminal."""
        table = rich.table.Table(caption=Text(self.caption))
        for i, title in enumerate(self.header):
            table.add_column(Text(title), justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*[Text(cell) for cell in row])
        return table


class Levels(NamedTuple):
    """Levels at which methods are compared: matched scores, and the upper edge of the area."""

    task: float
    kept: float
    best_task: float


@dataclass(frozen=True)
class Column:
    """One metric of all methods: method -> seed -> value, shown with `digits` decimals."""

    title: str
    digits: int
    values: BySeed[float]

    def cell(self, method: str) -> str:
        """Mean and half-width over the seeds of a method."""
        values = self.values[method]
        return _stated(interval(values.values()), len(values), self.digits)

    def difference(self, method: str, reference: str) -> str:
        """Method minus reference by seed, with a star if the interval excludes zero."""
        if method == reference:
            return NONE
        found = paired(self.values[method], self.values[reference])
        star = " *" if found.excludes_zero else ""
        return _stated(found, len(self.values[method]), self.digits, "+") + star


def comparison_table(
    results: Iterable[Result],
    task: str,
    level: float | None = None,
    kept_level: float | None = None,
    reference: str = "folora",
    methods: Sequence[str] | None = None,
) -> Table:
    """One row per method: kept score at a matched task score, the reverse, and averages.

    Without scorers, the task score is minus the task loss and the kept score minus the KL; the table then
    shows losses and KLs, and no averages.

    Args:
        results: Results of any tasks.
        task: Task to compare on.
        level: Matched task score. Default with scorers: 90 % of the way from the base's score to the best
            of any method (mean over seeds). Default without: the best level reached by every method that
            gets at least halfway to the best.
        kept_level: Matched kept score. Default: 90 % of the base's; without scorers, KL 0.05.
        reference: Method for the column of paired differences, which is omitted if it has no results.
        methods: Methods to show, in this order. By default all.

    Raises:
        DataError: There are no such results, or they cannot be compared with each other.
    """
    chosen = of_task(results, task, methods)
    scores = scores_of(chosen)
    sets, arms = point_sets(chosen), grouped(chosen)
    bases = {r.seed: scores.point(r.base) for r in chosen}
    levels = matched_levels(sets, bases, scores, level, kept_level)
    titles = {r.method: r.title for r in chosen}

    columns = _frontier_columns(sets, bases, scores, levels)
    caption = [
        f"{task}: mean ± half-width of the 95 % confidence interval over seeds; all arms (trainings) of a method "
        "are pooled.",
        _describe_levels(levels, scores, level is None, kept_level is None),
        _describe_area(levels, scores),
    ]
    if scores.task_scored and scores.kept_scored:
        best = {m: {s: best_average(g) for s, g in seeds.items()} for m, seeds in arms.items()}
        for title, (name, digits) in AVERAGES.items():
            values = {
                m: {s: getattr(a, name) for s, a in seeds.items()} for m, seeds in best.items()
            }
            columns.append(Column(title, digits, values))
        caption.append("Avg1, Avg2, GM: at each seed's measurement with the best GM.")
    cells: list[tuple[str, Cell]] = [(column.title, column.cell) for column in columns]
    if reference in arms:
        difference = partial(columns[0].difference, reference=reference)
        cells.insert(1, (f"minus {titles[reference]}", difference))
        caption.append("*: the interval of the differences by seed excludes zero.")
    if tokens := compute_cells(arms):
        cells.append(tokens)
        caption.append(COMPUTE)
    cells.append(("arms", lambda method: _count([*chain(*arms[method].values())])))
    cells.append(("seeds", lambda method: str(len(arms[method]))))
    caption.append(f"{NONE}: reached by no seed.")
    return Table.by_method(titles, cells, " ".join(caption))


def matched_levels(
    sets: Sets,
    bases: Mapping[int, Point],
    scores: Scores,
    task: float | None = None,
    kept: float | None = None,
) -> Levels:
    """The given levels, or the defaults described in `comparison_table`."""
    best = [_mean(_best_task(points) for points in seeds.values()) for seeds in sets.values()]
    reached = [value for value in best if math.isfinite(value)]
    start = _mean(p.task for p in bases.values())
    if task is None and not reached:
        task = math.nan
    elif task is None and scores.task_scored:
        task = start + FRACTION * (max(reached) - start)
    elif task is None:
        task = min(value for value in reached if value >= (start + max(reached)) / 2)
    if kept is None:
        kept = FRACTION * _mean(p.kept for p in bases.values()) if scores.kept_scored else -KL_LEVEL
    if scores.task_scored:
        return Levels(task, kept, 1.0)
    everyone = [p for seeds in sets.values() for points in seeds.values() for p in points]
    return Levels(task, kept, _best_task(everyone))


def _describe_levels(levels: Levels, scores: Scores, task_found: bool, kept_found: bool) -> str:
    if scores.task_scored:
        task = f"score of at least {levels.task:.3f}"
        why = "90 % of the way from the base to the best method"
    else:
        task = f"loss of at most {-levels.task:.3f} nats per token"
        why = "reached by every method that gets halfway to the best"
    if scores.kept_scored:
        kept = f"Matched retention: score of at least {levels.kept:.3f}"
        kept += " (90 % of the base's)" * kept_found
    else:
        kept = f"Matched KL: at most {-levels.kept:g} nats per token"
    return f"Matched task: {task}{f' ({why})' * task_found}. {kept}."


def _describe_area(levels: Levels, scores: Scores) -> str:
    task = "score to 1" if scores.task_scored else f"loss to {-levels.best_task:.3f}"
    kept = "retained score 0 to 1" if scores.kept_scored else f"KL {KL_FLOOR:g} to 0"
    return f"Area: under the frontier, as a fraction of the rectangle from the base's task {task} and from {kept}."


def _frontier_columns(
    sets: Sets, bases: Mapping[int, Point], scores: Scores, levels: Levels
) -> list[Column]:
    """The columns computed from points; losses and KLs are shown as such, not as negative scores."""

    def column(title: str, digits: int, measure: Callable[[list[Point], int], float]) -> Column:
        values = {m: {s: measure(p, s) for s, p in seeds.items()} for m, seeds in sets.items()}
        return Column(title, digits, values)

    def area(points: list[Point], seed: int) -> float:
        floor, top = (0.0, 1.0) if scores.kept_scored else (-KL_FLOOR, 0.0)
        return dominated_area(points, (bases[seed].task, floor), (levels.best_task, top))

    columns = [column("KL at matched task", 4, lambda p, _: kl_at(p, levels.task))]
    if scores.kept_scored:  # without scorers it is the same as the KL
        columns.insert(
            0, column("retained at matched task", 3, lambda p, _: kept_at(p, levels.task))
        )
    if scores.task_scored:
        columns.append(column("task at matched retention", 3, lambda p, _: task_at(p, levels.kept)))
    else:
        columns.append(column("loss at matched KL", 3, lambda p, _: -task_at(p, levels.kept)))
    return [*columns, column("area", 3, area)]


def compute_cells(arms: BySeed[list[Result]]) -> tuple[str, Cell] | None:
    """The column of the compute of an arm relative to LoRA's, and with set-up; None if none was counted."""

    def mean(method: str, *, setup: bool) -> float:
        results = chain(*arms.get(method, {}).values())
        counted = (r.tokens for r in results if r.tokens and not r.diverged)
        return _mean(trained_tokens(tokens, setup=setup) for tokens in counted)

    def cell(method: str) -> str:
        parts = (mean(method, setup=setup) / mean(BASELINE, setup=False) for setup in (False, True))
        training, whole = (NONE if math.isnan(part) else _text(part, 2) for part in parts)
        return training if training == whole else f"{training} ({whole})"

    if all(cell(method) == NONE for method in arms):
        return None
    return "tokens of LoRA's", cell


def trained_tokens(tokens: Mapping[str, int], *, setup: bool) -> float:
    """The compute of `compute.tokens_processed`, in tokens that are trained on, with or without set-up."""
    forward = tokens["base"] + (tokens["setup"] + tokens["scale"] if setup else 0)
    return tokens["task"] + tokens["anchor"] + FORWARD * forward


def best_average(arms: Sequence[Result]) -> Averages:
    """Averages of the reading with the best GM, base included, among arms of one method and seed, or NaN."""
    found = [
        averages(reading["kept"].values(), arm.base["kept"].values(), mean_score(reading["task"]))
        for arm in arms
        for reading in (arm.base, *arm.readings)
    ]
    usable = (a for a in found if math.isfinite(a.gm))
    return max(usable, key=lambda a: a.gm, default=Averages(*[math.nan] * 4))


def _stated(found: Interval, seeds: int, digits: int, sign: str = "-") -> str:
    """Mean ± half-width; with the number of seeds that have a value, if not all have."""
    if not found.n:
        return NONE
    text = _text(found.mean, digits, sign)
    if found.n > 1:
        text += f" ± {_text(found.half_width, digits)}"
    return text if found.n == seeds else f"{text} ({found.n} of {seeds} seeds)"


def _text(value: float, digits: int, sign: str = "-") -> str:
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # adding 0 turns -0 into 0


def _count(arms: Sequence[Result]) -> str:
    diverged = sum(arm.diverged for arm in arms)
    return f"{len(arms)} ({diverged} diverged)" if diverged else str(len(arms))


def _best_task(points: Iterable[Point]) -> float:
    return task_at(points, -math.inf)


def _mean(values: Iterable[float]) -> float:
    return interval(values).mean
