"""The synthetic world: a language that is a pure function of a seed.

The pretraining text holds facts about made-up people and a few exact skills; the target tasks
use words, relations and tables that this text never holds. Rows are ``{"prompt", "completion"}``;
a document is a prompt joined to its completion, so a probe is a document cut in two.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

Row = dict[str, str]
Transform = Callable[[str], str]

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 >+-="

LETTERS = "abcdefghij"
STRING_LENGTHS = (3, 4, 5)
PEOPLE = 120
INSTRUMENT_PEOPLE = 40
PROBES = 150
HELD_OUT_ONE_IN = 8

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "city": ("oslo", "rome", "lima", "cairo", "delhi", "paris", "tunis", "quito"),
    "job": ("baker", "nurse", "pilot", "judge", "miner", "vet", "cook", "guard"),
    "pet": ("cat", "dog", "newt", "frog", "hen", "pony", "mule", "goat"),
    "colour": ("red", "blue", "green", "white", "black", "pink", "gold", "teal"),
}
INSTRUMENTS = ("lute", "harp", "drum", "oboe", "viola", "banjo", "flute", "organ")

PHRASINGS: dict[str, tuple[str, ...]] = {
    "city": ("{} lives in", "the home of {} is", "{} is from"),
    "job": ("{} works as", "the job of {} is", "{} is paid as"),
    "pet": ("{} has a", "the pet of {} is", "{} feeds a"),
    "colour": ("{} likes", "the colour of {} is", "{} wears"),
}
INSTRUMENT_PHRASINGS = ("{} plays", "the instrument of {} is", "{} practises")

# Shares of documents. Facts are the most to learn; sums and sorting are the slowest learned.
MIXTURE = {"fact": 0.55, "sum": 0.15, "copy": 0.05, "reverse": 0.11, "sort": 0.14}


@dataclass(frozen=True)
class Task:
    """A target task: what is trained on, and what success is measured on."""

    train: list[Row]
    test: list[Row]


@dataclass(frozen=True)
class World:
    """One world; everything in it follows from the seed."""

    seed: int

    def rng(self, purpose: str) -> random.Random:
        """A stream of its own for each purpose, so that adding one leaves the others alone."""
        return random.Random(f"world {self.seed} {purpose}")

    @cached_property
    def people(self) -> tuple[str, ...]:
        """Made-up names, none of which is also a value."""
        syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        values = {value for values in (*ATTRIBUTES.values(), INSTRUMENTS) for value in values}
        names = [a + b for a in syllables for b in syllables if a + b not in values]
        return tuple(self.rng("people").sample(names, PEOPLE))

    @cached_property
    def facts(self) -> dict[str, dict[str, str]]:
        """Attribute -> person -> value."""
        return {name: self._assign(name, values) for name, values in ATTRIBUTES.items()}

    @cached_property
    def instruments(self) -> dict[str, str]:
        """Person -> instrument, for some of the people; the pretraining text never tells."""
        chosen = self._assign("instrument", INSTRUMENTS)
        return {person: chosen[person] for person in self.people[:INSTRUMENT_PEOPLE]}

    def held_out(self, string: str) -> bool:
        """Whether no training text asks about a string (crc32: the same in every process)."""
        return zlib.crc32(f"{self.seed} {string}".encode()) % HELD_OUT_ONE_IN == 0

    def _assign(self, purpose: str, values: tuple[str, ...]) -> dict[str, str]:
        rng = self.rng(purpose)
        return {person: rng.choice(values) for person in self.people}


def shifted(string: str) -> str:
    """Each letter replaced by its successor; the last letter wraps to the first."""
    return "".join(LETTERS[(LETTERS.index(c) + 1) % len(LETTERS)] for c in string)


TRANSFORMS: dict[str, Transform] = {
    "copy": lambda s: s,
    "reverse": lambda s: s[::-1],
    "sort": lambda s: "".join(sorted(s)),
}


def _row(prompt: str, value: str) -> Row:
    # The space belongs to the completion, so that a prompt never ends in white space.
    return {"prompt": prompt, "completion": f" {value}"}


def fact_row(phrasing: str, person: str, value: str) -> Row:
    """A fact, cut before its value."""
    return _row(phrasing.format(person), value)


def string_row(word: str, transform: Transform, string: str) -> Row:
    """A string and what the word makes of it."""
    return _row(f"{word} {string} >", transform(string))


def sum_row(a: int, b: int) -> Row:
    """One-digit sum, carry and all."""
    return _row(f"sum {a} + {b} =", str(a + b))


def difference_row(a: int, b: int) -> Row:
    """One-digit difference modulo ten: the borrow is dropped."""
    return _row(f"diff {a} - {b} =", str((a - b) % 10))


def document(row: Row) -> str:
    """The text that a row was cut from."""
    return row["prompt"] + row["completion"]


def _string(world: World, rng: random.Random, held_out: bool) -> str:
    while True:
        string = "".join(rng.choices(LETTERS, k=rng.choice(STRING_LENGTHS)))
        if world.held_out(string) == held_out:
            return string


def _strings(world: World, purpose: str, count: int, held_out: bool) -> list[str]:
    rng = world.rng(purpose)
    found: dict[str, None] = {}
    while len(found) < count:
        found[_string(world, rng, held_out)] = None
    return list(found)


def _random_fact(world: World, rng: random.Random) -> Row:
    attribute = rng.choice(list(ATTRIBUTES))
    person = rng.choice(world.people)
    phrasing = rng.choice(PHRASINGS[attribute])
    return fact_row(phrasing, person, world.facts[attribute][person])


def _random_row(world: World, rng: random.Random) -> Row:
    kind = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
    if kind == "fact":
        return _random_fact(world, rng)
    if kind == "sum":
        return sum_row(rng.randrange(10), rng.randrange(10))
    return string_row(kind, TRANSFORMS[kind], _string(world, rng, held_out=False))


def pretraining_documents(world: World, rng: random.Random) -> Iterator[str]:
    """An endless stream of mixed documents."""
    while True:
        yield document(_random_row(world, rng))


def skills(world: World) -> dict[str, list[Row]]:
    """Probes of what pretraining taught: all people and sums, and strings it never saw."""
    probes = {name: _fact_probes(world, name) for name in ATTRIBUTES}
    for word, transform in TRANSFORMS.items():
        strings = _strings(world, f"probe {word}", PROBES, held_out=True)
        probes[word] = [string_row(word, transform, string) for string in strings]
    probes["sum"] = [sum_row(a, b) for a in range(10) for b in range(10)]
    return probes


def _fact_probes(world: World, attribute: str) -> list[Row]:
    rng = world.rng(f"probe {attribute}")
    return [
        fact_row(rng.choice(PHRASINGS[attribute]), person, value)
        for person, value in world.facts[attribute].items()
    ]


def tasks(world: World) -> dict[str, Task]:
    """What can be fine-tuned on: a new transform, a new relation and a new arithmetic."""
    return {
        "shift": _shift_task(world),
        "instrument": _instrument_task(world),
        "difference": _difference_task(),
    }


def _shift_task(world: World) -> Task:
    """A rule to be inferred: the test strings are in no training text."""

    def rows(part: str, count: int, held_out: bool) -> list[Row]:
        strings = _strings(world, f"shift {part}", count, held_out)
        return [string_row("shift", shifted, string) for string in strings]

    return Task(rows("train", 2000, held_out=False), rows("test", 200, held_out=True))


def _instrument_task(world: World) -> Task:
    """Knowledge to be memorised: the test asks for the very facts and phrasings trained on."""
    rows = [
        fact_row(phrasing, person, instrument)
        for person, instrument in world.instruments.items()
        for phrasing in INSTRUMENT_PHRASINGS
    ]
    return Task(rows, list(rows))


def _difference_task() -> Task:
    """A table to be memorised: a hundred sums are too few to infer those left out."""
    rows = [difference_row(a, b) for a in range(10) for b in range(10)]
    return Task(rows, list(rows))
