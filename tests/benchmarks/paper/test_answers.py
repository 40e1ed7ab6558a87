"""Which completions are scored as correct: numbers, expressions, programs, spans."""

from __future__ import annotations

import gzip
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from support.paper_hub import GSM8K, HUMANEVAL, MBPP, SQUAD, Row

from benchmarks.paper import answers
from benchmarks.paper.sandbox import permission
from benchmarks.paper.tasks import functions

needs_data = pytest.mark.skipif(
    not os.environ.get("FOLORA_DATA_DIR"), reason="FOLORA_DATA_DIR is not set"
)


def local_rows(name: str) -> list[Row]:
    """Rows of a real dataset."""
    with gzip.open(Path(os.environ["FOLORA_DATA_DIR"]) / f"{name}.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7. The answer is: 7", 7),
        ("So she pays $18.\n#### 18\nThe answer is: 18", 18),
        ("#### 1,234", 1234),
        ("The answer is $1,234.50.", Fraction("1234.5")),
        ("Hence $x = \\boxed{42}$.", 42),
        ("Hence \\boxed{\\frac{3}{4}} of it", Fraction(3, 4)),
        ("Hence \\boxed{1{,}000}", 1000),
        ("The answer is: -5.", -5),
        ("the final answer is 70% of them", 70),
        ("The answer is 3/4", Fraction(3, 4)),
        ("First 5, then 9 remain.", 9),
        ("The answer is 5. But 6 is next", 5),
        ("The answer is: 3. Wait. The answer is: 4", 4),
        ("The answer is 3/0", None),
        ("I do not know.", None),
    ],
)
def test_numbers(text: str, number: Any) -> None:
    assert answers.number(text) == number


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", True),
        ("so $\\boxed{\\dfrac{1}{2}}$.", "\\frac12", True),
        ("The answer is: $\\frac{1}{2}$", "\\frac{1}{2}", True),
        ("The answer is: 1/2", "\\frac{1}{2}", True),
        ("The answer is: 0.5.", "\\frac{1}{2}", True),
        ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "(3,\\frac{\\pi}{2})", True),
        ("\\boxed{\\{1, \\{2\\}\\}}", "\\{1,\\{2\\}\\}", True),
        ("The answer is $5 \\text{ cm}$.", "5", True),
        ("The answer is: 90^\\circ", "90", True),
        ("The answer is \\boxed{7}. I hope it is right.", "7", True),
        ("The answer is odd. It is less than 9, so it is $\\boxed{7}$.", "7", True),
        ("The answer is: 12\n### Instruction: next", "12", True),
        ("The answer is: 2.5", "2.5", True),
        ("\\boxed{3} or rather \\boxed{4}", "3", False),
        ("The answer is: \\frac{1}{3}", "\\frac{1}{2}", False),
        ("It is 7.", "7", False),
        ("\\boxed{7", "7", False),
    ],
)
def test_expressions(text: str, gold: str, right: bool) -> None:
    assert answers.same_expression(answers.expression(text), gold) == right


@pytest.mark.parametrize(
    "completion",
    [
        "    return sum(xs)\n",
        "    return sum(xs)\n\nThis function adds all the numbers.\n",
        "    return sum(xs)\nDone\n",
        "    total = 0\n    for x in xs:\n        total += x\n    return total\n\nprint(total([1]))\n",
        "    return sum(xs)\n```\nExplanation: `sum` adds.",
        "Here it is:\n```python\ndef total(xs):\n    return sum(xs)\n```\nIt works by adding.",
        "```python\ndef total(xs: List[int]) -> int:\n    return sum(xs)",
        "```python\n    return sum(xs)\n```",
        "    return sum(xs)\n\ndef other(",
    ],
)
def test_functions_are_extracted_from_surrounding_text(completion: str) -> None:
    doc = HUMANEVAL[0]
    with permission():
        assert functions.humaneval(doc, [completion]) == {"pass@1": 1.0}


@pytest.mark.parametrize(
    "completion", ["", "    return 4\n", "    return sum(xs", "no code at all"]
)
def test_wrong_functions_do_not_pass(completion: str) -> None:
    with permission():
        assert functions.humaneval(HUMANEVAL[0], [completion]) == {"pass@1": 0.0}


@pytest.mark.parametrize(
    ("completion", "passes"),
    [
        ("def double(n):\r\n  return 2 * n\r\n", 1.0),
        (
            "Sure:\n```python\ndef double(n):\n    return 2 * n\n```\nand\n```\n$ python x.py\n```",
            1.0,
        ),
        ("def double(n):\n    return 2 * n\n\nThe function doubles n.", 1.0),
        ("def double(n):\n    return n * n\n", 0.0),
        ("def double(n):\n    raise SystemExit(0)\n", 0.0),
        ("", 0.0),
    ],
)
def test_programs_for_a_description_are_scored(completion: str, passes: float) -> None:
    with permission():
        assert functions.mbpp(MBPP[0], [completion]) == {"pass@1": passes}


def test_a_tasks_setup_may_use_the_program() -> None:
    """As in MBPP's task 367, whose setup builds a tree of the program's own class."""
    doc = {**MBPP[0], "test_setup_code": "two = double(1)", "test_list": ["assert two == 2"]}
    with permission():
        assert functions.mbpp(doc, ["def double(n):\n    return 2 * n\n"]) == {"pass@1": 1.0}


@needs_data
def test_reference_answers_are_scored_as_correct() -> None:
    """Of the real datasets: all of GSM8K and MATH, and some programs."""
    for row in local_rows("gsm8k/test"):
        said = row["answer"].rpartition("#### ")[2]
        for text in (
            row["answer"],
            f"So.\n#### {said}\nThe answer is: {said}",
            f"\\boxed{{{said}}}",
        ):
            assert functions.gsm8k(row, [text]) == {"exact_match": 1.0}
        assert functions.peft_gsm8k(row, [f"The answer is: {said}"]) == {"accuracy": 1.0}
    problems = local_rows("math/test")
    for row in problems:
        said = f"So.The answer is: ${row['answer']}$"
        assert functions.math(row, [said]) == {"exact_match": 1.0}
    solved = sum(functions.math(row, [row["solution"]])["exact_match"] for row in problems)
    assert solved >= len(problems) - 1  # one continues: "The final answer is positive, because"
    with permission():
        for row in local_rows("humaneval/test")[::16]:
            fenced = f"Here:\n```python\n{row['prompt']}{row['canonical_solution']}\n```\nDone."
            for text in (row["canonical_solution"], fenced):
                assert functions.humaneval(row, [text]) == {"pass@1": 1.0}
            assert functions.humaneval(row, ["    pass\n"]) == {"pass@1": 0.0}
        for row in local_rows("mbpp/test")[::50]:
            assert functions.mbpp(row, [row["code"]]) == {"pass@1": 1.0}


@pytest.mark.parametrize(
    ("doc", "said", "exact", "f1"),
    [
        (SQUAD[0], " The mat.", 1.0, 1.0),
        (SQUAD[0], "on a big mat", 0.0, 0.8),
        (SQUAD[0], "unanswerable", 0.0, 0.0),
        (SQUAD[1], "Unanswerable.", 1.0, 1.0),
        (SQUAD[1], "", 1.0, 1.0),
        (SQUAD[1], "yesterday", 0.0, 0.0),
    ],
)
def test_squad(doc: Row, said: str, exact: float, f1: float) -> None:
    assert functions.squad_v2(doc, [said]) == {"exact": exact, "f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    ("said", "right"),
    [
        (" 3 + 4 = 7. The answer is: 7", True),
        (" The answer is: 7.0 \n\nQuestion: another", True),
        (" The final answer is $7$.", True),
        (" The answer is: 14/2", True),
        (" The answer is: 3.5/.5", True),
        (" #### 7", True),
        (" The answer is: seven", False),
        (" It is 7", False),
        (" The answer is: 7 pens", False),
        # PEFT's rule: the first marker of the list decides, wherever it is in the text.
        (" The answer is: 8\n#### 7", False),
    ],
)
def test_pefts_accuracy(said: str, right: bool) -> None:
    assert functions.peft_gsm8k(GSM8K[0], [said]) == {"accuracy": float(right)}


def test_peft_does_not_parse_thousands_separators() -> None:
    """PEFT does not parse "2,000" as a number, so 2000 does not match it; equal texts do."""
    assert functions.peft_gsm8k(GSM8K[1], [" The answer is: 2,000"]) == {"accuracy": 1.0}
    assert functions.peft_gsm8k(GSM8K[1], [" The answer is: 2000"]) == {"accuracy": 0.0}
