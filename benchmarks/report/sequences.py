"""Tasks learned in a row: what remains of the earlier ones and of the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, nan
from typing import Any

from benchmarks.plan import THEN
from benchmarks.readings import backward_transfer
from benchmarks.report.blocks import Block, calibrated, only_task, parts, setting
from benchmarks.report.outcomes import METRICS
from benchmarks.report.source import Source, rate_of
from folora.compare.results import Result
from folora.compare.tables import Cell, Column, Table

Value = Callable[[Sequence[Any]], float]
BASE = "base"
OF_THE_BASE = ("retained", "KL", "facts (log-probability)", "text (bits per byte)")


def sequence(source: Source, plan: str) -> Block:
    """A row per arm: each task when it was learned and at the end, backward transfer, what is kept of the base."""
    results = source.chosen(plan)
    tasks = only_task(results).split(THEN)
    shown: list[tuple[str, int, Value]] = [
        (f"{task} learned", 3, score_of(i, task)) for i, task in enumerate(tasks)
    ]
    shown += [(f"{task} at the end", 3, score_of(-1, task)) for task in tasks[:-1]]
    shown += [
        (
            "backward transfer",
            3,
            lambda found: backward_transfer([r["task"] for r in found], tasks),
        ),
        ("rise in loss", 3, lambda found: rise_in_loss(found, tasks)),
    ]
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(_name(result), []).append(result)

    def values(value: Value) -> dict[str, dict[int, float]]:
        """By row and seed; NaN where training diverged before the end."""
        return {
            name: {
                r.seed: value(r.readings) if len(r.readings) == len(tasks) else nan for r in found
            }
            for name, found in rows.items()
        }

    columns = [Column(title, digits, {BASE: {}, **values(value)}) for title, digits, value in shown]
    base = {result.seed: result.base for result in results}
    for title in OF_THE_BASE:
        digits, metric = METRICS[title]
        found = {BASE: {s: metric(r) for s, r in base.items()}, **values(at_the_end(metric))}
        if all(isfinite(v) for v in found[BASE].values()):
            columns.append(Column(title, digits, found))
    caption = (
        f"{', then '.join(tasks)}: mean ± half-width of the 95 % confidence interval over seeds. Learned: exact match "
        "after the task's own stage. Backward transfer: mean over all tasks but the last of the exact match at the end "
        "minus that when learned; rise in loss: the same of the loss per response token, in nats. The other columns are of the base's abilities at the end; KL is to the original base on its own text."
    )
    cells: list[tuple[str, Cell]] = [(column.title, column.cell) for column in columns]
    cells.append(("seeds", lambda name: str(len(rows.get(name, base)))))
    table = Table.by_method({n: n for n in (BASE, *rows)}, cells, caption)
    return Block(parts(table, source.missing(plan)))


def score_of(stage: int, task: str) -> Value:
    """The exact match on a task after a stage."""
    return lambda readings: float(readings[stage]["task"][task])


def at_the_end(metric: Callable[[Any], float]) -> Value:
    """A metric after the last stage."""
    return lambda readings: metric(readings[-1])


def rise_in_loss(readings: Sequence[Any], tasks: Sequence[str]) -> float:
    """Mean over all tasks but the last of the loss at the end minus that when learned; NaN if it was not read."""
    rises = [
        readings[-1]["other"].get(f"{task}.loss", nan)
        - readings[stage]["other"].get(f"{task}.loss", nan)
        for stage, task in enumerate(tasks[:-1])
    ]
    return sum(rises) / len(rises)


def _name(result: Result) -> str:
    """Method, calibration text, learning rate and other changes."""
    title = calibrated(result) if result.calibration else result.title
    return ", ".join(filter(None, [title, f"lr {rate_of(result):g}", setting(result)]))


BLOCKS: dict[str, Callable[..., Block]] = {"sequence": sequence}
