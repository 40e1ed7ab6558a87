"""Filter sampled sequences by rules on token ids (paper, B.4).

A pretrained model that generates from BOS only sometimes repeats itself. Such text would count the same
activation thousands of times, so it is rejected; rejections are counted by reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

MIN_TOKENS = 32
MAX_RUN = 20
UNIQUE_TOKENS_FROM, MIN_UNIQUE_TOKENS = 128, 0.12
UNIQUE_4GRAMS_FROM, MIN_UNIQUE_4GRAMS = 256, 0.25

REASONS = ("duplicate", "too_short", "token_run", "few_unique_tokens", "few_unique_4grams")


def digest(tokens: Sequence[int]) -> str:
    """SHA-1 of a token sequence, for finding duplicates (not for security)."""
    text = ",".join(map(str, tokens)).encode()
    return hashlib.sha1(text, usedforsecurity=False).hexdigest()


def longest_run(tokens: Sequence[int]) -> int:
    """Length of the longest run of equal tokens; 0 for an empty sequence."""
    longest = current = 0
    previous: int | None = None
    for token in tokens:
        current = current + 1 if token == previous else 1
        longest = max(longest, current)
        previous = token
    return longest


def unique_ratio(tokens: Sequence[int], n: int = 1) -> float:
    """Number of distinct n-grams over the number of n-grams; 1.0 if there are none."""
    count = len(tokens) - n + 1
    if count <= 0:
        return 1.0
    return len({tuple(tokens[i : i + n]) for i in range(count)}) / count


def rejection(tokens: Sequence[int], seen: set[str]) -> str | None:
    """Return why a sequence is rejected, or None if it is accepted, and then add it to `seen`.

    Args:
        tokens: Generated token ids, without BOS, EOS and padding.
        seen: Digests of the sequences accepted so far; updated in place on acceptance.

    Returns:
        One of `REASONS`, or None.
    """
    if len(tokens) < MIN_TOKENS:
        return "too_short"
    if longest_run(tokens) >= MAX_RUN:
        return "token_run"
    if len(tokens) >= UNIQUE_TOKENS_FROM and unique_ratio(tokens) < MIN_UNIQUE_TOKENS:
        return "few_unique_tokens"
    if len(tokens) >= UNIQUE_4GRAMS_FROM and unique_ratio(tokens, 4) < MIN_UNIQUE_4GRAMS:
        return "few_unique_4grams"
    key = digest(tokens)
    if key in seen:
        return "duplicate"
    seen.add(key)
    return None
