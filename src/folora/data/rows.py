"""Rows of a data set -> token ids with a loss mask on the response.

`formats.FORMATS` lists the rows that are read, `chats.ChatTokenizer` finds the answers of a chat.
Labels are -100 where there is no loss.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset, DatasetDict, load_dataset
from pyarrow.parquet import ParquetFile
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from folora.config import DataConfig
from folora.data.chats import STRICT, ChatTokenizer
from folora.data.formats import (
    IGNORE,
    Chat,
    Format,
    Plain,
    Row,
    Tokens,
    choose_format,
    columns_of,
)
from folora.errors import DataError
from folora.runtime.fingerprints import tokens_fingerprint
from folora.runtime.progress import progress

logger = logging.getLogger(__name__)

CHUNK = 2**20  # bytes
_SPACE = re.compile(r"\s*")
LOCAL_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Example:
    """One tokenized row; `labels` is -100 where there is no loss. Both have the same length."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TaskData:
    """The target task: rows to train on and rows held out for the task loss."""

    train: list[Example]
    held_out: list[Example]
    dropped: int = 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokens and labels, and of where the held-out rows begin."""
        train, held_out = ([e.input_ids + e.labels for e in p] for p in (self.train, self.held_out))
        return tokens_fingerprint([*train, [], *held_out])


def local_format(name: str) -> str | None:
    """``"json"`` or ``"parquet"`` for a local data file's name, None for a Hub name."""
    suffixes = [s for s in Path(name).suffixes if s != ".gz"]
    return LOCAL_FORMATS.get(suffixes[-1]) if suffixes else None


def load_rows(
    dataset: str | Dataset | DatasetDict | Sequence[Row], split: str = "train"
) -> list[Row]:
    """Rows of a local file, of a Hub data set, or of what is already in memory.

    Raises:
        DataError: The file is missing, empty, or cannot be parsed; no such split; or what is in
            memory has no length (IterableDataset) or no rows with named columns.
    """
    if isinstance(dataset, str):
        kind = local_format(dataset)
        if kind is not None or os.path.exists(dataset):
            rows = _read_local(Path(dataset), kind)
        else:
            try:
                rows = list(load_dataset(dataset, split=split))
            except Exception as error:  # the Hub's client raises many kinds
                raise DataError(
                    f"data set {dataset!r} is neither a local .json, .jsonl or .parquet file nor "
                    f"to be had from the Hub (split {split!r}): {error}"
                ) from error
    else:
        rows = _rows_in_memory(dataset, split)
    if not rows:
        raise DataError(f"data set {dataset if isinstance(dataset, str) else ''!r} has no rows")
    return rows


def _rows_in_memory(dataset: Any, split: str) -> list[Row]:
    if isinstance(dataset, Mapping):  # DatasetDict: one data set for each split
        if split not in dataset:
            raise DataError(
                f"the data set has no split {split!r}, but {sorted(map(str, dataset))}; give one with "
                "data.split"
            )
        dataset = dataset[split]
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"a {type(dataset).__name__} does not say how many rows it has; give a list, for example "
            "list(dataset.take(10000))"
        )
    rows = list(dataset)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            raise DataError(
                f"row {number} of the data set is {type(row).__name__}, but must be a dict of named columns "
                "(of a pandas DataFrame: frame.to_dict('records'))"
            )
    return rows


def check_dataset(name: str) -> None:
    """Refuse, before anything is loaded, a local file that cannot be read. Raises DataError."""
    kind = local_format(name)
    if kind is None and not os.path.exists(name):  # which a name too long does not either
        if name.startswith((".", "/", "~")):
            raise DataError(f"data file {name} does not exist")
        return  # a Hub name
    if os.path.isdir(name):
        raise DataError(f"data file {name} is a folder, but must be a file")
    if not os.path.isfile(name):
        there = os.path.exists(name)
        what = "is a named pipe or a device, but must be a file" if there else "does not exist"
        raise DataError(f"data file {name} {what}")
    if kind is None:
        raise DataError(f"data file {name} must end in .json, .jsonl or .parquet (.gz allowed)")
    if os.path.getsize(name) == 0:
        raise DataError(f"data file {name} is empty")


def _read_local(path: Path, kind: str | None) -> list[Row]:
    check_dataset(str(path))
    if kind == "json":
        return _read_json(path)
    try:
        with ParquetFile(path) as file:
            groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
            size = sum(group.total_byte_size for group in groups)
            if size > (most := _most_bytes()):
                raise ValueError(_too_large(most))
            return file.read().to_pylist()
    except Exception as error:  # pyarrow raises many kinds
        raise DataError(f"data file {path} cannot be read as {kind}: {error}") from error


def _read_json(path: Path) -> list[Row]:
    """Rows of a JSON list, or of JSON objects one after another.

    By Python's own reader: Arrow's takes texts that look like dates for dates, and ends the process
    on a line that holds null.
    """
    try:
        content = _read_bytes(path)
        values = list(_json_values(content.decode("utf-8-sig")))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"data file {path} cannot be read as json: {error}") from error
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(
                f"data file {path}, row {number} is {json.dumps(row)[:40]}, but must be an object "
                "with named columns"
            )
    return rows


def _read_bytes(path: Path) -> bytes:
    """The file's bytes, unpacked, if there is room for them and for what is made of them."""
    most = _most_bytes()
    content = bytearray()
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        while part := file.read(CHUNK):  # read(most) would ask for that much memory at once
            content += part
            if len(content) > most:
                raise ValueError(_too_large(most))
    return bytes(content)


def _most_bytes() -> int:
    """How large a data file may be, so that there is room for what is made of it."""
    return psutil.virtual_memory().available // 4


def _too_large(most: int) -> str:
    return f"it holds more than {most / 1e9:.3g} GB, a quarter of the memory that is free"


def _json_values(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder(object_pairs_hook=_without_doubles)
    end = 0
    while (start := _SPACE.match(text, end).end()) < len(text):  # type: ignore[union-attr]
        value, end = decoder.raw_decode(text, start)
        yield value


def _without_doubles(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"column {twice!r} is given twice in one row")
    return row


class Formatter:
    """Turns rows into examples for one tokenizer; the format is chosen once, from all columns.

    Raises:
        DataError: No known format, or a refused one; a named column that is not there; a row with
            something else than its format has; a chat whose answers cannot be found.
    """

    def __init__(
        self, columns: Collection[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.format = choose_format(columns, config)
        self.cut = 0
        self.chats = ChatTokenizer(tokenizer)
        template = tokenizer.chat_template is not None
        self.use_template = template if config.chat_template is None else config.chat_template
        if self.use_template and not template:
            raise DataError("data.chat_template is on, but this tokenizer has no chat template")

    def __call__(self, row: Row, number: int) -> Example:
        """One row, cut to `max_length`; `number` is for messages."""
        try:
            example = self._example(row)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
        end = self.config.max_length
        self.cut += len(example.input_ids) > end
        return Example(example.input_ids[:end], example.labels[:end])

    def _example(self, row: Row) -> Example:
        if self.format.read is None:
            raise TypeError(f"{self.format.name} has no reader")
        content = self.format.read(row)
        if isinstance(content, Tokens):
            return Example(content.input_ids, content.labels)
        if isinstance(content, Plain):
            return self._plain(content.prompt, content.response)
        if isinstance(content, Chat):
            return self._chat(content)
        if self.use_template:
            return self._chat(content.chat)
        if content.tools or content.options:
            raise DataError("columns 'tools' and 'chat_template_kwargs' need a chat template")
        system = f"{content.system}\n\n" if content.system else ""
        return self._plain(system + ALPACA.format(instruction=content.prompt), content.response)

    def _plain(self, prompt: str, response: str) -> Example:
        """Text before text; the response ends with EOS."""
        if not response:
            raise DataError("the response is empty")
        tokenizer = self.tokenizer
        before = tokenizer(prompt)["input_ids"]
        if before and before[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
            before = before[:-1]  # tokenizers that close every text
        after = tokenizer(response, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None and after[-1:] != [tokenizer.eos_token_id]:
            after = [*after, tokenizer.eos_token_id]
        if before and (before[1:] + after)[:1] == before[:1] == [tokenizer.bos_token_id]:
            before = before[1:]  # the text has its own
        return Example([*before, *after], [IGNORE] * len(before) + after)

    def _chat(self, chat: Chat) -> Example:
        """A chat with loss on its learned answers."""
        found = self.chats(chat)
        labels = [IGNORE] * len(found.input_ids)
        for start, end in found.answers:
            labels[start:end] = found.input_ids[start:end]
        return Example(found.input_ids, labels)


def prepare_task(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> TaskData:
    """Tokenize all rows and set some aside, chosen by a seed.

    Rows whose response is cut away by `max_length` are dropped and counted.

    Raises:
        DataError: See `Formatter`; also when no row is left.
    """
    columns = columns_of(rows)
    formatter = Formatter(columns, tokenizer, config)
    _say_format(formatter.format, columns)
    examples = []
    with progress("tokenizing rows", len(rows)) as tick:
        for number, row in enumerate(rows):
            examples.append(formatter(row, number))
            tick(tokens=len(examples[-1].input_ids))
    _say_chats(formatter.chats)
    usable = [e for e in examples if any(label != IGNORE for label in e.labels[1:])]
    dropped = len(examples) - len(usable)
    if not usable:
        raise DataError(
            f"no row has a response token within data.max_length = {config.max_length}; raise it"
        )
    if formatter.cut:
        logger.warning(
            "%d of %d rows cut to data.max_length = %d tokens",
            formatter.cut,
            len(rows),
            config.max_length,
        )
    if dropped:
        logger.warning(
            "%d of %d rows dropped: no response token within %d tokens",
            dropped, len(examples), config.max_length,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(usable), generator=generator).tolist()
    count = min(config.eval_rows, len(usable) // 10)
    held_out = sorted(order[:count])
    train = sorted(order[count:])
    return TaskData([usable[i] for i in train], [usable[i] for i in held_out], dropped)


def _say_format(chosen: Format, columns: Collection[str]) -> None:
    """Name the columns before work starts, those that are not used above all."""
    used = [name for name in columns if name not in chosen.unused(columns)]
    logger.info("rows are read as %s: columns %s", chosen.name, ", ".join(used))
    if unused := chosen.unused(columns):
        logger.info("columns not used: %s", ", ".join(unused))


def _say_chats(chats: ChatTokenizer) -> None:
    if set(chats.ways) - {STRICT}:
        ways = ", ".join(f"{count} by {way}" for way, count in chats.ways.most_common())
        logger.info("answers of the chats were found %s", ways)
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
    """Refuse tokens that the model has no embedding of, and rows longer than it can read.

    Args:
        task: The tokenized rows.
        tokenizer: Whose tokens they are.
        start_id: The token that sampling starts from.
        vocabulary: How many tokens the model knows; None if its config does not say.
        context: How many tokens it reads at most; likewise.

    Raises:
        DataError: Naming the token, or the length.
    """
    rows = [*task.train, *task.held_out]
    if vocabulary is not None:
        used = {start_id, tokenizer.pad_token_id or 0}.union(*(e.input_ids for e in rows))
        if (largest := max(used)) >= vocabulary:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"the tokenizer gives {token!r} the id {largest}, but the model knows {vocabulary} "
                "tokens. Is it the model's own tokenizer?"
            )
    longest = max((len(e.input_ids) for e in rows), default=0)
    if context is not None and longest > context:
        raise DataError(
            f"a row has {longest} tokens, but the model reads at most {context}; give "
            f"--data.max_length {context}"
        )


def pad_batch(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels``, each (batch, longest)."""
    longest = max(len(e.input_ids) for e in examples)

    def padded(rows: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

    return {
        "input_ids": padded((e.input_ids for e in examples), pad_id),
        "attention_mask": padded(([1] * len(e.input_ids) for e in examples), 0),
        "labels": padded((e.labels for e in examples), IGNORE),
    }


def batches(
    examples: Sequence[Example], batch_size: int, pad_id: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Padded batches, longest examples first, so that little is padded and memory peaks early."""
    ordered = sorted(examples, key=lambda e: -len(e.input_ids))
    for i in range(0, len(ordered), batch_size):
        yield pad_batch(ordered[i : i + batch_size], pad_id)


def text_examples(sequences: Iterable[list[int]]) -> list[Example]:
    """Plain token sequences as examples with loss on every token."""
    return [Example(row, row) for row in sequences]
