"""What the local tasks share: rows from ``FOLORA_DATA_DIR``, and scores that see small changes.

A small model is near the floor, or far from any decision, on many questions, so next to being right
(``acc``) tasks report how likely the right answer is. ``probability``: among the choices where there
are some, else of the text itself. ``nats``: the logarithm of that text's likelihood.
"""

import gzip
import json
import math
import os
import random
from pathlib import Path
from typing import Any

from datasets import Dataset

Row = dict[str, Any]
Likelihood = tuple[
    float, bool
]  # log-likelihood in nats, and whether greedy decoding gives the text


def load(file: str, **_: object) -> dict[str, Dataset]:
    """Rows of a file, shuffled once, so that any first part is a sample."""
    return {"test": Dataset.from_list(_shuffled(_rows(file)))}


def passages(file: str, characters: int, **_: object) -> dict[str, Dataset]:
    """The texts of a file in pieces of so many characters, shuffled once."""
    texts = [row["text"] for row in _rows(file)]
    pieces = [t[i : i + characters] for t in texts for i in range(0, len(t), characters)]
    whole = [{"text": piece} for piece in pieces if len(piece) == characters]
    return {"test": Dataset.from_list(_shuffled(whole))}


def cloze(doc: Row, results: list[Likelihood]) -> dict[str, float]:
    """One text that should be likely."""
    ((nats, greedy),) = results
    return {"acc": float(greedy), "probability": math.exp(nats), "nats": nats}


def choice(doc: Row, results: list[Likelihood]) -> dict[str, float]:
    """The gold one of several texts should be likelier than the others."""
    nats = [value for value, _ in results]
    gold, top = doc["gold"], max(nats)
    weights = [math.exp(value - top) for value in nats]
    return {
        "acc": float(nats[gold] == top),
        "probability": weights[gold] / sum(weights),
        "nats": nats[gold],
    }


def bits(doc: Row, results: list[float]) -> dict[str, float]:
    """How well a passage is compressed."""
    (nats,) = results
    return {"bits_per_byte": -nats / math.log(2) / len(doc["text"].encode())}


def _rows(file: str) -> list[Row]:
    folder = os.environ.get("FOLORA_DATA_DIR")
    if not folder:
        raise FileNotFoundError("FOLORA_DATA_DIR is not set, so there is nothing to read from")
    with gzip.open(Path(folder) / file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _shuffled(rows: list[Row]) -> list[Row]:
    random.Random(0).shuffle(rows)
    return rows
