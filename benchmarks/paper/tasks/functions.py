"""What the tasks in this folder share: prompts, data that need joining, and how an answer is scored."""

from __future__ import annotations

import random
from typing import Any

import datasets
from lm_eval.tasks.qasper.metrics import f1_abstractive, normalize_answer

from benchmarks.paper import answers, sandbox

Row = dict[str, Any]
Score = dict[str, float]

MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
NO_ANSWER = "unanswerable"


def math_rows(**_: object) -> dict[str, datasets.Dataset]:
    """The test problems of all seven subjects, in one set."""
    parts = [
        datasets.load_dataset("EleutherAI/hendrycks_math", name=subject)["test"]
        for subject in MATH_SUBJECTS
    ]
    return {"test": datasets.concatenate_datasets(parts)}


def mbpp_shots(rows: datasets.Dataset) -> datasets.Dataset:
    """Tasks 2, 3 and 4 of the split of prompts: the three that MBPP's authors show."""
    return rows.filter(lambda row: row["task_id"] in (2, 3, 4))


def gsm8k(doc: Row, results: list[str]) -> Score:
    """The same number as in the reference solution."""
    answer = answers.number(results[0])
    gold = answers.number(doc["answer"])
    return {"exact_match": float(answer is not None and answer == gold)}


def math(doc: Row, results: list[str]) -> Score:
    """The same expression as in the reference solution's box."""
    gold = answers.boxed(doc["solution"]) or ""
    return {"exact_match": float(answers.same_expression(answers.expression(results[0]), gold))}


def humaneval(doc: Row, results: list[str]) -> Score:
    """The function passes the problem's tests."""
    program = answers.completed_function(doc["prompt"], results[0], doc["entry_point"])
    tests = f"{doc['test']}\n\ncheck({doc['entry_point']})"
    return {"pass@1": float(sandbox.run(f"{program}\n\n{tests}\n").passed)}


def mbpp(doc: Row, results: list[str]) -> Score:
    """The program passes the task's assertions."""
    parts = [answers.program_of(results[0]), doc["test_setup_code"], *doc["test_list"]]
    return {"pass@1": float(sandbox.run("\n".join(parts) + "\n").passed)}


def squad_v2(doc: Row, results: list[str]) -> Score:
    """Exact match and F1 with the best of the answers; saying that there is none is an answer too."""
    said = "" if normalize_answer(results[0]) == NO_ANSWER else results[0]
    gold = [text for text in doc["answers"]["text"] if normalize_answer(text)] or [""]
    return {
        "exact": max(float(normalize_answer(said) == normalize_answer(text)) for text in gold),
        "f1": max(_f1(said, text) for text in gold),
    }


def peft_gsm8k(doc: Row, results: list[str]) -> Score:
    """Accuracy by the rules of PEFT's method_comparison, which reads prompt and answer together."""
    answer = answers.peft_answer(f"{doc['question']}\n{results[0]}")
    return {"accuracy": float(answers.peft_same(answer, answers.peft_answer(doc["answer"])))}


def _f1(said: str, gold: str) -> float:
    if not normalize_answer(said) or not normalize_answer(gold):
        return float(normalize_answer(said) == normalize_answer(gold))
    return float(f1_abstractive([said], [gold]))


def gpqa_rows(rows: datasets.Dataset) -> datasets.Dataset:
    """Questions with their four choices in an order that the question itself decides."""

    def ordered(row: Row) -> Row:
        right = row["Correct Answer"].strip()
        choices = [right, *(row[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3))]
        random.Random(row["Question"]).shuffle(choices)
        return {"choices": choices, "gold": choices.index(right)}

    return rows.map(ordered)
