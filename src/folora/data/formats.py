"""Which rows can be trained on: one table, from columns to text, an instruction, a chat or tokens.

A column is used, or the rows are refused with a remedy. Columns that only describe a row (``id``,
``source``, ``category``) are not used, and named in a log line (`Format.unused`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from folora.config import DataConfig
from folora.data.messages import (
    Message,
    from_json,
    learns,
    read_messages,
    read_tools,
    without_nulls,
)
from folora.errors import DataError, nearest

IGNORE = -100

Row = dict[str, Any]


@dataclass(frozen=True)
class Plain:
    """Text before text, without a chat template; the loss falls on the response."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Chat:
    """Messages for the chat template, and the indices of those that the loss falls on."""

    messages: list[Message]
    learned: tuple[int, ...]
    tools: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Instruction:
    """A prompt and its response: a chat of two messages, or text where there is no template."""

    prompt: str
    response: str
    system: str = ""
    tools: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chat(self) -> Chat:
        """The same as messages."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        turn = (("user", self.prompt), ("assistant", self.response))
        messages = [*system, *({"role": role, "content": text} for role, text in turn)]
        return Chat(messages, (len(messages) - 1,), self.tools, self.options)


@dataclass(frozen=True)
class Tokens:
    """A row that is tokenized already; `labels` is -100 where there is no loss."""

    input_ids: list[int]
    labels: list[int]


Content = Plain | Instruction | Chat | Tokens


@dataclass(frozen=True)
class Format:
    """One format of rows.

    Attributes:
        name: As messages and the documentation say it.
        columns: Columns that the rows must have.
        note: How they are used; where `read` is None, what to do instead.
        optional: Columns that are used where a row has them.
        read: Makes the content of a row; None for rows that are refused.
    """

    name: str
    columns: tuple[str, ...]
    note: str
    optional: tuple[str, ...] = ()
    read: Callable[[Row], Content] | None = None

    def unused(self, columns: Collection[str]) -> list[str]:
        """The columns that this format does not use."""
        return sorted(set(columns) - {*self.columns, *self.optional})


# One value of a row


def _text(row: Row, column: str, *, needed: bool = True) -> str:
    value = row.get(column)
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds {type(value).__name__}, not text")
    check_unicode(value, f"column {column!r}")
    return value


def check_unicode(text: str, what: str) -> None:
    """Raise DataError for a text that cannot be encoded, as JSON may hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} holds half of a surrogate pair, which is no text") from None


SYSTEM = ("system", "system_prompt")
TEMPLATE = ("tools", "chat_template_kwargs")
# Arguments of `apply_chat_template` that are no variables of a template.
TAKEN = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


def _system(row: Row) -> str:
    given = {text for name in SYSTEM if (text := _text(row, name, needed=False))}
    if len(given) > 1:
        raise DataError(f"columns {' and '.join(SYSTEM)} differ; keep one of them")
    return next(iter(given), "")


def _options(row: Row) -> Mapping[str, Any]:
    column = "column 'chat_template_kwargs'"
    given = without_nulls(from_json(row.get("chat_template_kwargs"), column, dict)) or {}
    if taken := [name for name in given if name in TAKEN or not isinstance(name, str)]:
        raise DataError(f"{column} holds {taken[0]!r}, which folora sets itself. Remove it")
    return given  # type: ignore[no-any-return]


def _numbers(row: Row, column: str) -> list[int] | None:
    """Whole numbers, as a list or a tensor; None where the row has none."""
    values: Any = row.get(column)
    values = values.tolist() if hasattr(values, "tolist") else values
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise DataError(f"column {column!r} must hold a list of whole numbers")
    return [int(value) for value in values]


# Contents of a row


def _read_tokens(row: Row) -> Tokens:
    ids = _numbers(row, "input_ids")
    if not ids or min(ids) < 0:
        raise DataError("column 'input_ids' must hold token ids")
    given = {name: _numbers(row, name) for name in TOKENS[1:]}
    for name, values in given.items():
        if values is not None and len(values) != len(ids):
            raise DataError(f"{name!r} has {len(values)} entries, but 'input_ids' {len(ids)}")
    labels = given["labels"] or ids
    if any(label not in (IGNORE, token) for label, token in zip(labels, ids, strict=True)):
        raise DataError("labels must be -100 or the token at the same place, not shifted")
    masks = [m for name in ("completion_mask", "assistant_masks") if (m := given[name])]
    labels = [label if all(on) else IGNORE for label, *on in zip(labels, *masks, strict=True)]
    attended = given["attention_mask"] or [1] * len(ids)
    if 1 not in attended:
        raise DataError("attention_mask is 0 for every token")
    start, end = attended.index(1), len(ids) - attended[::-1].index(1)
    if not all(attended[start:end]):
        raise DataError("attention_mask is 0 between tokens; only padding at the ends is cut off")
    return Tokens(ids[start:end], labels[start:end])


def _chat(row: Row, messages: list[Message], first: int = 0) -> Chat:
    """A chat with loss on what the assistant says from message `first` on."""
    if system := _system(row):
        head = messages[0] if messages and messages[0]["role"] == "system" else None
        if head is None:
            messages, first = [{"role": "system", "content": system}, *messages], first + 1
        elif head["content"].strip() != system.strip():
            raise DataError("the system prompt in its own column and that of the messages differ")
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
    learned = tuple(i for i in answers if learns(messages[i]))
    if not learned:
        zero = " (each has weight 0)" if answers else ""
        raise DataError(f"the chat has no message of the role 'assistant' to learn from{zero}")
    return Chat(messages, learned, read_tools(row.get("tools")), _options(row))


def _read_chat(column: str, row: Row) -> Chat:
    return _chat(row, read_messages(row.get(column), texts=column == "conversations"))


def _read_pair(prompt: str, response: str, row: Row) -> Plain | Chat:
    if isinstance(row.get(prompt), list) and isinstance(row.get(response), list):
        before = read_messages(row[prompt])
        return _chat(row, [*before, *read_messages(row[response])], first=len(before))
    content = Plain(_text(row, prompt), _text(row, response))
    for name in (*SYSTEM, *TEMPLATE):
        if row.get(name):
            raise DataError(
                f"column {name!r} is for chats, but {prompt!r} is text that no chat template is "
                "applied to. Give messages, or rename the columns to instruction and response"
            )
    return content


def _read_instruction(texts: Sequence[str], needed: str, response: str, row: Row) -> Content:
    if isinstance(row.get(needed), list) and isinstance(row.get(response), list):
        return _read_pair(needed, response, row)
    given = [text for name in texts if (text := _text(row, name, needed=name == needed))]
    return Instruction(
        "\n\n".join(given), _text(row, response), _system(row),
        read_tools(row.get("tools")), _options(row),
    )  # fmt: skip


def _read_text(row: Row) -> Plain:
    return Plain("", _text(row, "text"))


# The table

TOKENS = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks")
# The texts of a prompt in their order, by the column that must be there.
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
# What a text's answer is called; a model trained on the text alone would not learn it.
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
        "Two texts are joined as they are, without a chat template; two lists of messages are a "
        "chat. Loss on the completion.",
        (*SYSTEM, *TEMPLATE),
        partial(_read_pair, prompt, response),
    )


def _instruction(prompt: str, response: str) -> Format:
    texts = PROMPTS.get(prompt, (prompt,))
    joined = f" The prompt is {', '.join(texts)}, with blank lines between." if texts[1:] else ""
    return Format(
        "instruction",
        (prompt, response),
        "A chat of two messages, or Alpaca's text if the tokenizer has no chat template." + joined,
        (*(name for name in texts if name != prompt), *SYSTEM, *TEMPLATE),
        partial(_read_instruction, texts, prompt, response),
    )


def _messages(column: str, note: str) -> Format:
    return Format("chat", (column,), note, (*SYSTEM, *TEMPLATE), partial(_read_chat, column))


# In the order in which they are tried. A row's other columns do not matter here.
FORMATS = (
    Format(
        "tokens",
        TOKENS[:1],
        "Used as they are, without padding. Loss where labels is not -100 and every mask is 1; "
        "without them, on every token.",
        TOKENS[1:],
        _read_tokens,
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
    _messages("messages", "Loss on what the assistant says, unless its weight is 0."),
    _messages("conversations", "Likewise; ShareGPT's from and value, or texts in turn."),
    _messages("conversation", "Likewise; also pairs of input and output."),
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
        read=_read_text,
    ),
)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns that hold something in at least one row."""
    held: dict[str, None] = {}
    for row in rows:
        for name, value in row.items():
            empty = name in MEANING and isinstance(value, str | list | dict) and not value
            if name not in held and value is not None and not empty:
                held[name] = None
    return [*held]


def choose_format(columns: Collection[str], config: DataConfig) -> Format:
    """The format of rows that have these columns.

    Args:
        columns: Columns that hold something in at least one row.
        config: May name the columns of prompt and response.

    Raises:
        DataError: No format has these columns, theirs is refused, a named column is not there, or a
            column that changes what the rows mean would not be used.
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
