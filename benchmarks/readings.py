"""Readings beside folora's meter: KL between two models, exact match, flips, backward transfer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from folora.data.contents import IGNORE, Example
from folora.data.rows import batches
from folora.metrics.evaluation import Graded
from folora.metrics.kl import kl, labelled_logits
from folora.runtime.contexts import evaluating, without_adapter

CHUNK = 256  # rows of (tokens, vocabulary) log-probabilities in float32


def prompt_of(row: Example) -> list[int]:
    """The tokens before the first labelled one."""
    start = next(i for i, label in enumerate(row.labels) if label != IGNORE)
    return row.input_ids[:start]


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Run a PEFT model as its base; other models as they are."""
    if isinstance(model, PeftModel):
        with without_adapter(model):
            yield
    else:
        yield


@torch.inference_mode()
def mean_kl(base: Any, adapted: Any, examples: Sequence[Example], batch_size: int) -> float:
    """KL(base || adapted) in nats per labelled token.

    Args:
        base: A causal LM; it may be the one that `adapted` wraps, whose adapter is off meanwhile.
        adapted: Another, with the same vocabulary.
        examples: Token ids, and which of them count.
        batch_size: Sequences per forward pass.
    """
    total = count = 0.0
    with evaluating(base), evaluating(adapted):
        for batch in batches(examples, batch_size):
            after = labelled_logits(adapted, batch)[0].split(CHUNK)
            with adapter_off(adapted):
                before = labelled_logits(base, batch)[0].split(CHUNK)
            for b, a in zip(before, after, strict=True):
                found = kl(b, a)
                total, count = total + float(found.double().sum()), count + len(found)
    return total / count


@torch.inference_mode()
def exact_match(model: Any, examples: Sequence[Example], batch_size: int) -> float:
    """Share of rows whose labelled tokens are all the most likely ones, given prompt and right prefix.

    For a row that is not truncated this is exact match of greedy decoding, which then has the same prefixes.
    """
    right = 0
    with evaluating(model):
        for batch in batches(examples, batch_size):
            logits, labels = labelled_logits(model, batch)
            counts = (batch["labels"][:, 1:] != IGNORE).sum(1).tolist()
            right += sum(bool(row.all()) for row in (logits.argmax(-1) == labels).split(counts))
    return right / len(examples)


def flips(before: Graded, after: Graded) -> dict[str, float]:
    """How many questions changed from right to wrong (``lost``) and from wrong to right (``gained``).

    ``lost_adjusted`` and ``gained_adjusted`` are shares of all questions without what guesses explain
    (arXiv:2510.17776): with accuracies a before and a' after, and k choices, independent guesses alone flip a
    share (1 - a) (1 - a') / (k - 1) each way, which is subtracted; at least 0. Where k differs between
    questions, the mean of 1 / (k - 1) is taken. A model that is compared with its own base repeats most of its
    guesses, so that the adjusted shares are lower limits.
    """
    pairs = list(zip(before.right, after.right, strict=True))
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    wrong = [1 - sum(graded.right) / len(pairs) for graded in (before, after)]
    by_chance = wrong[0] * wrong[1] * before.guess
    return {
        "questions": len(pairs),
        "lost": lost,
        "gained": gained,
        "lost_adjusted": max(0.0, lost / len(pairs) - by_chance),
        "gained_adjusted": max(0.0, gained / len(pairs) - by_chance),
    }


def backward_transfer(scores: Sequence[Mapping[str, float]], tasks: Sequence[str]) -> float:
    """Mean over all tasks but the last of R[T, i] - R[i, i] (arXiv:1706.08840; as used by TRACE, arXiv:2310.06762).

    Args:
        scores: After each of T stages, the score of every task: ``scores[t][task]`` is R[t, task].
        tasks: In the order in which they were learned.
    """
    changes = [scores[-1][task] - scores[i][task] for i, task in enumerate(tasks[:-1])]
    return sum(changes) / len(changes)
