"""Target and retained scores in [0, 1] of a model on a recipe's benchmarks and passages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from benchmarks.paper.recipe import TASKS, Benchmark, Passages, Recipe
from folora.compare.readings import Score, Scores
from folora.data.rows import batches, text_examples
from folora.errors import ConfigError, DataError
from folora.metrics.evaluation import Answers, Evaluation
from folora.metrics.meter import response_loss
from folora.runtime.contexts import evaluating

Setting = tuple[bool, int | None, int]  # ours or the harness's, shots, batch size


def scorer(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    allow_code: bool,
    max_new_tokens: int | None = None,
) -> Score:
    """Load all questions and texts, check that they can be scored, and ask them of every model.

    Args:
        recipe: For its target, kept, benchmarks and passages.
        tokenizer: Of the models.
        allow_code: Whether programs may run; the caller also has to be in `sandbox.permission`.
        max_new_tokens: A lower limit on what is generated, for trials.

    Raises:
        ConfigError: A task or metric is unknown, or runs programs without `allow_code`.
        DataError: Data cannot be had.
    """
    evaluations = [
        _evaluation(setting, group, recipe, tokenizer, allow_code, max_new_tokens)
        for setting, group in _by_setting(recipe.asked).items()
    ]
    texts = {
        name: load_passages(passages)
        for name, passages in recipe.passages.items()
        if name in (*recipe.target, *recipe.kept)
    }

    def score(model: PeftModel) -> Scores:
        answers: Answers = {}
        for evaluation in evaluations:
            answers |= evaluation(model)
        values = {name: answers[b.task][b.metric] for name, b in recipe.asked.items()}
        other = {
            f"{name}.{metric}": value
            for name, b in recipe.asked.items()
            for metric, value in answers[b.task].items()
            if metric != b.metric
        }
        for name, rows in texts.items():
            loss = token_loss(model, tokenizer, rows, recipe.passages[name].max_length)
            values[name], other[f"{name}.nats"] = math.exp(-loss), loss
        return {
            "task": {name: values[name] for name in recipe.target},
            "kept": {name: values[name] for name in recipe.kept},
            "other": other,
        }

    return score


def check_code(recipe: Recipe, allow_code: bool) -> None:
    """Refuse to start with benchmarks that need a permission that is not given. Raises ConfigError."""
    running = [
        name
        for name, benchmark in recipe.asked.items()
        if benchmark.own and "unsafe_code: true" in (TASKS / f"{benchmark.task}.yaml").read_text()
    ]
    if running and not allow_code:
        raise ConfigError(
            f"{', '.join(running)} run programs that the model writes. Allow it by --allow-code on a "
            "machine where they can do no harm (benchmarks/paper/sandbox.py says what guards it), or "
            "leave them out by --benchmarks"
        )


def load_passages(wanted: Passages) -> list[str]:
    """The first texts of a data set. Raises DataError."""
    try:
        stream = datasets.load_dataset(wanted.dataset, split=wanted.split, streaming=True)
        rows = list(stream.take(wanted.count))
    except Exception as error:  # the Hub's client raises many kinds
        raise DataError(f"data set {wanted.dataset!r} cannot be had: {error}") from error
    if not rows or wanted.column not in rows[0]:
        raise DataError(
            f"data set {wanted.dataset!r} has no column {wanted.column!r}; there are "
            f"{', '.join(rows[0]) if rows else 'no rows'}"
        )
    return [str(row[wanted.column]) for row in rows]


def token_loss(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> float:
    """Mean cross-entropy per token in nats, over all tokens of all texts."""
    rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    with evaluating(model):
        parts = [response_loss(model, batch) for batch in batches(text_examples(rows), 1)]
    return sum(loss for loss, _ in parts) / sum(count for _, count in parts)


def _by_setting(asked: Mapping[str, Benchmark]) -> dict[Setting, list[Benchmark]]:
    """Benchmarks that can be asked together."""
    groups: dict[Setting, list[Benchmark]] = {}
    for benchmark in asked.values():
        setting = (benchmark.own, benchmark.shots, benchmark.batch_size)
        groups.setdefault(setting, []).append(benchmark)
    return groups


def _evaluation(
    setting: Setting,
    group: Sequence[Benchmark],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    allow_code: bool,
    max_new_tokens: int | None,
) -> Evaluation:
    own, shots, batch_size = setting
    evaluation = Evaluation(
        {benchmark.task: benchmark.limit for benchmark in group},
        tokenizer,
        folder=TASKS if own else None,
        batch_size=batch_size,
        num_fewshot=shots,
        max_new_tokens=max_new_tokens,
        options=recipe.options,
        allow_code=allow_code and own,  # the harness's own would run programs outside the sandbox
    )
    evaluation.check_metrics({benchmark.task: benchmark.metric for benchmark in group})
    return evaluation
