"""Blocks of docs/results.md: one narrow table for each question, of numbers that the appendices explain."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from benchmarks.report.blocks import REFERENCE, Block
from benchmarks.report.forgetting import forgetting_table
from benchmarks.report.real import with_references
from benchmarks.report.source import MAIN, Source
from benchmarks.report.worlds import STRENGTH
from folora.compare.tables import NONE, Table, comparison_table

Cells = Mapping[str, str]  # by row


def relative_kl(source: Source, plan: str, *tasks: str) -> Block:
    """The KL of each method of a plan as a percentage of LoRA's at matched task loss; a column a task."""
    return _relative_kl({task: forgetting_table(source.chosen(plan, task)) for task in tasks})


def relative_kl_beside(source: Source, plan: str, other: str, *tasks: str) -> Block:
    """The same beside another plan's LoRA and folora of the same seeds."""
    return _relative_kl(
        {task: forgetting_table(with_references(source, plan, task, other)) for task in tasks}
    )


def retained(source: Source, *tasks: str) -> Block:
    """What methods retain on worlds at matched task score; a column a task."""
    columns = {}
    for task in tasks:
        results = [*source.chosen(MAIN, task), *source.maybe(STRENGTH, task)]
        table = comparison_table(results, task, reference=REFERENCE)
        columns[task] = {
            row[0]: re.sub(r" ± [\d.]+", "", row[1]) + " *" * row[2].endswith("*")
            for row in table.rows
        }
    return Block([_joined(columns)])


def _relative_kl(tables: Mapping[str, Table]) -> Block:
    """Of tables whose third column compares the second, the KL, with that of a baseline."""
    columns = {
        task: {
            name: f"KL {kl}" if share == NONE != kl else share for name, kl, share, *_ in table.rows
        }
        for task, table in tables.items()
    }
    return Block([_joined(columns)])


def _joined(columns: Mapping[str, Cells]) -> Table:
    names: Sequence[str] = [*dict.fromkeys(name for cells in columns.values() for name in cells)]
    rows = tuple((name, *(cells.get(name, NONE) for cells in columns.values())) for name in names)
    return Table(("method", *columns), rows, "")


BLOCKS: dict[str, Callable[..., Block]] = {
    "relative_kl": relative_kl,
    "relative_kl_beside": relative_kl_beside,
    "retained": retained,
}
