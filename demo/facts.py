"""A small probe of what a language model knows, to measure what fine-tuning makes it forget.

Each fact is a sentence to complete ("The capital of France is"), its right ending (" Paris")
and three wrong endings of the same sort. A model is scored in two ways: how often it finds the
right ending the most likely of the four, and how likely (mean log-probability) it finds the
right ending. The first is easy to read; the second also moves when no ranking changes.

The facts in ``facts.json`` were written by hand for this project, one a line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folora.runtime.contexts import evaluating

FACTS_PATH = Path(__file__).with_name("facts.json")


@dataclass(frozen=True)
class Fact:
    """A sentence to complete, its right ending and the wrong endings to choose from."""

    kind: str
    prompt: str
    answer: str
    others: tuple[str, ...]

    @property
    def choices(self) -> tuple[str, ...]:
        """All endings, the right one first."""
        return (self.answer, *self.others)


@dataclass(frozen=True)
class FactScores:
    """How well a model knows a list of facts.

    ``log_probability`` is the mean over the facts of the right ending's log-probability (summed
    over its tokens), ``by_kind`` gives (right, total) for each kind, and ``right`` says for each
    fact, in the order given, whether its right ending was the most likely.
    """

    accuracy: float
    log_probability: float
    by_kind: dict[str, tuple[int, int]]
    right: tuple[bool, ...]


@dataclass(frozen=True)
class _Choice:
    """One ending as token ids: what the model reads, and the tokens it should then predict."""

    context: tuple[int, ...]
    """The prompt and the ending, less the ending's last token (nothing is predicted after it)."""
    target: tuple[int, ...]
    """The ending's tokens; the first is predicted from the prompt's last position."""

    @property
    def first_position(self) -> int:
        return len(self.context) - len(self.target)


def load_facts() -> list[Fact]:
    """Read the facts that come with the demo."""
    rows = json.loads(FACTS_PATH.read_text(encoding="utf-8"))
    return [Fact(row["kind"], row["prompt"], row["answer"], tuple(row["others"])) for row in rows]


def score_facts(
    model: PreTrainedModel | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    batch_size: int = 64,
) -> FactScores:
    """Score a causal language model (plain or wrapped by PEFT) on ``facts``."""
    if not facts:
        raise ValueError("there are no facts to score")
    choices = [_encode(tokenizer, f.prompt, ending) for f in facts for ending in f.choices]
    with evaluating(model), torch.inference_mode():
        scores = iter(_log_probabilities(model, choices, batch_size))
    return _summarize(facts, [[next(scores) for _ in fact.choices] for fact in facts])


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, ending: str) -> _Choice:
    """Tokenize a prompt and its ending so that the ending's ids follow the prompt's ids."""
    start = tuple(tokenizer(prompt)["input_ids"])
    whole = tuple(tokenizer(prompt + ending)["input_ids"])
    if not start or len(whole) <= len(start) or whole[: len(start)] != start:
        raise ValueError(
            f"the tokens of {prompt!r} are no proper prefix of the tokens of {prompt + ending!r}: "
            "the tokenizer joins prompt and ending, or adds a token at the end of a text"
        )
    return _Choice(context=whole[:-1], target=whole[len(start) :])


def _log_probabilities(
    model: nn.Module, choices: Sequence[_Choice], batch_size: int
) -> list[float]:
    """Summed log-probability of each choice's target, in the order given."""
    rows, row_of = _shared_rows([choice.context for choice in choices])
    members: list[list[int]] = [[] for _ in rows]
    for index, row in enumerate(row_of):
        members[row].append(index)
    scores = [0.0] * len(choices)
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        wanted = [(place, index) for place, row in enumerate(batch) for index in members[row]]
        sums = _score_batch(
            model, [rows[row] for row in batch], [(place, choices[i]) for place, i in wanted]
        )
        for (_, index), value in zip(wanted, sums, strict=True):
            scores[index] = value
    return scores


def _shared_rows(
    contexts: Sequence[tuple[int, ...]],
) -> tuple[list[tuple[int, ...]], list[int]]:
    """The fewest rows that contain every context as a prefix, and each context's row.

    A causal model's output at a position depends on the tokens up to there only, so one pass over
    a row serves all its prefixes. The endings of one prompt mostly share a row, and always do
    where they are single tokens.
    """
    rows: list[tuple[int, ...]] = []
    row_of: dict[tuple[int, ...], int] = {}
    # In descending order a context comes right after the contexts that it is a prefix of.
    for context in sorted(set(contexts), reverse=True):
        if not rows or rows[-1][: len(context)] != context:
            rows.append(context)
        row_of[context] = len(rows) - 1
    return rows, [row_of[context] for context in contexts]


def _score_batch(
    model: nn.Module, rows: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, _Choice]]
) -> list[float]:
    """Summed log-probability of each wanted target, given with its place in ``rows``."""
    first = min(choice.first_position for _, choice in wanted)
    logits = _logits_from(model, rows, first)
    device = logits.device
    places, positions, targets, owners = [], [], [], []
    for owner, (place, choice) in enumerate(wanted):
        for offset, token in enumerate(choice.target):
            places.append(place)
            positions.append(choice.first_position + offset - first)
            targets.append(token)
            owners.append(owner)
    picked = logits[torch.tensor(places, device=device), torch.tensor(positions, device=device)]
    picked = picked.float()  # half precision is too coarse for a log-sum over a vocabulary
    chosen = picked.gather(1, torch.tensor(targets, device=device)[:, None])[:, 0]
    log_probs = (chosen - picked.logsumexp(dim=-1)).double().cpu()
    sums = torch.zeros(len(wanted), dtype=torch.float64)
    sums.index_add_(0, torch.tensor(owners), log_probs)
    return [float(value) for value in sums]


def _logits_from(model: nn.Module, rows: Sequence[tuple[int, ...]], first: int) -> Tensor:
    """The logits of right-padded ``rows`` from position ``first`` on, from one forward pass."""
    width = max(len(row) for row in rows)
    # The padding's id does not matter: it comes after all that is read, and is masked.
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    device = next(model.parameters()).device
    # All logits, though prompts need none: keeping the last few makes the head's input a slice,
    # for which torch copies a frozen head's weight once a row (ten times slower on the CPU).
    output = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    logits: Tensor = output.logits
    return logits[:, first:]


def _summarize(facts: Sequence[Fact], scores: Sequence[Sequence[float]]) -> FactScores:
    """Sum up the scores of each fact's choices, the right one first."""
    right = tuple(row[0] > max(row[1:]) for row in scores)
    by_kind: dict[str, tuple[int, int]] = {}
    for fact, is_right in zip(facts, right, strict=True):
        hits, total = by_kind.get(fact.kind, (0, 0))
        by_kind[fact.kind] = (hits + int(is_right), total + 1)
    return FactScores(
        accuracy=sum(right) / len(right),
        log_probability=sum(row[0] for row in scores) / len(scores),
        by_kind=by_kind,
        right=right,
    )
