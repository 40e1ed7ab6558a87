"""A wrong input as a test case, and short ways to write one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from support.wrong_inputs.edits import Edit, tokenizer

from benchmarks.tiny import CHAT

Found = Literal["options", "files", "model", "work"]
"""What must be read to detect it: the command line (and config file) only; data, tokenizer and
config.json; the weights; or the computation itself."""


@dataclass(frozen=True)
class Wrong:
    """One wrong input.

    Attributes:
        name: What is wrong.
        arguments: Appended to a command line that works; with `alone`, the whole command line.
        message: Pattern of the message, with the option, file or layer.
        found: What the command may read before the error.
        command: Name of the command.
        files: Contents of files in HERE, by name.
        model: Change of a copy of the tiny model's folder, which is then the model.
        run: Change of a copy of a finished run's folder, which is then the output.
        alone: Whether `arguments` is the whole command line.
        pipe: Whether HERE has a named pipe, ``pipe``, without a writer.
    """

    name: str
    arguments: str
    message: str
    found: Found = "options"
    command: str = "run"
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    model: Edit | None = None
    run: Edit | None = None
    alone: bool = False
    pipe: bool = False


def value(option: str, given: str, message: str, **more: Any) -> Wrong:
    """An invalid value of an option; the message must name the option."""
    named = option.replace(".", r"\.")
    given_name = given.strip("'")
    return Wrong(
        f"{option} {given_name}", f"--{option} {given}", f"{named} is .*(?:{message})", **more
    )


def file(name: str, content: str | bytes, message: str) -> Wrong:
    """An invalid config file; the message must name it."""
    return Wrong(
        name, "--config HERE/c.yaml", rf"c\.yaml.*{message}", files={"c.yaml": content}, alone=True
    )


def options_file(name: str, content: str, message: str) -> Wrong:
    """A valid YAML file with wrong options."""
    return Wrong(name, "--config HERE/c.yaml", message, files={"c.yaml": content}, alone=True)


def data(
    name: str,
    content: str | bytes,
    message: str,
    arguments: str = "",
    file: str = "rows.jsonl",
    found: Found = "files",
    **more: Any,
) -> Wrong:
    """A data file."""
    arguments = f"--dataset HERE/{file} {arguments}"
    return Wrong(name, arguments, message, found, files={file: content}, **more)


def chat(name: str, row: Any, message: str, template: str | None = CHAT) -> Wrong:
    """A chat, or an invalid one, and a tokenizer with a chat template."""
    return data(name, json.dumps(row), message, model=tokenizer(template=template))


def model(name: str, edit: Edit, message: str, found: Found = "model", **more: Any) -> Wrong:
    """A model's folder."""
    return Wrong(name, more.pop("arguments", ""), message, found, model=edit, **more)


def damaged(
    name: str,
    edit: Edit,
    message: str,
    found: Found = "model",
    command: str = "run",
    arguments: str = "",
) -> Wrong:
    """A finished run with a modified file."""
    return Wrong(name, arguments, message, found, command=command, run=edit)
