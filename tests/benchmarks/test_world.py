"""The synthetic world is consistent, and its small model pretrains, scores and loads."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from benchmarks.world.language import (
    ALPHABET,
    ATTRIBUTES,
    INSTRUMENT_PHRASINGS,
    INSTRUMENTS,
    LETTERS,
    Row,
    World,
    document,
    pretraining_documents,
    skills,
    tasks,
)
from benchmarks.world.pretrain import packed_sequences, pretrain
from benchmarks.world.score import score_rows, score_skills
from benchmarks.world.tokenizer import BOS, EOS, PAD, build_tokenizer

WORLD = World(3)


def some_documents(world: World, count: int) -> list[str]:
    return list(itertools.islice(pretraining_documents(world, random.Random(7)), count))


def answer(prompt: str) -> str:
    """The correct completion, computed from the text of the prompt only."""
    word, *rest = prompt.split()
    if word == "copy":
        return rest[0]
    if word == "reverse":
        return "".join(reversed(rest[0]))
    if word == "sort":
        return "".join(c * rest[0].count(c) for c in LETTERS)
    if word == "shift":
        return rest[0].translate(str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0]))
    if word == "sum":
        return str(int(rest[0]) + int(rest[2]))
    assert word == "diff"
    return str((10 + int(rest[0]) - int(rest[2])) % 10)


def check(rows: list[Row]) -> None:
    for row in rows:
        assert row == {"prompt": row["prompt"], "completion": f" {answer(row['prompt'])}"}


def test_the_language_depends_on_the_seed_only() -> None:
    for make in (skills, tasks, lambda world: some_documents(world, 500)):
        assert make(World(3)) == make(World(3))
        assert make(World(3)) != make(World(4))
    assert WORLD.people == World(3).people
    assert len(set(WORLD.people)) == 120


def test_target_tasks_never_appear_in_pretraining() -> None:
    documents = some_documents(WORLD, 5000)
    told = {phrasing.replace("{}", "").strip() for phrasing in INSTRUMENT_PHRASINGS}
    absent = ["shift", "diff", "-", *INSTRUMENTS, *told]
    text = "\n".join(documents)
    assert [word for word in absent if word in text] == []
    rows = [row for task in tasks(WORLD).values() for row in task.train + task.test]
    assert {document(row) for row in rows}.isdisjoint(documents)


def test_probes_have_correct_answers() -> None:
    probes = skills(WORLD)
    assert len(probes) >= 5
    assert all(100 <= len(rows) <= 200 for rows in probes.values())
    for word in ("copy", "reverse", "sort", "sum"):
        check(probes[word])
    assert len({row["prompt"] for row in probes["sum"]}) == 100
    for attribute, values in ATTRIBUTES.items():
        facts = WORLD.facts[attribute]
        for row in probes[attribute]:
            (person,) = set(row["prompt"].split()) & set(WORLD.people)
            assert row["completion"].strip() == facts[person]
            assert facts[person] in values


def test_fact_probes_are_taught_and_string_probes_are_not() -> None:
    documents = set(some_documents(WORLD, 40_000))
    for name, rows in skills(WORLD).items():
        taught = sum(document(row) in documents for row in rows) / len(rows)
        assert taught == 0 if name in ("copy", "reverse", "sort") else taught > 0.99


def test_tasks_have_correct_answers() -> None:
    target = tasks(WORLD)
    for name in ("shift", "difference"):
        check(target[name].train + target[name].test)
    shift = target["shift"]
    assert {r["prompt"] for r in shift.train}.isdisjoint({r["prompt"] for r in shift.test})
    assert len(target["difference"].test) == 100
    for row in target["instrument"].train:
        (person,) = set(row["prompt"].split()) & set(WORLD.instruments)
        assert row["completion"].strip() == WORLD.instruments[person]
    assert target["instrument"].test == target["instrument"].train


def test_tokenizer_round_trip() -> None:
    tokenizer = build_tokenizer()
    special = {tokenizer.convert_tokens_to_ids(token) for token in (PAD, BOS, EOS)}
    for text in (ALPHABET, " two  spaces ", *some_documents(WORLD, 200)):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert not special & set(ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer(f"{BOS}a{EOS}")["input_ids"] == [
        tokenizer.bos_token_id,
        tokenizer.convert_tokens_to_ids("a"),
        tokenizer.eos_token_id,
    ]
    with pytest.raises(Exception, match="UNK"):
        tokenizer("é")


def test_packed_sequences_start_at_bos() -> None:
    tokenizer = build_tokenizer()
    documents = iter(["sum 1 + 1 = 2", "copy ab > ab", "sum 1 + 2 = 3", "copy ba > ba"])
    sequences = packed_sequences(documents, tokenizer, 20)
    assert tokenizer.decode(next(sequences)) == "<bos>sum 1 + 1 = 2<eos><bos>copy"
    assert tokenizer.decode(next(sequences)) == "<bos>sum 1 + 2 = 3<eos><bos>copy"


def tiny_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def slow_row(model: nn.Module, tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[bool, float]:
    """Decode one token at a time, without padding."""
    ids = [tokenizer.bos_token_id, *tokenizer(row["prompt"])["input_ids"]]
    right, total = True, 0.0
    for token in [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]:
        log_probabilities = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        right = right and int(log_probabilities.argmax()) == token
        total += float(log_probabilities[token])
        ids.append(token)
    return right, total


@torch.no_grad()
def greedy_row(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Row | None:
    """The row with the model's own greedy completion, if it ends soon."""
    ids = [tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]
    start = len(ids)
    while len(ids) < start + 12:
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return {"prompt": prompt, "completion": str(tokenizer.decode(ids[start:]))}
        ids.append(token)
    return None


def test_score_rows_equals_slow_reference() -> None:
    tokenizer = build_tokenizer()
    model = tiny_model(tokenizer)
    probes = skills(WORLD)
    prompts = [row["prompt"] for rows in probes.values() for row in rows[:15]]
    given = [row for prompt in prompts if (row := greedy_row(model, tokenizer, prompt))]
    assert given, "the tiny model has to be right on some rows for the test to mean anything"
    rows = given[:10] + [row for rows in probes.values() for row in rows[:3]]

    slow = [slow_row(model, tokenizer, row) for row in rows]
    accuracy, log_probability = score_rows(model, tokenizer, rows, batch_size=7)

    assert accuracy == sum(right for right, _ in slow) / len(rows)
    assert 0 < accuracy < 1
    assert log_probability == pytest.approx(sum(lp for _, lp in slow) / len(rows), rel=1e-5)


def test_score_rows_restores_each_mode_and_refuses_no_rows() -> None:
    tokenizer = build_tokenizer()
    model = tiny_model(tokenizer).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    score_rows(model, tokenizer, [{"prompt": "sum 1 + 1 =", "completion": " 2"}])
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="no rows"):
        score_rows(model, tokenizer, [])


def test_a_seed_is_pretrained_on_its_own_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[World] = []

    def train(model: object, tokenizer: object, world: World, steps: int) -> float:
        seen.append(world)
        return 0.0

    monkeypatch.setattr("benchmarks.world.pretrain.train", train)
    for seed in (5, 6):
        pretrain(tmp_path / str(seed), seed=seed, steps=1)
    assert seen == [World(5), World(6)]


def test_short_pretraining_is_reproducible_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.world.pretrain.BATCH", 2)
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(1)
    try:
        facts = [pretrain(tmp_path / name, seed=5, steps=20) for name in ("a", "b")]
    finally:
        torch.set_num_threads(threads)
    assert facts[0] == facts[1]
    assert torch.equal(torch.random.get_rng_state(), state)
    for name in ("model.safetensors", "tokenizer.json", "config.json", "world.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokenizer("sum 1")["input_ids"] == build_tokenizer()("sum 1")["input_ids"]
    assert score_skills(model, tokenizer, World(5)) == facts[0]["skills"]
    with pytest.raises(FileExistsError):
        pretrain(tmp_path / "a", seed=5, steps=20)
