"""Which formats of rows can be trained on: one table, by columns.

Every column is used, or the rows are refused with a remedy. Columns that only describe a row (``id``,
``source``, ``category``) are not used; a log line names them (`Format.unused`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from folora.config import DataConfig
from folora.data.contents import (
    SYSTEM,
    TEMPLATE,
    TOKENS,
    Content,
    Row,
    read_chat,
    read_instruction,
    read_pair,
    read_text,
    read_tokens,
)
from folora.errors import DataError, nearest


@dataclass(frozen=True)
class Format:
    """One format of rows.

    Attributes:
        name: Name in messages and in the documentation.
        columns: Required columns.
        note: How they are used; if `read` is None, the remedy.
        optional: Columns that are used if a row has them.
        read: Returns the content of a row; None if the format is refused.
    """

    name: str
    columns: tuple[str, ...]
    note: str
    optional: tuple[str, ...] = ()
    read: Callable[[Row], Content] | None = None

    def unused(self, columns: Collection[str]) -> list[str]:
        """The columns that this format does not use."""
        return sorted(set(columns) - {*self.columns, *self.optional})


# The columns of a prompt in their order, by the required one.
PROMPTS = {
    "instruction": ("instruction", "input", "context"),
    "question": ("context", "passage", "question"),
    "query": ("context", "query"),
}
INSTRUCTIONS = (
    ("instruction", "response"),
    ("instruction", "output"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("problem", "generated_solution"),
    ("inputs_pretokenized", "targets_pretokenized"),
    ("inputs", "targets"),
    ("input", "output"),
)
# Names of answers beside a column ``text``; training on the text would not include them.
BESIDE_TEXT = ("code", "summary", "response", "answer", "output", "target", "completion", "role")
# Columns that change what a row means: rows that have one are refused unless their format uses it.
MEANING = {
    "input", "context", "passage", "history", "choices", "options", "system", "system_prompt",
    "tools", "functions", "chat_template_kwargs", "label", "labels", "chosen", "rejected",
    "completions", "image", "images", "audio", "audios", "video", "videos", "position_ids",
    "seq_lengths",
}  # fmt: skip


def _pair(prompt: str, response: str) -> Format:
    return Format(
        "prompt and completion",
        (prompt, response),
        "Two texts are concatenated without a chat template; two lists of messages are a "
        "chat. Loss on the completion.",
        (*SYSTEM, *TEMPLATE),
        partial(read_pair, prompt, response),
    )


def _instruction(prompt: str, response: str) -> Format:
    texts = PROMPTS.get(prompt, (prompt,))
    joined = f" The prompt is {', '.join(texts)}, with blank lines between." if texts[1:] else ""
    return Format(
        "instruction",
        (prompt, response),
        "A chat of two messages, or Alpaca's text if the tokenizer has no chat template." + joined,
        (*(name for name in texts if name != prompt), *SYSTEM, *TEMPLATE),
        partial(read_instruction, texts, prompt, response),
    )


def _messages(column: str, note: str) -> Format:
    return Format("chat", (column,), note, (*SYSTEM, *TEMPLATE), partial(read_chat, column))


# The first format whose required columns are all present is used.
FORMATS = (
    Format(
        "tokens",
        TOKENS[:1],
        "Padding is removed. Loss where labels is not -100 and every mask is 1; "
        "without them, on every token.",
        TOKENS[1:],
        read_tokens,
    ),
    Format(
        "stepwise supervision",
        ("completions", "labels"),
        "Labels of steps are for reward models. Join the steps of right answers into a completion.",
    ),
    Format(
        "preference",
        ("chosen", "rejected"),
        "Pairs are for DPO and reward models. To train on the chosen ones, rename chosen to "
        "completion (to messages or text if it holds the whole chat) and remove rejected.",
    ),
    Format(
        "unpaired preference",
        ("prompt", "completion", "label"),
        "Labels are for KTO. To train on the good ones, keep the rows whose label is true and "
        "remove the column label.",
    ),
    Format(
        "message tree",
        ("text", "role", "parent_id"),
        "A row is one message. Follow parent_id from every leaf and give messages.",
    ),
    Format(
        "tool calls as JSON",
        ("query", "answers", "tools"),
        "Give messages, the calls in tool_calls of an assistant's message, and tools.",
    ),
    _messages("messages", "Loss on the assistant's messages, unless their weight is 0."),
    _messages("conversations", "The same; also ShareGPT's from and value, or alternating texts."),
    _messages("conversation", "The same; also pairs of input and output."),
    _pair("prompt", "completion"),
    *(_instruction(prompt, response) for prompt, response in INSTRUCTIONS),
    Format(
        "prompt and response",
        ("prompt", "response"),
        "Whether a chat template belongs around them is not known. If so, rename prompt to "
        "instruction; if not, rename response to completion.",
    ),
    Format(
        "prompt alone",
        ("prompt",),
        "There is nothing to learn from. Add a completion.",
    ),
    *(
        Format(
            "text and more",
            ("text", other),
            f"If they are prompt and response: --data.prompt_column text --data.response_column "
            f"{other}. To train on text alone, remove {other}.",
        )
        for other in BESIDE_TEXT
    ),
    Format(
        "text",
        ("text",),
        "Language modeling: loss on every token, without a chat template.",
        read=read_text,
    ),
)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns that are not empty in at least one row."""

    def holds(name: str, value: Any) -> bool:
        empty = name in MEANING and isinstance(value, str | list | dict) and not value
        return value is not None and not empty

    return [*dict.fromkeys(n for row in rows for n, value in row.items() if holds(n, value))]


def choose_format(columns: Collection[str], config: DataConfig) -> Format:
    """The format of rows that have these columns; `config` may name those of prompt and response.

    Raises:
        DataError: The format is unknown or refused, a named column is missing, or a column that changes
            what the rows mean would not be used.
    """
    found = _named(columns, config) or _known(columns)
    if found.read is None:
        raise DataError(
            f"rows of {'/'.join(found.columns)} ({found.name}) are refused. {found.note}"
        )
    picked = {"chosen", "rejected"} if set(found.columns) & {"chosen", "rejected"} else set()
    if lost := [c for c in found.unused(columns) if c in MEANING - picked]:
        raise DataError(
            f"column {lost[0]!r} changes what a row means, but is not used with "
            f"{'/'.join(found.columns)}. Put it into the text or remove it; {_accepted()}"
        )
    return found


def _named(columns: Collection[str], config: DataConfig) -> Format | None:
    for option in ("prompt_column", "response_column"):
        name = getattr(config, option)
        if name is not None and name not in columns:
            raise DataError(
                f"data.{option} is {name!r}, but the data have {sorted(columns)}"
                f"{nearest(name, columns)}"
            )
    prompt, response = config.prompt_column, config.response_column
    if prompt and response:
        return (_pair if prompt == "prompt" else _instruction)(prompt, response)
    if prompt or response:
        raise DataError("give both data.prompt_column and data.response_column, or neither")
    return None


def _known(columns: Collection[str]) -> Format:
    for known in FORMATS:
        if set(known.columns) <= set(columns):
            return known
    raise DataError(
        f"no prompt and response among the columns {sorted(columns)}; {_accepted()}. "
        "Name them: --data.prompt_column X --data.response_column Y"
    )


def _accepted() -> str:
    return "known are " + ", ".join("/".join(f.columns) for f in FORMATS if f.read)
