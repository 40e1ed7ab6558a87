"""Tokenize chats with a tokenizer's chat template, and find the tokens of the assistant's messages.

Templates are programs: some render a turn differently once others follow, drop its reasoning, or
begin the answer in the generation prompt. So several methods are tried, the strictest first. One is used
only if the template renders every message and it finds the tokens of every answer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise, takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from folora.data.contents import Chat, check_unicode
from folora.data.messages import WEIGHTS, Message
from folora.errors import DataError

MARKERS = re.compile(r"\{%-?\s*generation\b")
REASONING = ("reasoning_content", "reasoning", "thinking")
NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
# A fixed date for templates that render the current one, so that tokens are reproducible.
DATE = datetime(2024, 7, 26, tzinfo=UTC)  # the default of Llama 3's templates
DIFFERENT = (
    "this chat template renders a turn differently once others follow, so the assistant's tokens "
    "cannot be found. Give prompt/completion rows, or a template with {% generation %} markers "
    "(TRL, where it is installed, has one for many models)"
)

STRICT = "the chat template"

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """The tokens of a chat, and the start and end of each answer with loss."""

    input_ids: list[int]
    answers: list[Span]


class ChatTokenizer:
    """Tokenizes chats with one tokenizer's template.

    Attributes:
        methods: How often each method of finding the answers was used.
        unended: Number of chats that do not end with a special token.
        unused: Fields of messages that the template does not use.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.methods: Counter[str] = Counter()
        self.unended = 0
        self.unused: set[str] = set()

    def __call__(self, chat: Chat) -> Rendered:
        """The tokens of a chat.

        Raises:
            DataError: The template raises an error or omits part of the chat, or the tokens of an answer
                cannot be found.
        """
        if self.tokenizer.chat_template is None:
            raise DataError(
                "the rows are chats, but this tokenizer has no chat template. Use the tokenizer of "
                "an instruction-tuned model, or prompt/completion rows"
            )
        template = self.tokenizer.get_chat_template(tools=[*chat.tools] or None)
        last: DataError | None = None
        for method, find in self._methods(chat, template):
            try:
                found = find()
            except DataError as error:
                last = error
                continue
            self.methods[method] += 1
            self.unended += not self._ends(found)
            self.unused |= {k for m in chat.messages for k in m if k not in template} - {
                *WEIGHTS,
                *REASONING,
            }
            return found
        raise last or DataError(DIFFERENT)

    def _methods(self, chat: Chat, template: str) -> Iterator[tuple[str, Callable[[], Rendered]]]:
        yield STRICT, lambda: self._by_prefixes(chat, strict=True)
        if MARKERS.search(template):
            yield "the generation markers", lambda: self._by_markers(chat, template)
        if training := self._training_template:
            yield "TRL's training template", lambda: self._by_markers(chat, training)
        yield "the chat template and the contents", lambda: self._by_prefixes(chat)

    @cached_property
    def _training_template(self) -> str | None:
        """TRL's training version of this template, if TRL is installed and has one."""
        if find_spec("trl") is None:
            return None
        try:
            found: str | None = import_module("trl.chat_template_utils").get_training_chat_template(
                self.tokenizer
            )
        except Exception:  # an unknown template, or an older TRL
            return None
        return found

    # Methods to find the answers

    def _by_prefixes(self, chat: Chat, *, strict: bool = False) -> Rendered:
        """Find an answer as what follows the previous messages and the generation prompt.

        If `strict`, the prompt and the chat up to the answer must be prefixes of the whole chat, and the
        answer must end with a special token. Otherwise an answer may begin where its prompt and the chat
        diverge, and end with the first special token after its content.
        """
        ids = self._tokens(self._whole(chat))
        answers = []
        for i in chat.learned:
            prompt = self._prompt(chat, i)
            start = _common(prompt, ids)
            upto = self._tokens(self._render(chat, i + 1))
            end = len(upto) if ids[: len(upto)] == upto else None
            if i and start < len(
                prompt
            ):  # the prompt begins the answer, for example with "<think>"
                before = _common(self._tokens(self._render(chat, i)), ids)
                if strict or start <= before:
                    raise DataError(DIFFERENT)
            if end is None:
                if strict:
                    raise DataError(DIFFERENT)
                end = self._end(ids, start, chat.messages[i : i + 2])
            answers.append((start, end))
        found = Rendered(ids, answers)
        _check_order(found)
        if strict and not self._ends(found):
            raise DataError("the chat template ends an answer without a special token")
        return found

    def _by_markers(self, chat: Chat, template: str) -> Rendered:
        """Find an answer by the template's generation markers, excluding the generation prompt."""
        self._whole(chat, template)
        try:
            read: Any = self.tokenizer.apply_chat_template(
                self._template_messages(chat.messages), tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True, **self._arguments(chat, template),
            )  # fmt: skip
        except Exception as error:  # any error of the template; slow tokenizers have no offsets
            raise DataError(f"the markers of the chat template fail: {error}") from error
        ids, marked = read["input_ids"], _runs(read["assistant_masks"])
        assistant = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
        if len(marked) == len(assistant):
            answers = [
                (max(start, min(_common(self._prompt(chat, i, template), ids), end - 1)), end)
                for i, (start, end) in zip(assistant, marked, strict=True)
                if i in chat.learned
            ]
        elif marked and [*chat.learned] == assistant:  # several marks in one answer
            answers = marked
        else:
            raise DataError(DIFFERENT)
        found = Rendered(ids, answers)
        _check_order(found)
        if not self._ends(found):
            raise DataError("the markers leave out the token that ends an answer")
        return found

    def _prompt(self, chat: Chat, i: int, template: str | None = None) -> list[int]:
        """The tokens before answer `i`, including the generation prompt.

        For the first message there is nothing to render; then the whole chat is rendered with another
        first content, which begins with the same tokens.
        """
        if i:
            return self._tokens(self._render(chat, i, template, prompt=True))
        first = chat.messages[0]
        other = {**first, "content": "1" if first["content"].lstrip()[:1] != "1" else "2"}
        changed = replace(chat, messages=[other, *chat.messages[1:]])
        return self._tokens(self._render(changed, len(chat.messages), template))

    # Where an answer ends

    def _end(self, ids: list[int], start: int, messages: Sequence[Message]) -> int:
        """The position after the first special token that follows the content of the first message."""
        content = _squeezed(messages[0]["content"])
        merged = any(message["role"] == "assistant" for message in messages[1:])
        if content and not merged and "tool_calls" not in messages[0]:
            for i in range(start, len(ids)):
                if ids[i] in self._special and content in _squeezed(self._decode(ids[start:i])):
                    return i + 1
        raise DataError(DIFFERENT)

    def _ends(self, found: Rendered) -> bool:
        """Whether the last answer ends with a special token, so that a model learns to stop."""
        answer = found.input_ids[slice(*found.answers[-1])]
        last = next((token for token in reversed(answer) if self._decode([token]).strip()), None)
        return last in self._special

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.get_added_vocab().values()
        return frozenset({*added, *self.tokenizer.all_special_ids})

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    # Rendering

    def _whole(self, chat: Chat, template: str | None = None) -> str:
        """The text of a chat. Raises DataError if the template omits part of it."""
        count = len(chat.messages)
        text = self._render(chat, count, template)
        shown = _squeezed(text)
        for i, message in enumerate(chat.messages):
            for what, value in _parts(message, learned=i in chat.learned):
                if _squeezed(value) not in shown and _squeezed(_quoted(value)) not in shown:
                    raise DataError(
                        _left_out(f"{what} of message {i} ({message['role']}), {value[:40]!r}")
                    )
        without = {"the column 'tools'": replace(chat, tools=())} if chat.tools else {}
        for i in (i for i in chat.learned if "tool_calls" in chat.messages[i]):
            bare = {k: v for k, v in chat.messages[i].items() if k != "tool_calls"}
            messages = [*chat.messages[:i], bare, *chat.messages[i + 1 :]]
            without[f"the tool calls of message {i}"] = replace(chat, messages=messages)
        for what, changed in without.items():
            if text == self._attempt(changed, template):
                raise DataError(_left_out(what))
        return text

    def _attempt(self, chat: Chat, template: str | None) -> str | None:
        """The text of a chat; None if the template raises an error."""
        try:
            return self._render(chat, len(chat.messages), template)
        except DataError:
            return None

    def _render(
        self, chat: Chat, count: int, template: str | None = None, *, prompt: bool = False
    ) -> str:
        """The text of the first `count` messages, followed by the generation prompt if `prompt`."""
        if not count:
            return ""
        text = self._apply(
            self._template_messages(chat.messages[:count]), add_generation_prompt=prompt, **self._arguments(chat, template),
        )  # fmt: skip
        check_unicode(text, "the chat")  # includes roles and what the template adds
        return text

    def _apply(self, messages: list[Message], **arguments: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
        except Exception as error:  # a template may raise any error
            raise DataError(f"the tokenizer's chat template refuses this chat: {error}") from error

    def _arguments(self, chat: Chat, template: str | None) -> dict[str, Any]:
        tools = [*chat.tools] or None
        text = template or self.tokenizer.get_chat_template(tools=tools)
        return {"tools": tools, "chat_template": NOW.sub(_date, text), **chat.options}

    def _template_messages(self, messages: Sequence[Message]) -> list[Message]:
        """Messages in the form that the template expects."""
        plain = [{k: v for k, v in m.items() if k not in WEIGHTS} for m in messages]
        return [_in_blocks(m) for m in plain] if self._takes_blocks else plain

    @cached_property
    def _takes_blocks(self) -> bool:
        """Whether the template renders only contents in lists of blocks, as multimodal templates do."""
        message = {"role": "user", "content": "0#folora#0"}
        for given in (message, _in_blocks(message)):
            try:
                if message["content"] in self._apply([given]):
                    return given is not message
            except DataError:
                continue
        return False

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _parts(message: Message, *, learned: bool) -> Iterator[tuple[str, str]]:
    """Texts of a message that the template must render; earlier reasoning may be dropped, as at inference."""
    if learned or message["role"] != "assistant":
        yield "the content", message["content"]
    if learned:
        yield from ((f"{k!r}", message[k]) for k in REASONING if isinstance(message.get(k), str))


def _left_out(what: str) -> str:
    return f"the chat template leaves out {what}. Remove it, or use a template that renders it"


def _date(call: re.Match[str]) -> str:
    return json.dumps(DATE.strftime(call[2]))


def _in_blocks(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _squeezed(text: str) -> str:
    """Without whitespace, which templates strip and add."""
    return "".join(text.split())


def _quoted(text: str) -> str:
    """Escaped as in JSON, as some templates render tool results."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _runs(mask: Sequence[int]) -> list[Span]:
    """Start and end of each run of ones."""
    edges = [i for i, (a, b) in enumerate(pairwise([0, *mask, 0])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _check_order(found: Rendered) -> None:
    borders = [border for answer in found.answers for border in answer]
    empty = any(start >= end for start, end in found.answers)
    if empty or borders != sorted(borders) or borders[-1] > len(found.input_ids):
        raise DataError(DIFFERENT)
