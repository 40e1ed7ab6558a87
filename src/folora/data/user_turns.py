"""Open a chat template at the user's turn, so that a model writes both sides of a dialogue (arXiv:2406.08464)."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from folora.data.chat_templates import ChatTemplate
from folora.data.contents import Chat
from folora.errors import DataError

MARK = "folora0content"  # no template changes it
NOT_OPENED = "the chat template cannot be opened at a user's turn: {}"


@dataclass(frozen=True)
class UserTurn:
    """The tokens around a user's message.

    Attributes:
        opening: All tokens before it, with a system prompt if the template has one by default.
        insert: The special token that ends the user's turn, and the rest up to the assistant's message.
    """

    opening: tuple[int, ...]
    insert: tuple[int, ...]


def user_turn(tokenizer: PreTrainedTokenizerBase) -> UserTurn:
    """The tokens around a user's first message. Raises DataError, with the reason, if they cannot be found."""
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template")
    template = ChatTemplate(tokenizer)
    text = template.render(Chat([{"role": "user", "content": MARK}], ()), prompt=True)
    before, *after = text.split(MARK)
    if len(after) != 1:
        raise DataError(NOT_OPENED.format("it does not render a message exactly once"))
    # Spaces around a message belong to the tokens of its words.
    opening = template.tokens(before.rstrip(" "))
    insert = template.tokens(after[0].lstrip(" "))
    special = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    if not opening:
        raise DataError(NOT_OPENED.format("nothing comes before the message"))
    if not insert or insert[0] not in special:
        raise DataError(NOT_OPENED.format("no special token ends the message"))
    whole = template.tokens(text.replace(MARK, "Hello"))
    if whole[: len(opening)] != opening or whole[-len(insert) :] != insert:
        raise DataError(NOT_OPENED.format("its tokens depend on the message"))
    return UserTurn(tuple(opening), tuple(insert))
