"""Sources of calibration text: their shares, dialogues by both sides, files, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_templates import (
    CHATML,
    DEFAULT_SYSTEM,
    INST,
    MERGES,
    NO_END,
    NO_SYSTEM,
    TOOLS,
    byte_tokenizer,
)
from transformers import PreTrainedTokenizerFast

import folora
from benchmarks.tiny import make_llama, make_tokenizer
from folora.calibration.calibration_set import CalibrationSet
from folora.calibration.engine import HuggingFaceEngine
from folora.calibration.logits import decoding_of, inverse_cdf, stream_seed, warp_logits
from folora.calibration.sampling import sample_sequences, sampling_facts
from folora.calibration.source_files import mixture_of
from folora.calibration.sources import Mixture, Script, Source
from folora.config import SamplingConfig
from folora.data.user_turns import user_turn
from folora.errors import ConfigError, DataError, FoLoraError

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TEMPLATES = {
    "ChatML": (CHATML, "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "a default system prompt": (
        DEFAULT_SYSTEM,
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "Llama 3": (
        LLAMA3,
        "<s><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "Gemma": (NO_SYSTEM, "<s><start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),
    "Mistral": (INST, "<s>[INST]", "[/INST]"),
    "GLM 4": (NO_END, "[gMASK]<sop><|user|>\n", "<|assistant|>\n"),
    "Gemma 4": (MERGES, "<|user|>", "<|end|><|assistant|>"),
}
CONFIG = SamplingConfig(num_sequences=48, min_new_tokens=32, max_new_tokens=40, batch_size=16)
START, END = 1, 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_opened_at_the_users_turn(name: str) -> None:
    template, opening, insert = TEMPLATES[name]
    tokenizer = byte_tokenizer(template)
    found = user_turn(tokenizer)
    assert tokenizer.decode(found.opening) == opening
    assert tokenizer.decode(found.insert) == insert
    assert len(tokenizer.decode(found.insert[:1])) > 1  # a special token, not a byte


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template"),
        ("{{ messages[0].role }}", "does not render a message exactly once"),
        ("{{ messages[0].content }}</s>", "nothing comes before"),
        ("User: {{ messages[0].content }}\nAssistant:", "no special token ends the message"),
        ("<s>{{ messages[0].content.upper() }}</s>", "exactly once"),
        ("{{ raise_exception('no system prompt') }}", "refuses this chat"),
    ],
)
def test_a_template_that_cannot_be_opened_is_refused(template: str | None, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        user_turn(byte_tokenizer(template))


def source(name: str, share: float, count: int | None = None) -> Source:
    if count is None:
        return Source(name, share, [Script((1,))], endless=True)
    return Source(name, share, [Script((1, n)) for n in range(count)])


def test_every_prefix_has_the_shares() -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    mixture = Mixture([source(name, share) for name, share in shares.items()], START)
    taken: Counter[str] = Counter()
    for number in range(200):
        found, index = mixture.place(number) or (source("", 0), -1)
        assert index == taken[found.name]
        taken[found.name] += 1
        assert all(abs(taken[n] - s * (number + 1)) <= 1 for n, s in shares.items())


def test_the_others_replace_a_file_that_is_used_up() -> None:
    mixture = Mixture([source("a", 0.5), source("b", 0.5, count=3)], START)
    names = [place[0].name for n in range(10) if (place := mixture.place(n))]
    assert names == ["a", "b"] * 3 + ["a"] * 4
    files = Mixture([source("b", 1.0, count=3)], START)
    assert [files.place(n) is None for n in range(5)] == [False] * 3 + [True] * 2


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """``<s>u:`` opens the user's turn; ``</s>`` ends it, and ``<s>a:`` opens the answer."""
    return make_tokenizer(chat=True)


def chat_mixture(config: SamplingConfig = CONFIG, **sources: float) -> Mixture:
    return mixture_of(config.replace(sources=sources or None), chat_tokenizer(), START)


def engine(mixture: Mixture, config: SamplingConfig = CONFIG) -> HuggingFaceEngine:
    return HuggingFaceEngine(make_llama(), mixture, [END], config)


def written_alone(mixture: Mixture, number: int) -> list[int]:
    """What an engine should write, computed without a cache, a batch or padding."""
    model, (source, index) = make_llama(), mixture.place(number) or (None, 0)
    assert source is not None
    script, setting = source.script(index), decoding_of(index)
    stream = torch.Generator().manual_seed(stream_seed(0, number))
    uniforms = torch.rand(200, generator=stream, dtype=torch.float64)
    ids, forced, turn, written = [*script.opening], list[int](), 0, 0
    least = CONFIG.min_new_tokens if script.least is None else script.least
    for step in range(len(script.opening) - 1, 200):
        if forced:
            ids.append(forced.pop(0))
            continue
        scores = model(input_ids=torch.tensor([ids])).logits[:, -1].float()
        if turn < least:
            scores[:, END] = -float("inf")
        if not setting.is_plain:
            scores = warp_logits(scores, setting)
        token = int(inverse_cdf(scores, uniforms[step : step + 1]))
        turn, written = turn + 1, written + 1
        ids.append(token)
        if token == END and script.insert and ids.count(END) == 1:
            ids[-1:], forced, turn = [script.insert[0]], [*script.insert[1:]], 0
            written -= 1
        elif token == END or written == CONFIG.max_new_tokens:
            break
    return ids[len(script.opening) :]


@torch.no_grad()
@pytest.mark.parametrize("steps", [True, False], ids=["cache", "generate"])
def test_a_dialogue_depends_on_its_number_alone(steps: bool) -> None:
    """Not on its batch, whose rows have openings of other lengths, nor on how it is decoded."""
    mixture = chat_mixture(bos=0.5, chat=0.5)
    decoder = engine(mixture)
    decoder.steps = steps
    together = decoder(range(24))
    assert together == [*decoder(range(5)), *decoder(range(5, 24))]
    for number in (0, 1, 3, 11, 23):
        assert together[number] == written_alone(mixture, number)
    answered = [row for row in together[1::2] if END in row and row.index(END) < len(row) - 4]
    assert len(answered) > 2
    insert = user_turn(chat_tokenizer()).insert
    for row in answered:
        end = row.index(END)
        assert tuple(row[end : end + len(insert)]) == insert


def test_the_set_has_the_shares_and_each_source_is_held_out() -> None:
    config = CONFIG.replace(num_sequences=40)
    mixture = chat_mixture(bos=0.7, chat=0.3)
    found = sample_sequences(engine(mixture), mixture, [END], config)
    assert Counter(found.sources) == {"bos": 28, "chat": 12}
    held_out = {name: len(rows) for name, rows in found.by_source().items()}
    assert held_out == {"bos": 12, "chat": 5}  # of 16, rounded up
    opening = user_turn(chat_tokenizer()).opening
    whole = found.by_source(held_out_only=False)
    assert all(tuple(row[: len(opening)]) == opening for row in whole["chat"])
    assert not any(tuple(row[: len(opening)]) == opening for row in whole["bos"])
    assert found.rejected["unanswered"] > 0
    assert sum(map(len, whole.values())) == 40
    for size in (8, 40):
        other = config.replace(batch_size=size)
        assert sample_sequences(engine(mixture, other), mixture, [END], other) == found


def test_text_from_the_start_token_alone_is_as_before_there_were_sources() -> None:
    mixture = chat_mixture(bos=1.0)
    plain = sample_sequences(engine(mixture), mixture, [END], CONFIG)
    old = HuggingFaceEngine(make_llama(), START, [END], CONFIG)
    assert sample_sequences(old, START, [END], CONFIG) == plain
    assert sampling_facts(mixture, [END], CONFIG) == sampling_facts(START, [END], CONFIG)
    assert mixture.turn_ends == ()


def test_an_interrupted_mixture_resumes(tmp_path: Path) -> None:
    mixture = chat_mixture()
    expected = sample_sequences(engine(mixture), mixture, [END], CONFIG, tmp_path)
    last = max(tmp_path.glob("shard-*.json"))
    last.unlink()
    asked: list[int] = []
    decoder = engine(mixture)

    def counting(numbers: Sequence[int]) -> list[list[int]]:
        asked.extend(numbers)
        return decoder(numbers)

    assert sample_sequences(counting, mixture, [END], CONFIG, tmp_path) == expected
    assert min(asked) == int(last.stem[-6:])
    expected.save(tmp_path / "set")
    assert CalibrationSet.load(tmp_path / "set") == expected


def test_a_source_of_which_nothing_passes_is_named() -> None:
    """A model that never ends its turn: after 44 attempts, as .9^44 < .01."""
    mixture = chat_mixture(bos=0.5, chat=0.5)
    asked: list[int] = []

    def endless(numbers: Sequence[int]) -> list[list[int]]:
        asked.extend(numbers)
        return [distinct(n) for n in numbers]

    message = r"of 44 sampled sequences of chat only 0 passed .*'unanswered': 44.* one in 10 must"
    with pytest.raises(DataError, match=message + r".*--sampling\.sources, or a larger"):
        sample_sequences(endless, mixture, [END], CONFIG.replace(num_sequences=2000))
    assert len(asked) == 96  # of 88 needed, in batches of 16


def distinct(number: int) -> list[int]:
    """A sequence without an end that the filter accepts as text."""
    return [4 + (number + 7 * place * (1 + number % 5)) % 47 for place in range(40)]


@pytest.mark.parametrize(("one_in", "is_refused"), [(5, False), (20, True)])
def test_sampling_is_given_up_if_less_than_a_tenth_passes(one_in: int, is_refused: bool) -> None:
    asked: list[int] = []

    def decoder(numbers: Sequence[int]) -> list[list[int]]:
        asked.extend(numbers)
        return [
            [*divmod(n, 47), *distinct(n)] if n % one_in == one_in - 1 else [3] * 40
            for n in numbers
        ]

    config = CONFIG.replace(num_sequences=400)
    if is_refused:
        with pytest.raises(DataError, match=r"only \d+ passed"):
            sample_sequences(decoder, START, [END], config)
        assert len(asked) < 400  # instead of 4000
    else:
        found = sample_sequences(decoder, START, [END], config)
        assert len(found.calibration + found.held_out) == 400


def test_the_default_follows_the_model(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert mixture_of(CONFIG, make_tokenizer(), START).shares == {"bos": 1.0}
    assert not caplog.text
    assert mixture_of(CONFIG, chat_tokenizer(), START).shares == {"bos": 0.5, "chat": 0.5}
    assert "50% bos, 50% chat" in caplog.text
    other = chat_tokenizer()
    other.chat_template = "User: {{ messages[0].content }}\n"
    assert mixture_of(CONFIG, other, START).shares == {"bos": 1.0}
    assert "no special token ends the message" in caplog.text
    sampler = CONFIG.replace(sampler_model="other")
    assert mixture_of(sampler, chat_tokenizer(), START).shares == {"bos": 1.0}
    with pytest.raises(ConfigError, match="no special token ends the message; use bos"):
        mixture_of(CONFIG.replace(sources={"chat": 1.0}), other, START)
    assert folora.FoLoraConfig.paper().sampling.sources == {"bos": 1.0}


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(ids: Sequence[int]) -> str:
    return "".join(chat_tokenizer().convert_ids_to_tokens([*ids]))


def test_prompts_and_texts_are_read_from_files(tmp_path: Path) -> None:
    prompts = write(
        tmp_path / "p.jsonl",
        [{"prompt": f"add {n}"} for n in range(30)]
        + [
            {
                "messages": [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "no"},
                ]
            }
        ]
        + [{"prompt": "add 3"}],
    )
    texts = write(
        tmp_path / "t.jsonl", [{"text": chr(97 + n % 26) * 2 + str(n)} for n in range(40)]
    )
    sources = {f"prompts:{prompts}": 0.5, f"texts:{texts}": 0.5}
    config = CONFIG.replace(sources=sources)
    mixture = mixture_of(config, chat_tokenizer(), START)
    asked, given = mixture.sources
    assert len(asked.scripts) == 31  # without the duplicate
    assert text(asked.script(2).opening) == "<s>u:add 2</s><s>a:"
    assert text(asked.script(30).opening) == "<s>u:hi</s><s>a:"
    assert text(given.script(1).opening) == "<s>bb1"
    found = sample_sequences(engine(mixture), mixture, [END], config)
    parts = found.by_source(held_out_only=False)
    assert parts[given.name] == [[*given.script(n).opening] for n in range(24)]
    used = [
        s.opening
        for s in asked.scripts
        for r in parts[asked.name]
        if s.opening == (*r[: len(s.opening)],)
    ]
    assert len({*used}) == len(used) == 24  # no prompt is used twice
    with pytest.raises(DataError, match="row 30: it has messages, but this tokenizer has no chat"):
        mixture_of(config, make_tokenizer(), START)
    write(prompts, [{"prompt": f"add {n}"} for n in range(30)])
    plain = mixture_of(config, make_tokenizer(), START).sources[0]
    assert text(plain.script(2).opening) == "<s>add 2"


TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {}}}}
CALL = {"function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
ASKED = {"role": "user", "content": "Oslo?"}
CALLED = [ASKED, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "cold"}]


def test_prompts_with_tools_are_opened_with_the_definitions(tmp_path: Path) -> None:
    """So that the model answers with a call; also after the result of one."""
    prompts = [{"prompt": f"weather {n}?", "tools": [TOOL]} for n in range(60)]
    file = write(
        tmp_path / "p.jsonl", [*prompts, {"messages": CALLED, "tools": json.dumps([TOOL])}]
    )
    tokenizer = byte_tokenizer(TOOLS)
    config = CONFIG.replace(sources={f"prompts:{file}": 1.0})
    mixture = mixture_of(config, tokenizer, START)
    (source,) = mixture.sources
    opened = [tokenizer.decode(script.opening) for script in source.scripts]
    defined = json.dumps({"type": "function", "function": TOOL})
    system = f"<|im_start|>system\n{defined}\n<|im_end|>\n<|im_start|>user\n"
    answer = "<|im_end|>\n<|im_start|>assistant\n"
    assert opened[7] == f"{system}weather 7?{answer}"
    assert opened[60].startswith(f"{system}Oslo?{answer}")
    assert '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}' in opened[60]
    assert opened[60].endswith(f"<|im_start|>tool\ncold{answer}")
    decoder = HuggingFaceEngine(
        make_llama(vocab=len(tokenizer), max_position_embeddings=512), mixture, [END], config
    )
    found = sample_sequences(decoder, mixture, [END], config)
    assert found.held_out and {*found.sources} == {source.name}
    assert all(tokenizer.decode(row).startswith(system) for row in found.held_out)
    write(file, [{key: row[key] for key in ("prompt",)} for row in prompts])
    without = mixture_of(config, tokenizer, START)
    assert "get_weather" not in tokenizer.decode(without.script(0).opening)
    assert without.facts != mixture.facts


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (CHATML, {"prompt": "a", "tools": [TOOL]}, "leaves out the column 'tools'"),
        ("{% if tools %}{% endif %}" + CHATML, {"prompt": "a", "tools": [TOOL]}, "leaves out"),
        ("{% if tools %}{{ raise_exception('none') }}{% endif %}" + CHATML,
         {"prompt": "a", "tools": [TOOL]}, "refuses this chat: none"),
        (CHATML, {"messages": CALLED}, "leaves out the tool calls of message 1"),
        (TOOLS, {"prompt": "a", "tools": "get_weather"}, "column 'tools'"),
    ],
)  # fmt: skip
def test_tools_that_a_template_does_not_render_are_refused(
    template: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "p.jsonl", [row])
    config = CONFIG.replace(sources={f"prompts:{file}": 1.0})
    with pytest.raises(DataError, match=rf"prompts:{file}, row 0: .*{message}"):
        mixture_of(config, byte_tokenizer(template), START)


def test_long_texts_are_cut_into_pieces(tmp_path: Path) -> None:
    texts = write(
        tmp_path / "t.jsonl", [{"text": f"{n:02}" * 25 + f"{n:02}." * 17} for n in range(30)]
    )
    config = CONFIG.replace(sources={f"texts:{texts}": 1.0})
    (given,) = mixture_of(config, make_tokenizer(), START).sources
    lengths = [len(script.opening) for script in given.scripts]
    assert {*lengths} == {41}  # what remains of a text is shorter than a piece may be
    assert all(script.opening[0] == START for script in given.scripts)


MANY = [{"text": f"text {n}"} for n in range(60)]


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("texts", [], "is empty"),
        ("texts", MANY[:5], "has 5 different sequences, but a share of 1 needs at least 48"),
        ("texts", [*MANY, {"text": "x"}], "row 60: 'x' has 1 tokens, but at least 2"),
        ("texts", [*MANY, {"text": ""}], "row 60: '' has 0 tokens"),
        ("texts", [{"body": "some text"}] * 60, "row 0: it has neither a column 'text'"),
        ("texts", [{**row, "label": 1} for row in MANY], "column 'label' is not used"),
        ("texts", [{"text": 3}] * 60, "row 0: a chat must be a list"),
        ("prompts", [{"prompt": "a" * 230}] * 60, "row 0|context of the model is 256"),
        ("prompts", [{"messages": [{"role": "assistant", "content": "x"}]}], "hold no prompt"),
        ("prompts", [{"prompt": "\ud800"}], "surrogate"),
    ],
)
def test_files_that_cannot_be_used_are_refused(
    kind: str, rows: list[Any], message: str, tmp_path: Path
) -> None:
    if "context" in message:
        rows = [{"prompt": f"{row['prompt']}{n}"} for n, row in enumerate(rows)]
    file = write(tmp_path / "rows.jsonl", rows)
    config = CONFIG.replace(sources={f"{kind}:{file}": 1.0})
    with pytest.raises(FoLoraError, match=message) as error:
        mixture_of(config, chat_tokenizer(), START, vocabulary=51, context=256)
    assert f"{kind}:{file}" in str(error.value)


def test_facts_tell_the_contents_of_files_apart(tmp_path: Path) -> None:
    one, other = (write(tmp_path / f"{n}.jsonl", MANY[n:]) for n in range(2))

    def facts(file: Path) -> Any:
        config = CONFIG.replace(sources={"bos": 0.5, f"texts:{file}": 0.5})
        (*_, found) = mixture_of(config, make_tokenizer(), START).facts["mixture"].values()
        return found

    assert facts(one) != facts(other)
    write(tmp_path / "1.jsonl", MANY)
    assert facts(one) == facts(other)
