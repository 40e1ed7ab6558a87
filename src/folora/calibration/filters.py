"""Filter sampled sequences by rules on token ids (paper, B.4).

A pretrained model that generates from BOS only sometimes repeats itself. Such text would count the same
activation thousands of times, so it is rejected; rejections are counted by reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

MIN_TOKENS = 32
MAX_RUN = 20
UNIQUE_TOKENS_FROM, MIN_UNIQUE_TOKENS = 128, 0.12
UNIQUE_4GRAMS_FROM, MIN_UNIQUE_4GRAMS = 256, 0.25

UNANSWERED = "unanswered"  # a dialogue that is cut before the answer
REASONS = (
    "duplicate", "too_short", "token_run", "few_unique_tokens", "few_unique_4grams", UNANSWERED,
)  # fmt: skip


def longest_run(tokens: Sequence[int]) -> int:
    """Length of the longest run of equal tokens; 0 for an empty sequence."""
    return max((len([*run]) for _, run in groupby(tokens)), default=0)


def unique_ratio(tokens: Sequence[int], n: int = 1) -> float:
    """Number of distinct n-grams over the number of n-grams; 1.0 if there are none."""
    count = len(tokens) - n + 1
    if count <= 0:
        return 1.0
    return len({tuple(tokens[i : i + n]) for i in range(count)}) / count


def rejection(
    tokens: Sequence[int], seen: set[tuple[int, ...]], least: int = MIN_TOKENS
) -> str | None:
    """Which of `REASONS` rejects a sequence; None if it is accepted, and then it is added to `seen`.

    The tokens are those generated, at least `least`, without BOS, EOS and padding.
    """
    if len(tokens) < least:
        return "too_short"
    if longest_run(tokens) >= MAX_RUN:
        return "token_run"
    if len(tokens) >= UNIQUE_TOKENS_FROM and unique_ratio(tokens) < MIN_UNIQUE_TOKENS:
        return "few_unique_tokens"
    if len(tokens) >= UNIQUE_4GRAMS_FROM and unique_ratio(tokens, 4) < MIN_UNIQUE_4GRAMS:
        return "few_unique_4grams"
    if tuple(tokens) in seen:
        return "duplicate"
    seen.add(tuple(tokens))
    return None
