"""Rows of a data set -> token ids with a loss mask on the response.

Understood, by column names: prompt/completion, instruction[/input]/response (or output),
question/answer, and chats in ``messages`` (or a chat in ``prompt`` and ``completion``, as in TRL).
Loss falls on the response alone: labels are -100 elsewhere.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset, load_dataset
from pyarrow.parquet import ParquetFile
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from folora.config import DataConfig
from folora.errors import DataError, nearest
from folora.fingerprints import tokens_fingerprint

logger = logging.getLogger(__name__)

IGNORE = -100
CHUNK = 2**20  # bytes
_SPACE = re.compile(r"\s*")
LOCAL_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
PAIRS = (
    ("prompt", "completion"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("question", "answer"),
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)

Message = dict[str, str]
Row = dict[str, Any]


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


def load_rows(dataset: str | Dataset | Sequence[Row], split: str = "train") -> list[Row]:
    """Rows of a local file, of a Hub data set, or of what is already in memory.

    Raises:
        DataError: The file is missing, empty, or cannot be parsed.
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
        rows = list(dataset)
    if not rows:
        raise DataError(f"data set {dataset if isinstance(dataset, str) else ''!r} has no rows")
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
        raise DataError(f"data file {name} does not exist")
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
    """Turns rows into examples for one tokenizer; the columns are chosen once, from the first row.

    Raises:
        DataError: No known pair of columns, a named column that is not there, a row with something
            else than text, a chat without an answer, or a chat template that does not render chats
            turn by turn.
    """

    def __init__(
        self, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.columns = choose_columns(columns, config)
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
        return Example(example.input_ids[:end], example.labels[:end])

    def _example(self, row: Row) -> Example:
        prompt_name, response_name = self.columns
        if response_name is None:
            return self._chat(row.get(prompt_name))
        prompt: Any = row.get(prompt_name)
        response: Any = row.get(response_name)
        if isinstance(prompt, list) and isinstance(response, list):
            return self._chat([*prompt, *response], first=len(prompt))
        for name, value in zip(self.columns, (prompt, response), strict=True):
            if not isinstance(value, str):
                raise DataError(f"column {name!r} holds {type(value).__name__}, not text")
            _check_unicode(value, f"column {name!r}")
        if prompt_name == "prompt":
            return self._plain(prompt, response)
        if row.get("input") and prompt_name == "instruction":
            prompt = f"{prompt}\n\n{row['input']}"
            _check_unicode(prompt, "column 'input'")
        if self.use_template:
            return self._chat(
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            )
        return self._plain(ALPACA.format(instruction=prompt), response)

    def _plain(self, prompt: str, response: str) -> Example:
        """Text before text; the response ends with EOS."""
        if not response:
            raise DataError("the response is empty")
        tokenizer = self.tokenizer
        before = tokenizer(prompt)["input_ids"]
        if before and before[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
            before = before[:-1]  # tokenizers that close every text
        after = tokenizer(response, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            after = [*after, tokenizer.eos_token_id]
        return Example([*before, *after], [IGNORE] * len(before) + after)

    def _chat(self, messages: Any, first: int = 0) -> Example:
        """A chat with loss on what the assistant says from message `first` on."""
        if not isinstance(messages, list) or not all(
            isinstance(m, dict)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        ):
            raise DataError("a chat must be a list of {'role': name, 'content': text}")
        if self.tokenizer.chat_template is None:
            raise DataError("the data are chats, but this tokenizer has no chat template")
        if not any(m["role"] == "assistant" for m in messages[first:]):
            raise DataError("the chat has no message of the role 'assistant' to learn from")
        ids = self._render(messages)
        labels = [IGNORE] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i < first:
                continue
            before = self._render(messages[:i], add_generation_prompt=True)
            upto = self._render(messages[: i + 1])
            start = len(before)
            if upto != ids[: len(upto)] or before != ids[:start] or start >= len(upto):
                raise DataError(
                    "this chat template renders a turn differently once others follow, so the "
                    "assistant's tokens cannot be found. Give prompt/completion rows instead."
                )
            labels[start : len(upto)] = ids[start : len(upto)]
        return Example(ids, labels)

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> list[int]:
        if not messages:
            return []
        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program, and may raise what it likes
            raise DataError(f"the tokenizer's chat template refuses this chat: {error}") from error
        _check_unicode(text, "the chat")  # a role, or whatever the template adds
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def choose_columns(columns: Sequence[str], config: DataConfig) -> tuple[str, str | None]:
    """The columns of prompt and response; ``("messages", None)`` for chats. Raises DataError."""
    for option in ("prompt_column", "response_column"):
        name = getattr(config, option)
        if name is not None and name not in columns:
            raise DataError(
                f"data.{option} is {name!r}, but the data have {sorted(columns)}"
                f"{nearest(name, columns)}"
            )
    if config.prompt_column and config.response_column:
        return config.prompt_column, config.response_column
    if config.prompt_column or config.response_column:
        raise DataError("give both data.prompt_column and data.response_column, or neither")
    if "messages" in columns:
        return "messages", None
    for pair in PAIRS:
        if set(pair) <= set(columns):
            return pair
    known = ", ".join("/".join(pair) for pair in PAIRS)
    raise DataError(
        f"no prompt and response among the columns {sorted(columns)}; known are {known} and "
        "messages. Name them: --data.prompt_column X --data.response_column Y"
    )


def prepare_task(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> TaskData:
    """Tokenize all rows and set some aside, chosen by a seed.

    Rows whose response is cut away by `max_length` are dropped and counted.

    Raises:
        DataError: See `Formatter`; also when no row is left.
    """
    formatter = Formatter(list(rows[0]), tokenizer, config)
    examples = [formatter(row, number) for number, row in enumerate(rows)]
    usable = [e for e in examples if any(label != IGNORE for label in e.labels[1:])]
    dropped = len(examples) - len(usable)
    if not usable:
        raise DataError(
            f"no row has a response token within data.max_length = {config.max_length}; raise it"
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


def _check_unicode(text: str, what: str) -> None:
    """Raise DataError for a text that cannot be encoded, as JSON may hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} holds half of a surrogate pair, which is no text") from None


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
