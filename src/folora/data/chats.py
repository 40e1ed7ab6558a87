"""Tokenize chats, and find the tokens of the assistant's messages.

Templates are programs: some render a turn differently once others follow, drop its reasoning, or
begin the answer in the generation prompt. So several methods are tried, the strictest first. One is used
only if the template renders every message and it finds the tokens of every answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise, takewhile

from transformers import PreTrainedTokenizerBase

from folora.data.chat_templates import REASONING, ChatTemplate, squeezed
from folora.data.contents import IGNORE, Chat, Example
from folora.data.messages import WEIGHTS, Message
from folora.errors import DataError

MARKERS = re.compile(r"\{%-?\s*generation\b")
DIFFERENT = (
    "this chat template renders a turn differently once others follow, so the assistant's tokens "
    "cannot be found. Give prompt/completion rows, or a template with {% generation %} markers "
    "(TRL, where it is installed, has one for many models)"
)
STRICT = "the chat template"

Span = tuple[int, int]
Answers = tuple[list[int], list[Span]]  # the tokens of a chat; start and end of each answer


class ChatTokenizer:
    """Tokenizes chats with one tokenizer's template.

    Attributes:
        methods: How often each method of finding the answers was used.
        unended: Number of chats that do not end with a special token.
        unused: Fields of messages that the template does not use.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.methods: Counter[str] = Counter()
        self.unended = 0
        self.unused: set[str] = set()

    def __call__(self, chat: Chat) -> Example:
        """The tokens of a chat, with loss on the selected answers.

        Raises:
            DataError: The template raises an error or omits part of the chat, or the tokens of an answer
                cannot be found.
        """
        if self.tokenizer.chat_template is None:
            raise DataError(
                "the rows are chats, but this tokenizer has no chat template. Use the tokenizer of "
                "an instruction-tuned model, or prompt/completion rows"
            )
        ids, answers = self._find(chat)
        self.unended += not self._ends(ids, answers)
        source = self.template.source(chat.tools)
        self.unused |= {k for m in chat.messages for k in m if k not in source}
        self.unused -= {*WEIGHTS, *REASONING}
        labels = [IGNORE] * len(ids)
        for start, end in answers:
            labels[start:end] = ids[start:end]
        return Example(ids, labels)

    def _find(self, chat: Chat) -> Answers:
        """The answers by the first method that finds them."""
        for method, find in self._methods(chat):
            with suppress(DataError):
                found = find()
                if self._ends(*found):
                    self.methods[method] += 1
                    return found
        found = self._by_prefixes(chat)
        self.methods["the chat template and the contents"] += 1
        return found

    def _methods(self, chat: Chat) -> Iterator[tuple[str, Callable[[], Answers]]]:
        """Methods of which each answer must end with a special token."""
        yield STRICT, lambda: self._by_prefixes(chat, strict=True)
        if MARKERS.search(self.template.source(chat.tools)):
            yield "the generation markers", lambda: _by_markers(chat, self.template)
        if training := self._training_template:
            yield "TRL's training template", lambda: _by_markers(chat, training)

    @cached_property
    def _training_template(self) -> ChatTemplate | None:
        """TRL's training version of this template, if TRL is installed and has one."""
        if find_spec("trl") is None:
            return None
        try:
            utils = import_module("trl.chat_template_utils")
            found = utils.get_training_chat_template(self.tokenizer)
        except Exception:  # an unknown template, or an older TRL
            return None
        return ChatTemplate(self.tokenizer, found) if found else None

    def _by_prefixes(self, chat: Chat, *, strict: bool = False) -> Answers:
        """Find an answer as what follows the previous messages and the generation prompt.

        If `strict`, the prompt and the chat up to the answer must be prefixes of the whole chat. Otherwise
        an answer may begin where its prompt and the chat diverge, and end with the first special token
        after its content.
        """
        template = self.template
        ids = template.tokens(template.whole(chat))
        answers = []
        for i in chat.learned:
            prompt = template.before(chat, i)
            start = _common(prompt, ids)
            upto = template.tokens(template.render(chat, i + 1))
            whole = ids[: len(upto)] == upto
            if i and start < len(prompt):  # the prompt begins the answer, as with "<think>"
                before = _common(template.tokens(template.render(chat, i)), ids)
                if strict or start <= before:
                    raise DataError(DIFFERENT)
            if strict and not whole:
                raise DataError(DIFFERENT)
            end = len(upto) if whole else self._end(ids, start, chat.messages[i : i + 2])
            answers.append((start, end))
        return _in_order(ids, answers)

    def _end(self, ids: list[int], start: int, messages: Sequence[Message]) -> int:
        """The position after the first special token that follows the content of the first message."""
        content = squeezed(messages[0]["content"])
        merged = any(message["role"] == "assistant" for message in messages[1:])
        if content and not merged and "tool_calls" not in messages[0]:
            for i in range(start, len(ids)):
                if ids[i] in self._special and content in squeezed(self._decode(ids[start:i])):
                    return i + 1
        raise DataError(DIFFERENT)

    def _ends(self, ids: list[int], answers: Sequence[Span]) -> bool:
        """Whether the last answer ends with a special token, so that a model learns to stop."""
        answer = reversed(ids[slice(*answers[-1])])
        last = next((token for token in answer if self._decode([token]).strip()), None)
        return last in self._special

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.get_added_vocab().values()
        return frozenset({*added, *self.tokenizer.all_special_ids})

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _by_markers(chat: Chat, template: ChatTemplate) -> Answers:
    """Find an answer by the template's generation markers, excluding the generation prompt."""
    template.whole(chat)
    read = template.apply(chat, return_dict=True, return_assistant_tokens_mask=True)
    ids = read["input_ids"]
    edges = [i for i, (a, b) in enumerate(pairwise([0, *read["assistant_masks"], 0])) if a != b]
    runs = list(zip(edges[::2], edges[1::2], strict=True))
    assistant = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
    if len(runs) == len(assistant):
        answers = [
            (max(start, min(_common(template.before(chat, i), ids), end - 1)), end)
            for i, (start, end) in zip(assistant, runs, strict=True)
            if i in chat.learned
        ]
    elif runs and [*chat.learned] == assistant:  # several marks in one answer
        answers = runs
    else:
        raise DataError(DIFFERENT)
    return _in_order(ids, answers)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _in_order(ids: list[int], answers: list[Span]) -> Answers:
    """The same, if no answer is empty and each begins after the previous one. Raises DataError."""
    borders = [border for answer in answers for border in answer]
    if borders != sorted(borders) or any(start == end for start, end in answers):
        raise DataError(DIFFERENT)
    return ids, answers
