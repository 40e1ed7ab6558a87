"""Blocks of docs/speed.md and its appendix: time, memory, and how many eigenvectors, samples and rows suffice."""

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
from benchmarks.speed.table import (
    cost_table,
    sampling_table,
    scale_table,
    setup_table,
    solve_table,
    step_table,
    whole_table,
)
from folora.compare.results import Result
from folora.compare.tables import comparison_table

WHOLE = "all eigenvectors"

DIRECTIONS = "spectrum.directions"

DEVICES = ("cpu", "cuda")


def cost(source: Source) -> Block:
    """Overhead over LoRA on every shape and device that was measured."""
    return Block(parts(cost_table([r for device in DEVICES for r in source.measured(device)])))


def steps(source: Source, device: str, shape: str) -> Block:
    """Time and memory of a step by mode on one shape."""
    return Block(parts(step_table(source.measured(device, shape)[0])))


def preparation(source: Source, device: str) -> Block:
    """Time of the set-up: sampling, second moments, eigenproblems."""
    found = [result for result in source.measured(device) if "setup" in result]
    tables = (sampling_table(found), setup_table(found), solve_table(found))
    return Block(parts(*tables))


def whole(source: Source) -> Block:
    """The set-up as a whole, beside an epoch."""
    return Block(parts(whole_table(source.setups())))


def scale(source: Source, device: str) -> Block:
    """Bytes and seconds by model, extrapolated from measurements."""
    return Block(parts(scale_table(source.measured(device))))


def eigenvectors(source: Source, plan: str, task: str, *others: str) -> Block:
    """Numbers of eigenvectors, beside arms of other plans, by the retained score."""
    return _eigenvectors(source, plan, task, others, lambda result: result)


def eigenvectors_by_kl(source: Source, plan: str, task: str, *others: str) -> Block:
    """The same by KL alone, which resolves more than a few questions."""
    return _eigenvectors(source, plan, task, others, without_scores)


def sequences(source: Source, plan: str, count: str, task: str = "") -> Block:
    """Numbers of sequences for C_pre, compared with one of them, by the retained score."""
    return _sequences(source, plan, count, task, lambda result: result)


def sequences_by_kl(source: Source, plan: str, count: str, task: str = "") -> Block:
    """The same by KL alone, which resolves more than a few questions."""
    return _sequences(source, plan, count, task, without_scores)


def amounts_of_text(source: Source, model: str) -> Block:
    """Utility of the directions on other text, by length and number of sequences."""
    return Block(parts(text_table(source.amounts_of(model))))


def amounts_of_rows(source: Source, model: str) -> Block:
    """The same by number of task rows."""
    return Block(parts(rows_table(source.amounts_of(model))))


def _eigenvectors(
    source: Source,
    plan: str,
    task: str,
    others: Sequence[str],
    seen: Callable[[Result], Result],
) -> Block:
    """Values of an option of folora, beside its arms in other plans with the same seeds and learning rates."""
    results = source.chosen(plan, task)
    wanted = {(r.seed, rate_of(r)) for r in results}
    whole = [
        relabelled(r, WHOLE)
        for name in others
        for r in source.maybe(name, task)
        if r.method == REFERENCE and (r.seed, rate_of(r)) in wanted
    ]
    ordered = sorted(results, key=lambda r: str(r.changes.get(DIRECTIONS, "")))
    together = [*whole, *(relabelled(r, setting(r)) for r in ordered)]
    table = comparison_table([seen(r) for r in together], task, reference=WHOLE)
    return Block(parts(table, source.missing(plan, task)))


def _sequences(
    source: Source, plan: str, count: str, task: str, seen: Callable[[Result], Result]
) -> Block:
    results = sorted(map(seen, source.chosen(plan, task)), key=count_of)
    rows = [relabelled(r, calibrated(r)) for r in results]
    reference = next((row.title for row in rows if str(count_of(row)) == count), rows[-1].title)
    table = comparison_table(rows, only_task(results), reference=reference)
    return Block(parts(table, source.missing(plan, task)))


BLOCKS: dict[str, Callable[..., Block]] = {
    "cost": cost,
    "steps": steps,
    "preparation": preparation,
    "whole": whole,
    "scale": scale,
    "eigenvectors": eigenvectors,
    "eigenvectors_by_kl": eigenvectors_by_kl,
    "sequences": sequences,
    "sequences_by_kl": sequences_by_kl,
    "amounts_of_text": amounts_of_text,
    "amounts_of_rows": amounts_of_rows,
}
