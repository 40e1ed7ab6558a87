"""Generate token sequences by number: the `Engine` interface, and an engine on a transformers model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from folora.calibration.decoding import (
    CudaGraphError,
    Forward,
    decode,
    generate_cache_options,
    is_steppable,
)
from folora.calibration.logits import NON_FINITE_LOGITS, PerSequenceSampler
from folora.calibration.sources import Mixture, as_mixture
from folora.config import SamplingConfig
from folora.errors import ConfigError, FoLoraError, NumericsError
from folora.runtime import distributed
from folora.runtime.contexts import evaluating, is_sharded
from folora.runtime.memory import cache_bytes, free_bytes
from folora.runtime.progress import progress

logger = logging.getLogger(__name__)

# Matrix products with fewer rows use other kernels, which round differently (measured on the CPU).
MIN_ROWS = 8
BATCH_SIZES = (64, 128, 256, 512, 1024)  # an accelerator uses the largest that fits
EARLY_STOPPING_BATCH = 256  # limit if sampling may stop early; smaller batches are no faster
SERVER_BATCH = 256  # concurrent requests to a server; vLLM's default maximum
LOGITS_COPIES = 6  # float32 copies of a row's logits in memory at once
TRIAL_TOKENS = 2  # decoded to find out whether a model can generate
NO_TOKEN = -1  # rows end by the sampler; with None generate would use the model's EOS


class Engine(Protocol):
    """Generates sequences by number; the interface of decoding engines."""

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
        """The tokens of each sequence after its opening, up to and including EOS."""
        ...


def with_batch_size(config: SamplingConfig, model: Any, given: int = 0) -> SamplingConfig:
    """The config with the batch size for a loaded model or a server filled in."""
    if config.server is not None:
        return config.replace(batch_size=config.batch_size or SERVER_BATCH)
    size = batch_size_for(
        model.device, model.config, model.dtype.itemsize, config, distributed.world_size(), 0, given
    )
    return config.replace(batch_size=size)


def batch_size_for(
    device: torch.device,
    model_config: Any,
    itemsize: int,
    config: SamplingConfig,
    processes: int,
    taken: int = 0,
    given: int = 0,
) -> int:
    """Number of sequences to decode at once, the same in all processes.

    It is ``sampling.batch_size`` if set, else 64, or on an accelerator the largest power of two from 64 to 1024
    for which KV cache and logits fit into a quarter of the free memory, of which `taken` bytes will be used
    for something else by then, and which leaves a batch for each process; at most 256 if sampling may stop
    early. `itemsize` is that of the model's dtype, in bytes, and `given` is `Mixture.given`.
    """
    if config.batch_size is not None or device.type == "cpu":
        return config.batch_size or BATCH_SIZES[0]
    vocabulary = model_config.get_text_config().vocab_size
    tokens = config.max_new_tokens + given
    row = cache_bytes(model_config, itemsize) * tokens + LOGITS_COPIES * 4 * vocabulary
    size = min(distributed.all_gather((free_bytes(device) - taken) // 4 // row))
    size = min(size, config.num_sequences // processes)
    if config.may_end_early:
        size = min(size, EARLY_STOPPING_BATCH)
    return max((n for n in BATCH_SIZES if n <= size), default=BATCH_SIZES[0])


@dataclass(eq=False)
class HuggingFaceEngine:
    """An engine on a transformers model, with a random stream per sequence instead of per batch.

    Uses `decoding` for models that support it, otherwise ``generate``.
    """

    model: PreTrainedModel
    start: int | Mixture
    eos_ids: Sequence[int]
    config: SamplingConfig
    seed: int = 0

    def __post_init__(self) -> None:
        self.mixture = as_mixture(self.start)
        self.steps = is_steppable(self.model)

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
        """See `Engine`. After an out-of-memory error the batch is split in half."""
        scripts = {n: script for n in numbers if (script := self.mixture.script(n)).is_written}
        if not scripts and not is_sharded(self.model):
            return [[] for _ in numbers]
        # Of sharded weights, the other processes need this one's part.
        found = dict(zip(scripts, self._written([*scripts] or [0]), strict=False))
        return [found.get(number, []) for number in numbers]

    def _written(self, numbers: Sequence[int]) -> list[list[int]]:
        """The same for sequences that the model writes."""
        given = max(self.mixture.script(number).given for number in numbers)
        if is_sharded(self.model):  # every process takes as many steps as the slowest
            given = self.mixture.given
        try:
            what = f"decoding {len(numbers)} sequences (tokens each)"
            return self._decode(numbers, self.config.max_new_tokens + given, what)
        except torch.OutOfMemoryError:
            half = len(numbers) // 2
            # With sharded weights the other processes would wait for one that retries.
            if half < MIN_ROWS or is_sharded(self.model):
                raise
            logger.warning(
                "out of memory decoding %d sequences at once; retrying with half as many",
                len(numbers),
            )
        return [*self._written(numbers[:half]), *self._written(numbers[half:])]

    def check_decodes(self) -> None:
        """Decode two tokens: some models of transformers run but cannot generate.

        Raises:
            ConfigError: The model cannot generate; the reason is named.
        """
        try:
            self._decode([0], TRIAL_TOKENS, "test decoding (tokens)")
        except (FoLoraError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the model's code raises
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{type(self.model).__name__} cannot generate text here ({type(error).__name__}: "
                f"{reason:.200}). Generate with another model that has the same tokenizer "
                "(--sampling.sampler_model), or use a file of 'folora base' (--base)."
            ) from error

    @torch.inference_mode()
    def _decode(self, numbers: Sequence[int], most: int, what: str) -> list[list[int]]:
        """At most `most` tokens of each sequence. Batches smaller than `MIN_ROWS` are padded with copies."""
        padded = list(numbers) + [numbers[-1]] * max(0, MIN_ROWS - len(numbers))
        scripts = [self.mixture.script(number) for number in padded]
        start = torch.tensor([script.opening[:1] for script in scripts], device=self.model.device)
        with evaluating(self.model), progress(what, most) as tick:
            sampler = partial(
                PerSequenceSampler,
                self.model, self.mixture, padded, self.eos_ids, self.config, self.seed, tick,
            )  # fmt: skip
            if self.steps:
                own = sampler()
                try:
                    written = decode(
                        Forward(self.model, most), start, own.choose, lambda: bool(own.ended().all()), most
                    )  # fmt: skip
                except CudaGraphError as error:
                    logger.warning(
                        "decoding cannot use a CUDA graph and falls back to generate, which is slower: %s",
                        error,
                    )
                    self.steps = False
            if not self.steps:
                written = self._decode_with_generate(start, sampler(), most)
        return [
            script.written(row[len(script.opening) - 1 :], self.eos_ids, self.config.max_new_tokens)
            for script, row in zip(scripts, written[: len(numbers)].tolist(), strict=False)
        ]

    def _decode_with_generate(
        self, start: Tensor, sampler: PerSequenceSampler, most: int
    ) -> Tensor:
        generate: Any = self.model.generate
        written: Tensor = generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=1,
                use_cache=True,
                max_new_tokens=most,
                eos_token_id=NO_TOKEN,
                pad_token_id=0,
                repetition_penalty=1.0,
            ),
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([sampler.ended]),
            **generate_cache_options(self.model, most),
        )
        if sampler.non_finite:
            raise NumericsError(NON_FINITE_LOGITS.format(""))
        return written[:, 1:]
