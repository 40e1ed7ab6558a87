"""Extract answers from generated text, by the harness's functions where it has them.

Numbers: behind the last "The answer is", else behind "####", else in the last ``\\boxed``, else the
last number there is. Mathematics: likewise, without the last resort, compared by the harness's rules
for MATH. Code: the fenced block that defines the function, else the longest beginning that is Python.
"""

from __future__ import annotations

import ast
import re
import warnings
from fractions import Fraction
from operator import truediv

from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed

NUMBER = re.compile(r"-?\.?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d[\d,]*)?")
ANSWER = re.compile(r"the (?:final )?answer is\s*:?", re.IGNORECASE)
SENTENCE_END = re.compile(r"\.(?:\s|$)|\n")
BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)

PEFT_MARKS = (
    "The answer is: ",
    "The answer is ",
    "The final answer is: ",
    "The final answer is ",
    "#### ",
)


def number(text: str) -> Fraction | None:
    """The number that a solution ends with; None if it has none."""
    said = _behind_mark(text)
    if said is None and "####" in text:
        said = text.rpartition("####")[2]
    if said is None:
        said = boxed(text)
    found = NUMBER.findall(_without_latex(said)) if said is not None else []
    if found:
        return _fraction(found[0])
    found = NUMBER.findall(_without_latex(text))
    return _fraction(found[-1]) if found else None


def expression(text: str) -> str | None:
    """The final answer to a problem of MATH, as LaTeX; None if none is marked as such."""
    said = _behind_mark(text)
    return boxed(text) if said is None else said.strip().strip("$").strip()


def same_expression(answer: str | None, gold: str) -> bool:
    """Whether two answers are the same by the harness's rules for MATH."""
    return answer is not None and bool(is_equiv(answer, gold))


def boxed(text: str) -> str | None:
    """What is in the last ``\\boxed{...}``, however braces are nested."""
    found = last_boxed_only_string(text)
    if found is None or not found.startswith("\\boxed"):
        return None
    try:
        return str(remove_boxed(found))
    except AssertionError:  # neither \boxed{...} nor "\boxed "
        return None


def completed_function(prompt: str, completion: str, name: str) -> str:
    """The program for a prompt that ends inside a function, as HumanEval's do.

    Args:
        prompt: Imports, perhaps helpers, and the function's head with its docstring.
        completion: The function's body, or an answer with the whole function in a fenced block.
        name: Of the function.
    """
    blocks = [block for block in BLOCK.findall(completion) if f"def {name}" in block]
    if blocks:
        return python_of(f"{prompt}\n    pass\n\n{blocks[0]}")
    inside = BLOCK.match(completion.lstrip("\n"))
    body = inside.group(1) if inside else completion.partition("```")[0]
    return python_of(prompt + body)


def program_of(completion: str) -> str:
    """The program in an answer to a description in words, as for MBPP."""
    blocks = BLOCK.findall(completion)
    defining = [block for block in blocks if "def " in block]
    return python_of((defining or blocks or [completion])[0])


def python_of(text: str) -> str:
    """The longest beginning of a text that is Python, without what it calls for show at top level.

    Models talk on after the function; a single word would even be a valid line.
    """
    lines = text.replace("\r\n", "\n").replace("\x00", "").split("\n")
    for end in range(len(lines), 0, -1):
        try:
            with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
                tree = ast.parse("\n".join(lines[:end]))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        tree.body = [part for part in tree.body if not isinstance(part, ast.Expr)]
        return ast.unparse(tree)
    return ""


def peft_answer(text: str) -> str | None:
    """An answer by the rules of PEFT's method_comparison: behind the first mark of its list.

    Those rules are kept as they are, so that numbers can be compared with the ones published there.
    """
    text = text.strip().rstrip(".!?")
    for mark in PEFT_MARKS:
        if mark in text:
            return text.rpartition(mark)[2].strip().split("\n", 1)[0].strip(" .!?$%")
    return None


def peft_same(answer: str | None, gold: str | None) -> bool:
    """Whether PEFT's method_comparison takes an answer for right: as numbers where they are some."""
    if answer is None or gold is None:
        return False
    numbers = [_fraction(text, commas=False) for text in (answer, gold)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return numbers == [None, None] and answer == gold


def _behind_mark(text: str) -> str | None:
    """What the last "The answer is" says: a box behind it, else the rest of its sentence."""
    *before, rest = ANSWER.split(text)
    if not before:
        return None
    inner = boxed(rest)
    return SENTENCE_END.split(rest.strip(), maxsplit=1)[0] if inner is None else inner


def _without_latex(text: str) -> str:
    """Numbers written with LaTeX's commas, fractions and currency, as plain ones."""
    text = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    return re.sub(r"\\[!,;]|\{,\}|\\?\$", lambda m: "," if m.group() == "{,}" else "", text)


def _fraction(text: str, commas: bool = True) -> Fraction | None:
    """A number; commas between digits are let through if asked for."""
    if commas:
        text = text.replace(",", "")
    try:
        parts = [Fraction(part.strip()) for part in text.split("/")]
        return parts[0] if len(parts) == 1 else truediv(*parts)
    except (ValueError, TypeError, ZeroDivisionError):  # TypeError: more than one stroke
        return None
