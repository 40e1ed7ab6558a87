"""The demo's facts are well formed and scored correctly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo import facts as facts_module
from demo.facts import FACTS_PATH, Fact, load_facts, score_facts


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Several threads make models this small many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_facts_are_well_formed() -> None:
    facts = load_facts()
    assert 300 <= len(facts) <= 400
    prompts = [fact.prompt for fact in facts]
    assert len(set(prompts)) == len(prompts)
    for fact in facts:
        assert len(fact.others) == 3, fact
        assert fact.answer not in fact.others, fact
        assert len({choice.strip().lower() for choice in fact.choices}) == 4, fact
        assert fact.prompt, fact
        assert fact.prompt == fact.prompt.strip(), fact
        for choice in fact.choices:
            assert re.fullmatch(r" \S.*\S| \S", choice), fact
            assert len(choice) <= 30, fact
        # An ending that is a prefix of another is at least as likely for any model.
        for other in fact.others:
            assert not other.startswith(fact.answer), fact
            assert not fact.answer.startswith(other), fact


def test_facts_have_at_least_six_kinds_of_some_size() -> None:
    kinds = [fact.kind for fact in load_facts()]
    assert len(set(kinds)) >= 6
    assert all(kinds.count(kind) >= 20 for kind in set(kinds))


def test_the_facts_file_has_one_fact_per_line() -> None:
    lines = FACTS_PATH.read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("[", "]")
    assert len(lines) == len(load_facts()) + 2


# Scoring


def character_tokenizer(facts: list[Fact], bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each character of the facts."""
    text = "".join(fact.prompt + "".join(fact.choices) for fact in facts)
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", *sorted(set(text))])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def tiny_llama(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # large enough that the context affects the output
    )
    return LlamaForCausalLM(config).eval()


def reference_scores(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, fact: Fact
) -> list[float]:
    """One plain forward pass for each choice: no batch, no padding, all logits."""
    scores = []
    start = len(tokenizer(fact.prompt)["input_ids"])
    for choice in fact.choices:
        ids = torch.tensor([tokenizer(fact.prompt + choice)["input_ids"]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(dim=-1)
        tokens = range(start, ids.shape[1])
        scores.append(sum(float(log_probs[at - 1, ids[0, at]]) for at in tokens))
    return scores


def some_facts() -> list[Fact]:
    return load_facts()[::13]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_scores_equal_a_slow_reference(batch_size: int, bos: bool) -> None:
    facts = some_facts()
    tokenizer = character_tokenizer(facts, bos)
    model = tiny_llama(len(tokenizer))
    expected = [reference_scores(model, tokenizer, fact) for fact in facts]

    scores = score_facts(model, tokenizer, facts, batch_size=batch_size)

    mean = sum(row[0] for row in expected) / len(expected)
    assert scores.log_probability == pytest.approx(mean, rel=1e-5)
    assert scores.right == tuple(row[0] > max(row[1:]) for row in expected)
    assert scores.accuracy == pytest.approx(sum(scores.right) / len(facts))
    assert 0 < sum(scores.right) < len(facts)  # otherwise the comparison would be trivial
    for kind, (hits, total) in scores.by_kind.items():
        of_kind = [right for f, right in zip(facts, scores.right, strict=True) if f.kind == kind]
        assert (hits, total) == (sum(of_kind), len(of_kind))
    assert sum(total for _, total in scores.by_kind.values()) == len(facts)


def test_each_choice_equals_a_slow_reference() -> None:
    facts = some_facts()
    tokenizer = character_tokenizer(facts)
    model = tiny_llama(len(tokenizer))
    choices = [facts_module._encode(tokenizer, f.prompt, c) for f in facts for c in f.choices]
    with torch.no_grad():
        scores = facts_module._log_probabilities(model, choices, batch_size=7)
    expected = [score for fact in facts for score in reference_scores(model, tokenizer, fact)]
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=1e-5, atol=0)


def test_models_without_logits_to_keep_are_scored_alike() -> None:
    class Plain(nn.Module):
        def __init__(self, inner: LlamaForCausalLM) -> None:
            super().__init__()
            self.inner = inner

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool
        ) -> SimpleNamespace:
            output = self.inner(input_ids=input_ids, attention_mask=attention_mask)
            return SimpleNamespace(logits=output.logits)

    facts = some_facts()
    tokenizer = character_tokenizer(facts)
    model = tiny_llama(len(tokenizer))
    plain, full = (score_facts(m, tokenizer, facts) for m in (Plain(model), model))
    assert plain.log_probability == pytest.approx(full.log_probability, rel=1e-5)
    assert plain.right == full.right


def test_peft_models_are_scored_with_their_adapter() -> None:
    peft = pytest.importorskip("peft")
    facts = some_facts()
    tokenizer = character_tokenizer(facts)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    model = peft.get_peft_model(tiny_llama(len(tokenizer)), config)
    before = score_facts(model, tokenizer, facts)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    after = score_facts(model, tokenizer, facts)
    assert before == score_facts(tiny_llama(len(tokenizer)), tokenizer, facts)
    expected = [reference_scores(model.eval(), tokenizer, fact)[0] for fact in facts]
    assert after.log_probability == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert abs(after.log_probability - before.log_probability) > 0.01


def test_scoring_restores_the_mode_of_every_module() -> None:
    facts = some_facts()[:3]
    tokenizer = character_tokenizer(facts)
    model = tiny_llama(len(tokenizer)).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    seen: list[bool] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, _: seen.append(any(m.training for m in module.modules()))
    )
    score_facts(model, tokenizer, facts)
    hook.remove()
    assert seen
    assert not any(seen)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_endings_of_one_prompt_share_rows() -> None:
    rows, row_of = facts_module._shared_rows([(1, 2), (1,), (1, 3), (1, 2), (2,), (1, 2, 4)])
    assert sorted(rows) == [(1, 2, 4), (1, 3), (2,)]
    shared = [(1, 2, 4), (1, 2, 4), (1, 3), (1, 2, 4), (2,), (1, 2, 4)]
    # The context (1,) may go to either row that starts with it.
    assert [rows[row] for row in row_of][2:] == shared[2:]
    assert rows[row_of[1]][:1] == (1,)


def test_endings_that_merge_with_the_prompt_are_refused() -> None:
    class Joining:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, 9] if text == "a" else [1, 2, 9]}  # 9 ends every text

    with pytest.raises(ValueError, match="no proper prefix"):
        score_facts(tiny_llama(10), Joining(), [Fact("kind", "a", " b", (" c", " d", " e"))])


def test_no_facts_are_refused() -> None:
    with pytest.raises(ValueError, match="no facts"):
        score_facts(tiny_llama(10), character_tokenizer([]), [])
