"""A page of docs: its template, with every line ``{{ block argument ... }}`` filled in.

``{{ block argument ... | column; column }}`` stands for these columns of the block's first table alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import (
    outcomes,
    overview,
    real,
    reliability,
    sequences,
    speed,
    summary,
    worlds,
)
from benchmarks.report.blocks import Block, Drawing
from benchmarks.report.source import NoResultsError, Source, check_word
from folora.errors import ConfigError, FoLoraError

TEMPLATES = Path(__file__).parent / "templates"
CALL = re.compile(r"\s*\{\{(.*)\}\}\s*")

MARKED = re.compile(r"(<!-- (\{\{.*\}\}) -->\n).*?(?=<!-- end -->)", re.DOTALL)

BLOCKS: dict[str, Callable[..., Block]] = {
    **overview.BLOCKS,
    **summary.BLOCKS,
    **worlds.BLOCKS,
    **sequences.BLOCKS,
    **real.BLOCKS,
    **outcomes.BLOCKS,
    **speed.BLOCKS,
    **reliability.BLOCKS,
}
"""By name; each takes the source and the words that follow its name."""


def pages(docs: Path) -> dict[Path, Path]:
    """The page of each template: the same path below `docs`."""
    return {path: docs / path.relative_to(TEMPLATES) for path in sorted(TEMPLATES.rglob("*.md"))}


@dataclass(frozen=True)
class Page:
    """Markdown text, and functions that draw its pictures, by file name."""

    text: str
    pictures: Mapping[str, Drawing]


def render(template: str, source: Source, name: str = "the template") -> Page:
    """The whole page: the template with its blocks filled in, and all pictures.

    Raises:
        ConfigError: A block is unknown, or its arguments or results are wrong; the line is named.
    """
    lines: list[str] = []
    pictures: dict[str, Drawing] = {}
    for number, line in enumerate(template.splitlines(), 1):
        if "{{" not in line:
            lines.append(line)
            continue
        try:
            block = _called(line, source)
        except NoResultsError as nothing:
            block = Block([f"*{nothing}*"])
        except FoLoraError as error:
            raise ConfigError(f"{name}, line {number}, {line.strip()!r}: {error}") from error
        lines.append(block.text)
        pictures |= block.pictures
    return Page("\n".join([*lines, ""]), pictures)


def refresh(text: str, source: Source) -> str:
    """A hand-written page with all between ``<!-- {{ block }} -->`` and ``<!-- end -->`` made anew."""
    return MARKED.sub(lambda found: found[1] + render(found[2], source).text, text)


def _called(line: str, source: Source) -> Block:
    """The block that a line of the template calls for."""
    call = CALL.fullmatch(line)
    if not call:
        raise ConfigError("a block {{ name argument ... }} needs a line of its own")
    words, _, columns = call[1].partition("|")
    name, *arguments = words.split() or [""]
    check_word(name, BLOCKS, "block")
    try:
        inspect.signature(BLOCKS[name]).bind(source, *arguments)
    except TypeError as error:
        raise ConfigError(f"wrong arguments, {error}") from error
    block = BLOCKS[name](source, *arguments)
    return block.columns([title.strip() for title in columns.split(";")]) if columns else block
