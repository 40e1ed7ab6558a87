"""Sequences that a vLLM server writes: an `Engine` behind the same seam as `generate`.

vLLM is made for decoding many sequences at once, but asks for other versions of torch and transformers
than folora does. So it stays in an environment of its own (``vllm serve MODEL``), on this machine or
another, and tokens go back and forth, no text. Decoding setting and seed of a sequence are functions of its number
here too. The draws are vLLM's: another set than `generate`'s, from the same distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from folora.calibration.engine import Engine, HuggingFaceEngine
from folora.calibration.logits import Decoding, decoding_of, stream_seed
from folora.config import SamplingConfig
from folora.data.special_tokens import known_tokens
from folora.errors import MismatchError, ServerError
from folora.runtime.contexts import evaluating

ENGINE = "vllm"  # as manifests call it
PROBED = 64  # tokens by which a server's model is told from another
SAME = 0.2  # nats a token; bf16 in other kernels is .05 off, SmolLM2 with 2 % of noise on its weights .23


@dataclass(frozen=True)
class Server:
    """What a vLLM server offers.

    Attributes:
        url: Where it is, such as ``http://localhost:8000``.
        name: Of its model.
    """

    url: str
    name: str


def find_server(url: str, config: SamplingConfig) -> Server:
    """Ask a server what it serves.

    Args:
        url: Such as ``http://localhost:8000``, with or without ``/v1``.
        config: Its sequences must fit the server's context.

    Raises:
        ServerError: Nothing answers there, it is no vLLM server, or its context is too short.
    """
    url = url.rstrip("/").removesuffix("/v1")
    answer = _request_json("GET", f"{url}/v1/models")[0]
    try:
        own = next(m for m in answer["data"] if m.get("parent") is None)  # others are its adapters
        name, context = str(own["id"]), int(own["max_model_len"])
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration):
        raise ServerError(f"{url}/v1/models does not answer as a vLLM server does") from None
    if context <= config.max_new_tokens:  # the start token comes in front
        raise ServerError(
            f"the server at {url} reads at most {context} tokens, but must read more than "
            f"sampling.max_new_tokens ({config.max_new_tokens}); start it with a larger --max-model-len"
        )
    return Server(url, name)


class VllmEngine:
    """Sequences by number from a vLLM server; see `Engine`.

    Args:
        server: From `find_server`.
        start_id: The prompt of every sequence.
        eos_ids: Ending tokens.
        config: Lengths.
        known: How many tokens the model knows.

    Raises:
        ServerError: From a call: the server is gone, refuses, or answers with something else.
    """

    def __init__(
        self,
        server: Server,
        start_id: int,
        eos_ids: Sequence[int],
        config: SamplingConfig,
        known: int,
        seed: int = 0,
    ) -> None:
        self.server = server
        self.start_id = start_id
        self.eos_ids = list(eos_ids)
        self.config = config
        self.known = known
        self.seed = seed

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
        """See `Engine`; as many are asked for at once as there are numbers."""
        requests = [self._request(number, decoding_of(number)) for number in numbers]
        return [self._tokens(choice) for choice in self._choices(requests)]

    def check_serves(self, model: PreTrainedModel) -> None:
        """Refuse a server of other weights: log-probabilities of what it writes must be the model's.

        Raises:
            MismatchError: They are further than `SAME` from the model's own.
        """
        wanted = {"logprobs": 0, "max_tokens": PROBED, "min_tokens": PROBED}
        choice = self._choices([self._request(0, Decoding(1)) | wanted])[0]
        tokens = self._tokens(choice)
        ids = torch.tensor([[self.start_id, *tokens]], device=model.device)
        with torch.inference_mode(), evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        own = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu()
        try:
            theirs = torch.tensor([float(x) for x in choice["logprobs"]["token_logprobs"]])
            apart = float((theirs.reshape(own.shape) - own).abs().mean())
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise self._unexpected("log-probabilities of its tokens") from None
        if not apart <= SAME:
            raise MismatchError(
                f"the server at {self.server.url} serves {self.server.name}, whose log-probabilities "
                f"are {apart:.2g} nats a token from those of the model here (allowed: {SAME:g}). "
                "Serve the same weights in the same precision; or, if another model is meant to write "
                "the text, name it: --sampling.sampler_model"
            )

    def _request(self, number: int, setting: Decoding) -> dict[str, Any]:
        """What the server is asked for one sequence."""
        config = self.config
        return {
            "model": self.server.name,
            "prompt": [self.start_id],
            "seed": stream_seed(self.seed, number),
            "min_tokens": config.min_new_tokens,
            "max_tokens": config.max_new_tokens,
            "temperature": setting.temperature,
            "top_p": setting.top_p,
            "top_k": setting.top_k,
            "stop_token_ids": self.eos_ids,
            "ignore_eos": True,  # the server's own choice of them
            "return_token_ids": True,
            # All that a model's generation_config.json may set otherwise.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }

    def _choices(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The sequences as the server tells them."""
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
                f"the server at {self.server.url} wrote the token {wrong[0]!r:.80}, but the model knows "
                f"{self.known}; it serves another model"
            )
        return found

    def _unexpected(self, what: str) -> ServerError:
        return ServerError(f"the server at {self.server.url} answers without {what}")


def engine_of(
    model: PreTrainedModel,
    start_id: int,
    eos_ids: Sequence[int],
    config: SamplingConfig,
    seed: int = 0,
) -> Engine:
    """The engine that a config asks for.

    Args:
        model: Writes the text, or is what the server must serve; with ``sampler_model`` the server
            is taken at its word.
        start_id: In front of every sequence.
        eos_ids: Ending tokens.
        config: Lengths and server.
        seed: Of the random draws; each sequence has its own stream.

    Raises:
        ConfigError: transformers cannot decode with this model; two tokens are tried.
        ServerError: The server is not there or not fit.
        MismatchError: It serves another model.
    """
    if config.server is None:
        own = HuggingFaceEngine(model, start_id, eos_ids, config, seed)
        own.check_decodes()
        return own
    server = find_server(config.server, config)
    engine = VllmEngine(server, start_id, eos_ids, config, known_tokens(model), seed)
    if config.sampler_model is None:
        engine.check_serves(model)
    return engine


def _request_json(method: str, url: str, requests: Sequence[Any] = (None,)) -> list[Any]:
    """`client.asked`, whose packages are an extra."""
    from folora.calibration.vllm_client import request_json

    return request_json(method, url, requests)
