"""Each rejection rule of the filter at its boundary."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from folora.calibration.filters import MIN_TOKENS, REASONS, longest_run, rejection, unique_ratio


def test_too_short_at_the_boundary() -> None:
    assert rejection(list(range(31)), set()) == "too_short"
    assert rejection(list(range(32)), set()) is None


def test_long_runs_of_one_token_are_rejected() -> None:
    assert rejection([*range(30), *[7] * 20], set()) == "token_run"
    assert rejection([*range(30), *[7] * 19], set()) is None


def test_unique_tokens_only_from_128_on() -> None:
    def pattern(kinds: int, length: int) -> list[int]:
        return [i % kinds for i in range(length)]

    assert rejection(pattern(15, 128), set()) == "few_unique_tokens"
    assert rejection(pattern(15, 127), set()) is None
    assert rejection(pattern(16, 128), set()) is None


def test_unique_4grams_only_from_256_on() -> None:
    def pattern(length: int) -> list[int]:
        return [i % 60 for i in range(length)]

    assert rejection(pattern(256), set()) == "few_unique_4grams"
    assert rejection(pattern(255), set()) is None


def test_duplicates_are_remembered_only_when_accepted() -> None:
    seen: set[str] = set()
    assert rejection(list(range(40)), seen) is None
    assert rejection(list(range(40)), seen) == "duplicate"
    assert rejection(list(range(20)), seen) == "too_short"
    assert len(seen) == 1


@given(st.lists(st.integers(0, 3), max_size=60))
def test_run_and_ratio_against_a_slow_count(tokens: list[int]) -> None:
    runs = [n for i in range(len(tokens)) for n in range(1, len(tokens) - i + 1)
            if len(set(tokens[i : i + n])) == 1]  # fmt: skip
    assert longest_run(tokens) == max(runs, default=0)
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    assert unique_ratio(tokens, 4) == (len(set(grams)) / len(grams) if grams else 1.0)


@given(st.lists(st.integers(0, 5), max_size=300))
def test_every_rejection_has_a_known_reason(tokens: list[int]) -> None:
    assert rejection(tokens, set()) in (None, *REASONS)


texts = st.one_of(
    st.lists(st.integers(0, 50), max_size=300),
    # Rarer: runs, few tokens and long periods.
    st.builds(
        lambda start, unit, times: [*start, *unit * times],
        st.lists(st.integers(0, 9), max_size=40),
        st.lists(st.integers(0, 90), min_size=1, max_size=60),
        st.integers(1, 12),
    ),
)


@given(texts)
def test_texts_are_judged_independently_and_kept_once(tokens: list[int]) -> None:
    seen: set[str] = set()
    first = rejection(tokens, seen)
    assert first != "duplicate"
    assert rejection(list(tokens), set()) == first
    assert rejection(tokens, seen) == ("duplicate" if first is None else first)
    assert len(seen) == (first is None)
    if first is None:
        assert len(tokens) >= MIN_TOKENS
        # Renaming tokens one to one changes nothing: only equality counts.
        assert rejection([1000 - t for t in tokens], seen) in (None, "duplicate")


@given(st.lists(texts, max_size=6), st.randoms(use_true_random=False))
def test_order_decides_only_which_of_two_equal_texts_is_the_duplicate(
    batch: list[list[int]], random: Random
) -> None:
    """The counts of reasons and the accepted texts are the same in any order."""
    batch = batch + batch[:2]

    def judged(order: list[list[int]]) -> tuple[Counter[str | None], set[tuple[int, ...]]]:
        seen: set[str] = set()
        reasons = [rejection(tokens, seen) for tokens in order]
        kept = {tuple(t) for t, reason in zip(order, reasons, strict=True) if reason is None}
        assert len(kept) == len(seen) == reasons.count(None)
        return Counter(reasons), kept

    shuffled = list(batch)
    random.shuffle(shuffled)
    assert judged(shuffled) == judged(batch)


@given(texts, st.integers(1, 5))
def test_the_unique_ngram_ratio_is_a_ratio(tokens: list[int], n: int) -> None:
    ratio = unique_ratio(tokens, n)
    assert 0 < ratio <= 1
    assert unique_ratio(tokens[::-1], n) == ratio  # reversal does not change it
    assert longest_run(tokens[::-1]) == longest_run(tokens) <= len(tokens)
    if n > 1:  # n-grams with different first tokens differ
        count = len(tokens) - n + 1
        assert count <= 0 or ratio * count >= len(set(tokens[:count]))
