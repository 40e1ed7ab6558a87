"""The mixture that a config asks for: text of the model, its dialogues, and the user's prompts and texts from files."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from folora.calibration.sources import Mixture, Script, Source
from folora.config import BOS, CHAT, FIRST_LOOK, SamplingConfig
from folora.data.chat_templates import ChatTemplate
from folora.data.contents import Chat, Row, check_unicode
from folora.data.files import load_rows
from folora.data.formats import MEANING, columns_of
from folora.data.messages import read_messages, read_tools
from folora.data.user_turns import UserTurn, user_turn
from folora.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

MESSAGES = "messages"
TEXTS = {"prompts": "prompt", "texts": "text"}
"""The column of plain text in a file of each kind; the other column is `MESSAGES`."""
SHORTEST = 32  # tokens of the last piece of a long text; a shorter one is left out


def mixture_of(
    config: SamplingConfig,
    tokenizer: PreTrainedTokenizerBase,
    start_id: int,
    *,
    vocabulary: int | None = None,
    context: int | None = None,
) -> Mixture:
    """The sources of ``config.sources``, or those that suit the model.

    Args:
        config: Counts, lengths and shares.
        tokenizer: The model's tokenizer.
        start_id: The token that plain text starts from.
        vocabulary: Number of tokens that the model knows, if known.
        context: Length of the model's context, if known.

    Raises:
        ConfigError: The template cannot be opened at a user's turn, or a sequence does not fit the context.
        DataError: A file is missing, empty, has too few rows, or a row cannot be used.
    """
    shares, turn = _shares(config, tokenizer)
    sources = []
    for name, share in shares.items():
        if name == BOS:
            sources.append(Source(name, share, [Script((start_id,), least=None)], endless=True))
        elif name == CHAT:
            assert turn is not None
            sources.append(Source(name, share, [Script(turn.opening, turn.insert)], endless=True))
        else:
            scripts = _scripts(name, tokenizer, start_id, config)
            _check_count(name, share, len(scripts), config)
            sources.append(Source(name, share, scripts))
    for source in sources:
        _check_fits(source, config, vocabulary, context)
    if len(sources) > 1:
        shown = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
        logger.info("sources of the calibration text: %s", shown)
    return Mixture(sources, start_id, [turn.insert[0]] if turn else [])


def _shares(
    config: SamplingConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, float], UserTurn | None]:
    """The shares, and the user's turn of a chat template where they need it."""
    try:
        turn = user_turn(tokenizer)
    except DataError as error:
        if config.sources is not None and CHAT in config.sources:
            raise ConfigError(f"sampling.sources has chat, but {error}; use bos") from error
        if config.sources is None and tokenizer.chat_template is not None:
            logger.info("calibration text is from the start token alone (bos): %s", error)
        return dict(config.sources or {BOS: 1.0}), None
    if config.sources is None:
        if config.sampler_model is not None:
            logger.info(
                "calibration text is from the start token alone (bos), because sampling.sampler_model may be no "
                "chat model; sampling.sources can add chat"
            )
            return {BOS: 1.0}, None
        return {BOS: 0.5, CHAT: 0.5}, turn
    return dict(config.sources), turn if [*config.sources] != [BOS] else None


def _scripts(
    name: str, tokenizer: PreTrainedTokenizerBase, start_id: int, config: SamplingConfig
) -> list[Script]:
    """A script for each prompt, or each piece of a text, in a file; without duplicates."""
    kind, _, file = name.partition(":")
    with _named(name):
        rows = load_rows(file)
    text = TEXTS[kind]
    unused = sorted({*columns_of(rows)} - {text, MESSAGES, "tools"})
    if lost := [column for column in unused if column in MEANING]:
        raise DataError(f"sampling.sources {name}: column {lost[0]!r} is not used; remove it")
    if unused:
        logger.info("%s: columns not used: %s", name, ", ".join(unused))
    found: dict[Script, None] = {}
    for number, row in enumerate(rows):
        with _named(f"{name}, row {number}"):
            ids = _tokens(row, text, tokenizer, start_id)
        if kind == "prompts":
            found[Script(tuple(ids))] = None
        else:
            found |= {
                Script(part, is_written=False): None for part in _pieces(ids, start_id, config)
            }
    return [*found]


def _tokens(row: Row, text: str, tokenizer: PreTrainedTokenizerBase, start_id: int) -> list[int]:
    """The tokens of a prompt, up to where the answer begins, or of a text. Raises DataError."""
    given = row.get(MESSAGES) if row.get(text) is None else row[text]
    is_prompt = text == TEXTS["prompts"]
    if isinstance(given, str):
        check_unicode(given, f"column {text!r}")
        if not is_prompt or tokenizer.chat_template is None:
            ids: list[int] = tokenizer(given, add_special_tokens=False)["input_ids"]
            if not ids if is_prompt else len(ids) < 2:
                raise DataError(
                    f"{given[:40]!r} has {len(ids)} tokens, but at least {2 - is_prompt} are needed"
                )
            return [start_id, *ids]
        given = [{"role": "user", "content": given}]
    if given is None:
        raise DataError(f"it has neither a column {text!r} nor {MESSAGES!r}")
    messages = read_messages(given)
    if is_prompt and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or (is_prompt and messages[-1]["role"] not in ("user", "tool")):
        raise DataError("the messages hold no prompt that the model could answer")
    if tokenizer.chat_template is None:
        raise DataError("it has messages, but this tokenizer has no chat template; give text")
    template = ChatTemplate(tokenizer)
    chat = Chat(messages, (), read_tools(row.get("tools")))
    whole = template.whole(chat)  # refuses a template that leaves out part of it
    return template.tokens(template.render(chat, prompt=True) if is_prompt else whole)


def _pieces(ids: list[int], start_id: int, config: SamplingConfig) -> Iterator[tuple[int, ...]]:
    """A text, in pieces with at most as many tokens as the model writes; each begins like the text."""
    most = config.max_new_tokens
    first = [start_id] if ids[0] == start_id else []
    body = ids[len(first) :]
    for begin in range(0, len(body), most):
        part = body[begin : begin + most]
        if begin == 0 or len(part) >= SHORTEST:
            yield (*first, *part)


def _check_count(name: str, share: float, count: int, config: SamplingConfig) -> None:
    """Refuse a file that is used up before the first check of early stopping; log when others replace it."""
    first = min(FIRST_LOOK, config.num_sequences)
    needed = math.ceil(share * first)
    if count < needed:
        raise DataError(
            f"sampling.sources {name} has {count} different sequences, but a share of {share:g} needs at least "
            f"{needed} (of the first {first}); give more, or a smaller share"
        )
    if count < math.ceil(share * config.num_sequences):
        logger.info(
            "%s has %d different sequences: its share of %g holds up to %d sequences; of more, the other sources "
            "have more", name, count, share, int(count / share),
        )  # fmt: skip


def _check_fits(
    source: Source, config: SamplingConfig, vocabulary: int | None, context: int | None
) -> None:
    """Refuse sequences that are longer than the context, or hold tokens that the model does not have."""
    for row, script in enumerate(source.scripts):
        tokens = [*script.opening, *script.insert]
        if vocabulary is not None and (largest := max(tokens)) >= vocabulary:
            raise DataError(
                f"sampling.sources {source.name} has the token {largest}, but the model has {vocabulary} tokens; "
                "use the model's own tokenizer"
            )
        length = len(tokens) + (config.max_new_tokens if script.is_written else 0)
        if source.name != BOS and context is not None and length > context:
            raise ConfigError(
                f"sampling.sources {source.name}: sequence {row} has {len(tokens)} tokens before what the model writes, and with "
                f"sampling.max_new_tokens ({config.max_new_tokens}) {length}, but the context of the model is "
                f"{context}; shorten it, or lower sampling.max_new_tokens"
            )


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Errors name the source."""
    try:
        yield
    except DataError as error:
        raise DataError(f"sampling.sources {place}: {error}") from error
