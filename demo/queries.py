"""Questions about tables with the SQL queries that answer them: the task that the demo teaches.

A question is one of several phrasings of a query's shape, about a random table, column and value. Held-out
questions are about tables that occur in no training row, so that only the format can be learned:

    Question: How many ships have the flag Norway?
    SQL: SELECT COUNT(*) FROM ships WHERE flag = 'Norway';
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

COUNTRIES = ("Spain", "Norway", "Kenya", "Brazil", "Japan", "Canada", "Egypt", "Poland", "India")
COLORS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey")
CITIES = ("Lisbon", "Oslo", "Lima", "Cairo", "Boston", "Dublin", "Kyoto", "Prague", "Milan")


@dataclass(frozen=True)
class Table:
    """A table with a column `name`, columns of words with some values, and columns of numbers up to a limit."""

    name: str
    words: dict[str, Sequence[str]]
    numbers: dict[str, int]


TRAIN_TABLES = (
    Table(
        "singers",
        {"country": COUNTRIES, "genre": ("jazz", "rock", "folk")},
        {"height": 200, "salary": 900},
    ),
    Table("ships", {"flag": COUNTRIES, "harbor": CITIES}, {"length": 300, "speed": 40}),
    Table(
        "books",
        {"language": ("Dutch", "Greek", "Czech"), "color": COLORS},
        {"length": 700, "price": 60},
    ),
    Table("hotels", {"city": CITIES, "country": COUNTRIES}, {"price": 400, "rating": 9}),
    Table(
        "students",
        {"city": CITIES, "subject": ("law", "physics", "art")},
        {"score": 100, "debt": 90},
    ),
    Table(
        "horses", {"color": COLORS, "owner": ("Ana", "Ben", "Omar")}, {"weight": 700, "speed": 50}
    ),
    Table(
        "bridges",
        {"material": ("steel", "stone", "wood"), "city": CITIES},
        {"height": 90, "year": 1990},
    ),
    Table(
        "films",
        {"country": COUNTRIES, "genre": ("drama", "comedy")},
        {"length": 200, "budget": 90},
    ),
    Table(
        "cars", {"color": COLORS, "maker": ("Fiat", "Ford", "Honda")}, {"price": 900, "power": 300}
    ),
)
TEST_TABLES = (
    Table("museums", {"city": CITIES, "theme": ("music", "trains")}, {"fee": 90, "size": 600}),
    Table("farms", {"country": COUNTRIES, "crop": ("rice", "wheat")}, {"profit": 500, "depth": 40}),
    Table("kites", {"color": COLORS, "shape": ("star", "fish")}, {"width": 90, "cost": 70}),
)
SHAPES = (
    (
        "SELECT {column} FROM {table} WHERE {word} = '{value}';",
        "What is the {column} of the {table} whose {word} is {value}?",
        "Show the {column} of all {table} with the {word} {value}.",
        "For the {word} {value}, list the {column} of the {table}.",
    ),
    (
        "SELECT COUNT(*) FROM {table} WHERE {word} = '{value}';",
        "How many {table} have the {word} {value}?",
        "Count the {table} whose {word} is {value}.",
        "What is the number of {table} with the {word} {value}?",
    ),
    (
        "SELECT name FROM {table} WHERE {number} > {limit};",
        "Which {table} have a {number} above {limit}?",
        "Name all {table} whose {number} is more than {limit}.",
        "Find the {table} with a {number} over {limit}.",
    ),
    (
        "SELECT name FROM {table} ORDER BY {number} DESC LIMIT {count};",
        "Which {count} {table} have the highest {number}?",
        "Name the {count} {table} with the largest {number}.",
        "Show the top {count} {table} by {number}.",
    ),
    (
        "SELECT AVG({number}) FROM {table} WHERE {word} = '{value}';",
        "What is the average {number} of {table} whose {word} is {value}?",
        "Give the mean {number} of the {table} with the {word} {value}.",
        "For the {word} {value}, what is the mean {number} of the {table}?",
    ),
)
"""Each a query and phrasings of its question."""


def split(train: int, test: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Draw rows {"prompt", "completion"} with different prompts, those of `test` about other tables."""
    rng = random.Random(seed)
    return _draw(rng, TRAIN_TABLES, train), _draw(rng, TEST_TABLES, test)


def _draw(rng: random.Random, tables: Sequence[Table], count: int) -> list[dict[str, str]]:
    rows: dict[str, str] = {}
    while len(rows) < count:
        table = rng.choice(tables)
        word, number = rng.choice([*table.words]), rng.choice([*table.numbers])
        query, *phrasings = rng.choice(SHAPES)
        blanks = {
            "table": table.name,
            "word": word,
            "value": rng.choice(table.words[word]),
            "number": number,
            "column": rng.choice(["name", *(c for c in table.words if c != word), *table.numbers]),
            "limit": rng.randrange(table.numbers[number] // 2, table.numbers[number]),
            "count": rng.randint(2, 9),
        }
        question = rng.choice(phrasings).format(**blanks)
        rows[f"Question: {question}\nSQL:"] = " " + query.format(**blanks)
    return [{"prompt": prompt, "completion": query} for prompt, query in rows.items()]
