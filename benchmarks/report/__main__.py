"""Write the pages of docs that hold figures, and README's table: ``python -m benchmarks.report``, or ``make results``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.blocks import PICTURES
from benchmarks.report.page import pages, refresh, render
from benchmarks.report.source import Source
from folora.runtime.storage import write_text


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Write the pages of docs from results."
    )
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--plans", type=Path, default=Path("benchmarks/plans"))
    parser.add_argument("--demo", type=Path, default=Path("docs/demo.json"))
    parser.add_argument("--template", type=Path, help="default: those of all pages")
    parser.add_argument("--output", type=Path, default=Path("docs/results.md"), help="its page")
    options = parser.parse_args(arguments)
    source = Source.load(options.results, options.plans, options.demo)
    wanted = {options.template: options.output} if options.template else pages(Path("docs"))
    for template, output in wanted.items():
        page = render(template.read_text(encoding="utf-8"), source, str(template))
        for name, draw in page.pictures.items():
            draw(output.parent / PICTURES / name)
        write_text(output, page.text)
        print(f"{output} and {len(page.pictures)} pictures")
    if not options.template:
        readme = Path("README.md")
        write_text(readme, refresh(readme.read_text(encoding="utf-8"), source))


if __name__ == "__main__":
    main()
