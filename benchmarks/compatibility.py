"""docs/compatibility.md from docs/compatibility/*.json: what was run, and what came of it.

Each file is one section, written by what ran the cases:

    {"title": ..., "text": [paragraphs], "columns": [names], "rows": [{name: value}]}

    python -m benchmarks.compatibility [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "compatibility"
PAGE = FOLDER.with_suffix(".md")
ORDER = ("versions", "architectures", "data", "outputs")
HEAD = """# Compatibility

What folora has been run with. This page is made from the files in `docs/compatibility/` by
`python -m benchmarks.compatibility`.
"""


def write_section(
    name: str, title: str, text: list[str], columns: list[str], rows: list[dict[str, Any]]
) -> None:
    """Write one section's file and the page with it.

    Args:
        name: Of the file, one of `ORDER`.
        title: The heading.
        text: Paragraphs above the table.
        columns: The table's, in order; names of values in `rows`.
        rows: One for each case, and one line of the file. Values that no column names are kept in the file alone.
    """
    head = json.dumps(
        {"title": title, "text": text, "columns": columns}, indent=1, ensure_ascii=False
    )
    lines = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in rows)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    PAGE.write_text(page())


def read_section(name: str) -> dict[str, Any]:
    """What `write_section` wrote."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def page() -> str:
    """The whole page. Raises ValueError for a file whose section has no place."""
    names = {file.stem for file in FOLDER.glob("*.json")}
    if unknown := names - set(ORDER):
        raise ValueError(f"no place for {sorted(unknown)}; the order is {', '.join(ORDER)}")
    sections = [_section(read_section(name)) for name in ORDER if name in names]
    return "\n".join([HEAD, *sections])


def _section(part: dict[str, Any]) -> str:
    columns = part["columns"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    lines += [_line([_cell(row.get(c, "")) for c in columns]) for row in part["rows"]]
    return "\n\n".join([f"## {part['title']}", *part["text"], "\n".join(lines)]) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def main(arguments: list[str]) -> int:
    """Write the page, or say by the exit code whether it is current."""
    if arguments == ["--check"]:
        return int(PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
