"""Sample the calibration set: text that the base model generates (paper 3.4, B.4), from sources by share.

Every sequence has a number. Its source, decoding setting and random stream are functions of that number and
the seed only. So the set does not depend on the batch size, except where different rounding changes a
sampled token (one sequence in some dozens), and an interrupted run can resume. Sequences are filtered in
the order of their numbers until the requested number is accepted, with each source's share of it.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import count, islice, takewhile
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folora.calibration.calibration_set import CalibrationSet
from folora.calibration.engine import BATCH_SIZES, Engine, with_batch_size
from folora.calibration.filters import REASONS
from folora.calibration.logits import MIXTURE
from folora.calibration.source_files import mixture_of
from folora.calibration.sources import Mixture, as_mixture, most_behind
from folora.calibration.vllm import engine_of
from folora.config import FIRST_LOOK, LEAST_SEQUENCES, SamplingConfig
from folora.data.special_tokens import ending_ids, start_token_id
from folora.errors import DataError
from folora.runtime import distributed
from folora.runtime.architecture import size_limits
from folora.runtime.progress import progress
from folora.runtime.storage import json_fingerprint, malformed_is_damaged, read_sealed, write_sealed

logger = logging.getLogger(__name__)

_Token = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
BATCH = TypeAdapter(Annotated[list[list[_Token]], Field(strict=True, min_length=1)])
"""The sequences in a shard; without any, reading would never advance."""
MAX_ATTEMPTS_PER_SEQUENCE = 10
GIVING_UP = 0.01  # probability of so few accepted sequences at which a source is given up

_Named = tuple[str, list[int]]  # a source and a sequence


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SamplingConfig | None = None,
    seed: int = 0,
) -> CalibrationSet:
    """Sample text from a model: from its start token (paper 3.4, B.4), and from other sources by share.

    Args:
        model: A causal LM on its device.
        tokenizer: The model's tokenizer.
        config: Counts and lengths. Early stopping needs the task and is not used.
        seed: Seed of the random streams, one for each sequence.

    Raises:
        FoLoraError: The model cannot generate, has no start token, or most sequences are rejected; a source
            cannot be used.
    """
    config = config or SamplingConfig()
    generation = getattr(model, "generation_config", None)
    start_id = start_token_id(tokenizer, config.start_token, model.config, generation)
    mixture = mixture_of(config, tokenizer, start_id, **size_limits(model.config))
    config = with_batch_size(config, model, mixture.given)
    eos_ids = ending_ids(model, tokenizer, mixture.turn_ends)
    engine = engine_of(model, mixture, eos_ids, config, seed)
    return sample_sequences(engine, mixture, eos_ids, config)


def sample_sequences(
    engine: Engine,
    start: int | Mixture,
    eos_ids: Sequence[int],
    config: SamplingConfig,
    shards: Path | None = None,
    converged: Callable[[Sequence[list[int]]], bool] | None = None,
) -> CalibrationSet:
    """Sample until the requested number of sequences passes the filter, or until convergence.

    Args:
        engine: Generates sequences by number.
        start: The sources, or the token that every sequence starts from.
        eos_ids: Tokens that end a sequence; the filter ignores them.
        config: Counts and lengths.
        shards: Folder with a file per batch; batches that are already there are not sampled again.
        converged: Early-stopping criterion, called with all sequences for C_pre so far, at `FIRST_LOOK`
            accepted sequences and at each doubling up to half of ``num_sequences``.

    Raises:
        DataError: Too many sequences are rejected; the reasons are named.
        ArtifactError: A shard is damaged.
    """
    mixture = as_mixture(start)
    accepted: list[_Named] = []
    rejected: Counter[str] = Counter()
    check_points = _check_points(config.num_sequences)
    with progress("sampling", config.num_sequences) as tick:
        for found in _accepted(engine, mixture, eos_ids, config, shards, rejected, tick):
            accepted.append(found)
            if len(accepted) == config.num_sequences:
                break
            if converged and len(accepted) in check_points:
                chosen = _split(accepted, mixture, config, rejected)
                if converged(chosen.calibration):
                    return chosen
    if len(accepted) < LEAST_SEQUENCES:
        raise DataError(
            f"the files of sampling.sources give only {len(accepted)} sequences that pass the filter (rejected: "
            f"{dict(rejected)}), but {LEAST_SEQUENCES} are needed; add more, or bos"
        )
    return _split(accepted, mixture, config, rejected)


def _accepted(
    engine: Engine,
    mixture: Mixture,
    eos_ids: Sequence[int],
    config: SamplingConfig,
    shards: Path | None,
    rejected: Counter[str],
    tick: Callable[[int, int], None],
) -> Iterator[_Named]:
    """Sequences that pass the filter, in an order that gives every source its share; counts those `rejected`."""
    seen: set[tuple[int, ...]] = set()
    waiting: dict[str, deque[list[int]]] = {source.name: deque() for source in mixture.sources}
    tried, taken = dict.fromkeys(waiting, 0), dict.fromkeys(waiting, 0)
    generated = _sequences(engine, config.batch_size or BATCH_SIZES[0], shards)
    for number in count():
        if (place := mixture.place(number)) is None:
            return
        tokens = next(generated)
        source, index = place
        tried[source.name] += 1
        reason = source.rejection(index, tokens, eos_ids, seen)
        tick(int(reason is None), len(tokens))
        if reason is None:
            waiting[source.name].append([*source.script(index).opening, *tokens])
        else:
            rejected[reason] += 1
        while True:
            left = [s for s in mixture.sources if waiting[s.name] or s.has(tried[s.name])]
            if not left or not waiting[(due := most_behind(left, taken)).name]:
                break
            taken[due.name] += 1
            yield due.name, waiting[due.name].popleft()
        passed = taken[source.name] + len(waiting[source.name])
        hopeless = _is_hopeless(passed, tried[source.name])
        if hopeless or number + 1 >= MAX_ATTEMPTS_PER_SEQUENCE * config.num_sequences:
            raise DataError(
                f"of {tried[source.name]} sampled sequences{mixture.of_source(source)} only {passed} passed the filter "
                f"(rejected: {dict(rejected)}), but at least one in {MAX_ATTEMPTS_PER_SEQUENCE} must. The model may not "
                "generate text from this start token, or not end a turn; try another --sampling.start_token, "
                "--sampling.sampler_model or --sampling.sources, or a larger --sampling.max_new_tokens."
            )


def _is_hopeless(passed: int, tried: int) -> bool:
    """Whether so few sequences of a source passed that less than one in `MAX_ATTEMPTS_PER_SEQUENCE` will.

    If one did, so few would pass with probability at most exp(-tried KL(rate || 1/10)), by Chernoff's bound. It
    is below `GIVING_UP` after 44 attempts if none passed, after 74 if one did.
    """
    rate, least = passed / tried, 1 / MAX_ATTEMPTS_PER_SEQUENCE
    if rate >= least:
        return False
    kl = (1 - rate) * math.log((1 - rate) / (1 - least))
    kl += rate * math.log(rate / least) if passed else 0.0
    return tried * kl > -math.log(GIVING_UP)


def _split(
    accepted: Sequence[_Named], mixture: Mixture, config: SamplingConfig, rejected: Counter[str]
) -> CalibrationSet:
    """The accepted sequences as a calibration set: of each source the first for C_pre, the last held out."""
    held_out = config.replace(num_sequences=len(accepted)).num_held_out
    counts = Counter(name for name, _ in accepted)
    # Rounded up, so that there are enough of them together.
    cut = {name: n - -(-held_out * n // len(accepted)) for name, n in counts.items()}
    parts: dict[str, list[list[int]]] = {name: [] for name in mixture.shares}
    calibration: list[_Named] = []
    for name, tokens in accepted:
        if cut[name] > 0:
            cut[name] -= 1
            calibration.append((name, tokens))
        else:
            parts[name].append(tokens)
    last = [(name, tokens) for name, part in parts.items() for tokens in part]
    return CalibrationSet(
        [tokens for _, tokens in calibration],
        [tokens for _, tokens in last],
        {reason: rejected[reason] for reason in REASONS},
        [name for name, _ in [*calibration, *last]],
    )


def _check_points(maximum: int) -> set[int]:
    """Numbers of sequences at which convergence is tested: doublings up to half of the maximum."""
    doublings = (FIRST_LOOK * 2**n for n in count())
    return {*takewhile(lambda number: 2 * number <= maximum, doublings)}


def sampling_facts(
    start: int | Mixture, eos_ids: Sequence[int], config: SamplingConfig, seed: int = 0
) -> dict[str, Any]:
    """Fingerprint of the settings that a sequence depends on besides the model and its number."""
    mixture = as_mixture(start)
    settings = {
        "settings": [vars(setting) for setting in MIXTURE],
        "start_id": mixture.start_id,
        "eos_ids": list(eos_ids),
        "min_new_tokens": config.min_new_tokens,
        "max_new_tokens": config.max_new_tokens,
        "seed": seed,
    }
    return {"sampling": json_fingerprint(settings), **mixture.facts}


def lazy_engine(make: Callable[[], Engine]) -> Engine:
    """An engine that is created on first use: finished shards need no model."""
    made = cache(make)
    return lambda numbers: made()(numbers)


def _sequences(engine: Engine, size: int, shards: Path | None) -> Iterator[list[int]]:
    """Endless sequences in the order of their numbers, from shards where they exist.

    Each process decodes a batch at a time; rank 0 reads and writes the files.
    """
    number = 0
    ahead: dict[int, list[list[int]]] = {}
    while True:
        if number not in ahead:
            ahead |= distributed.on_rank_zero(partial(_stored, shards, number))
        if number not in ahead:
            due = distributed.on_rank_zero(partial(_missing, shards, number, size))
            own = due[distributed.rank()]
            decoded = distributed.all_gather(
                distributed.raise_together(partial(engine, range(own, own + size)))
            )
            ahead = dict(zip(due, decoded, strict=True))
            distributed.on_rank_zero(partial(_store, shards, ahead))
        batch = ahead.pop(number)
        yield from batch
        number += len(batch)


def _shard(shards: Path | None, number: int) -> Path | None:
    """The file of the batch that begins with a number; None in memory."""
    return None if shards is None else shards / f"shard-{number:06d}.json"


def _stored(shards: Path | None, number: int) -> dict[int, list[list[int]]]:
    """The stored batch that begins with a number, if there is one. Raises ArtifactError."""
    file = _shard(shards, number)
    if file is None or not file.exists():
        return {}
    batch = read_sealed(file)["sequences"]
    with malformed_is_damaged(file):
        return {number: BATCH.validate_python(batch)}


def _missing(shards: Path | None, number: int, size: int) -> list[int]:
    """The first numbers of the next batches that are not stored, one for each process."""
    numbers = count(number, size)
    missing = (n for n in numbers if (file := _shard(shards, n)) is None or not file.exists())
    return [*islice(missing, distributed.world_size())]


def _store(shards: Path | None, batches: Mapping[int, list[list[int]]]) -> None:
    for number, batch in batches.items():
        if file := _shard(shards, number):
            write_sealed(file, {"sequences": batch})
