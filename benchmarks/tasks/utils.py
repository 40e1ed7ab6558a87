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
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

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


def texts(
    file: str,
    tokenizer: str,
    prompt: str,
    completion: str,
    characters: int,
    chat: bool = False,
    **_: object,
) -> dict[str, Dataset]:
    """Prompts, the texts that should follow them, and how many tokens these have, shuffled once.

    Args:
        file: Rows.
        tokenizer: Folder of the model's tokenizer.
        prompt: Column of the prompts.
        completion: Column of the texts.
        characters: Most that both may have together; the row is left out if they have more.
        chat: Both are a user's and an assistant's turn in the model's chat template.
    """
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    found = []
    for row in _rows(file):
        asked, text = row[prompt], row[completion]
        if len(asked + text) > characters:
            continue
        if chat:
            asked, text = _turn(loaded, _said("user", asked), _said("assistant", text))
        # The harness moves white space from the end of a prompt to what follows.
        tokens = len(loaded(asked + text)["input_ids"]) - len(loaded(asked.rstrip())["input_ids"])
        found.append({"prompt": asked, "text": text, "tokens": tokens})
    return {"test": Dataset.from_list(_shuffled(found))}


def calls(tokenizer: str, **_: object) -> dict[str, Dataset]:
    """Questions that one of two tools answers, in the model's chat template, shuffled once.

    ``text`` is the right call as a block of JSON, and ``opening`` the beginning of any call. The template
    asks for ``<tool_call>``, but Qwen2.5-Coder-0.5B has in its output layer the row of an unused token
    there, and answers by such a block.
    """
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    table = json.loads((Path(__file__).parent / "tools.json").read_text())
    tools = {tool["name"]: _schema(**tool) for tool in table["tools"]}
    names, found = list(tools), []
    for question, name, arguments in table["questions"]:
        other = names[(names.index(name) + 1) % len(names)]
        offered = [tools[n] for n in sorted((name, other))]
        call = json.dumps({"name": name, "arguments": arguments}, indent=2)
        asked, answer = _said("user", question), _said("assistant", f"```json\n{call}\n```")
        prompt, text = _turn(loaded, asked, answer, offered)
        if name not in prompt:
            raise ValueError(f"the chat template of {tokenizer} has no place for tools")
        found.append({"prompt": prompt, "opening": text.split(name)[0], "text": text})
    return {"test": Dataset.from_list(_shuffled(found))}


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


def per_token(doc: Row, results: list[Likelihood]) -> dict[str, float]:
    """One long text that should be likely: the mean over its tokens."""
    ((nats, _),) = results
    return {"probability": math.exp(nats / doc["tokens"]), "nats": nats / doc["tokens"]}


def call(doc: Row, results: list[Likelihood]) -> dict[str, float]:
    """``acc``: greedy decoding opens a call. The others are of the whole right call."""
    (_, opens), (nats, _) = results
    return {"acc": float(opens), "probability": math.exp(nats), "nats": nats}


def bits(doc: Row, results: list[float]) -> dict[str, float]:
    """How well a passage is compressed."""
    (nats,) = results
    return {"bits_per_byte": -nats / math.log(2) / len(doc["text"].encode())}


def _turn(
    tokenizer: PreTrainedTokenizerBase, asked: Row, answer: Row, tools: list[Any] | None = None
) -> tuple[str, str]:
    """A user's turn up to where the assistant's begins, and that, in the tokenizer's chat template."""
    template: Any = partial(tokenizer.apply_chat_template, tools=tools, tokenize=False)
    prompt, whole = template([asked], add_generation_prompt=True), template([asked, answer])
    if not whole.startswith(prompt):
        raise ValueError("the chat template writes the user's turn otherwise when it is answered")
    return prompt, whole[len(prompt) :].rstrip()


def _said(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def _schema(name: str, description: str, arguments: dict[str, str]) -> Row:
    """A tool as chat templates take it: a function whose arguments are all required."""
    properties = {argument: {"type": kind} for argument, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": [*arguments]}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _rows(file: str) -> list[Row]:
    folder = os.environ.get("FOLORA_DATA_DIR")
    if not folder:
        raise FileNotFoundError("FOLORA_DATA_DIR is not set, so there is nothing to read from")
    with gzip.open(Path(folder) / file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _shuffled(rows: list[Row]) -> list[Row]:
    random.Random(0).shuffle(rows)
    return rows
