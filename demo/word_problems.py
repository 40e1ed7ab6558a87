"""Worked arithmetic word problems in a fixed style: the templated task of the demo.

A problem is drawn from a template with random names, things and numbers; its solution is a chain
of steps and the answer, " 3 * 12 = 36; 36 - 7 = 29. #### 29". No model writes this style
unprompted, so there is something to learn, and the number after "####" is easy to check.

All draws come from one seeded generator, so equal arguments give equal rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Ana Ben Carla David Elif Femi Greta Hugo Ines Jamal Keiko Liam Maya Nadia Omar Priya Quentin "
    "Rosa Samir Tara Ulla Victor Wanda Xavier Yusuf Zoe Anton Bianca Chen Dora Emil Farah Goran "
    "Hana Igor Julia Kofi Lena Mateo Noor"
)
THINGS = _words(
    "pencils apples marbles stickers books coins shells stamps buttons cards beads balloons "
    "oranges candles cups keys stones plates roses lemons crayons ribbons bottles eggs toys "
    "postcards peaches magnets bells pears"
)
VEHICLES = _words("bus truck car van train tram coach taxi jeep motorbike")
CARRIERS = _words("bus train tram boat")
BAKED = _words("cookies muffins rolls pies waffles pretzels scones biscuits tarts cupcakes")
PLANTS = _words("trees bushes tulips cabbages vines palms lilies beans onions ferns")
KIN = _words("aunt uncle teacher neighbor grandmother grandfather")
READINGS = _words("book novel diary comic guide story report play manual magazine")
AIMS = _words("bike guitar coat trip drum tent lamp camera watch desk")

SEPARATOR = "####"


@dataclass(frozen=True)
class Step:
    """One step of a solution, such as 3 * 12 = 36."""

    left: int
    operator: str
    right: int

    @property
    def result(self) -> int:
        """The exact result; a division must leave no remainder."""
        if self.operator == "/":
            quotient, remainder = divmod(self.left, self.right)
            if remainder:
                raise ValueError(f"{self.left} / {self.right} is not a whole number")
            return quotient
        if self.operator == "*":
            return self.left * self.right
        return self.left + self.right if self.operator == "+" else self.left - self.right

    def __str__(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.result}"


@dataclass(frozen=True)
class Problem:
    """The text of a problem and the steps that solve it; the last result is the answer."""

    text: str
    steps: tuple[Step, ...]

    def row(self) -> dict[str, str]:
        """The problem as a training row."""
        solution = "; ".join(str(step) for step in self.steps)
        return {
            "prompt": f"Problem: {self.text}\nSolution:",
            "completion": f" {solution}. {SEPARATOR} {self.steps[-1].result}",
        }


class Draw:
    """Random names, things and numbers for one problem."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def number(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return self.rng.randint(low, high)

    def less_than(self, limit: int) -> int:
        """A number from 2 on that can be taken from ``limit`` and leaves at least 2."""
        return self.rng.randint(2, limit - 2)

    def one(self, words: list[str]) -> str:
        """One of the words."""
        return self.rng.choice(words)

    def two(self, words: list[str]) -> list[str]:
        """Two different words."""
        return self.rng.sample(words, 2)


def _boxes(d: Draw) -> Problem:
    name, thing, boxes, each = d.one(NAMES), d.one(THINGS), d.number(2, 9), d.number(5, 20)
    packed = Step(boxes, "*", each)
    given = d.less_than(packed.result)
    return Problem(
        f"{name} has {boxes} boxes with {each} {thing} each and gives {given} away. "
        f"How many {thing} are left?",
        (packed, Step(packed.result, "-", given)),
    )


def _change(d: Draw) -> Problem:
    name, thing, count, price = d.one(NAMES), d.one(THINGS), d.number(2, 9), d.number(2, 15)
    cost = Step(count, "*", price)
    paid = cost.result + d.number(2, 60)
    return Problem(
        f"{name} has {paid} dollars and buys {count} {thing} for {price} dollars each. "
        "How many dollars are left?",
        (cost, Step(paid, "-", cost.result)),
    )


def _shopping(d: Draw) -> Problem:
    name, (one, other) = d.one(NAMES), d.two(THINGS)
    first = Step(d.number(2, 9), "*", d.number(2, 11))
    second = Step(d.number(2, 9), "*", d.number(2, 11))
    return Problem(
        f"{name} buys {first.left} {one} at {first.right} dollars each and "
        f"{second.left} {other} at {second.right} dollars each. How many dollars is that?",
        (first, second, Step(first.result, "+", second.result)),
    )


def _unit_price(d: Draw) -> Problem:
    name, thing, price = d.one(NAMES), d.one(THINGS), d.number(2, 15)
    count, wanted = d.rng.sample(range(2, 14), 2)
    unit = Step(count * price, "/", count)
    return Problem(
        f"{count} {thing} cost {unit.left} dollars. How many dollars does {name} pay for "
        f"{wanted} {thing}?",
        (unit, Step(unit.result, "*", wanted)),
    )


def _sharing(d: Draw) -> Problem:
    name, thing, friends, share = d.one(NAMES), d.one(THINGS), d.number(2, 9), d.number(3, 18)
    kept = d.number(2, 30)
    total = friends * share + kept
    rest = Step(total, "-", kept)
    return Problem(
        f"{name} has {total} {thing}, keeps {kept} and shares the rest equally among "
        f"{friends} friends. How many {thing} does each friend get?",
        (rest, Step(rest.result, "/", friends)),
    )


def _pooling(d: Draw) -> Problem:
    (one, other), thing, ways, share = d.two(NAMES), d.one(THINGS), d.number(2, 9), d.number(4, 18)
    first = d.less_than(ways * share)
    pool = Step(first, "+", ways * share - first)
    return Problem(
        f"{one} has {first} {thing} and {other} has {pool.right}. They fill {ways} equal bags "
        f"with them. How many {thing} are in each bag?",
        (pool, Step(pool.result, "/", ways)),
    )


def _baking(d: Draw) -> Problem:
    name, baked, size, bags = d.one(NAMES), d.one(BAKED), d.number(2, 12), d.number(2, 14)
    eaten = d.number(2, 25)
    rest = Step(size * bags + eaten, "-", eaten)
    return Problem(
        f"{name} bakes {rest.left} {baked}, eats {eaten} and packs the rest in bags of {size}. "
        "How many bags are there?",
        (rest, Step(rest.result, "/", size)),
    )


def _distance(d: Draw) -> Problem:
    name, vehicle, speed, hours = d.one(NAMES), d.one(VEHICLES), d.number(12, 50), d.number(2, 3)
    extra = d.number(2, 40)
    way = Step(speed, "*", hours)
    return Problem(
        f"{name}'s {vehicle} goes {speed} km an hour for {hours} hours, then {extra} km more. "
        "How many km is that?",
        (way, Step(way.result, "+", extra)),
    )


def _ages(d: Draw) -> Problem:
    (one, other), age, older, times = d.two(NAMES), d.number(3, 13), d.number(2, 9), d.number(2, 4)
    second = Step(age, "+", older)
    kin = d.one(KIN)
    return Problem(
        f"{one} is {age}. {other} is {older} years older, and {other}'s {kin} is {times} times "
        f"as old as {other}. How old is the {kin}?",
        (second, Step(second.result, "*", times)),
    )


def _collecting(d: Draw) -> Problem:
    (one, other), thing, daily, days = d.two(NAMES), d.one(THINGS), d.number(3, 16), d.number(2, 9)
    more = d.number(4, 50)
    found = Step(daily, "*", days)
    return Problem(
        f"{one} collects {daily} {thing} a day for {days} days. {other} collects {more}. "
        f"How many {thing} do they have together?",
        (found, Step(found.result, "+", more)),
    )


def _reading(d: Draw) -> Problem:
    name, pages, days, rest = d.one(NAMES), d.number(4, 18), d.number(2, 9), d.number(5, 38)
    kind = d.one(READINGS)
    read = Step(pages, "*", days)
    total = read.result + rest
    return Problem(
        f"A {kind} has {total} pages. {name} reads {pages} pages a day for {days} days. "
        "How many pages are left?",
        (read, Step(total, "-", read.result)),
    )


def _saving(d: Draw) -> Problem:
    name, start, weekly, weeks = d.one(NAMES), d.number(5, 60), d.number(3, 15), d.number(2, 9)
    aim = d.one(AIMS)
    saved = Step(weekly, "*", weeks)
    return Problem(
        f"{name} has {start} dollars for a {aim} and saves {weekly} dollars a week. "
        f"How many dollars are there after {weeks} weeks?",
        (saved, Step(start, "+", saved.result)),
    )


def _earning(d: Draw) -> Problem:
    name, wage, hours, thing = d.one(NAMES), d.number(6, 20), d.number(2, 9), d.one(THINGS)
    pay = Step(wage, "*", hours)
    spent = d.less_than(pay.result)
    return Problem(
        f"{name} earns {wage} dollars an hour, works {hours} hours and spends {spent} dollars on "
        f"{thing}. How many dollars are left?",
        (pay, Step(pay.result, "-", spent)),
    )


def _garden(d: Draw) -> Problem:
    name, (one, other), rows, each = d.one(NAMES), d.two(PLANTS), d.number(2, 12), d.number(3, 14)
    more = d.number(2, 30)
    planted = Step(rows, "*", each)
    return Problem(
        f"{name} plants {rows} rows of {each} {one} and also {more} {other}. "
        "How many plants is that?",
        (planted, Step(planted.result, "+", more)),
    )


def _comparing(d: Draw) -> Problem:
    (one, other), thing, count, times = d.two(NAMES), d.one(THINGS), d.number(3, 30), d.number(3, 6)
    many = Step(count, "*", times)
    return Problem(
        f"{one} has {count} {thing} and {other} has {times} times as many. "
        f"How many more {thing} does {other} have?",
        (many, Step(many.result, "-", count)),
    )


def _passengers(d: Draw) -> Problem:
    name, vehicle, riders = d.one(NAMES), d.one(CARRIERS), d.number(12, 90)
    off, on = d.number(2, riders - 4), d.number(2, 40)
    rest = Step(riders, "-", off)
    return Problem(
        f"{name}'s {vehicle} has {riders} riders. Then {off} get off and {on} get on. "
        "How many riders are there now?",
        (rest, Step(rest.result, "+", on)),
    )


def _giving(d: Draw) -> Problem:
    (one, other), thing, count = d.two(NAMES), d.one(THINGS), d.number(10, 120)
    gift, bought = d.less_than(count), d.number(2, 60)
    rest = Step(count, "-", gift)
    return Problem(
        f"{one} has {count} {thing}, gives {gift} to {other} and buys {bought} more. "
        f"How many {thing} does {one} have now?",
        (rest, Step(rest.result, "+", bought)),
    )


def _piles(d: Draw) -> Problem:
    (one, other), thing, piles, each = d.two(NAMES), d.one(THINGS), d.number(2, 10), d.number(3, 18)
    return Problem(
        f"{one} helps {other} sort {piles * each} {thing} into {piles} equal piles. "
        f"How many {thing} are in each pile?",
        (Step(piles * each, "/", piles),),
    )


def _packets(d: Draw) -> Problem:
    (one, other), thing, packets = d.two(NAMES), d.one(THINGS), d.number(2, 9)
    size = d.number(3, 20)
    return Problem(
        f"{one} sends {other} {packets} packets of {size} {thing}. How many {thing} is that?",
        (Step(packets, "*", size),),
    )


TEMPLATES: tuple[Callable[[Draw], Problem], ...] = (
    _boxes,
    _change,
    _shopping,
    _unit_price,
    _sharing,
    _pooling,
    _baking,
    _distance,
    _ages,
    _collecting,
    _reading,
    _saving,
    _earning,
    _garden,
    _comparing,
    _passengers,
    _giving,
    _piles,
    _packets,
)


def generate(count: int, seed: int) -> list[dict[str, str]]:
    """Draw ``count`` rows {"prompt", "completion"} with different prompts."""
    draw = Draw(random.Random(seed))
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        row = draw.rng.choice(TEMPLATES)(draw).row()
        rows.setdefault(row["prompt"], row)
    return list(rows.values())


def split(train: int, test: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Draw ``train`` and ``test`` rows of which no two share a prompt."""
    rows = generate(train + test, seed)
    return rows[:train], rows[train:]


def answer_of(completion: str) -> str | None:
    """The answer that a completion states after "####", or None where it states none."""
    return completion.partition(SEPARATOR)[2].strip() or None


if __name__ == "__main__":
    for row in split(600, 64, seed=0)[0]:
        print(json.dumps(row))
