"""Sources of calibration text, mixed by share, and the `Script` of each sequence.

Sequences are numbered. The mixture maps a number to a source and a number within it, so that each source has
its share of any first n numbers. A script says which tokens of a sequence are given; the model writes the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from folora.calibration.filters import MIN_TOKENS, UNANSWERED, rejection
from folora.config import BOS
from folora.runtime.fingerprints import tokens_fingerprint


@dataclass(frozen=True)
class Script:
    """What is given of a sequence.

    Attributes:
        opening: Its first tokens, at least one.
        insert: Tokens that replace the end of the model's first turn; the model then writes a second
            turn, the answer. Empty: it writes one turn.
        least: Tokens that it writes before a turn may end; None: ``sampling.min_new_tokens``.
        is_written: False if the opening is the whole sequence.
    """

    opening: tuple[int, ...]
    insert: tuple[int, ...] = ()
    least: int | None = 1
    is_written: bool = True

    @property
    def given(self) -> int:
        """Number of given tokens after the first."""
        return len(self.opening) - 1 + len(self.insert)

    def first_end(self, tokens: Sequence[int], ends: Collection[int]) -> int | None:
        """Index of the end of the first turn in the tokens after the opening."""
        return next((i for i, token in enumerate(tokens) if token in ends), None)

    def written(self, tokens: Sequence[int], ends: Collection[int], most: int) -> list[int]:
        """The tokens after the opening up to the end of the last turn, `most` that the model wrote at most."""
        found = [*tokens[: most + len(self.insert)]]
        start = 0
        if self.insert:
            if (first := self.first_end(found, ends)) is None:
                return found[:most]
            start = first + len(self.insert)
        last = self.first_end(found[start:], ends)
        return found if last is None else found[: start + last + 1]


@dataclass(frozen=True)
class Source:
    """A source of sequences.

    Attributes:
        name: As in ``sampling.sources``.
        share: Of all sequences, in (0, 1].
        scripts: Of each of its sequences; a single one for any number of them if `endless`.
        endless: Whether its one script is used again and again.
    """

    name: str
    share: float
    scripts: Sequence[Script]
    endless: bool = False

    def has(self, index: int) -> bool:
        """Whether it has a sequence of this number."""
        return self.endless or index < len(self.scripts)

    def script(self, index: int) -> Script:
        """The script of one of its sequences."""
        return self.scripts[0 if self.endless else index]

    def rejection(
        self, index: int, tokens: Sequence[int], ends: Collection[int], seen: set[tuple[int, ...]]
    ) -> str | None:
        """Why the tokens after the opening are rejected; None if they are accepted."""
        script = self.script(index)
        if not script.is_written:
            return None
        if script.insert:
            first = script.first_end(tokens, ends)
            if first is None or len(tokens) <= first + len(script.insert):
                return UNANSWERED
        body = tokens[:-1] if tokens and tokens[-1] in ends else tokens
        # Messages may be short, and answers to different prompts alike.
        least = MIN_TOKENS if script.least is None else 1
        return rejection(body, seen if self.endless else set(), least)


class Mixture:
    """Sources by share.

    Args:
        sources: Their shares sum to 1.
        start_id: The token that plain text starts from.
        turn_ends: Tokens that end a turn of a chat, beside the model's own ends of a sequence.
    """

    def __init__(
        self, sources: Sequence[Source], start_id: int, turn_ends: Sequence[int] = ()
    ) -> None:
        self.sources, self.start_id, self.turn_ends = tuple(sources), start_id, tuple(turn_ends)
        self._places: list[tuple[Source, int]] = []
        self._used = {source.name: 0 for source in self.sources}

    @classmethod
    def plain(cls, start_id: int) -> Mixture:
        """Text from the start token alone."""
        return cls([Source(BOS, 1.0, [Script((start_id,), least=None)], endless=True)], start_id)

    def place(self, number: int) -> tuple[Source, int] | None:
        """The source of a sequence and its number there; None if all sources are used up before it."""
        while number >= len(self._places):
            left = [s for s in self.sources if s.has(self._used[s.name])]
            if not left:
                return None
            source = most_behind(left, self._used)
            self._places.append((source, self._used[source.name]))
            self._used[source.name] += 1
        return self._places[number]

    def script(self, number: int) -> Script:
        """The script of a sequence; one that is not written if there is none."""
        found = self.place(number)
        return found[0].script(found[1]) if found else Script((self.start_id,), is_written=False)

    @property
    def given(self) -> int:
        """The most given tokens of a sequence that the model writes, after the first token."""
        scripts = [s for source in self.sources for s in source.scripts if s.is_written]
        return max((script.given for script in scripts), default=0)

    @property
    def shares(self) -> dict[str, float]:
        """Share of each source."""
        return {source.name: source.share for source in self.sources}

    def of_source(self, source: Source) -> str:
        """``" of NAME"``, for messages; nothing if there is one source."""
        return f" of {source.name}" if len(self.sources) > 1 else ""

    @property
    def facts(self) -> dict[str, Any]:
        """Fingerprint for manifests; empty for text from the start token alone, as before there were sources."""
        if [*self.shares] == [BOS]:
            return {}
        return {
            "mixture": {
                s.name: [s.share, tokens_fingerprint([[*x.opening, -1, *x.insert] for x in s.scripts])]
                for s in self.sources
            }
        }  # fmt: skip


def most_behind(sources: Sequence[Source], used: Mapping[str, int]) -> Source:
    """The source whose number of sequences is furthest below its share; the first of several."""
    total = sum(used.values()) + 1
    return max(sources, key=lambda source: source.share * total - used[source.name])


def as_mixture(start: int | Mixture) -> Mixture:
    """A mixture, or text from a start token alone."""
    return start if isinstance(start, Mixture) else Mixture.plain(start)
