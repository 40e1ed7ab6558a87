"""Blocks of docs/speed.md: seconds and bytes, and how many eigenvectors, samples and rows are enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.amounts import rows_table, text_table
from benchmarks.report.blocks import (
    REFERENCE,
    Block,
    calibrated,
    count_of,
    only_task,
    parts,
    relabelled,
    setting,
)
from benchmarks.report.forgetting import without_scores
from benchmarks.report.source import Source, rate_of
from benchmarks.speed.table import sampling_table, scale_table, setup_table, solve_table, step_table
from folora.compare.results import Result
from folora.compare.tables import comparison_table

WHOLE = "all directions"

KEPT = "spectrum.directions"


def steps(source: Source, device: str, shape: str) -> Block:
    """Time and memory of a step by mode on one shape."""
    return Block(parts(step_table(source.measured(device, shape)[0])))


def preparation(source: Source, device: str) -> Block:
    """What comes before training: sampling, statistics and solve."""
    found = [result for result in source.measured(device) if "setup" in result]
    tables = (sampling_table(found), setup_table(found), solve_table(found))
    return Block(parts(*tables))


def scale(source: Source, device: str) -> Block:
    """Bytes and seconds by model, carried over from what was measured."""
    return Block(parts(scale_table(source.measured(device))))


def turned(source: Source, plan: str, task: str, *others: str) -> Block:
    """How many directions are kept, beside arms of other plans, by the kept score."""
    return _turned(source, plan, task, others, lambda result: result)


def turned_by_meter(source: Source, plan: str, task: str, *others: str) -> Block:
    """The same by the KL alone, which tells more than few questions do."""
    return _turned(source, plan, task, others, without_scores)


def enough(source: Source, plan: str, count: str, task: str = "") -> Block:
    """Numbers of sequences for C_pre, beside one of them, by the kept score."""
    return _enough(source, plan, count, task, lambda result: result)


def enough_by_meter(source: Source, plan: str, count: str, task: str = "") -> Block:
    """The same by the KL alone, which tells more than few questions do."""
    return _enough(source, plan, count, task, without_scores)


def amounts_of_text(source: Source, model: str) -> Block:
    """What directions are worth elsewhere, by length and number of the sequences."""
    return Block(parts(text_table(source.amounts_of(model))))


def amounts_of_rows(source: Source, model: str) -> Block:
    """The same by number of the task's rows."""
    return Block(parts(rows_table(source.amounts_of(model))))


def _turned(
    source: Source,
    plan: str,
    task: str,
    others: Sequence[str],
    seen: Callable[[Result], Result],
) -> Block:
    """Values of folora's knobs, beside its arms in other plans with the same seeds and rates."""
    results = source.chosen(plan, task)
    wanted = {(r.seed, rate_of(r)) for r in results}
    whole = [
        relabelled(r, WHOLE)
        for name in others
        for r in source.maybe(name, task)
        if r.method == REFERENCE and (r.seed, rate_of(r)) in wanted
    ]
    ordered = sorted(results, key=lambda r: str(r.changes.get(KEPT, "")))
    together = [*whole, *(relabelled(r, setting(r)) for r in ordered)]
    table = comparison_table([seen(r) for r in together], task, reference=WHOLE)
    return Block(parts(table, source.missing(plan, task)))


def _enough(
    source: Source, plan: str, count: str, task: str, seen: Callable[[Result], Result]
) -> Block:
    results = sorted(map(seen, source.chosen(plan, task)), key=count_of)
    rows = [relabelled(r, calibrated(r)) for r in results]
    reference = next((row.title for row in rows if str(count_of(row)) == count), rows[-1].title)
    table = comparison_table(rows, only_task(results), reference=reference)
    return Block(parts(table, source.missing(plan, task)))


BLOCKS: dict[str, Callable[..., Block]] = {
    "steps": steps,
    "preparation": preparation,
    "scale": scale,
    "turned": turned,
    "turned_by_meter": turned_by_meter,
    "enough": enough,
    "enough_by_meter": enough_by_meter,
    "amounts_of_text": amounts_of_text,
    "amounts_of_rows": amounts_of_rows,
}
