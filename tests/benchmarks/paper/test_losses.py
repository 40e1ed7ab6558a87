"""The loss on passages, and the score computed from it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.paper.recipe import Recipe, read_recipe
from benchmarks.paper.scoring import load_passages, scorer, token_loss
from benchmarks.tiny import make_llama
from folora.errors import DataError

FOLDER = Path(__file__).parents[3] / "benchmarks" / "paper"


def test_the_loss_weighs_all_tokens_equally(hub: None, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, initializer_range=0.5,
        )
    ).train()  # fmt: skip
    texts = ["the cat sat on the mat", "a"]
    found = token_loss(model, tokenizer, texts, max_length=6)
    assert model.training
    losses: list[float] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:6]
        with torch.no_grad():
            chances = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-float(chances[i - 1, ids[i]]) for i in range(1, len(ids))]
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_passages_are_the_first_rows(hub: None) -> None:
    passages = read_recipe(FOLDER / "recipes" / "peft-metamath.yaml").passages["finewiki"]
    assert (passages.count, passages.max_length) == (100, 768)
    texts = load_passages(type(passages)(**{**passages.__dict__, "count": 3}))
    assert [text[:6] for text in texts] == ["Text 0", "Text 1", "Text 2"]
    with pytest.raises(DataError, match="no column 'body'; there are id, text"):
        load_passages(type(passages)(**{**passages.__dict__, "column": "body"}))


def test_forgetting_follows_from_the_score_of_passages(
    hub: None, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = FOLDER / "recipes" / "peft-metamath.yaml"
    recipe: Recipe = read_recipe(path)
    only = Recipe(**{**recipe.__dict__, "target": []})
    score = scorer(only, tokenizer, allow_code=False)
    found = score(make_llama(vocab=len(tokenizer)))
    assert found["task"] == {}
    assert -math.log(found["kept"]["finewiki"]) == pytest.approx(found["other"]["finewiki.nats"])
