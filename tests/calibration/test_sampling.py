"""The calibration set: independent of the batch size (bitwise on the CPU), resumable, and from the right distribution."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, TopKLogitsWarper, TopPLogitsWarper

from benchmarks.tiny import make_gpt2, make_llama, make_mistral, make_tokenizer, tiny_config
from folora.calibration.calibration_set import CalibrationSet
from folora.calibration.decoding import CHECK_EVERY, CudaGraphError, Forward, decode
from folora.calibration.engine import HuggingFaceEngine, batch_size_for
from folora.calibration.logits import MIXTURE, Decoding, decoding_of, inverse_cdf, warp_logits
from folora.calibration.sampling import sample_sequences, sampling_facts
from folora.config import SamplingConfig
from folora.data.special_tokens import check_same_tokenizer, ending_ids, start_token_id
from folora.errors import ArtifactError, DataError, NumericsError
from folora.runtime.artifacts import write_artifact
from folora.runtime.memory import cache_bytes
from folora.runtime.storage import write_sealed

CONFIG = SamplingConfig(num_sequences=40, min_new_tokens=32, max_new_tokens=40, batch_size=16)


def engine(config: SamplingConfig = CONFIG, seed: int = 0) -> HuggingFaceEngine:
    return HuggingFaceEngine(make_llama(seed), 1, [2], config)


@pytest.mark.parametrize("batch_size", [1, 5, 40, 64])
def test_batch_size_does_not_change_the_set(batch_size: int) -> None:
    expected = sample_sequences(engine(), 1, [2], CONFIG)
    config = SamplingConfig(
        num_sequences=40, min_new_tokens=32, max_new_tokens=40, batch_size=batch_size
    )
    found = sample_sequences(engine(config), 1, [2], config)
    assert found == expected
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("make", [make_llama, make_gpt2, make_mistral])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stepwise_decoding_matches_generate(make: Any, attention: str, dtype: torch.dtype) -> None:
    """Also rows that end at different steps; CUDA graphs are tested in test_cuda.py."""
    config = CONFIG.replace(num_sequences=64, min_new_tokens=2)
    model = make().to(dtype)
    model.set_attn_implementation(attention)
    generates, loops = (HuggingFaceEngine(model, 1, [2], config) for _ in range(2))
    assert loops.steps == (make is not make_mistral)  # it has a sliding window
    generates.steps = False
    expected = generates(range(20))
    assert len({len(row) for row in expected}) > 5
    assert loops(range(20)) == expected


def test_models_without_a_cuda_graph_fall_back_to_generate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [engine()(range(9)), engine()(range(9, 18))]
    taken = []

    def capture(forward: Forward, tokens: torch.Tensor) -> torch.Tensor:
        if forward.steps == 3:
            taken.append(forward)
            raise CudaGraphError("stream is capturing")
        forward.steps += 1
        return forward._run(tokens)

    monkeypatch.setattr(Forward, "__call__", capture)
    decoder = engine()
    assert [decoder(range(9)), decoder(range(9, 18))] == expected
    assert len(taken) == 1
    assert caplog.text.count("stream is capturing") == 1


def test_decoding_stops_when_all_sequences_have_ended() -> None:
    asked = []

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        asked.append(tokens)
        return torch.zeros(3, 8)

    def choose(written: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.tensor([7 if written.shape[1] >= n else 3 for n in (2, 5, 20)])

    start = torch.ones(3, 1, dtype=torch.long)
    written = decode(forward, start, choose, lambda: len(asked) >= 20, 500)
    assert len(asked) == written.shape[1] == 2 * CHECK_EVERY
    assert [row.tolist().index(7) for row in written] == [1, 4, 19]
    assert decode(forward, start, choose, lambda: False, 40).shape == (3, 40)


def test_out_of_memory_halves_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The set is the same; a batch of the minimum size that does not fit is an error."""
    expected = sample_sequences(engine(), 1, [2], CONFIG)
    config = CONFIG.replace(batch_size=64)
    decoder, seen = engine(config), []
    decoder.steps = False
    generate = decoder.model.generate

    def with_room_for(rows: int) -> None:
        def limited(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
            seen.append(len(input_ids))
            if len(input_ids) > rows:
                raise torch.OutOfMemoryError("no room")
            return generate(input_ids=input_ids, **options)

        monkeypatch.setattr(decoder.model, "generate", limited)

    with_room_for(20)
    assert sample_sequences(decoder, 1, [2], config) == expected
    assert seen == [64, 32, 16, 16, 32, 16, 16]
    with_room_for(4)
    with pytest.raises(torch.OutOfMemoryError):
        sample_sequences(decoder, 1, [2], config)


@pytest.mark.parametrize(
    ("free", "processes", "size"),
    # A sequence takes 512 bytes of cache for each of 512 tokens, and logits; 36 is the least.
    [(10**10, 1, 1024), (4 * 200 * (512 * 512 + 6 * 4 * 51), 1, 128), (10**10, 10, 128),
     (10**10, 16, 64), (10**6, 1, 64)],
)  # fmt: skip
def test_batch_size_fits_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, processes: int, size: int
) -> None:
    monkeypatch.setattr("folora.calibration.engine.free_bytes", lambda _: free + 1000)
    config = SamplingConfig(max_new_tokens=512, tolerance=None)
    model, cuda = make_llama().config, torch.device("cuda")
    assert cache_bytes(model, 4) == 2 * 2 * 2 * 8 * 4
    assert batch_size_for(cuda, model, 8, config, processes, taken=1000) == size
    assert batch_size_for(cuda, model, 8, config.replace(batch_size=5), processes) == 5
    assert batch_size_for(torch.device("cpu"), model, 8, config, processes) == 64
    early = config.replace(tolerance=3.0)
    assert batch_size_for(cuda, model, 8, early, processes, taken=1000) == min(size, 256)


def test_counts_lengths_and_the_held_out_split() -> None:
    found = sample_sequences(engine(), 1, [2], CONFIG)
    assert len(found.calibration) == 24
    assert len(found.held_out) == 16
    for row in [*found.calibration, *found.held_out]:
        assert row[0] == 1
        body = row[1:]
        assert 32 <= len(body) <= 40
        assert 2 not in body[:32]  # EOS only after the minimum
        assert 2 not in body[:-1]
    assert len({tuple(r) for r in [*found.calibration, *found.held_out]}) == 40
    assert SamplingConfig().num_held_out == 100


def test_the_seed_changes_the_set() -> None:
    other = HuggingFaceEngine(make_llama(), 1, [2], CONFIG, seed=1)
    assert sample_sequences(other, 1, [2], CONFIG) != sample_sequences(engine(), 1, [2], CONFIG)


def test_decoding_settings_are_mixed_70_20_10() -> None:
    counts = Counter(decoding_of(n) for n in range(1000))
    assert counts == {setting: 100 * setting.tenths for setting in MIXTURE}
    assert all(len({decoding_of(n) for n in range(k, k + 10)}) == 3 for k in range(0, 100, 10))


def test_sampled_tokens_follow_the_models_distribution() -> None:
    """First tokens of many sequences, chi-square against the softmax (seeded: no flakes)."""
    model = make_llama()
    config = SamplingConfig(num_sequences=32, min_new_tokens=1, max_new_tokens=32, batch_size=500)
    numbers = [n for n in range(3000) if decoding_of(n) == Decoding(7)]
    draw = HuggingFaceEngine(model, 1, [], config)
    counts = torch.zeros(51, dtype=torch.float64)
    for i in range(0, 2000, 500):
        for row in draw(numbers[i : i + 500]):
            counts[row[0]] += 1
    expected = model(torch.tensor([[1]])).logits[0, -1].double().softmax(-1) * counts.sum()
    big = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[big].sum()
    assert statistic < 2 * big.sum()  # mean of chi-square is its degrees of freedom


@pytest.mark.parametrize("vocabulary", [1, 51, 256, 700])
def test_inverse_cdf_sampling_finds_its_token(vocabulary: int) -> None:
    """Against the CDF in float64; forbidden tokens are never sampled, at either end."""
    scores = 3 * torch.randn(400, vocabulary)
    scores[torch.rand_like(scores) < 0.3] = -float("inf")
    scores[:, vocabulary // 2] = 0.0
    draws = torch.rand(400, dtype=torch.float64)
    draws[:2] = torch.tensor([0.0, 1 - 2**-53])
    cdf = scores.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cdf / cdf[:, -1:], draws[:, None], right=True)[:, 0]
    found = inverse_cdf(scores, draws)
    # float32 weights move a boundary by 1e-7, so one sample in many thousands may differ.
    assert (found == expected).float().mean() > 0.99
    assert torch.isfinite(scores.gather(1, found[:, None])).all()


@pytest.mark.parametrize("vocabulary", [51, 3000])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("top_k", [0, 5])
def test_restrict_agrees_with_transformers(top_p: float, top_k: int, vocabulary: int) -> None:
    # Peaked rows, for which a few tokens suffice, and flat ones.
    spread = torch.tensor([3.0, 0.01]).repeat(8)
    scores = spread[:, None] * torch.randn(16, vocabulary)
    ours = warp_logits(scores, Decoding(1, temperature=1.2, top_p=top_p, top_k=top_k))
    theirs = scores / 1.2
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    theirs = TopPLogitsWarper(top_p)(None, theirs)
    assert torch.equal(torch.isinf(ours), torch.isinf(theirs))
    assert torch.equal(ours[~torch.isinf(ours)], theirs[~torch.isinf(theirs)])


class Interrupted(Exception):
    pass


class FailingEngine:
    """Generates some batches, then is interrupted."""

    def __init__(self, batches: int) -> None:
        self.left = batches
        self.inner = engine()
        self.calls = 0

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
        if self.left == 0:
            raise Interrupted
        self.left -= 1
        self.calls += 1
        return self.inner(numbers)


def test_sampling_resumes_and_loses_at_most_a_batch(tmp_path: Path) -> None:
    expected = sample_sequences(engine(), 1, [2], CONFIG)
    with pytest.raises(Interrupted):
        sample_sequences(FailingEngine(2), 1, [2], CONFIG, tmp_path)
    assert len(list(tmp_path.glob("shard-*.json"))) == 2
    again = FailingEngine(5)
    assert sample_sequences(again, 1, [2], CONFIG, tmp_path) == expected
    assert again.calls == 1
    assert sample_sequences(FailingEngine(0), 1, [2], CONFIG, tmp_path) == expected


def test_more_sequences_reuse_existing_shards(tmp_path: Path) -> None:
    sample_sequences(engine(), 1, [2], CONFIG, tmp_path)
    more = SamplingConfig(num_sequences=60, min_new_tokens=32, max_new_tokens=40, batch_size=16)
    extra = FailingEngine(9)
    found = sample_sequences(extra, 1, [2], more, tmp_path)
    assert len(found.calibration) == 44
    assert extra.calls == 1
    assert found == sample_sequences(engine(more), 1, [2], more)


@pytest.mark.parametrize("change", [{"max_new_tokens": 39}, {"min_new_tokens": 31}])
def test_settings_that_change_sequences_change_the_request(change: dict[str, int]) -> None:
    other = CONFIG.replace(**change)
    assert sampling_facts(1, [2], other) != sampling_facts(1, [2], CONFIG)
    assert sampling_facts(1, [2], CONFIG, seed=3) != sampling_facts(1, [2], CONFIG)
    assert sampling_facts(1, [2], CONFIG.replace(num_sequences=90)) == sampling_facts(
        1, [2], CONFIG
    )


@pytest.mark.parametrize("damage", ["[[1, 2", "[]", "{}", '[["a"]]'])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    with pytest.raises(Interrupted):
        sample_sequences(FailingEngine(1), 1, [2], CONFIG, tmp_path)
    shard = tmp_path / "shard-000000.json"
    json.loads(shard.read_text())
    shard.write_text(damage)
    with pytest.raises(ArtifactError, match="shard-000000"):
        sample_sequences(engine(), 1, [2], CONFIG, tmp_path)


def test_a_model_whose_samples_are_rejected_raises_with_reasons() -> None:
    def stuck(numbers: Sequence[int]) -> list[list[int]]:
        return [[5] * 40 for _ in numbers]

    with pytest.raises(DataError, match="token_run"):
        sample_sequences(stuck, 1, [2], CONFIG)


def test_text_can_continue_past_the_end_of_a_document() -> None:
    """Without endings EOS is a token like any other: it occurs, also before the minimum length."""
    model, tokenizer = make_llama(), make_tokenizer()
    config = tiny_config().sampling
    assert ending_ids(model, tokenizer) == [2]
    model.generation_config.eos_token_id = []
    assert ending_ids(model, tokenizer) == []
    found = sample_sequences(HuggingFaceEngine(model, 1, [], config), 1, [], config)
    rows = [row[1:] for row in [*found.calibration, *found.held_out]]
    assert {len(row) for row in rows} == {config.max_new_tokens}
    assert any(2 in row[: config.min_new_tokens - 1] for row in rows)


def test_rejections_are_counted() -> None:
    inner = engine()

    def sometimes(numbers: Sequence[int]) -> list[list[int]]:
        return [
            [5] * 40 if n % 4 == 0 else row for n, row in zip(numbers, inner(numbers), strict=True)
        ]

    found = sample_sequences(sometimes, 1, [2], CONFIG)
    assert found.rejected["token_run"] >= 13
    assert len(found.calibration) + len(found.held_out) == 40


def test_the_start_token_is_the_configured_one_or_bos() -> None:
    assert start_token_id(make_tokenizer(), None) == 1
    assert start_token_id(make_tokenizer(), "a") == 4
    without = make_tokenizer(bos=False)
    assert start_token_id(without, "eos") == 2
    with pytest.raises(DataError, match="nope"):
        start_token_id(without, "nope")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("special", "eos", "template", "model_bos", "generation_bos", "wanted"),
    [
        (["<|endoftext|>", "<|im_end|>"], "<|im_end|>", CHATML, "<|endoftext|>", None, "<|endoftext|>"),
        (["<|endoftext|>", "<|im_end|>", "<s>"], "<|im_end|>", CHATML, "<s>", None, "<s>"),
        (["<|endoftext|>", "<|im_end|>", "<s>"], "<|im_end|>", CHATML, None, "<s>", "<s>"),
        (["<|endoftext|>", "<|im_end|>"], "<|im_end|>", CHATML, None, None, "<|endoftext|>"),
        (["<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>", "{{ eos_token }}", None, None, "<|end_of_text|>"),
        (["<|endoftext|>"], "<|endoftext|>", None, "a", None, "<|endoftext|>"),  # the default id of a config class
        (["</s>"], "</s>", None, None, None, "</s>"),
        (["</s>", "<end>"], "</s>", "{{ messages[0]['content'] }}<end>", None, None, "</s>"),
        (["<|im_end|>"], "<|im_end|>", CHATML, None, None, None),
        (["<|im_end|>"], "<|im_end|>", "{{ eos_token }}", "a", "a", None),
    ],
    ids=["qwen3", "the model's", "its generation's", "qwen without bos_token_id", "llama 3", "an id of a letter",
         "eos, no chat", "eos, not of turns", "no separator", "no separator, ids of letters"],
)  # fmt: skip
def test_without_bos_sampling_starts_from_a_document_separator(
    special: list[str], eos: str, template: str | None, model_bos: str | None,
    generation_bos: str | None, wanted: str | None, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    tokenizer = make_tokenizer(bos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": special, "eos_token": eos})
    tokenizer.chat_template = template

    def config(bos: str | None) -> LlamaConfig:
        return LlamaConfig(
            bos_token_id=None if bos is None else tokenizer.convert_tokens_to_ids(bos)
        )

    configs = config(model_bos), config(generation_bos), None
    if wanted is None:
        with pytest.raises(
            DataError, match=r"no BOS token .*start_token eos \(which is '<\|im_end"
        ):
            start_token_id(tokenizer, None, *configs)
        return
    with caplog.at_level("INFO"):
        assert start_token_id(tokenizer, None, *configs) == tokenizer.convert_tokens_to_ids(wanted)
    assert f"starts from '{wanted}'" in caplog.text


def test_a_sampler_with_another_tokenizer_is_refused() -> None:
    other = make_tokenizer()
    other.add_tokens(["new"])
    check_same_tokenizer(make_tokenizer(), make_tokenizer(), "big")
    with pytest.raises(DataError, match="another tokenizer"):
        check_same_tokenizer(make_tokenizer(), other, "big")


def test_nan_weights_are_detected_while_sampling() -> None:
    bad = engine()
    bad.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        bad(range(8))


def test_training_mode_is_restored() -> None:
    working = engine()
    working.model.train()
    working(range(2))
    assert working.model.training


def test_the_config_of_these_tests_is_valid() -> None:
    assert tiny_config().sampling == CONFIG


@pytest.mark.parametrize(
    "batch",
    [[], None, 3, {"0": [4]}, [3], ["ab"], [[4, "5"]], [[4, None]], [[4.0]], [[True]], [[-1]], [[2**31]],
     [[2**70]], [[[4]]], [["\ud800"]]],
)  # fmt: skip
def test_a_sealed_shard_with_wrong_contents_is_named(tmp_path: Path, batch: Any) -> None:
    """Its checksum is valid; reading an empty one would never end."""
    write_sealed(tmp_path / "shard-000000.json", {"sequences": batch})
    with pytest.raises(ArtifactError, match=r"shard-000000\.json has unexpected contents"):
        sample_sequences(engine(), 1, [2], CONFIG, tmp_path)
    write_sealed(tmp_path / "shard-000000.json", {"sequence": [[4]]})
    with pytest.raises(ArtifactError, match=r"shard-000000\.json has no entry 'sequences'"):
        sample_sequences(engine(), 1, [2], CONFIG, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "facts"),
    [
        ({"tokens": None}, {}),
        ({"lengths": None}, {}),
        ({"tokens": torch.ones(6)}, {}),
        ({"tokens": torch.ones(2, 3, dtype=torch.int64)}, {}),
        ({"tokens": torch.tensor(3)}, {}),
        ({"tokens": -torch.ones(6, dtype=torch.int64)}, {}),
        ({"lengths": torch.tensor([3.0, 3.0])}, {}),
        ({"lengths": torch.tensor([7, -1])}, {}),
        ({"lengths": torch.tensor([3, 4])}, {}),
        ({}, {"sequences": None}),
        ({}, {"sequences": [2]}),
        ({}, {"sequences": [2, 2]}),
        ({}, {"sequences": [2, -1]}),
        ({}, {"sequences": [2, 1.0]}),
        ({}, {"sequences": [2, True]}),
        ({}, {"sequences": [2, "1"]}),
    ],
)
def test_a_sealed_set_with_wrong_contents_is_named(
    tmp_path: Path, tensors: dict[str, Any], facts: dict[str, Any]
) -> None:
    good = {"tokens": torch.arange(6), "lengths": torch.tensor([3, 3])}
    said = {"sequences": [2, 1], "rejected": {}}
    write_artifact(tmp_path / "set", CalibrationSet.kind, good, said)
    assert CalibrationSet.load(tmp_path / "set") == CalibrationSet([[0, 1, 2]], [[3, 4, 5]], {})
    bad = {name: t for name, t in {**good, **tensors}.items() if t is not None}
    write_artifact(tmp_path / "set", CalibrationSet.kind, bad, {**said, **facts})
    with pytest.raises(ArtifactError, match="set has unexpected contents"):
        CalibrationSet.load(tmp_path / "set")
