"""Tasks in a model's chat template: what is asked, what should follow, and how it is scored."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from support.chat_templates import CHATML, COUNTS, TOOLS, byte_tokenizer
from transformers import PreTrainedTokenizerBase

from benchmarks.tasks import utils
from benchmarks.tiny import make_llama
from folora.errors import DataError
from folora.metrics.evaluation import Evaluation

TASKS = Path(utils.__file__).parent
CODE = {"prompt": "def f(x):\n    ", "canonical_solution": "return x\n"}
CHAT = [
    {"instruction": "What is Lima?", "response": "A city."},
    {"instruction": "Too long?", "response": "Yes. " * 200},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer(TOOLS)


@pytest.fixture
def folder(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A tokenizer on disk, and rows in FOLORA_DATA_DIR."""
    for file, rows in (("humaneval/test", [CODE]), ("dolly_hhrlhf/train", CHAT)):
        path = tmp_path / f"{file}.jsonl.gz"
        path.parent.mkdir()
        with gzip.open(path, "wt") as lines:
            lines.write("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("FOLORA_DATA_DIR", str(tmp_path))
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def evaluation(tokenizer: PreTrainedTokenizerBase, folder: str, *tasks: str) -> Evaluation:
    found = dict.fromkeys(tasks, 2)
    return Evaluation(found, tokenizer, folder=TASKS, options={"tokenizer": folder})


def test_long_texts_are_scored_by_the_mean_over_their_tokens(
    folder: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_llama(vocab=len(tokenizer), max_position_embeddings=2048).eval()
    found = evaluation(tokenizer, folder, "humaneval", "dolly_chat")(model)
    turn = "<|im_start|>user\nWhat is Lima?<|im_end|>\n<|im_start|>assistant", "\nA city.<|im_end|>"
    code = "def f(x):", "\n    return x\n"  # white space belongs to what follows
    for task, (before, after) in (("humaneval", code), ("dolly_chat", turn)):
        ids = torch.tensor([tokenizer(before + after)["input_ids"]])
        first = len(tokenizer(before)["input_ids"])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, first - 1 : -1].log_softmax(-1)
        nats = logs.gather(1, ids[0, first:, None]).sum().item()
        tokens = ids.shape[1] - first
        assert found[task]["nats"] == pytest.approx(nats / tokens, rel=1e-5)
        assert found[task]["probability"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_every_question_is_answered_by_one_of_the_two_tools_offered(folder: str) -> None:
    rows = list(utils.calls(folder)["test"])
    assert len({row["text"] for row in rows}) == len(rows) == 40
    for row in rows:
        answer = row["text"].removesuffix("<|im_end|>")
        call = json.loads(answer.removeprefix("```json\n").removesuffix("\n```"))
        system, user = row["prompt"].split("<|im_end|>\n", 1)
        offered = [json.loads(line)["function"] for line in system.splitlines()[1:]]
        (tool,) = (tool for tool in offered if tool["name"] == call["name"])
        assert len(offered) == 2
        assert [*call["arguments"]] == tool["parameters"]["required"]
        for argument, value in call["arguments"].items():
            if isinstance(value, str):
                assert value in user, argument
        assert answer.startswith(row["opening"] + call["name"])
        assert user.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_call_is_opened_or_not() -> None:
    row = {"opening": "{", "text": "{f}"}
    found = utils.call(row, [(-0.1, True), (-2.0, False)])
    assert found == {"acc": 1.0, "probability": math.exp(-2.0), "nats": -2.0}
    assert utils.call(row, [(-9.0, False), (-12.0, False)])["acc"] == 0.0


def test_calls_of_tools_are_evaluated(folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_llama(vocab=len(tokenizer), max_position_embeddings=2048).eval()
    (found,) = evaluation(tokenizer, folder, "tool_calls")(model).values()
    assert found["acc"] == 0.0  # of a random model
    assert found["nats"] < -100


def test_a_template_without_tools_is_refused(folder: str) -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.save_pretrained(folder)
    with pytest.raises(DataError, match=r"'tool_calls': the chat template of .* has no place for"):
        evaluation(tokenizer, folder, "tool_calls")


def test_a_template_that_changes_an_answered_turn_is_refused(folder: str) -> None:
    byte_tokenizer(COUNTS).save_pretrained(folder)
    with pytest.raises(ValueError, match="otherwise when it is answered"):
        utils.texts("dolly_hhrlhf/train.jsonl.gz", folder, "instruction", "response", 500, True)
