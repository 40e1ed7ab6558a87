"""The proxy set: text that the pretrained model writes itself (paper 3.4, B.4).

Every sequence has a number. Its decoding setting and its random draws are functions of that number
and the seed alone, so the set is the same whatever the batch size (but for a draw that falls between
the roundings of two sizes, one sequence in some dozens), and an interrupted run goes on where it
stopped. Sequences are judged in the order of their numbers until enough have passed.

`Engine` is the seam for other engines: anything that turns sequence numbers into tokens.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from folora import ranks
from folora.artifacts import (
    read_artifact,
    tokenizer_fingerprint,
    tokens_fingerprint,
    write_artifact,
)
from folora.config import FIRST_LOOK, SamplingConfig
from folora.decoding import CannotReplay, Forward, decode, is_replayable
from folora.disk import fitting, json_fingerprint, read_sealed, write_sealed
from folora.errors import DataError, MismatchError, NumericsError
from folora.filtering import REASONS, rejection
from folora.finiteness import where_it_breaks
from folora.memory import cache_bytes, free_bytes
from folora.modes import evaluating, is_shared_out
from folora.progress import progress

logger = logging.getLogger(__name__)

# Matrix products of fewer rows take other kernels, which round differently; measured on CPU.
MIN_ROWS = 8
BATCH_SIZES = (64, 128, 256, 512, 1024)  # of which an accelerator takes what fits
MAY_DO = 256  # sequences at once where so many may be enough; fewer take as long
SERVED = 256  # sequences that a server is asked for at once; vLLM takes as many by default
LOGITS = 6  # copies in float32, of a row
BLOCK = 256  # tokens whose probabilities are summed as one at first
CANDIDATES = 1024  # a sort of the whole vocabulary is rarely needed to find top-p
NO_TOKEN = -1  # None would make generate fall back on the model's own EOS
LARGEST_VOCABULARY = 2**31
ATTEMPTS_A_SEQUENCE = 10
HOPELESS_AFTER = 256
_UNSOUND = (
    "the model's logits are not finite while sampling{}. Its weights hold NaN or overflow in this dtype. "
    "Check the weights, or load the model in bf16 or fp32."
)


@dataclass(frozen=True)
class Decoding:
    """One decoding setting and how often it is used (in tenths)."""

    tenths: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether it is the model's own distribution."""
        return (self.temperature, self.top_p, self.top_k) == (1.0, 1.0, 0)


MIXTURE = (
    Decoding(7),
    Decoding(2, top_p=0.95),
    Decoding(1, temperature=1.2, top_p=0.98, top_k=50),
)
_SCHEDULE = tuple(setting for setting in MIXTURE for _ in range(setting.tenths))


def decoding_of(number: int) -> Decoding:
    """Setting of a sequence: 7, 2 and 1 of every ten, spread out evenly."""
    return _SCHEDULE[number * 3 % 10]


@dataclass(frozen=True)
class ProxySet:
    """Sampled sequences, ready for the model.

    Attributes:
        calibration: Token ids with the start token in front, for C_pre.
        held_out: The same, set aside for the meter.
        rejected: How many sequences were rejected, by reason.
    """

    calibration: list[list[int]]
    held_out: list[list[int]]
    rejected: dict[str, int] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens."""
        return tokens_fingerprint([*self.calibration, [], *self.held_out])


def stream_seed(seed: int, number: int) -> int:
    """The seed of a sequence's own stream, in [0, 2^63)."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) % 2**63


class Engine(Protocol):
    """Writes sequences by number; the only thing that another decoding engine has to offer."""

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
        """Generated tokens of each sequence, without the start token, up to and with EOS."""
        ...


def start_token_id(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> int:
    """The token that sampling starts from.

    Args:
        tokenizer: Of the model.
        choice: None for the tokenizer's BOS, ``"eos"``, or the text of a token.

    Raises:
        DataError: The tokenizer has no BOS and nothing was chosen, or the token does not exist.
    """
    if choice is None:
        if tokenizer.bos_token_id is None:
            raise DataError(
                "this tokenizer has no BOS token to start sampling from. Choose one: "
                f"--sampling.start_token eos (which is {tokenizer.eos_token!r}), or the text of a "
                "token that stood at the start of documents in pretraining."
            )
        return int(tokenizer.bos_token_id)
    if choice == "eos":
        if tokenizer.eos_token_id is None:
            raise DataError("sampling.start_token is 'eos', but this tokenizer has no EOS token")
        return int(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    if choice not in vocabulary:
        raise DataError(f"sampling.start_token {choice!r} is not a token of this tokenizer")
    return int(vocabulary[choice])


def ending_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: SamplingConfig
) -> list[int]:
    """The tokens that end a sampled sequence: none if EOS is to be ignored.

    Raises:
        DataError: The model has no logit for one of them.
    """
    found = [] if config.ignore_eos else eos_token_ids(model, tokenizer)
    known = known_tokens(model)
    if wrong := [i for i in found if not 0 <= i < known]:
        raise DataError(
            f"the model's generation config ends sequences at token {wrong[0]}, but the model knows "
            f"{known} tokens; correct eos_token_id there, or give --sampling.ignore_eos true"
        )
    return found


def known_tokens(model: PreTrainedModel) -> int:
    """How many tokens the model has embeddings for."""
    return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a sequence, by the model's generation config or the tokenizer."""
    generation = getattr(model, "generation_config", None)
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return []
    return [int(i) for i in found] if isinstance(found, list | tuple) else [int(found)]


def check_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, name: str
) -> None:
    """Refuse a sampler model whose tokenizer gives other ids. Raises DataError."""
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other):
        raise DataError(
            f"the sampler model {name} has another tokenizer than the model ({len(other)} against "
            f"{len(tokenizer)} tokens, or other ids), so its tokens mean nothing to the model. "
            "Choose a sampler of the same family, or leave sampling.sampler_model out."
        )


def sized(config: SamplingConfig, model: Any) -> SamplingConfig:
    """The config with the batch size that a loaded model, or a server, decodes with."""
    if config.server is not None:
        return replace(config, batch_size=config.batch_size or SERVED)
    size = batch_size_for(model.device, model.config, model.dtype.itemsize, config, ranks.count())
    return replace(config, batch_size=size)


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
    fitting = min(ranks.gather((free_bytes(device) - taken) // 4 // row))
    fitting = min(fitting, config.num_sequences // processes)
    if config.may_end_early:
        fitting = min(fitting, MAY_DO)
    return max((n for n in BATCH_SIZES if n <= fitting), default=BATCH_SIZES[0])


class HuggingFaceEngine:
    """A model of transformers, with random draws that belong to the sequence, not to the batch.

    Decoded by replays of a CUDA graph where the model allows it, else by ``generate``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start_id: int,
        eos_ids: Sequence[int],
        config: SamplingConfig,
    ) -> None:
        self.model: Any = model
        self.start_id = start_id
        self.eos_ids = list(eos_ids)
        self.config = config
        self.replays = is_replayable(model)

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
        """See `Engine`. What does not fit the memory at once is decoded in halves."""
        try:
            return self._decoded(numbers)
        except torch.OutOfMemoryError:
            half = len(numbers) // 2
            # Processes that share the weights out would wait for one that begins anew.
            if half < MIN_ROWS or is_shared_out(self.model):
                raise
            logger.warning("%d sequences at once do not fit the memory, half as many", len(numbers))
        return [*self(numbers[:half]), *self(numbers[half:])]

    @torch.inference_mode()
    def _decoded(self, numbers: Sequence[int]) -> list[list[int]]:
        """Fewer than `MIN_ROWS` numbers are decoded beside copies of the last."""
        wanted = list(numbers) + [numbers[-1]] * max(0, MIN_ROWS - len(numbers))
        start = torch.full((len(wanted), 1), self.start_id, device=self.model.device)
        with evaluating(self.model):
            written = self._replayed(start, wanted) if self.replays else None
            if written is None:
                written = self._generated(start, wanted)
        return [_until_eos(row, self.eos_ids) for row in written[: len(numbers)].tolist()]

    def _replayed(self, start: Tensor, numbers: Sequence[int]) -> Tensor | None:
        most = self.config.max_new_tokens
        draws = _SequenceDraws(self.model, numbers, self.eos_ids, self.config)
        try:
            return decode(Forward(self.model, most), start, draws.choose, self.eos_ids, most)
        except CannotReplay as error:
            logger.warning("no CUDA graph of a step of decoding, generate is slower: %s", error)
            self.replays = False
            return None

    def _generated(self, start: Tensor, numbers: Sequence[int]) -> Tensor:
        draws = _SequenceDraws(self.model, numbers, self.eos_ids, self.config)
        written: Tensor = self.model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=1,
                use_cache=True,
                # Written in place; on an accelerator generate would compile the model for it.
                cache_implementation="static" if start.device.type == "cpu" else None,
                max_new_tokens=self.config.max_new_tokens,
                eos_token_id=self.eos_ids or NO_TOKEN,
                pad_token_id=self.eos_ids[0] if self.eos_ids else 0,
                repetition_penalty=1.0,
            ),
            logits_processor=LogitsProcessorList([draws]),
        )
        if draws.unsound:
            raise NumericsError(_UNSOUND.format(""))
        return written[:, 1:]


class _SequenceDraws(LogitsProcessor):
    """Chooses each row's next token by inverting its CDF at a draw of the row's own stream.

    To generate it returns scores whose argmax is the choice, so that greedy search takes it.
    """

    def __init__(
        self, model: Any, numbers: Sequence[int], eos_ids: list[int], config: SamplingConfig
    ) -> None:
        self.model = model
        self.shared_out = is_shared_out(model)
        self.unsound = False
        settings = [decoding_of(n) for n in numbers]
        self.rows = {
            setting: torch.tensor([i for i, s in enumerate(settings) if s == setting]).to(
                model.device
            )
            for setting in set(settings)
            if not setting.is_plain
        }
        self.draws = torch.stack(
            [_draws(config.seed, number, config.max_new_tokens) for number in numbers]
        ).to(model.device)
        self.eos_ids = eos_ids
        self.min_new_tokens = config.min_new_tokens
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        choice = self.choose(input_ids, scores)
        return torch.full_like(scores, -1.0).scatter_(1, choice[:, None], 1.0)

    def choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The next token of each row, (rows,) int64, given what is there and the model's scores of it."""
        scores = scores.to(torch.float32, copy=True)
        extremes = torch.stack(scores.aminmax())  # NaN is both; ten times as fast as to ask of all
        if not torch.isfinite(extremes).all():
            if not self.shared_out:
                where = where_it_breaks(self.model, {"input_ids": input_ids, "use_cache": False})
                raise NumericsError(_UNSOUND.format(f": {where}"))
            self.unsound = True  # the others run the model with this process until all have ended
            scores = torch.zeros_like(scores)
        if self.step < self.min_new_tokens and self.eos_ids:
            scores[:, self.eos_ids] = -float("inf")
        for setting, rows in self.rows.items():
            scores[rows] = restrict(scores[rows], setting)
        choice = invert(scores, self.draws[:, self.step])
        self.step += 1
        return choice


def invert(scores: Tensor, draws: Tensor) -> Tensor:
    """The token of each row whose share of the cumulative distribution holds the row's draw.

    Sums are in float64, first over blocks of tokens and then inside of the one block that is hit.

    Args:
        scores: Unnormalized log-probabilities, (rows, vocabulary) float32, -inf where forbidden.
        draws: Uniform in [0, 1), (rows,) float64.

    Returns:
        Token ids, (rows,) int64.
    """
    weights = (scores - scores.amax(-1, keepdim=True)).exp_()
    if rest := -scores.shape[1] % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, rest))
    blocks = weights.unflatten(1, (-1, BLOCK))
    upto = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    draw = draws[:, None] * upto[:, -1:]
    hit = torch.searchsorted(upto, draw, right=True).clamp_(max=upto.shape[1] - 1)
    block = blocks.gather(1, hit[..., None].expand(-1, 1, BLOCK))[:, 0].double()
    inside = block.cumsum(-1) + (upto.gather(1, hit) - block.sum(-1, keepdim=True))
    # Rounding may leave a draw just beyond the sum; then it is the last token that is allowed.
    places = torch.arange(BLOCK, device=scores.device)
    last = torch.where(block > 0, places, 0).amax(-1, keepdim=True)
    within = torch.searchsorted(inside, draw, right=True).minimum(last)
    return (hit * BLOCK + within)[:, 0]


def restrict(scores: Tensor, setting: Decoding) -> Tensor:
    """Apply temperature, top-k and top-p, in this order, to scores of shape (rows, vocabulary)."""
    scores = scores / setting.temperature
    if setting.top_k:
        kth = scores.topk(min(setting.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -float("inf"))
    return scores if setting.top_p == 1.0 else _nucleus(scores, setting.top_p, CANDIDATES)


def _nucleus(scores: Tensor, top_p: float, candidates: int) -> Tensor:
    """The smallest set of each row's tokens that reaches top_p; candidates are the likeliest, which often do."""
    whole = scores.logsumexp(-1, keepdim=True)
    ordered, order = scores.topk(min(candidates, scores.shape[-1]))
    shares = (ordered - whole).exp()
    upto = shares.cumsum(-1)
    # Drop what comes after it was reached.
    kept = ordered.masked_fill(upto - shares >= top_p, -float("inf"))
    found = torch.full_like(scores, -float("inf")).scatter_(1, order, kept)
    flat = (upto[:, -1] < top_p).nonzero()[:, 0]
    if len(flat) and candidates < scores.shape[-1]:
        found[flat] = _nucleus(scores[flat], top_p, scores.shape[-1])
    return found


def sample(
    engine: Engine,
    start_id: int,
    eos_ids: Sequence[int],
    config: SamplingConfig,
    shards: Path | None = None,
    enough: Callable[[Sequence[list[int]]], bool] | None = None,
) -> ProxySet:
    """Sample until enough sequences have passed the filter.

    Args:
        engine: Writes sequences by number.
        start_id: Put in front of every sequence.
        eos_ids: Ending tokens; not counted by the filter.
        config: Counts, lengths, seed.
        shards: Folder for one file a batch; what is already there is not sampled again.
        enough: Asked with the sequences for C_pre when there are `FIRST_LOOK` sequences, twice as
            many, and so on; at a yes sampling ends before its ceiling. Later calls bring all that
            earlier ones did.

    Raises:
        DataError: So many sequences are rejected that going on is hopeless; reasons are named.
        ArtifactError: A shard is damaged.
    """
    seen: set[str] = set()
    accepted: list[list[int]] = []
    rejected: Counter[str] = Counter()
    attempts = 0
    looks = _looks(config.num_sequences) if enough else iter(())
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


def _split(accepted: list[list[int]], config: SamplingConfig, rejected: Counter[str]) -> ProxySet:
    """What there is so far: the first for C_pre, the last for the meter."""
    cut = len(accepted) - replace(config, num_sequences=len(accepted)).num_held_out
    counted = {reason: rejected[reason] for reason in REASONS}
    return ProxySet(accepted[:cut], accepted[cut:], counted)


def _looks(ceiling: int) -> Iterator[int]:
    count = FIRST_LOOK
    while count < ceiling:
        yield count
        count *= 2


def sample_to_folder(
    engine: Callable[[], Engine],
    start_id: int,
    eos_ids: Sequence[int],
    config: SamplingConfig,
    facts: dict[str, Any],
    folder: Path,
    enough: Callable[[Sequence[list[int]]], bool] | None = None,
    decision: dict[str, Any] | None = None,
) -> ProxySet:
    """Sample into a folder, going on where an earlier call stopped.

    Args:
        engine: Makes the engine; called only if something is left to sample.
        start_id: As in `sample`.
        eos_ids: As in `sample`.
        config: As in `sample`.
        facts: Fingerprints of what the set belongs to; a folder with other facts is refused.
        folder: Receives ``request.json``, one shard a batch, and at the end ``set/``.
        enough: As in `sample`.
        decision: What `enough` depends on beside the sequences; another one is decided anew.

    Raises:
        MismatchError: The folder holds the work of another request.
        ArtifactError: Something in it is damaged.
    """
    request = {
        **facts,
        "sampling": json_fingerprint(
            {
                "settings": [vars(setting) for setting in MIXTURE],
                "start_id": start_id,
                "eos_ids": list(eos_ids),
                **{
                    name: getattr(config, name)
                    for name in ("min_new_tokens", "max_new_tokens", "seed")
                },
            }
        ),
    }
    complete = {**request, "asked": [config.num_sequences, config.num_held_out, decision]}
    found = ranks.first(lambda: _begun(folder, request, complete))
    if found is None:
        found = sample(_Lazy(engine), start_id, eos_ids, config, folder, enough)
        ranks.first(lambda: write_proxy_set(folder, found, complete))
    return found


def _begun(folder: Path, request: dict[str, Any], complete: dict[str, Any]) -> ProxySet | None:
    """The finished set of a folder, or None if it is to be made or to go on; see `sample_to_folder`."""
    request_file = folder / "request.json"
    if request_file.exists():
        if read_sealed(request_file) != request:
            raise MismatchError(
                f"{folder} holds samples of another model, start token, length or seed. Choose "
                "another output folder, or move that one away."
            )
    else:
        write_sealed(request_file, request)
    if (folder / "set").exists():
        try:
            return load_proxy_set(folder, complete)
        except MismatchError as error:  # another number of sequences: the shards still serve
            logger.info("sampling goes on: %s", error)
    return None


def write_proxy_set(folder: Path, proxies: ProxySet, facts: dict[str, Any]) -> None:
    """Write the finished set of a folder; see `load_proxy_set`."""
    counts = [len(proxies.calibration) + len(proxies.held_out), len(proxies.held_out)]
    own = {"sequences": counts, "rejected": proxies.rejected, "fingerprint": proxies.fingerprint}
    write_artifact(folder / "set", "samples", proxies_to_tensors(proxies), {**facts, **own})


def proxies_to_tensors(proxies: ProxySet) -> dict[str, Tensor]:
    """All sequences end to end and their lengths, held-out ones last; int64."""
    rows = [*proxies.calibration, *proxies.held_out]
    flat = [token for row in rows for token in row]
    return {"tokens": torch.tensor(flat), "lengths": torch.tensor([len(row) for row in rows])}


def proxies_from_tensors(
    tensors: Mapping[str, Tensor], held_out: int, rejected: dict[str, int]
) -> ProxySet:
    """Inverse of `proxies_to_tensors`. Raises ValueError if lengths do not fit the tokens."""
    tokens, counts = tensors["tokens"], tensors["lengths"]
    if any(t.dtype != torch.int64 or t.ndim != 1 for t in (tokens, counts)):
        raise ValueError("tokens and lengths are not rows of int64")
    lengths = counts.tolist()
    if sum(lengths) != len(tokens) or min(lengths, default=1) < 1:
        raise ValueError(f"lengths of sequences do not add up to {len(tokens)} tokens")
    if type(held_out) is not int or not 0 <= held_out < len(lengths):
        raise ValueError(f"{held_out!r:.80} of {len(lengths)} sequences are held out")
    if int(tokens.min()) < 0:
        raise ValueError(f"{int(tokens.min())} is no token")
    rows = [row.tolist() for row in tokens.split(lengths)]
    cut = len(rows) - held_out
    return ProxySet(rows[:cut], rows[cut:], rejected)


def load_proxy_set(folder: Path, expected: dict[str, Any] | None = None) -> ProxySet:
    """Read the finished set of a folder. Raises ArtifactError as `read_artifact`."""
    artifact = read_artifact(folder / "set", "samples", expected)
    manifest = artifact.manifest
    with fitting(folder / "set"):
        held_out = manifest["sequences"][1]
        return proxies_from_tensors(artifact.tensors, held_out, manifest["rejected"])


class _Lazy:
    """An engine that is made on first use: finished shards need no model."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        self.make = make
        self.engine: Engine | None = None

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
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
            ahead |= ranks.first(partial(_kept, shards, number))
        if number not in ahead:
            due = ranks.first(partial(_missing, shards, number, size))
            own = due[ranks.rank()]
            decoded = ranks.gather(ranks.agree(partial(engine, range(own, own + size))))
            ahead = dict(zip(due, decoded, strict=True))
            ranks.first(partial(_keep, shards, ahead))
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
    while len(found) < ranks.count():
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
    with fitting(file):
        if not batch:  # of which reading on would never come to an end
            raise ValueError("it has no sequences")
        return [[_token(t) for t in row] for row in batch]


def _token(value: Any) -> int:
    if type(value) is not int or not 0 <= value < LARGEST_VOCABULARY:
        raise ValueError(f"{value!r:.80} is no token")
    return value


def _draws(seed: int, number: int, count: int) -> Tensor:
    """The uniform draws of one sequence, shape (count,) float64 in [0, 1)."""
    generator = torch.Generator().manual_seed(stream_seed(seed, number))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def _until_eos(row: list[int], eos_ids: list[int]) -> list[int]:
    for position, token in enumerate(row):
        if token in eos_ids:
            return row[: position + 1]
    return row
