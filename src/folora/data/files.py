"""Load rows from local files, from the Hub and from memory."""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from datasets import Dataset, DatasetDict, load_dataset
from pyarrow.parquet import ParquetFile

from folora.data.contents import Row
from folora.errors import DataError

CHUNK = 2**20  # bytes
SPACE = re.compile(r"\s*")
LOCAL_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def local_format(name: str) -> str | None:
    """``"json"`` or ``"parquet"`` for a local data file's name, None for a Hub name."""
    suffixes = [s for s in Path(name).suffixes if s != ".gz"]
    return LOCAL_FORMATS.get(suffixes[-1]) if suffixes else None


def load_rows(
    dataset: str | Dataset | DatasetDict | Sequence[Row], split: str = "train"
) -> list[Row]:
    """Rows of a local file, of a Hub data set, or of an object in memory.

    Raises:
        DataError: The file is missing, empty, or cannot be parsed; there is no such split; or an object in
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
                    f"available from the Hub (split {split!r}): {error}"
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
                f"the data set has no split {split!r}, only {sorted(map(str, dataset))}; choose one with "
                "data.split"
            )
        dataset = dataset[split]
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"a {type(dataset).__name__} has no length; give a list, for example "
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
    """Refuse a local file that cannot be read. Raises DataError."""
    kind = local_format(name)
    if not os.path.exists(name):  # as for a name that is too long
        if kind is None and not name.startswith((".", "/", "~")):
            return  # a Hub name
        wrong = "does not exist"
    elif os.path.isdir(name):
        wrong = "is a folder, but must be a file"
    elif not os.path.isfile(name):
        wrong = "is a named pipe or a device, but must be a file"
    elif kind is None:
        wrong = "must end in .json, .jsonl or .parquet (.gz allowed)"
    elif os.path.getsize(name) == 0:
        wrong = "is empty"
    else:
        return
    raise DataError(f"data file {name} {wrong}")


def _read_local(path: Path, kind: str | None) -> list[Row]:
    check_dataset(str(path))
    if kind == "json":
        return _read_json(path)
    try:
        with ParquetFile(path) as file:
            groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
            size = sum(group.total_byte_size for group in groups)
            _check_size(size, _most_bytes())
            return file.read().to_pylist()
    except Exception as error:  # pyarrow raises many kinds
        raise DataError(f"data file {path} cannot be read as {kind}: {error}") from error


def _read_json(path: Path) -> list[Row]:
    """Rows of a JSON list, or of JSON objects one after another.

    With Python's parser: Arrow's turns texts that look like dates into dates, and crashes on a line that
    holds null.
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
    """The file's bytes, decompressed. Raises ValueError if they are too many."""
    most = _most_bytes()
    content = bytearray()
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        while part := file.read(CHUNK):  # read(most) would allocate that much memory at once
            content += part
            _check_size(len(content), most)
    return bytes(content)


def _most_bytes() -> int:
    """Size limit of a data file, which leaves memory for the parsed rows."""
    return psutil.virtual_memory().available // 4


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"it holds more than {most / 1e9:.3g} GB, a quarter of the free memory")


def _json_values(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder(object_pairs_hook=_unique_columns)
    end = 0
    while (start := SPACE.match(text, end).end()) < len(text):  # type: ignore[union-attr]
        value, end = decoder.raw_decode(text, start)
        yield value


def _unique_columns(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"column {twice!r} is given twice in one row")
    return row
