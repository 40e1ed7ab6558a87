"""Sampling the calibration set: text that the pretrained model generates itself (paper 3.4, B.4).

Every sequence has a number. Its decoding setting and its random draws are functions of that number
and the seed alone, so the set is the same whatever the batch size (but for a draw that falls between
the roundings of two sizes, one sequence in some dozens), and an interrupted run is resumed. Sequences are judged in the order of their numbers until enough have passed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folora.calibration.calibration_set import CalibrationSet
from folora.calibration.engine import BATCH_SIZES, Engine, with_batch_size
from folora.calibration.filters import REASONS, rejection
from folora.calibration.logits import MIXTURE
from folora.calibration.vllm import engine_of
from folora.config import FIRST_LOOK, SamplingConfig
from folora.data.special_tokens import ending_ids, start_token_id
from folora.errors import DataError
from folora.runtime import distributed
from folora.runtime.progress import progress
from folora.runtime.storage import json_fingerprint, malformed_is_damaged, read_sealed, write_sealed

logger = logging.getLogger(__name__)

LARGEST_VOCABULARY = 2**31
ATTEMPTS_A_SEQUENCE = 10
HOPELESS_AFTER = 256


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SamplingConfig | None = None,
    seed: int = 0,
) -> CalibrationSet:
    """Text that a model generates itself, from its start token on (paper 3.4, B.4).

    Args:
        model: A causal LM on its device.
        tokenizer: Of the model.
        config: Counts and lengths. Early stopping needs the task and is not used here.
        seed: Of the random draws; each sequence has its own stream.

    Raises:
        FoLoraError: The model cannot generate, has no start token, or most sequences are rejected.
    """
    config = with_batch_size(config or SamplingConfig(), model)
    generation = getattr(model, "generation_config", None)
    start_id = start_token_id(tokenizer, config.start_token, model.config, generation)
    eos_ids = ending_ids(model, tokenizer)
    engine = engine_of(model, start_id, eos_ids, config, seed)
    return sample_sequences(engine, start_id, eos_ids, config)


def sample_sequences(
    engine: Engine,
    start_id: int,
    eos_ids: Sequence[int],
    config: SamplingConfig,
    shards: Path | None = None,
    enough: Callable[[Sequence[list[int]]], bool] | None = None,
) -> CalibrationSet:
    """Sample until enough sequences have passed the filter.

    Args:
        engine: Writes sequences by number.
        start_id: Put in front of every sequence.
        eos_ids: Ending tokens; not counted by the filter.
        config: Counts and lengths.
        shards: Folder for one file a batch; what is already there is not sampled again.
        enough: Asked with the sequences for C_pre when there are `FIRST_LOOK` sequences, twice as
            many, and so on up to half the ceiling; at a yes sampling ends. Later calls bring all that
            earlier ones did.

    Raises:
        DataError: So many sequences are rejected that going on is hopeless; reasons are named.
        ArtifactError: A shard is damaged.
    """
    seen: set[str] = set()
    accepted: list[list[int]] = []
    rejected: Counter[str] = Counter()
    attempts = 0
    looks = _check_points(config.num_sequences) if enough else iter(())
    look = next(looks, None)
    with progress("sampling", config.num_sequences) as tick:
        for batch in _batches(engine, config.batch_size or BATCH_SIZES[0], shards):
            before = len(accepted)
            for tokens in batch:
                if len(accepted) == config.num_sequences:
                    break
                attempts += 1
                body = tokens[:-1] if tokens and tokens[-1] in eos_ids else tokens
                reason = rejection(body, seen)
                if reason is not None:
                    rejected[reason] += 1
                    continue
                accepted.append([start_id, *tokens])
                if enough and len(accepted) == look:  # before another batch is decoded
                    found = _split(accepted, config, rejected)
                    if enough(found.calibration):
                        return found
                    look = next(looks, None)
            tick(len(accepted) - before, sum(map(len, batch)))
            if len(accepted) == config.num_sequences:
                break
            hopeless = attempts >= HOPELESS_AFTER and not accepted
            if hopeless or attempts >= ATTEMPTS_A_SEQUENCE * config.num_sequences:
                raise DataError(
                    f"of {attempts} sampled sequences only {len(accepted)} passed the filter "
                    f"({dict(rejected)}). Does the model write text from this start token? "
                    "Try another --sampling.start_token, or another --sampling.sampler_model."
                )
    return _split(accepted, config, rejected)


def _split(
    accepted: list[list[int]], config: SamplingConfig, rejected: Counter[str]
) -> CalibrationSet:
    """What there is so far: the first for C_pre, the last for the meter."""
    cut = len(accepted) - config.replace(num_sequences=len(accepted)).num_held_out
    counted = {reason: rejected[reason] for reason in REASONS}
    return CalibrationSet(accepted[:cut], accepted[cut:], counted)


def _check_points(ceiling: int) -> Iterator[int]:
    """Numbers of sequences after which it is asked, as long as a yes saves as many again."""
    count = FIRST_LOOK
    while 2 * count <= ceiling:
        yield count
        count *= 2


def sampling_facts(
    start_id: int, eos_ids: Sequence[int], config: SamplingConfig, seed: int = 0
) -> dict[str, Any]:
    """What each sequence depends on besides the model and its number, as a fingerprint."""
    settings = {
        "settings": [vars(setting) for setting in MIXTURE],
        "start_id": start_id,
        "eos_ids": list(eos_ids),
        "min_new_tokens": config.min_new_tokens,
        "max_new_tokens": config.max_new_tokens,
        "seed": seed,
    }
    return {"sampling": json_fingerprint(settings)}


class LazyEngine:
    """An engine that is made on first use: finished shards need no model."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self.make = make
        self.engine: Engine | None = None

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
        """See `Engine`."""
        if self.engine is None:
            self.engine = self.make()
        return self.engine(numbers)


def _batches(engine: Engine, size: int, shards: Path | None) -> Iterator[list[list[int]]]:
    """Endless batches in the order of sequence numbers, from shards as far as they go.

    Several processes decode as many batches at once; the first one keeps the files.
    """
    number = 0
    ahead: dict[int, list[list[int]]] = {}
    while True:
        if number not in ahead:
            ahead |= distributed.on_rank_zero(partial(_kept, shards, number))
        if number not in ahead:
            due = distributed.on_rank_zero(partial(_missing, shards, number, size))
            own = due[distributed.rank()]
            decoded = distributed.all_gather(
                distributed.raise_together(partial(engine, range(own, own + size)))
            )
            ahead = dict(zip(due, decoded, strict=True))
            distributed.on_rank_zero(partial(_keep, shards, ahead))
        batch = ahead.pop(number)
        yield batch
        number += len(batch)


def _shard(shards: Path, number: int) -> Path:
    return shards / f"shard-{number:06d}.json"


def _kept(shards: Path | None, number: int) -> dict[int, list[list[int]]]:
    """The batch that begins with a number, if it was decoded before. Raises ArtifactError."""
    if shards is None or not _shard(shards, number).exists():
        return {}
    return {number: _read_shard(_shard(shards, number))}


def _missing(shards: Path | None, number: int, size: int) -> list[int]:
    """Where the next batches begin that are not there yet, one for each process."""
    found: list[int] = []
    while len(found) < distributed.count():
        if shards is None or not _shard(shards, number).exists():
            found.append(number)
        number += size
    return found


def _keep(shards: Path | None, batches: Mapping[int, list[list[int]]]) -> None:
    if shards is not None:
        for number, batch in batches.items():
            write_sealed(_shard(shards, number), {"sequences": batch})


def _read_shard(file: Path) -> list[list[int]]:
    """The sequences in a shard. Raises ArtifactError."""
    batch = read_sealed(file)["sequences"]
    with malformed_is_damaged(file):
        if not batch:  # of which reading on would never come to an end
            raise ValueError("it has no sequences")
        return [[_token(t) for t in row] for row in batch]


def _token(value: Any) -> int:
    if type(value) is not int or not 0 <= value < LARGEST_VOCABULARY:
        raise ValueError(f"{value!r:.80} is no token")
    return value
