"""Tokenize rows and mask the loss to the response.

`formats.FORMATS` lists the supported formats; `chats.ChatTokenizer` finds the answers of a chat.
Labels are -100 where there is no loss.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from folora.config import DataConfig
from folora.data.chats import STRICT, ChatTokenizer
from folora.data.contents import IGNORE, Chat, Example, Instruction, Plain, Row
from folora.data.formats import Format, choose_format, columns_of
from folora.errors import DataError
from folora.runtime.fingerprints import tokens_fingerprint
from folora.runtime.progress import progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The target task: rows for training and rows held out for the task loss."""

    train: list[Example]
    held_out: list[Example]
    dropped: int = 0

    def __repr__(self) -> str:
        return f"TaskData({len(self.train)} rows and {len(self.held_out)} held out)"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokens, labels and the split."""
        train, held_out = ([e.input_ids + e.labels for e in p] for p in (self.train, self.held_out))
        return tokens_fingerprint([*train, [], *held_out])


class Formatter:
    """Turns rows into examples for one tokenizer; the format is chosen once, from all columns.

    Raises:
        DataError: The format is unknown or refused, a named column is missing, a row does not match
            the format, or the answers of a chat cannot be found.
    """

    def __init__(
        self, columns: Collection[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.format = choose_format(columns, config)
        self.truncated = 0
        self.chats = ChatTokenizer(tokenizer)
        template = tokenizer.chat_template is not None
        self.use_template = template if config.chat_template is None else config.chat_template
        if self.use_template and not template:
            raise DataError("data.chat_template is true, but this tokenizer has no chat template")

    def __call__(self, row: Row, number: int) -> Example:
        """One row, truncated to `max_length`; `number` is for messages."""
        try:
            example = self._example(row)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
        end = self.config.max_length
        self.truncated += len(example.input_ids) > end
        return Example(example.input_ids[:end], example.labels[:end])

    def _example(self, row: Row) -> Example:
        assert self.format.read is not None
        content = self.format.read(row)
        if isinstance(content, Instruction):
            content = content.chat if self.use_template else content.plain
        if isinstance(content, Chat):
            return self.chats(content)
        return content if isinstance(content, Example) else self._plain(content)

    def _plain(self, content: Plain) -> Example:
        """Prompt and response without a template; the response ends with EOS."""
        if not content.response:
            raise DataError("the response is empty")
        tokenizer = self.tokenizer
        before = tokenizer(content.prompt)["input_ids"]
        if before and before[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
            before = before[:-1]  # the tokenizer appends EOS to every text
        after = tokenizer(content.response, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None and after[-1:] != [tokenizer.eos_token_id]:
            after = [*after, tokenizer.eos_token_id]
        if before and (before[1:] + after)[:1] == before[:1] == [tokenizer.bos_token_id]:
            before = before[1:]  # the text already begins with BOS
        return Example([*before, *after], [IGNORE] * len(before) + after)


def prepare_task(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, seed: int = 0
) -> TaskData:
    """Tokenize all rows and hold some out, chosen by a seed.

    Rows whose response is truncated away by `max_length` are dropped and counted.

    Raises:
        DataError: See `Formatter`; also if no row remains.
    """
    columns = columns_of(rows)
    formatter = Formatter(columns, tokenizer, config)
    _log_format(formatter.format, columns)
    examples = []
    with progress("tokenizing rows", len(rows)) as tick:
        for number, row in enumerate(rows):
            examples.append(formatter(row, number))
            tick(tokens=len(examples[-1].input_ids))
    _log_chats(formatter.chats)
    usable = [e for e in examples if any(label != IGNORE for label in e.labels[1:])]
    dropped = len(examples) - len(usable)
    if not usable:
        raise DataError(
            f"no row has a response token within data.max_length = {config.max_length}; raise it"
        )
    for count, what in (
        (formatter.truncated, "truncated to data.max_length = %d tokens"),
        (dropped, "dropped: no response token within %d tokens"),
    ):
        if count:
            logger.warning(f"%d of %d rows {what}", count, len(rows), config.max_length)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(usable), generator=generator).tolist()
    count = min(config.eval_rows, len(usable) // 10)
    held_out = sorted(order[:count])
    train = sorted(order[count:])
    return TaskData([usable[i] for i in train], [usable[i] for i in held_out], dropped)


def _log_format(chosen: Format, columns: Collection[str]) -> None:
    """Log which columns are used and which are not."""
    unused = chosen.unused(columns)
    used = ", ".join(name for name in columns if name not in unused)
    logger.info("rows are read as %s: columns %s", chosen.name, used)
    if unused:
        logger.info("columns not used: %s", ", ".join(unused))


def _log_chats(chats: ChatTokenizer) -> None:
    if set(chats.methods) - {STRICT}:
        methods = ", ".join(f"{count} by {name}" for name, count in chats.methods.most_common())
        logger.info("answers of the chats were found %s", methods)
    if chats.unused:
        logger.info("fields of messages not used: %s", ", ".join(sorted(chats.unused)))
    if chats.unended:
        logger.warning(
            "%d chats end without a special token: the model may not learn to stop", chats.unended
        )


def check_fits(
    task: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    start_id: int,
    *,
    vocabulary: int | None,
    context: int | None,
) -> None:
    """Refuse tokens without an embedding in the model, and rows longer than its context.

    `start_id` is the token that sampling starts from. `vocabulary` and `context` are the model's sizes in
    tokens; None if its config has none.

    Raises:
        DataError: A token or row does not fit; the token or the length is named.
    """
    rows = [*task.train, *task.held_out]
    if vocabulary is not None:
        used = {start_id, tokenizer.pad_token_id or 0}.union(*(e.input_ids for e in rows))
        if (largest := max(used)) >= vocabulary:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"the tokenizer gives {token!r} the id {largest}, but the model has {vocabulary} "
                "tokens. Use the model's own tokenizer."
            )
    longest = max((len(e.input_ids) for e in rows), default=0)
    if context is not None and longest > context:
        raise DataError(
            f"a row has {longest} tokens, but the model's context is {context}; set "
            f"--data.max_length {context}"
        )


def pad_batch(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels``, each (batch, longest) int64."""

    def padded(rows: Iterable[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], True, value)

    return {
        "input_ids": padded((e.input_ids for e in examples), pad_id),
        "attention_mask": padded(([1] * len(e.input_ids) for e in examples), 0),
        "labels": padded((e.labels for e in examples), IGNORE),
    }


def batches(
    examples: Sequence[Example], batch_size: int, pad_id: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Padded batches, longest examples first, so that there is little padding and memory peaks early."""
    ordered = sorted(examples, key=lambda e: -len(e.input_ids))
    for i in range(0, len(ordered), batch_size):
        yield pad_batch(ordered[i : i + batch_size], pad_id)


def text_examples(sequences: Iterable[list[int]]) -> list[Example]:
    """Plain token sequences as examples with loss on every token."""
    return [Example(row, row) for row in sequences]
