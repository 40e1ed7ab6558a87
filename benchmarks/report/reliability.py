"""Blocks of docs/reliability.md and docs/scaling.md: kills, damage, several processes."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.reliability.fuzz import fuzz_table
from benchmarks.reliability.table import distributed_table, disturbance_table, soak_table
from benchmarks.report.blocks import Block, parts
from benchmarks.report.source import Source
from benchmarks.scaling import bytes_table, time_table


def disturbed(source: Source) -> Block:
    """Runs that were killed, interrupted, starved and damaged, and what was lost."""
    return Block(parts(disturbance_table(source.disturbances("chaos"))))


def soaked(source: Source) -> Block:
    """What grew in a long training, and what many stops changed."""
    return Block(parts(soak_table(source.disturbances("soak"))))


def fuzzed(source: Source) -> Block:
    """Mutated files by parser, and what was found."""
    return Block(parts(fuzz_table(source.disturbances("fuzz"))))


def distributed(source: Source) -> Block:
    """Several processes against one."""
    return Block(parts(distributed_table(source.disturbances("distributed"))))


def scaling(source: Source) -> Block:
    """Seconds, bytes and traffic on more GPUs, by counts of operations."""
    return Block(parts(time_table(), bytes_table()))


BLOCKS: dict[str, Callable[..., Block]] = {
    "disturbed": disturbed,
    "soaked": soaked,
    "fuzzed": fuzzed,
    "distributed": distributed,
    "scaling": scaling,
}
