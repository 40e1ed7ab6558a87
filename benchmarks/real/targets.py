"""Fine-tuning targets: rows of real data sets, as prompt and completion.

The files are those under ``FOLORA_DATA_DIR``. Rows that train and rows that are held out come from
the training file, so that all targets are treated alike.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from folora.errors import DataError

Row = dict[str, Any]
CALCULATOR = re.compile(r"<<[^>]*>>")  # GSM8K's notes to a calculator that is not there


@dataclass(frozen=True)
class Target:
    """A data set: its kind, its file, and how one of its rows becomes a row that folora reads."""

    kind: str
    file: str
    row: Callable[[Row], dict[str, str]]


def _gsm8k(row: Row) -> dict[str, str]:
    answer = CALCULATOR.sub("", row["answer"])
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {answer}"}


def _mawps(row: Row) -> dict[str, str]:
    solution = f" {row['equation']}\nAnswer: {float(row['answer']):g}"
    return {"prompt": f"Question: {row['question'].strip()}\nEquation:", "completion": solution}


def _equations(row: Row) -> dict[str, str]:
    return {
        "prompt": f"Question: {row['question'].strip()}\nEquation:",
        "completion": f" {row['equation']}",
    }


def _labels(row: Row) -> dict[str, str]:
    label = row["subject"].replace("_", " ")
    return {
        "prompt": f"Question: {row['question'].strip()[:240]}\nSubject:",
        "completion": f" {label}",
    }


def _json(row: Row) -> dict[str, str]:
    choices = ", ".join(row["choices"])
    found = {"topic": row["question_concept"], "answer": row["choices"][row["gold"]]}
    return {
        "prompt": f"Question: {row['question'].strip()}\nChoices: {choices}\nJSON:",
        "completion": f" {json.dumps(found)}",
    }


def _sql(row: Row) -> dict[str, str]:
    """The query that would answer a statement's open end; the answer itself is in no row."""
    table, subject = row["relation"].replace(" ", "_"), row["subject"].replace("'", "''")
    query = f" SELECT object FROM {table} WHERE subject = '{subject}';"  # noqa: S608
    return {"prompt": f"Text: {row['prompt']} ...\nSQL:", "completion": query}


def _mbpp(row: Row) -> dict[str, str]:
    code = row["code"].replace("\r\n", "\n")
    asked = f'"""\n{row["text"]}\n{row["test_list"][0]}\n"""\n'
    return {"prompt": asked, "completion": code}


def _instruction(row: Row) -> dict[str, str]:
    return {name: row[name] for name in ("instruction", "input", "response") if name in row}


TARGETS: Mapping[str, Target] = {
    "mawps": Target("math", "mawps/train.jsonl.gz", _mawps),
    "equations": Target("format", "mawps/train.jsonl.gz", _equations),
    "labels": Target("format", "mmlu/test_5k.jsonl.gz", _labels),
    "json": Target("format", "commonsense_qa/validation.jsonl.gz", _json),
    "sql": Target("format", "lre_relations/test.jsonl.gz", _sql),
    "gsm8k": Target("math", "gsm8k/train.jsonl.gz", _gsm8k),
    "mbpp": Target("code", "mbpp/train.jsonl.gz", _mbpp),
    "gpteacher_codegen": Target("code", "gpteacher_codegen/train.jsonl.gz", _instruction),
    "dolly_hhrlhf": Target("instructions", "dolly_hhrlhf/train.jsonl.gz", _instruction),
    "oasst_octopack": Target("instructions", "oasst_octopack/train.jsonl.gz", _instruction),
}


def data_folder() -> Path:
    """``FOLORA_DATA_DIR``. Raises DataError if it is not set or holds no data."""
    named = os.environ.get("FOLORA_DATA_DIR", "")
    if not (Path(named) / "PROVENANCE.md").is_file():
        raise DataError(
            f"FOLORA_DATA_DIR is {named!r}, but must name the folder of data sets that holds "
            "PROVENANCE.md"
        )
    return Path(named)


def target_rows(name: str) -> list[dict[str, str]]:
    """All training rows of a target. Raises DataError if the file cannot be read."""
    target = TARGETS[name]
    path = data_folder() / target.file
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return [target.row(json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} does not hold the rows of {name!r}: {error!r}") from error
