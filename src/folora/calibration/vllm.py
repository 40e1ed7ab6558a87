"""An `Engine` that generates sequences on a vLLM server.

vLLM needs other versions of torch and transformers than folora, so it runs in a separate environment
(``vllm serve MODEL``), on this machine or another. Requests and answers hold token ids, not text. Decoding
setting and seed are functions of a sequence's number as in `HuggingFaceEngine`. The random streams are
vLLM's: the sequences differ, but have the same distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from folora.calibration.engine import Engine, HuggingFaceEngine
from folora.calibration.logits import Decoding, decoding_of, stream_seed
from folora.calibration.sources import Mixture, Script, as_mixture
from folora.config import SamplingConfig
from folora.data.special_tokens import known_tokens
from folora.errors import MismatchError, ServerError
from folora.runtime.contexts import evaluating

ENGINE = "vllm"  # in manifests
PROBE_TOKENS = 64  # for the check that a server has the same model
# Nats per token. bf16 in other kernels differs by .05; SmolLM2 with 2 % noise on its weights by .23.
LOGPROB_TOLERANCE = 0.2


@dataclass(frozen=True)
class Server:
    """A vLLM server.

    Attributes:
        url: Its address, such as ``http://localhost:8000``.
        name: Name of its model.
    """

    url: str
    name: str


def find_server(url: str, config: SamplingConfig, given: int = 0) -> Server:
    """Connect to a vLLM server and read the name of its model.

    Args:
        url: Such as ``http://localhost:8000``, with or without ``/v1``.
        config: Its sequences must fit into the server's context.
        given: `Mixture.given`.

    Raises:
        ServerError: It does not answer, is not a vLLM server, or its context is too short.
    """
    url = url.rstrip("/").removesuffix("/v1")
    answer = _request_json("GET", f"{url}/v1/models")[0]
    try:
        base = next(m for m in answer["data"] if m.get("parent") is None)  # the others are adapters
        name, context = str(base["id"]), int(base["max_model_len"])
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        raise ServerError(f"the answer of {url}/v1/models is not that of a vLLM server") from None
    if context <= config.max_new_tokens + given:  # plus the start token
        more = f" and {given} tokens of a prompt" if given else ""
        raise ServerError(
            f"the server at {url} has a context of {context} tokens, but needs more than "
            f"sampling.max_new_tokens ({config.max_new_tokens}){more}; start it with a larger --max-model-len"
        )
    return Server(url, name)


@dataclass(frozen=True)
class VllmEngine:
    """An engine on a vLLM server; see `Engine`.

    Args:
        server: From `find_server`.
        start: The sources, or the token that every sequence starts from.
        eos_ids: Tokens that end a sequence.
        config: Lengths.
        known: The model's vocabulary size.
        seed: Seed of the random streams, one for each sequence.

    Raises:
        ServerError: From a call: the server does not answer, refuses, or its answer is invalid.
    """

    server: Server
    start: int | Mixture
    eos_ids: Sequence[int]
    config: SamplingConfig
    known: int
    seed: int = 0

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
        """See `Engine`; all sequences are requested concurrently, of dialogues first the user's messages."""
        mixture, most = as_mixture(self.start), self.config.max_new_tokens
        scripts = {n: script for n in numbers if (script := mixture.script(n)).is_written}
        found = dict(zip(scripts, self._turns({n: [] for n in scripts}), strict=True))
        # A message that ends before the limit gets an answer.
        asked = {
            number: [*tokens[:end], *script.insert]
            for number, script in scripts.items()
            if script.insert
            and (end := script.first_end(tokens := found[number], self.eos_ids)) is not None
            and end < most
        }
        answers = self._turns(asked)
        found |= {n: [*before, *a] for (n, before), a in zip(asked.items(), answers, strict=True)}
        return [
            scripts[n].written(found[n], self.eos_ids, most) if n in found else [] for n in numbers
        ]

    def _turns(self, before: Mapping[int, list[int]]) -> list[list[int]]:
        """The next turn of each sequence, by the tokens after its opening."""
        requests = [self._request(number, tokens) for number, tokens in before.items()]
        return [self._tokens(choice) for choice in self._choices(requests)] if requests else []

    def check_serves(self, model: PreTrainedModel) -> None:
        """Refuse a server with other weights, by the log-probabilities of a sequence that it generates.

        Raises:
            MismatchError: Their mean absolute difference per token from the model's exceeds `LOGPROB_TOLERANCE`.
        """
        wanted = {"logprobs": 0, "max_tokens": PROBE_TOKENS, "min_tokens": PROBE_TOKENS}
        start_id = as_mixture(self.start).start_id
        request = self._request(0, [], Script((start_id,), least=None), Decoding(1))
        choice = self._choices([request | wanted])[0]
        tokens = self._tokens(choice)
        ids = torch.tensor([[start_id, *tokens]], device=model.device)
        with torch.inference_mode(), evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        ours = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu()
        try:
            theirs = torch.tensor([float(x) for x in choice["logprobs"]["token_logprobs"]])
            apart = float((theirs.reshape(ours.shape) - ours).abs().mean())
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise self._unexpected("log-probabilities of its tokens") from None
        if not apart <= LOGPROB_TOLERANCE:
            raise MismatchError(
                f"the server at {self.server.url} serves {self.server.name}, whose log-probabilities "
                f"are {apart:.2g} nats per token from those of the model here (allowed: {LOGPROB_TOLERANCE:g}). "
                "Serve the same weights in the same precision, or, to sample from another "
                "model on purpose, name it with --sampling.sampler_model"
            )

    def _request(
        self,
        number: int,
        before: Sequence[int],
        script: Script | None = None,
        setting: Decoding | None = None,
    ) -> dict[str, Any]:
        """The request for a turn of one sequence; `before` are the tokens after its opening."""
        mixture = as_mixture(self.start)
        script = script or mixture.script(number)
        _, index = mixture.place(number) or (None, number)
        setting = setting or decoding_of(index)
        written = len(before) - len(script.insert) if before else 0
        return {
            "model": self.server.name,
            "prompt": [*script.opening, *before],
            "seed": stream_seed(self.seed, number) + bool(before),
            "min_tokens": self.config.min_new_tokens if script.least is None else script.least,
            "max_tokens": self.config.max_new_tokens - written,
            "temperature": setting.temperature,
            "top_p": setting.top_p,
            "top_k": setting.top_k,
            "stop_token_ids": list(self.eos_ids),
            "ignore_eos": True,  # those of the server; ours are stop_token_ids
            "return_token_ids": True,
            # Defaults that a model's generation_config.json may change.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    def _choices(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The server's answers."""
        answers = _request_json("POST", f"{self.server.url}/v1/completions", requests)
        try:
            return [answer["choices"][0] for answer in answers]
        except (KeyError, TypeError, IndexError):
            raise self._unexpected("a completion") from None

    def _tokens(self, choice: dict[str, Any]) -> list[int]:
        found = choice.get("token_ids")
        if not isinstance(found, list) or not found:
            raise self._unexpected(
                "token_ids (older versions of vLLM do not know return_token_ids)"
            )
        if wrong := [t for t in found if type(t) is not int or not 0 <= t < self.known]:
            raise ServerError(
                f"the server at {self.server.url} generated the token {wrong[0]!r:.80}, but the model has "
                f"{self.known} tokens; it serves another model"
            )
        return found

    def _unexpected(self, what: str) -> ServerError:
        return ServerError(f"the server at {self.server.url} answers without {what}")


def engine_of(
    model: PreTrainedModel,
    start: int | Mixture,
    eos_ids: Sequence[int],
    config: SamplingConfig,
    seed: int = 0,
) -> Engine:
    """The engine that a config selects: on `model`, or on a server.

    The server must serve this model; with ``sampler_model`` that is not verified.

    Raises:
        ConfigError: The model cannot generate; two tokens are decoded to find out.
        ServerError: The server does not answer or cannot be used.
        MismatchError: It serves another model.
    """
    if config.server is None:
        local = HuggingFaceEngine(model, start, eos_ids, config, seed)
        local.check_decodes()
        return local
    server = find_server(config.server, config, as_mixture(start).given)
    engine = VllmEngine(server, start, eos_ids, config, known_tokens(model), seed)
    if config.sampler_model is None:
        engine.check_serves(model)
    return engine


def _request_json(method: str, url: str, requests: Sequence[Any] = (None,)) -> list[Any]:
    """`vllm_client.request_json`, imported late because its packages are an extra."""
    from folora.calibration.vllm_client import request_json

    return request_json(method, url, requests)
