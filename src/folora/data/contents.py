"""Contents of a row: text, an instruction, a chat or tokens, each with a reader of its columns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from folora.data.messages import (
    Message,
    from_json,
    learns,
    read_messages,
    read_tools,
    without_nulls,
)
from folora.errors import DataError

IGNORE = -100
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
TOKENS = ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks")

Row = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A tokenized row; `labels` is -100 where there is no loss. Both have the same length."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Plain:
    """A prompt and its response as plain text, without a chat template; loss on the response."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Chat:
    """Messages for the chat template, and the indices of those with loss."""

    messages: list[Message]
    learned: tuple[int, ...]
    tools: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def with_message(self, i: int, message: Message) -> Chat:
        """The same with another message at index `i`."""
        return replace(self, messages=[*self.messages[:i], message, *self.messages[i + 1 :]])


@dataclass(frozen=True)
class Instruction:
    """A chat of one turn that can be written as plain text where there is no chat template."""

    chat: Chat

    @property
    def plain(self) -> Plain:
        """Alpaca's text. Raises DataError if the chat has tools or options."""
        if self.chat.tools or self.chat.options:
            raise DataError("columns 'tools' and 'chat_template_kwargs' need a chat template")
        *system, prompt, response = (message["content"] for message in self.chat.messages)
        return Plain("\n\n".join([*system, ALPACA.format(instruction=prompt)]), response)


Content = Plain | Instruction | Chat | Example


def _text(row: Row, column: str, *, needed: bool = True) -> str:
    value = row.get(column)
    if value is None and not needed:
        return ""
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds {type(value).__name__}, not text")
    check_unicode(value, f"column {column!r}")
    return value


def check_unicode(text: str, what: str) -> None:
    """Raise DataError for a text with a lone surrogate, which JSON may hold but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} holds half of a surrogate pair, which is not valid text") from None


SYSTEM = ("system", "system_prompt")
TEMPLATE = ("tools", "chat_template_kwargs")
# Arguments of `apply_chat_template`, which are not variables of a template.
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
    """A list of integers, from a list or a tensor; None if the row has none."""
    values: Any = row.get(column)
    values = values.tolist() if hasattr(values, "tolist") else values
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise DataError(f"column {column!r} must hold a list of integers")
    return [int(value) for value in values]


def read_tokens(row: Row) -> Example:
    """Token ids with labels and masks. Raises DataError."""
    ids = _numbers(row, "input_ids")
    if not ids or min(ids) < 0:
        raise DataError("column 'input_ids' must hold token ids")
    given = {name: _numbers(row, name) for name in TOKENS[1:]}
    for name, values in given.items():
        if values is not None and len(values) != len(ids):
            raise DataError(f"{name!r} has {len(values)} entries, but 'input_ids' {len(ids)}")
    labels = given["labels"] or ids
    if any(label not in (IGNORE, token) for label, token in zip(labels, ids, strict=True)):
        raise DataError("labels must be -100 or the token at the same position, not shifted")
    masks = [m for name in ("completion_mask", "assistant_masks") if (m := given[name])]
    labels = [label if all(on) else IGNORE for label, *on in zip(labels, *masks, strict=True)]
    attended = given["attention_mask"] or [1] * len(ids)
    if 1 not in attended:
        raise DataError("attention_mask is 0 for every token")
    start, end = attended.index(1), len(ids) - attended[::-1].index(1)
    if not all(attended[start:end]):
        raise DataError(
            "attention_mask is 0 between tokens; only padding at the ends can be removed"
        )
    return Example(ids[start:end], labels[start:end])


def _chat(row: Row, messages: list[Message], first: int = 0) -> Chat:
    """A chat with loss on the assistant's messages from index `first` on."""
    if system := _system(row):
        head = messages[0] if messages and messages[0]["role"] == "system" else None
        if head is None:
            messages, first = [{"role": "system", "content": system}, *messages], first + 1
        elif head["content"].strip() != system.strip():
            raise DataError(
                "the system prompts in the column and in the messages differ; keep one of them"
            )
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= first]
    learned = tuple(i for i in answers if learns(messages[i]))
    if not learned:
        zero = " (each has weight 0)" if answers else ""
        raise DataError(f"the chat has no message of the role 'assistant' to learn from{zero}")
    return Chat(messages, learned, read_tools(row.get("tools")), _options(row))


def read_chat(column: str, row: Row) -> Chat:
    """The messages in a column. Raises DataError."""
    return _chat(row, read_messages(row.get(column), texts=column == "conversations"))


def read_pair(prompt: str, response: str, row: Row) -> Plain | Chat:
    """Two texts, or two lists of messages, in two columns. Raises DataError."""
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


def read_instruction(texts: Sequence[str], needed: str, response: str, row: Row) -> Content:
    """A prompt joined from the columns `texts`, of which `needed` is required. Raises DataError."""
    if isinstance(row.get(needed), list) and isinstance(row.get(response), list):
        return read_pair(needed, response, row)
    given = [text for name in texts if (text := _text(row, name, needed=name == needed))]
    turn = (("user", "\n\n".join(given)), ("assistant", _text(row, response)))
    return Instruction(_chat(row, [{"role": role, "content": text} for role, text in turn]))


def read_text(row: Row) -> Plain:
    """Text for language modeling. Raises DataError."""
    return Plain("", _text(row, "text"))
