"""Two documents of every dataset of the paper's recipes, with its columns on the Hub."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n"
)

# Two documents of every dataset, with its columns on the Hub.

GSM8K = [
    {"question": "Ann has 3 pens and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "A car costs $1,000 and a bus twice that. The bus?", "answer": "2 x\n#### 2,000"},
]
MATH = [
    {
        "problem": "What is $1/2 + 1/4$?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": "It is $\\boxed{\\frac{3}{4}}$.",
    }
]
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum."""\n',
        "canonical_solution": "    return sum(xs)\n",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
        "entry_point": "total",
    }
]
MBPP = [
    {
        "task_id": i,
        "text": "Write a function to double a number.",
        "code": "def double(n):\r\n  return 2 * n",
        "test_list": [f"assert double({n}) == {2 * n}" for n in (1, 2, i)],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for i in range(1, 6)
]
IFEVAL = [
    {
        "key": 1,
        "prompt": "Write four words without a comma.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [
            {"relation": None, "num_words": None},
            {"relation": "at least", "num_words": 4},
        ],
    }
]
TRIVIA = [
    {
        "question": "Capital of France?",
        "question_id": "a",
        "answer": {"aliases": ["Paris", "paris"]},
    }
]
TRUTHFUL = [
    {
        "question": "Do cats fly?",
        "mc1_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]},
        "mc2_targets": {"choices": ["No.", "They do not.", "Yes."], "labels": [1, 1, 0]},
    }
]
SQUAD = [
    {
        "id": str(i),
        "title": "Cats",
        "context": "The cat sat on the mat.",
        "question": question,
        "answers": {"text": texts, "answer_start": [15] * len(texts)},
    }
    for i, (question, texts) in enumerate([("Where?", ["the mat", "on the mat"]), ("When?", [])])
]
MMLU = [
    {"question": f"What is {i} + 1?", "subject": "x", "choices": ["1", "2", "3", "4"], "answer": 1}
    for i in range(5)
]
GPQA = [
    {
        "Question": f"Which is {name}?",
        "Correct Answer": f"{name}\n",
        **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)},
    }
    for name in ("red", "green", "blue", "white")
]
BABILONG = [{"input": "Ann went home.", "question": "Where is Ann? ", "target": "home"}]
LONGBENCH = [
    {
        "context": "A long text. " * 9,
        "question": "Who?",
        "choices": ["a", "b", "c", "d"],
        "answer": 2,
    }
]


def _two(rows: list[Row]) -> list[Row]:
    return (rows * 2)[:2]


HUB: dict[str, dict[str, list[Row]]] = {
    "mandarjoshi/trivia_qa": {"train": TRIVIA, "validation": _two(TRIVIA)},
    "google-research-datasets/nq_open": {
        split: _two([{"question": "who sat", "answer": ["the cat", "a cat"]}])
        for split in ("train", "validation")
    },
    "stanfordnlp/web_questions": {
        split: [{"url": "u", "question": "who sat?", "answers": ["The Cat", "A cat"]}]
        for split in ("train", "test")
    },
    "openai/gsm8k": {"train": GSM8K, "test": GSM8K},
    "EleutherAI/hendrycks_math": {"train": MATH, "test": MATH},
    "openai/openai_humaneval": {"test": HUMANEVAL},
    "google-research-datasets/mbpp": {"prompt": MBPP, "test": MBPP[:2]},
    "google/IFEval": {"train": IFEVAL},
    "truthfulqa/truthful_qa": {"validation": TRUTHFUL},
    "rajpurkar/squad_v2": {"train": SQUAD, "validation": SQUAD},
    "cais/mmlu": {"test": MMLU[:2], "dev": MMLU},
    "Idavidrein/gpqa": {"train": GPQA},
    "RMT-team/babilong-1k-samples": {f"qa{i}": _two(BABILONG) for i in range(1, 6)},
    "recursal/longbench-v2": {"train": LONGBENCH},
    "HuggingFaceFW/finewiki": {
        "train": [
            {"id": str(i), "text": f"Text {i} is about cats and mats. " * 5} for i in range(9)
        ]
    },
    "meta-math/MetaMathQA": {
        "train": [
            {
                "type": "GSM_Rephrased",
                "query": f"What is {i} + 1?",
                "original_question": "",
                "response": f"It is {i + 1}.\n#### {i + 1}\nThe answer is: {i + 1}",
            }
            for i in range(40)
        ]
    },
    "m-a-p/CodeFeedback-Filtered-Instruction": {
        "train": [
            {
                "query": f"Add {i}.",
                "answer": f"```python\nx += {i}\n```",
                "resource": "r",
                "lang": "python",
            }
            for i in range(40)
        ]
    },
    "WizardLMTeam/WizardLM_evol_instruct_V2_196k": {
        "train": [
            {
                "idx": f"w{i}",
                "conversations": [
                    {"from": "human", "value": f"Say {i}."},
                    {"from": "gpt", "value": f"I say {i}."},
                ],
            }
            for i in range(40)
        ]
    },
}
NAMES = {  # configurations that the recipes must request
    "mandarjoshi/trivia_qa": "rc.nocontext",
    "openai/gsm8k": "main",
    "google-research-datasets/mbpp": "full",
    "truthfulqa/truthful_qa": "multiple_choice",
    "Idavidrein/gpqa": "gpqa_main",
    "RMT-team/babilong-1k-samples": "2k",
}
