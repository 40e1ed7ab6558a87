"""Blocks of docs/reliability.md and docs/scaling.md: interruptions, damage, several processes."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.reliability.fuzz import fuzz_table
from benchmarks.reliability.table import distributed_table, disturbance_table, soak_table
from benchmarks.report.blocks import Block, parts
from benchmarks.report.source import Source
from benchmarks.scaling import bytes_table, time_table


def disturbed(source: Source) -> Block:
    """Runs that were killed, interrupted, out of disk or damaged, and what was lost."""
    return Block(parts(disturbance_table(source.disturbances("chaos"))))


def soaked(source: Source) -> Block:
    """Growth over a long training, and changes by many interruptions."""
    return Block(parts(soak_table(source.disturbances("soak"))))


def fuzzed(source: Source) -> Block:
    """Mutated files by parser, and findings."""
    return Block(parts(fuzz_table(source.disturbances("fuzz"))))


def distributed(source: Source) -> Block:
    """Several processes compared with one."""
    return Block(parts(distributed_table(source.disturbances("distributed"))))


def scaling(source: Source) -> Block:
    """Time, memory and traffic on several GPUs, from counts of operations."""
    return Block(parts(time_table(), bytes_table()))


BLOCKS: dict[str, Callable[..., Block]] = {
    "disturbed": disturbed,
    "soaked": soaked,
    "fuzzed": fuzzed,
    "distributed": distributed,
    "scaling": scaling,
}
