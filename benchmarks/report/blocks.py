"""What stands for a line of a template: text and pictures, and helpers that blocks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.plan import RATE
from benchmarks.report.source import check_word
from folora.compare.results import Result
from folora.compare.tables import Table
from folora.errors import DataError

REFERENCE = "folora"
REFERENCES = (REFERENCE, "lora", "folora-null")
PICTURES = "pictures"  # folder beside the page

NAMES = {
    "spectrum.tau": "tau",
    "spectrum.lam": "lambda",
    "spectrum.s_min": "s_min",
    "spectrum.directions": "directions",
    "training.lr_b_ratio": "lr of B / lr of A",
    "adapter.r": "r",
}

Drawing = Callable[[Path], None]


@dataclass(frozen=True)
class Block:
    """Tables and Markdown text, and functions that draw its pictures, by file name."""

    parts: Sequence[Table | str]
    pictures: Mapping[str, Drawing] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All parts as Markdown, with a blank line between."""
        texts = (part if isinstance(part, str) else part.markdown() for part in self.parts)
        return "\n\n".join(text.strip() for text in texts)

    def columns(self, titles: Sequence[str]) -> Block:
        """Some columns of the first table alone, without its caption.

        Raises:
            ConfigError: There is no such column.
        """
        table = next(part for part in self.parts if isinstance(part, Table))
        for title in titles:
            check_word(title, table.header, "column")
        places = [table.header.index(title) for title in titles]
        rows = tuple(tuple(row[i] for i in places) for row in table.rows)
        return Block([Table(tuple(titles), rows, "")])


def parts(*given: Table | str) -> list[Table | str]:
    """Those that are not empty."""
    return [part for part in given if part]


def image(name: str, about: str) -> str:
    """Markdown of a picture in the folder beside the page."""
    return f"![{about}]({PICTURES}/{name})"


def present(results: Iterable[Result], wanted: Iterable[str]) -> list[str]:
    """Those of some methods that have results, in the order asked for."""
    there = {r.method for r in results}
    return [method for method in wanted if method in there]


def only_task(results: Iterable[Result]) -> str:
    """The one task of results. Raises DataError if there are several."""
    task, *others = dict.fromkeys(r.task for r in results)
    if others:
        raise DataError(
            f"results of one task are needed, but there are {task}, {', '.join(others)}"
        )
    return task


def relabelled(result: Result, name: str) -> Result:
    """The same arm as a row of its own in a table."""
    return replace(result, method=name, title=name)


def knobs_of(result: Result) -> list[str]:
    """Options that an arm changes beyond its learning rate."""
    return [name for name in result.changes if name != RATE]


def knob_name(knob: str) -> str:
    """An option's name in tables."""
    return NAMES.get(knob, knob.rsplit(".", 1)[-1])


def knob_place(knob: str) -> tuple[int, str]:
    """Order of knobs: as in NAMES, then all others."""
    return (list(NAMES).index(knob) if knob in NAMES else len(NAMES), knob)


def setting(result: Result) -> str:
    """What an arm changes beyond its learning rate, in words."""

    def text(value: Any) -> str:
        return value if isinstance(value, str) else f"{value:g}"

    return ", ".join(
        f"{knob_name(knob)} = {text(result.changes[knob])}" for knob in knobs_of(result)
    )


def stated_range(values: Sequence[float], form: str) -> str:
    """Median, minimum and maximum."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def source_of(result: Result) -> str:
    """Where the sequences came from that C_pre was measured on."""
    return str(result.calibration["source"])


def count_of(result: Result) -> int:
    """How many sequences C_pre was measured on."""
    return int(result.calibration["count"])


def calibrated(result: Result) -> str:
    """Method, source and number of sequences, as the name of a row."""
    return f"{result.title}, {source_of(result)} {count_of(result)}"
