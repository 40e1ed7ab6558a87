"""Training rows of a recipe: the first rows of a data set, in the recipe's prompt, written to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.paper.recipe import Rows
from folora.data.files import load_rows
from folora.errors import DataError
from folora.runtime.storage import write_text


def write_rows(wanted: Rows, held_out: int, path: Path) -> None:
    """Write prompt/completion rows, `held_out` more than are trained on.

    Raises:
        DataError: A column that a template names is not there, or there are too few rows.
    """
    needed = wanted.count + held_out
    lines: list[str] = []
    for number, row in enumerate(load_rows(wanted.dataset, wanted.split)):
        prompt = _filled(wanted.prompt, row, number)
        completion = _filled(wanted.completion, row, number)
        length = len(prompt) + len(completion)
        if wanted.max_characters is None or length <= wanted.max_characters:
            lines.append(json.dumps({"prompt": prompt, "completion": completion}))
        if len(lines) == needed:
            break
    if len(lines) < needed:
        raise DataError(
            f"{wanted.dataset} has {len(lines)} rows that can be used, but data.count "
            f"{wanted.count} and data.eval_rows {held_out} need {needed}; lower data.count"
        )
    write_text(path, "\n".join(lines) + "\n")


def _filled(template: str, row: dict[str, Any], number: int) -> str:
    try:
        return template.format(**row)
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"row {number} does not fit the template {template!r} ({error!r}); its columns are "
            f"{', '.join(row)}"
        ) from error
