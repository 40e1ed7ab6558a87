"""lm-evaluation-harness on a model in memory matches likelihoods by hand and does not change the model."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks.tasks import utils
from benchmarks.tiny import make_llama, make_tokenizer
from folora.errors import ConfigError, DataError
from folora.metrics.evaluation import Evaluation

DOCUMENTS = [
    {"prompt": "the cat", "object": "sat", "query": "one", "choices": ["two", "bee", "six"], "gold": 1},
    {"prompt": "a dog", "object": "ran", "query": "red", "choices": ["sea", "sky", "ink"], "gold": 0},
]  # fmt: skip
HELPERS = Path(utils.__file__).read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cloze task and a multiple-choice task with local documents."""
    found = tmp_path_factory.mktemp("tasks")
    (found / "utils.py").write_text(
        HELPERS
        + f"\n\ndef documents(**_):\n    return {{'test': Dataset.from_list({DOCUMENTS})}}\n"
    )
    source = Path(utils.__file__).parent
    common = (source / "_metrics.yaml").read_text().replace("utils.load", "utils.documents")
    (found / "_metrics.yaml").write_text(common)
    for name in ("lre_relations", "hellaswag"):
        (found / f"{name}.yaml").write_text((source / f"{name}.yaml").read_text())
    (found / "broken.yaml").write_text(
        (source / "piqa.yaml").read_text().replace("include: _metrics.yaml", "include: _file.yaml")
    )
    (found / "_file.yaml").write_text((source / "_metrics.yaml").read_text())
    return found


def log_likelihood(model: Any, context: str, text: str) -> float:
    tokenizer = make_tokenizer()
    ids = tokenizer(context + text)["input_ids"]
    with torch.no_grad():
        chances = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    start = len(tokenizer(context)["input_ids"])
    return float(sum(chances[i - 1, ids[i]] for i in range(start, len(ids))))


def test_scores_match_log_likelihoods(folder: Path) -> None:
    model = make_llama()
    found = Evaluation({"lre_relations": None, "hellaswag": None}, make_tokenizer(), folder=folder)(
        model
    )
    cloze = [log_likelihood(model, d["prompt"], f" {d['object']}") for d in DOCUMENTS]
    assert found["lre_relations"]["nats"] == pytest.approx(np.mean(cloze), rel=1e-5)
    assert found["lre_relations"]["probability"] == pytest.approx(np.mean(np.exp(cloze)), rel=1e-4)
    chances, right = [], []
    for d in DOCUMENTS:
        nats = torch.tensor([log_likelihood(model, d["query"], f" {c}") for c in d["choices"]])
        chances.append(float(nats.softmax(0)[d["gold"]]))
        right.append(float(nats.argmax() == d["gold"]))
    assert found["hellaswag"]["probability"] == pytest.approx(np.mean(chances), rel=1e-4)
    assert found["hellaswag"]["acc"] == np.mean(right)


def test_single_answers_and_the_odds_of_guessing(folder: Path) -> None:
    """Three choices have odds of 1 to 2; text without choices cannot be guessed."""
    model = make_llama()
    ask = Evaluation({"lre_relations": None, "hellaswag": None}, make_tokenizer(), folder=folder)
    answers, graded = ask.graded(model)
    assert {name: g.guess for name, g in graded.items()} == {"lre_relations": 0, "hellaswag": 0.5}
    right = []
    for d in DOCUMENTS:
        nats = [log_likelihood(model, d["query"], f" {c}") for c in d["choices"]]
        right.append(nats[d["gold"]] == max(nats))
    assert graded["hellaswag"].right == right
    assert answers["hellaswag"]["acc"] == np.mean(right)
    assert graded["lre_relations"].right == [False, False]


def test_the_number_of_documents_is_limited(folder: Path) -> None:
    model = make_llama()
    found = Evaluation({"lre_relations": 1, "hellaswag": 99}, make_tokenizer(), folder=folder)(
        model
    )
    first = log_likelihood(model, DOCUMENTS[0]["prompt"], f" {DOCUMENTS[0]['object']}")
    assert found["lre_relations"]["nats"] == pytest.approx(first, rel=1e-5)


def test_evaluation_does_not_change_the_model(folder: Path) -> None:
    model = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"]))
    model.train()
    ask = Evaluation({"lre_relations": None}, make_tokenizer(), folder=folder)
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    before = ask(model)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(m.training for m in model.modules())
    assert ask(model) == before  # evaluation can be repeated
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(1.0)
    assert ask(model) != before  # the adapter is evaluated
    with model.disable_adapter():
        assert ask(model) == before


def test_wrong_tasks_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'hellaswag'"):
        Evaluation({"helaswag": 1}, make_tokenizer(), folder=folder)
    with pytest.raises(ConfigError, match="allow_code"):
        code = (folder / "lre_relations.yaml").read_text().replace("lre_relations", "code", 1)
        (folder / "code.yaml").write_text(code + "unsafe_code: true\n")
        Evaluation({"code": 1}, make_tokenizer(), folder=folder)


def test_missing_data_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOLORA_DATA_DIR", raising=False)
    with pytest.raises(DataError, match=r"piqa.*FOLORA_DATA_DIR"):
        Evaluation({"piqa": 1}, make_tokenizer(), folder=folder)


def test_bits_per_byte_of_a_passage() -> None:
    found = utils.bits({"text": "ab"}, [-2 * math.log(2)])
    assert found == {"bits_per_byte": pytest.approx(1.0)}
