"""Each rule of the filter at its boundary."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from folora.filtering import REASONS, longest_run, rejection, unique_ratio


def test_too_short_at_the_boundary() -> None:
    assert rejection(list(range(31)), set()) == "too_short"
    assert rejection(list(range(32)), set()) is None


def test_runs() -> None:
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
def test_always_a_known_reason(tokens: list[int]) -> None:
    assert rejection(tokens, set()) in (None, *REASONS)
