"""Blocks of docs/reliability.md and docs/scaling.md: kills, damage, several processes."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.reliability.fuzz import fuzz_table
from benchmarks.reliability.table import distributed_table, disturbance_table, soak_table
from benchmarks.report.blocks import (
    Block,
    paragraphs,
)
from benchmarks.report.source import Source
from benchmarks.scaling import bytes_table, time_table


def disturbed(source: Source) -> Block:
    """Runs that were killed, interrupted, starved and damaged, and what was lost."""
    return Block(disturbance_table(source.tormented("chaos")).markdown())


def soaked(source: Source) -> Block:
    """What grew in a long training, and what many stops changed."""
    return Block(soak_table(source.tormented("soak")).markdown())


def fuzzed(source: Source) -> Block:
    """Mutated files by parser, and what was found."""
    return Block(fuzz_table(source.tormented("fuzz")).markdown())


def distributed(source: Source) -> Block:
    """Several processes against one."""
    return Block(distributed_table(source.tormented("distributed")).markdown())


def scaling(source: Source) -> Block:
    """Seconds, bytes and traffic on more GPUs, by counts of operations."""
    return Block(paragraphs(time_table().markdown(), bytes_table().markdown()))


BLOCKS: dict[str, Callable[..., Block]] = {
    "disturbed": disturbed,
    "soaked": soaked,
    "fuzzed": fuzzed,
    "distributed": distributed,
    "scaling": scaling,
}
