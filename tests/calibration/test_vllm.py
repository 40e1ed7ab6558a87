"""Sequences from a vLLM server: by number, verified, resumable. A fake server implements the protocol.

The real one: ``vllm serve MODEL``, and ``FOLORA_TEST_VLLM="URL MODEL" pytest tests/calibration/test_vllm.py``.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.tiny import make_llama, make_tokenizer, tiny_config
from folora.calibration.engine import Engine
from folora.calibration.logits import MIXTURE, Decoding, decoding_of, stream_seed, warp_logits
from folora.calibration.sampling import sample_sequences
from folora.calibration.source_files import mixture_of
from folora.calibration.vllm import PROBE_TOKENS, VllmEngine, engine_of, find_server
from folora.config import SamplingConfig
from folora.errors import ConfigError, MismatchError, ServerError
from folora.pipeline.prepare import prepare
from folora.pipeline.run import Run
from folora.pipeline.stages import Samples

START, EOS = 1, 2
CONFIG = SamplingConfig(num_sequences=32, min_new_tokens=32, max_new_tokens=36, batch_size=12)


class FakeServer(ThreadingHTTPServer):
    """Answers the requests of these tests as `vllm serve` 0.32 does; `fault` changes an answer."""

    daemon_threads = True
    request_queue_size = 64  # pending connections

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.model = model
        self.requests: list[dict[str, Any]] = []
        self.key: str | None = None
        self.context = 256
        self.fault: Any = lambda answer: answer
        self.drops: int | None = None  # seed of the request that gets no answer
        self.refuses: int | None = None  # seed of the request that is refused while others wait
        self.going_on = Event()
        self.waited_in_vain = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client has disconnected
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def completion(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Tokens sampled with the settings and seed of the request."""
        self.requests.append(asked)
        generator = torch.Generator().manual_seed(asked["seed"])
        setting = Decoding(0, asked["temperature"], asked["top_p"], asked["top_k"])
        ids, logprobs = list(asked["prompt"]), []
        for step in range(asked["max_tokens"]):
            with torch.no_grad():
                scores: torch.Tensor = self.model(input_ids=torch.tensor([ids])).logits[:, -1]
            raw = scores.log_softmax(-1)[0]
            if step < asked["min_tokens"]:
                scores[:, asked["stop_token_ids"]] = -float("inf")
            token = int(
                warp_logits(scores, setting).softmax(-1).multinomial(1, generator=generator)
            )
            ids.append(token)
            logprobs.append(float(raw[token]))
            if token in asked["stop_token_ids"]:
                break
        time.sleep(random.random() / 50)
        choice = {
            "token_ids": ids[len(asked["prompt"]) :],
            "logprobs": {"token_logprobs": logprobs},
        }
        return {"object": "text_completion", "choices": [choice]}


class Answer(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        adapter = {"id": "adapter", "parent": "base", "max_model_len": 1}
        base = {"id": "base", "parent": None, "max_model_len": self.server.context}
        self.say({"object": "list", "data": [adapter, base]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions" or asked["model"] != "base":
            self.say({"error": {"message": "no such model"}}, 404)
        elif self.server.drops == asked["seed"]:
            self.close_connection = True
        elif self.server.refuses == asked["seed"]:
            self.say({"error": {"message": "not this one"}}, 400)
        else:
            if self.server.refuses is not None and not self.server.going_on.wait(30):
                self.server.waited_in_vain = True
            self.say(self.server.completion(asked))

    def say(self, answer: Any, status: int = 200) -> None:
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            answer, status = {"error": "Unauthorized"}, 401
        elif status == 200:
            answer = self.server.fault(answer)
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(model: PreTrainedModel) -> Iterator[FakeServer]:
    server = FakeServer(model)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving(make_llama()) as found:
        yield found


def engine(server: FakeServer, config: SamplingConfig = CONFIG) -> VllmEngine:
    return VllmEngine(find_server(server.url, config), START, [EOS], config, 51)


def test_every_sequence_is_requested_with_its_own_seed(server: FakeServer) -> None:
    written = engine(server)(range(20))
    assert engine(server)(range(7, 12)) == written[7:12]
    for number in range(20):
        seed = stream_seed(0, number)
        asked = next(r for r in server.requests if r["seed"] == seed)
        setting = decoding_of(number)
        assert asked["prompt"] == [START] and asked["stop_token_ids"] == [EOS]
        assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (
            setting.temperature, setting.top_p, setting.top_k,
        )  # fmt: skip
        assert (asked["min_tokens"], asked["max_tokens"]) == (32, 36)
        assert asked["repetition_penalty"] == 1.0  # overrides generation_config.json
    assert len({r["seed"] for r in server.requests}) == 20


def test_a_calibration_set_from_a_server(server: FakeServer) -> None:
    found = sample_sequences(engine(server), START, [EOS], CONFIG)
    rows = [*found.calibration, *found.held_out]
    assert len(rows) == 32 and len({tuple(row) for row in rows}) == 32
    assert all(row[0] == START and 33 <= len(row) <= 37 for row in rows)


def test_a_dialogue_takes_two_requests(server: FakeServer) -> None:
    """The message of the user, then the answer after the generation prompt."""
    config = CONFIG.replace(sources={"chat": 1.0})
    mixture = mixture_of(config, make_tokenizer(chat=True), START)
    opening, insert = (list(t) for t in (mixture.script(0).opening, mixture.script(0).insert))
    written = replace(engine(server, config), start=mixture)(range(40))
    answered = [row for row in written if EOS in row and len(row) > row.index(EOS) + len(insert)]
    assert len(answered) > 2
    prompts = {tuple(asked["prompt"]): asked for asked in server.requests}
    assert len(server.requests) == 40 + len(prompts) - 1
    for row in answered:
        end = row.index(EOS)
        assert row[end : end + len(insert)] == insert
        asked = prompts[(*opening, *row[:end], *insert)]
        assert (asked["min_tokens"], asked["max_tokens"]) == (1, 36 - end)
        assert len(row) <= 36 + len(insert)
    with pytest.raises(ServerError, match=r"max_new_tokens \(36\) and \d+ tokens of a prompt"):
        server.context = 37
        find_server(server.url, config, mixture.given)


def test_a_server_with_another_model_is_refused(server: FakeServer) -> None:
    config = CONFIG.replace(server=server.url + "/v1/")
    engine_of(make_llama(), START, [EOS], config)
    assert server.requests[-1]["max_tokens"] == PROBE_TOKENS
    with pytest.raises(MismatchError, match="nats per token"):
        engine_of(make_llama(seed=1), START, [EOS], config)
    another = config.replace(sampler_model="another")  # the server's model is not verified then
    engine_of(make_llama(seed=1), START, [EOS], another)


def changed(name: str, value: Any) -> Any:
    """A fault in the answers to completion requests."""

    def fault(answer: Any) -> Any:
        return answer | {"choices": [c | {name: value} for c in answer.get("choices", [])]}

    return fault


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda _: b"<html>", "does not answer with JSON: '<html>'"),
        (lambda _: {"choices": []}, "without a completion"),
        (lambda _: [1], "without a completion"),
        (changed("token_ids", None), "without token_ids"),
        (changed("token_ids", [5, 51]), "token 51, but the model has 51"),
        (changed("token_ids", [5, True]), "token True"),
        (changed("token_ids", [-1]), "token -1"),
    ],
)
def test_an_invalid_response_is_named(server: FakeServer, fault: Any, message: str) -> None:
    draw = engine(server)
    server.fault = fault
    with pytest.raises(ServerError, match=message):
        draw([0, 1, 2])


def test_a_failed_request_does_not_wait_for_other_sequences(server: FakeServer) -> None:
    draw = engine(server)
    server.refuses = stream_seed(0, 3)
    with pytest.raises(ServerError, match=r"answers 400: .*not this one"):
        draw(range(6))
    assert not server.waited_in_vain
    server.going_on.set()


@pytest.mark.parametrize("logprobs", [None, {}, {"token_logprobs": [0.0]}, {"token_logprobs": "x"}])
def test_a_probe_without_valid_logprobs_is_refused(server: FakeServer, logprobs: Any) -> None:
    draw = engine(server)
    server.fault = changed("logprobs", logprobs)
    with pytest.raises(ServerError, match="without log-probabilities"):
        draw.check_serves(make_llama())
    server.fault = changed("logprobs", {"token_logprobs": [math.nan] * PROBE_TOKENS})
    with pytest.raises(MismatchError):
        draw.check_serves(make_llama())


def test_an_unsuitable_server_is_refused(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.context = 36
    with pytest.raises(ServerError, match=r"context of 36 tokens.*--max-model-len"):
        find_server(server.url, CONFIG)
    server.context = 37
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server.key = "secret"
    assert find_server(server.url, CONFIG).name == "base"
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    with pytest.raises(ServerError, match=r"401.*set its API key in VLLM_API_KEY"):
        find_server(server.url, CONFIG)
    server.key, server.fault = None, lambda _: {"data": [{"id": "base"}]}
    with pytest.raises(ServerError, match="not that of a vLLM server"):
        find_server(server.url, CONFIG)


def test_an_unreachable_server_is_refused_before_the_model_is_loaded(
    server: FakeServer, model_folder: Path, tmp_path: Path
) -> None:
    """The model's weights are not loaded."""
    url = server.url
    server.shutdown()
    server.server_close()
    config = tiny_config(model=str(model_folder), output=str(tmp_path), sampling={"server": url})
    run = Run(config)
    with pytest.raises(ServerError, match=r"does not answer.*vllm serve"):
        run.check_command("sample")
    assert "model" not in vars(run)
    with pytest.raises(ConfigError, match="begin with http"):
        SamplingConfig(server="localhost:8000")


def test_a_run_resumes_after_a_server_failure(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with serving(model) as server:
        small = {"server": server.url, "batch_size": 10, "tolerance": None}
        config = tiny_config(
            model=str(model_folder),
            dataset=str(rows_file),
            output=str(tmp_path / "a"),
            sampling=small,
        )
        server.drops = stream_seed(config.seed, 23)  # in the third batch
        with pytest.raises(ServerError, match="finished batches are on disk"):
            Run(config).sample()
        kept = sorted(p.name for p in (tmp_path / "a" / "1-samples").glob("shard-*"))
        assert kept == ["shard-000000.json", "shard-000010.json"]
        server.drops, before = None, len(server.requests)
        found = Run(config).sample()
        # Requests of the third batch may still arrive here; the probe has a sequence's seed.
        asked = {r["seed"] for r in server.requests[before:] if "logprobs" not in r}
        assert asked == {
            stream_seed(config.seed, number) for number in range(20, config.sampling.num_sequences)
        }
    # The server has stopped; the later stages do not need it.
    again = Run(config)
    again.check_command("run")
    assert again.sample() == found
    # Another engine has other random streams, so its shards are separate.
    own = Run(config.replace(sampling=config.sampling.replace(server=None)))
    assert own.sample() != found
    with pytest.raises(ServerError):  # raised before the existing shards are moved away
        again.check_command("run")
    assert (tmp_path / "a" / Samples.path).exists() and (tmp_path / "a" / "old").exists()


def test_prepare_samples_from_a_server(model_folder: Path, rows_file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with serving(AutoModelForCausalLM.from_pretrained(model_folder)) as server:
        config = tiny_config(sampling={"server": server.url, "batch_size": 20})
        prepared = prepare(model, make_tokenizer(), str(rows_file), config)
        assert len(server.requests) > 32
        expected = sample_sequences(engine(server, config.sampling), START, [EOS], config.sampling)
    assert prepared.samples == expected


# A real server.

REAL = os.environ.get("FOLORA_TEST_VLLM")


@pytest.mark.skipif(REAL is None, reason="FOLORA_TEST_VLLM names no server and model")
def test_vllm_matches_the_model() -> None:
    """Tokens follow the distribution of the model's logits under our decoding settings."""
    url, name = str(REAL).split()
    model = AutoModelForCausalLM.from_pretrained(name)
    config = SamplingConfig(server=url, min_new_tokens=64, max_new_tokens=80, num_sequences=100)
    eos: int = model.config.eos_token_id
    draw: Engine = engine_of(model, START, [eos], config)
    numbers = range(100)
    rows = draw(numbers)
    assert sum(a == b for a, b in zip(draw(range(5, 15)), rows[5:15], strict=True)) >= 8  # rounding
    assert all(64 <= len(row) <= 80 for row in rows)
    assert all(eos not in row[:64] and (len(row) == 80 or row[-1] == eos) for row in rows)
    for setting in MIXTURE:
        surprise, variance, outside, tokens = 0.0, 0.0, 0, 0
        for number in (n for n in numbers if decoding_of(n) == setting):
            ids = torch.tensor([[START, *rows[number]]])
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0, :-1].float()
            scores[:64, eos] = -float("inf")
            allowed = warp_logits(scores, setting).log_softmax(-1)
            own = allowed.gather(1, ids[0, 1:, None])[:, 0]
            p = allowed.exp()
            finite = allowed.masked_fill(~allowed.isfinite(), 0.0)
            mean = (p * finite).sum(-1)
            inside = own.isfinite()
            surprise += float((own - mean)[inside].sum())
            variance += float(((p * finite**2).sum(-1) - mean**2)[inside].sum())
            outside += int((~inside).sum())
            tokens += len(own)
        print(f"{setting}: z {surprise / variance**0.5:.2f}, outside {outside} of {tokens}")
        assert abs(surprise) < 4 * variance**0.5
        assert outside <= 0.01 * tokens  # rounding at the boundary of top-p
