"""Which rows TRL's own preparation reads as folora does: the table of decision 15, measured.

Every format, and every chat with every template, is prepared by `prepare_task` and by `SFTTrainer`
with the options that put the loss on the assistant. `pytest tests/data/test_against_trl.py -s` prints
the table.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import test_chats as chats
import test_formats as formats
from datasets import Dataset
from support.chat_templates import byte_tokenizer
from transformers import PreTrainedTokenizerFast

import folora.data.chats
from folora.data.contents import IGNORE
from folora.data.rows import prepare_task
from folora.errors import DataError

DECISION = Path(__file__).parents[2] / "docs/decisions/0015-rows-are-formatted-by-folora.md"
MEASURED = "1.16.0"  # the version of TRL in the decision's table
pytestmark = pytest.mark.skipif(
    find_spec("trl") is None or version("trl") != MEASURED, reason=f"measured with TRL {MEASURED}"
)

Row = dict[str, Any]
Tokens = tuple[list[int], list[int]]

CHATS: dict[str, Row] = {
    "one turn": {"messages": chats.ONE},
    "two turns": {"messages": chats.MORE},
    "system": {"messages": [chats.SYSTEM, *chats.MORE]},
    "reasoning": {"messages": chats.THOUGHT},
    "earlier reasoning": {"messages": chats.THOUGHTS},
    "completion": {"prompt": chats.ONE[:1], "completion": chats.ONE[1:]},
    "second completion": {"prompt": chats.MORE[:3], "completion": chats.MORE[3:]},
    "completion with reasoning": {"prompt": chats.THOUGHTS[:3], "completion": chats.THOUGHTS[3:]},
    "tool calls": {"messages": chats.CALLS, "tools": [chats.TOOL]},
    "weights": {"messages": [chats.user("one?"), chats.says("two", weight=0), *chats.MORE[2:]]},
}
MARKED = re.sub(
    r"(\{\{ m\.content .*)(\{% endfor %\})",
    r"{% if m.role == 'assistant' %}{% generation %}\1{% endgeneration %}{% else %}\1{% endif %}\2",
    formats.TEMPLATE,
)
TODAY = re.compile(r"20\d\d-\d\d-\d\d|\d\d \w{3} 20\d\d")
COLUMNS = ("refused by both", "identical", "different", "folora only", "TRL only")
# Causes by a pattern of TRL's error, where only folora reads the rows.
ONLY_FOLORA = {
    "training-compatible": "no generation markers, and TRL has no training version of the template",
    "KeyError": "columns that TRL does not know: instruction sets, a prompt beside messages",
    "no assistant tokens": "senders `human` and `gpt`, which TRL passes to the template as roles",
    "has no attribute 'text'|ArrowInvalid": "contents as text and as blocks, which TRL does not convert",
}
# Causes by a pattern of folora's error, where only TRL reads the rows.
ONLY_TRL = {
    "changes what|are refused|is for chats|system|folora sets": "a column would be ignored or overridden",
    "leaves out|can only concatenate": "the template drops reasoning, tools or a message",
    "renders a turn differently": "the loss would include text before the answer",
    "input_ids|labels|attention_mask": "tokens with damaged labels or masks",
}


def pairs() -> Iterator[tuple[str, Row, PreTrainedTokenizerFast]]:
    """Group, row and tokenizer of every pair."""
    groups = {
        "TRL's formats": formats.TRL,
        "instruction sets": formats.SETS,
        "tokens, contradictions": formats.TOKENS,
    }
    for group, cases in groups.items():
        for template in (formats.TEMPLATE, MARKED, None):
            for row, _ in cases.values():
                yield group, row, byte_tokenizer(template)
    of_models = {p: (chats.FOLDER / f"{p}.jinja").read_text("utf-8") for p in chats.FAMILIES}
    for group, templates in (
        ("chats, our test templates", chats.TEMPLATES),
        ("chats, TRL's templates", of_models),
    ):
        for template in templates.values():
            for row in CHATS.values():
                yield group, row, byte_tokenizer(template)


def by_folora(row: Row, tokenizer: PreTrainedTokenizerFast) -> Tokens | str:
    """Token ids and labels, or the error."""
    try:
        (example,) = prepare_task([deepcopy(row)], tokenizer, chats.LONG).train
    except DataError as error:
        return str(error)
    return example.input_ids, example.labels


def by_trl(row: Row, tokenizer: PreTrainedTokenizerFast, args: Any) -> Tokens | str:
    """The same by `SFTTrainer`, which chooses the template and the masks in its constructor."""
    from trl import SFTTrainer
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers
    from trl.data_utils import is_conversational, is_conversational_from_value

    pair = {"prompt", "completion"} <= set(row)
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=None,
        completion_only_loss=pair or "completion_mask" in row,
    )
    try:
        # one column at a time: of several, is_conversational reads one at random
        chat = any(is_conversational({name: row[name]}) for name in row)
        args.assistant_only_loss = (chat or is_conversational_from_value(row)) and not pair
        if args.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
            trainer.chat_template = get_training_chat_template(tokenizer)
        rows = Dataset.from_list([deepcopy(row)]).to_iterable_dataset()
        found = [*SFTTrainer._prepare_dataset(trainer, rows, tokenizer, args, False, None, "train")]
    except Exception as error:  # of any kind: a row that TRL does not know, a template that fails
        return f"{type(error).__name__}: {error}"
    return (found[0]["input_ids"], found[0]["labels"]) if found else "no token has loss"


def compare(ours: Tokens | str, theirs: Tokens | str, row: Row, decode: Any) -> tuple[str, str]:
    """A column of the table, and the cause of a difference."""
    if isinstance(ours, str) and isinstance(theirs, str):
        return "refused by both", ""
    if isinstance(theirs, str):
        return "folora only", next(
            c for error, c in ONLY_FOLORA.items() if re.search(error, theirs)
        )
    if isinstance(ours, str):
        return "TRL only", next(c for error, c in ONLY_TRL.items() if re.search(error, ours))
    return ("identical", "") if ours == theirs else ("different", cause(ours, theirs, row, decode))


def cause(ours: Tokens, theirs: Tokens, row: Row, decode: Any) -> str:
    """Why tokens or loss of a row differ."""
    text, other = (TODAY.sub("", decode(ids)) for ids, _ in (ours, theirs))
    mine, more = ({i for i, t in enumerate(labels) if t != IGNORE} for _, labels in (ours, theirs))
    if "weight" in str(row):
        return "TRL ignores the weight of a message"
    if ours[0] == theirs[0]:
        if mine < more:
            return "TRL's loss includes the header of the answer, which the generation prompt holds"
        return "TRL's loss ends before the last special token"
    if text == other:
        return "the template renders the date, which folora fixes"
    if "one?" in text and "one?" not in other:
        return "text in a template that expects blocks: TRL's tokens lack every message"
    if text.count("think") > other.count("think"):
        return "the template drops reasoning: folora uses TRL's training version, TRL does not"
    if text.startswith(other):
        return (
            "the template does not end the answer: folora uses TRL's training version, TRL does not"
        )
    assert "text" in row or "attention_mask" in row, (row, text, other)
    return "Alpaca's column `text` is read instead of the instruction; padding is kept"


def test_the_table_of_the_decision_is_the_measurement() -> None:
    from trl import SFTConfig

    args = SFTConfig(output_dir="none", max_length=100_000, report_to=[], use_cpu=True, bf16=False)
    counts: dict[str, Counter[str]] = {}
    causes: Counter[tuple[str, str]] = Counter()
    for group, row, tokenizer in pairs():
        ours, theirs = by_folora(row, tokenizer), by_trl(row, tokenizer, args)
        column, why = compare(ours, theirs, row, tokenizer.decode)
        counts.setdefault(group, Counter())[column] += 1
        causes[column, why] += bool(why)
    counts["all"] = sum(counts.values(), Counter())
    table = [
        "| " + " | ".join(map(str, [group, found.total(), *(found[c] for c in COLUMNS)])) + " |"
        for group, found in counts.items()
    ]
    table += [f"| {column} | {why} | {number} |" for (column, why), number in causes.most_common() if number]  # fmt: skip
    print("\n".join(table))
    assert set(table) <= set(DECISION.read_text(encoding="utf-8").splitlines())


def test_most_pairs_are_the_same_without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [by_folora(row, tokenizer) for _, row, tokenizer in pairs()]
    monkeypatch.setattr(folora.data.chats, "find_spec", lambda _: None)
    without = [by_folora(row, tokenizer) for _, row, tokenizer in pairs()]
    changed = [after for before, after in zip(found, without, strict=True) if before != after]
    refused = sum(isinstance(after, str) for after in changed)
    counts = f"{len(found) - len(changed)} pairs are the same, {refused} are refused and {len(changed) - refused} differ"
    assert counts in DECISION.read_text(encoding="utf-8")
