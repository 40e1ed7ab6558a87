"""Turns sequence numbers into tokens, with the model at hand.

`Engine` is the seam for other engines; `serving` has one that asks a server.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from folora.calibration.decoding import (
    CudaGraphError,
    Forward,
    decode,
    generate_cache_options,
    is_steppable,
)
from folora.calibration.logits import NON_FINITE_LOGITS, PerSequenceSampler
from folora.config import SamplingConfig
from folora.errors import ConfigError, FoLoraError, NumericsError
from folora.runtime import distributed
from folora.runtime.contexts import evaluating, is_sharded
from folora.runtime.memory import cache_bytes, free_bytes
from folora.runtime.progress import progress

logger = logging.getLogger(__name__)

# Matrix products of fewer rows take other kernels, which round differently; measured on CPU.
MIN_ROWS = 8
BATCH_SIZES = (64, 128, 256, 512, 1024)  # of which an accelerator takes what fits
EARLY_STOPPING_BATCH = 256  # sequences at once where so many may be enough; fewer take as long
SERVER_BATCH = 256  # sequences that a server is asked for at once; vLLM takes as many by default
LOGITS = 6  # copies in float32, of a row
TRIAL_TOKENS = 2  # tokens, before anything long starts
NO_TOKEN = -1  # None would make generate fall back on the model's own EOS


class Engine(Protocol):
    """Writes sequences by number; the only thing that another decoding engine has to offer."""

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
        """Generated tokens of each sequence, without the start token, up to and with EOS."""
        ...


def with_batch_size(config: SamplingConfig, model: Any) -> SamplingConfig:
    """The config with the batch size that a loaded model, or a server, decodes with."""
    if config.server is not None:
        return config.replace(batch_size=config.batch_size or SERVER_BATCH)
    size = batch_size_for(
        model.device, model.config, model.dtype.itemsize, config, distributed.count()
    )
    return config.replace(batch_size=size)


def batch_size_for(
    device: torch.device,
    model_config: Any,
    itemsize: int,
    config: SamplingConfig,
    processes: int,
    taken: int = 0,
) -> int:
    """How many sequences to decode at once, the same in all processes.

    Args:
        device: Where the model computes.
        model_config: Of transformers.
        itemsize: Bytes of a number of the model.
        config: Its ``batch_size`` holds, if it is given.
        processes: How many share the sequences.
        taken: Bytes that something else will have taken by then.

    Returns:
        64, or on an accelerator the largest power of two from there to 1024 for which cache and logits
        take no more than a quarter of what is free, and which leaves a batch for each process; to 256
        if sampling may end early.
    """
    if config.batch_size is not None or device.type == "cpu":
        return config.batch_size or BATCH_SIZES[0]
    vocabulary = model_config.get_text_config().vocab_size
    row = cache_bytes(model_config, itemsize) * config.max_new_tokens + LOGITS * 4 * vocabulary
    fitting = min(distributed.all_gather((free_bytes(device) - taken) // 4 // row))
    fitting = min(fitting, config.num_sequences // processes)
    if config.may_end_early:
        fitting = min(fitting, EARLY_STOPPING_BATCH)
    return max((n for n in BATCH_SIZES if n <= fitting), default=BATCH_SIZES[0])


class HuggingFaceEngine:
    """A model of transformers, with random draws that belong to the sequence, not to the batch.

    Decoded step by step where the model allows it (see `decoding`), else by ``generate``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start_id: int,
        eos_ids: Sequence[int],
        config: SamplingConfig,
        seed: int = 0,
    ) -> None:
        self.model: Any = model
        self.start_id = start_id
        self.eos_ids = list(eos_ids)
        self.config = config
        self.seed = seed
        self.steps = is_steppable(model)

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
        """See `Engine`. What does not fit the memory at once is decoded in halves."""
        try:
            what = f"decoding {len(numbers)} sequences (tokens each)"
            return self._decoded(numbers, self.config.max_new_tokens, what)
        except torch.OutOfMemoryError:
            half = len(numbers) // 2
            # Processes that share the weights out would wait for one that begins anew.
            if half < MIN_ROWS or is_sharded(self.model):
                raise
            logger.warning("%d sequences at once do not fit the memory, half as many", len(numbers))
        return [*self(numbers[:half]), *self(numbers[half:])]

    def check_decodes(self) -> None:
        """Decode two tokens: transformers has models that run, but cannot be decoded.

        Raises:
            ConfigError: With the reason.
        """
        try:
            self._decoded([0], TRIAL_TOKENS, "trying to decode (tokens)")
        except (FoLoraError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the model's code raises
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{type(self.model).__name__} cannot generate text here ({type(error).__name__}: "
                f"{reason:.200}). Let another model with its tokenizer write it: --sampling.sampler_model, "
                "or take a file of 'folora base': --base"
            ) from error

    @torch.inference_mode()
    def _decoded(self, numbers: Sequence[int], most: int, what: str) -> list[list[int]]:
        """At most so many tokens. Fewer than `MIN_ROWS` numbers are decoded beside copies of the last."""
        wanted = list(numbers) + [numbers[-1]] * max(0, MIN_ROWS - len(numbers))
        start = torch.full((len(wanted), 1), self.start_id, device=self.model.device)
        with evaluating(self.model), progress(what, most) as tick:
            draws = partial(
                PerSequenceSampler, self.model, wanted, self.eos_ids, self.config, self.seed, tick
            )
            written = self._stepped(start, draws(), most) if self.steps else None
            if written is None:
                written = self._generated(start, draws(), most)
        return [_until_eos(row, self.eos_ids) for row in written[: len(numbers)].tolist()]

    def _stepped(self, start: Tensor, draws: PerSequenceSampler, most: int) -> Tensor | None:
        try:
            return decode(Forward(self.model, most), start, draws.choose, self.eos_ids, most)
        except CudaGraphError as error:
            logger.warning("no CUDA graph of a step of decoding, generate is slower: %s", error)
            self.steps = False
            return None

    def _generated(self, start: Tensor, draws: PerSequenceSampler, most: int) -> Tensor:
        written: Tensor = self.model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=1,
                use_cache=True,
                max_new_tokens=most,
                eos_token_id=self.eos_ids or NO_TOKEN,
                pad_token_id=self.eos_ids[0] if self.eos_ids else 0,
                repetition_penalty=1.0,
            ),
            logits_processor=LogitsProcessorList([draws]),
            **generate_cache_options(self.model, most),
        )
        if draws.unsound:
            raise NumericsError(NON_FINITE_LOGITS.format(""))
        return written[:, 1:]


def _until_eos(row: list[int], eos_ids: list[int]) -> list[int]:
    for position, token in enumerate(row):
        if token in eos_ids:
            return row[: position + 1]
    return row
