"""Render chats with a chat template, and refuse a template that leaves out part of a chat."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from folora.data.contents import Chat, check_unicode
from folora.data.messages import WEIGHTS, Message
from folora.errors import DataError

REASONING = ("reasoning_content", "reasoning", "thinking")
NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# A fixed date for templates that render the current one, so that tokens are reproducible.
DATE = datetime(2024, 7, 26, tzinfo=UTC)  # the default of Llama 3's templates


class ChatTemplate:
    """A chat template with its tokenizer.

    Args:
        tokenizer: The tokenizer.
        text: The template; None for the tokenizer's own, of which there may be another for tools.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.text = text

    def source(self, tools: Sequence[Any]) -> str:
        """The text of the template for chats with these tools."""
        return self.text or str(self.tokenizer.get_chat_template(tools=[*tools] or None))

    def apply(
        self, chat: Chat, count: int | None = None, *, blocks: bool | None = None, **arguments: Any
    ) -> Any:
        """What the tokenizer's `apply_chat_template` returns for the first `count` messages.

        Contents are given as text or, if `blocks`, as lists of blocks; None: as the template expects.
        """
        messages = [{k: v for k, v in m.items() if k not in WEIGHTS} for m in chat.messages[:count]]
        if self._takes_blocks if blocks is None else blocks:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
        template = NOW.sub(lambda call: json.dumps(DATE.strftime(call[2])), self.source(chat.tools))
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=[*chat.tools] or None, chat_template=template, **chat.options, **arguments,
            )  # fmt: skip
        except Exception as error:  # a template may raise any error
            raise DataError(f"the tokenizer's chat template refuses this chat: {error}") from error

    @cached_property
    def _takes_blocks(self) -> bool:
        """Whether the template renders only contents in lists of blocks, as multimodal templates do."""
        content = "0#folora#0"
        chat = Chat([{"role": "user", "content": content}], ())
        for blocks in (False, True):
            with suppress(DataError):
                if content in self.apply(chat, blocks=blocks, tokenize=False):
                    return blocks
        return False

    def render(self, chat: Chat, count: int | None = None, *, prompt: bool = False) -> str:
        """The text of the first `count` messages, followed by the generation prompt if `prompt`."""
        text = str(self.apply(chat, count, tokenize=False, add_generation_prompt=prompt))
        check_unicode(text, "the chat")  # includes roles and what the template adds
        return text

    def tokens(self, text: str) -> list[int]:
        """The tokens of a rendered text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def before(self, chat: Chat, i: int) -> list[int]:
        """The tokens before answer `i`, including the generation prompt.

        For the first message there is nothing to render; then the whole chat is rendered with another
        first content, which begins with the same tokens.
        """
        if i:
            return self.tokens(self.render(chat, i, prompt=True))
        first = chat.messages[0]
        other = {**first, "content": "1" if first["content"].lstrip()[:1] != "1" else "2"}
        return self.tokens(self.render(chat.with_message(0, other)))

    def whole(self, chat: Chat) -> str:
        """The text of a chat. Raises DataError if the template leaves out part of it."""
        text = self.render(chat)
        shown = squeezed(text)
        for i, message in enumerate(chat.messages):
            for what, value in _parts(message, learned=i in chat.learned):
                in_json = json.dumps(value, ensure_ascii=False)[1:-1]  # as some render tool results
                if squeezed(value) not in shown and squeezed(in_json) not in shown:
                    raise _left_out(f"{what} of message {i} ({message['role']}), {value[:40]!r}")
        without = {"the column 'tools'": replace(chat, tools=())} if chat.tools else {}
        for i, message in enumerate(chat.messages):
            if "tool_calls" not in message:
                continue
            bare = {k: v for k, v in message.items() if k != "tool_calls"}
            without[f"the tool calls of message {i}"] = chat.with_message(i, bare)
        for what, changed in without.items():
            try:
                same = text == self.render(changed)
            except DataError:  # the template needs it
                continue
            if same:
                raise _left_out(what)
        return text


def _parts(message: Message, *, learned: bool) -> Iterator[tuple[str, str]]:
    """Texts of a message that the template must render; earlier reasoning may be dropped, as at inference."""
    if learned or message["role"] != "assistant":
        yield "the content", message["content"]
    if learned:
        yield from ((f"{k!r}", message[k]) for k in REASONING if isinstance(message.get(k), str))


def _left_out(what: str) -> DataError:
    return DataError(
        f"the chat template leaves out {what}. Remove it, or use a template that renders it"
    )


def squeezed(text: str) -> str:
    """Without whitespace, which templates strip and add."""
    return "".join(text.split())
