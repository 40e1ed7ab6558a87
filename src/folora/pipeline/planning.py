"""What a run will need, said before anything starts: layers, bases, memory, disk and time.

Sizes follow from the model's skeleton on the meta device, without its weights. Times are estimates
from measuring on this machine for a moment (a matrix product in the model's dtype, and one in float64),
good to a factor of about three.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from folora.adapters.adapter import outline
from folora.adapters.coverage import Coverage, cover_config, warn_if_little
from folora.adapters.initialization import NONZERO
from folora.calibration.engine import batch_size_for
from folora.calibration.moments import GRAM_SHARE, passes, room_for_moments
from folora.config import FIRST_LOOK, FoLoraConfig
from folora.errors import ConfigError
from folora.pipeline.activation_memory import step_bytes
from folora.pipeline.stages import solve_options
from folora.runtime.loading import device_of, dtype_for, load_config, required
from folora.runtime.memory import cache_bytes, free_bytes, sharded_weight_bytes
from folora.spectral.groups import InputGroup
from folora.spectral.leading import uses_subspace_iteration

logger = logging.getLogger(__name__)

PROBE = 512
# Bytes of activations over those of what adapted layers read and give: measured, 2 to 10.
WIDTHS = 6
# Tokens of a short row, and seconds that a pass over a whole one may take on the meta device.
FEW_TOKENS, PATIENCE = 16, 20
# Of a large product's rate: for one token a row; and in training, where on a CPU TRL's loss takes about half.
DECODING_EFFICIENCY, TRAINING_EFFICIENCY = 0.15, {"cpu": 0.25}
# Operations of a solve over the cube of the width, in float64: to reduce it to one matrix, and for all its
# vectors; and of k leading ones over k times the square of the width. Measured.
REDUCTION, ALL_VECTORS, LEADING_VECTORS = 2.4, 17, 60


@dataclass(frozen=True)
class Stage:
    """One stage's needs.

    Attributes:
        name: Of the stage.
        memory: Bytes.
        disk: Bytes.
        seconds: At most; None where only the data can tell.
        soonest: The same if sampling ends at its first look.
    """

    name: str
    memory: int
    disk: int
    seconds: float | None
    soonest: float | None


@dataclass(frozen=True)
class BasisSize:
    """What training takes with so many directions of each basis.

    Attributes:
        directions: Number of directions; None for all.
        bases: Bytes of all bases.
        training: Bytes of training as a whole.
    """

    directions: int | None
    bases: int
    training: int


@dataclass(frozen=True)
class Plan:
    """Everything `folora plan` prints.

    Attributes:
        coverage: Which layers are adapted, and what is not.
        groups: Shared inputs.
        layers: Layers that are adapted.
        parameters: Of the model.
        trainable: Of the adapter.
        stages: What each needs.
        sizes: Of the bases as configured, then with all directions and with r, where these differ.
        batch: Rows and tokens of a row that training's memory is counted for.
        activations: Bytes that a forward and backward pass over them takes, part of training's.
        free: Bytes that the device has free now.
    """

    coverage: Coverage
    groups: list[InputGroup]
    layers: int
    parameters: int
    trainable: int
    stages: list[Stage]
    sizes: list[BasisSize]
    batch: tuple[int, int]
    activations: int
    free: int

    @property
    def advice(self) -> BasisSize | None:
        """What fits into the free memory: the configured size, or else a smaller one; or None."""
        most = self.sizes[0].bases
        fitting = (s for s in self.sizes if s.training < self.free and s.bases <= most)
        return next(fitting, None)


def plan(
    config: FoLoraConfig,
    task_tokens: int | None = None,
    rows: int | None = None,
    longest: int | None = None,
    processes: int = 1,
) -> Plan:
    """Estimate a run: memory a process, disk and seconds of all together.

    Args:
        config: With ``model`` given.
        task_tokens: Tokens of the training rows in one epoch, if known.
        rows: Number of training rows, if known.
        longest: Tokens of the longest row, if known; else rows are as long as they may be.
        processes: How many work together, each on an accelerator of its own or all on this CPU.

    Raises:
        ConfigError: `processes` is less than 1, the model cannot be found, or options do not fit it.
    """
    if processes < 1:
        raise ConfigError(f"--processes is {processes}, but must be >= 1")
    known = _known(config, processes)
    training = config.training
    # A packed row is as long as rows are packed to.
    extra = training.model_extra or {}
    packed = extra.get("max_length") if extra.get("packing") else None
    batch = (training.per_device_train_batch_size, packed or longest or config.data.max_length)
    activations = _activations(known, config, batch)
    factors = known.trainable * 4 * (2 if config.method.init in NONZERO else 1)
    without = known.weights + 3 * factors + activations  # two moments, of frozen halves too
    sizes = basis_sizes(config, known.groups, without)
    seconds = _training_seconds(known, config, task_tokens, rows)
    checkpoints = 2 * 4 * factors
    free = free_bytes(known.device) // (processes if known.device.type == "cpu" else 1)
    return Plan(
        coverage=known.coverage,
        groups=known.groups,
        layers=len(known.layers),
        parameters=known.parameters,
        trainable=known.trainable,
        stages=[
            *_text_stages(known, config),
            _solving(known, config),
            Stage("train", sizes[0].training, checkpoints, seconds, seconds),
            Stage("export", factors, factors, None, None),
        ],
        sizes=sizes,
        batch=batch,
        activations=activations,
        free=free,
    )


@dataclass(frozen=True)
class _Known:
    """What all stages work on, how many processes share them, and how fast each is."""

    device: torch.device
    dtype: torch.dtype
    model_config: Any
    skeleton: PreTrainedModel
    coverage: Coverage
    groups: list[InputGroup]
    layers: dict[str, tuple[int, int]]
    parameters: int
    trainable: int
    processes: int
    weights: int
    """Bytes of the base in a process."""
    rate: float
    """Operations a second of a product in the model's dtype."""
    wide_rate: float
    """Likewise in float64."""

    @property
    def moments(self) -> int:
        """Bytes of all second moments."""
        return sum(4 * g.d_in**2 for g in self.groups)


def _known(config: FoLoraConfig, processes: int) -> _Known:
    device = device_of(config)
    model_config = load_config(config, required(config.model, "model"))
    skeleton, coverage = cover_config(config, model_config)
    warn_if_little(coverage)
    groups, layers = coverage.groups, coverage.layers
    dtype = dtype_for(config, device, model_config) or torch.bfloat16
    parameters = sum(p.numel() for p in skeleton.parameters())
    weights = parameters * dtype.itemsize
    if config.shard:
        blocks = model_config.get_text_config().num_hidden_layers
        weights = int(sharded_weight_bytes(weights, blocks, processes))
    return _Known(
        device=device,
        dtype=dtype,
        model_config=model_config,
        skeleton=skeleton,
        coverage=coverage,
        groups=groups,
        layers=layers,
        parameters=parameters,
        trainable=sum(config.adapter.r * (d_in + d_out) for d_in, d_out in layers.values()),
        processes=processes,
        weights=weights,
        rate=_speed(device, dtype),
        wide_rate=_speed(device, torch.float64),
    )


def _activations(known: _Known, config: FoLoraConfig, batch: tuple[int, int]) -> int:
    """Bytes of a step's forward and backward pass.

    Some architectures take no ready-made mask there; experts are counted in bf16, the only dtype that torch
    has their grouped products in on the meta device. Where a pass goes token by token (a state-space model
    without its kernels), rows of few tokens are counted and extrapolated linearly. What does not run there
    at all is estimated by the widths of the adapted layers.
    """
    with suppress(AttributeError, ValueError):  # of older transformers, of a model without experts
        known.skeleton.set_experts_implementation("grouped_mm")
    model = outline(known.skeleton, known.layers, config.adapter.r, config.method.init).train()
    rows, tokens = batch

    def count(tokens: int, dtype: torch.dtype, masked: bool) -> int:
        found = step_bytes(
            model.to(dtype=dtype),  # type: ignore[call-arg]
            rows,
            tokens,
            on_cpu=known.device.type == "cpu",
            checkpointing=config.training.gradient_checkpointing,
            masked=masked,
        )
        return found * known.dtype.itemsize // dtype.itemsize

    for dtype in dict.fromkeys((known.dtype, torch.bfloat16)):
        for masked in (True, False):
            try:
                began = time.perf_counter()
                few = count(FEW_TOKENS, dtype, masked)
                seconds = time.perf_counter() - began
                if seconds * tokens / FEW_TOKENS < PATIENCE:
                    return count(tokens, dtype, masked)
                a_token = (count(2 * FEW_TOKENS, dtype, masked) - few) / FEW_TOKENS
                return int(few + a_token * (tokens - FEW_TOKENS))
            except Exception as error:  # whatever the model's code raises
                logger.debug("a step on the meta device: %s", error)
    logger.info("a step's memory is estimated: this architecture does not run without weights")
    widths = sum(g.d_in for g in known.groups) + sum(d for _, d in known.layers.values())
    return WIDTHS * widths * rows * tokens * known.dtype.itemsize


def _text_stages(known: _Known, config: FoLoraConfig) -> tuple[Stage, Stage]:
    """Sampling, and measuring what was sampled and the task."""
    sampling, processes = config.sampling, known.processes
    length = (sampling.min_new_tokens + sampling.max_new_tokens) // 2
    most = 0 if config.base is not None else sampling.num_sequences
    fewest = min(most, FIRST_LOOK) if config.ends_early else most
    at_once = batch_size_for(
        known.device, known.model_config, known.dtype.itemsize, sampling, processes, known.weights
    )
    a_token = cache_bytes(known.model_config, known.dtype.itemsize)
    cache = a_token * at_once * sampling.max_new_tokens
    room = room_for_moments(known.device, config.statistics.memory_gb, known.weights)
    parts = [sum(4 * g.d_in**2 for g in part) for part in passes(known.groups, room)]
    of_task = config.statistics.task_examples * min(config.data.max_length, 256)
    forward = 2 * known.parameters
    gram = GRAM_SHARE * sum(2 * g.d_in**2 for g in known.groups)
    elsewhere = sampling.server is not None

    def sampling_seconds(sequences: int) -> float | None:
        if elsewhere:
            return None
        # Of the busiest process: batches are not divided, and the last is as large as the others.
        mine = math.ceil(math.ceil(sequences / at_once) / processes) * at_once
        return forward * mine * length / known.rate / DECODING_EFFICIENCY

    def measuring_seconds(sequences: int) -> float:
        tokens = sequences * length + of_task
        return (len(parts) * forward + gram) * tokens / known.rate / processes

    return (
        Stage(
            "sample",
            known.weights + (0 if elsewhere else cache),
            8 * most * length,
            sampling_seconds(most),
            sampling_seconds(fewest),
        ),
        Stage(
            "measure",
            known.weights + 2 * max(parts),
            2 * known.moments,
            measuring_seconds(most),
            measuring_seconds(fewest),
        ),
    )


def _solving(known: _Known, config: FoLoraConfig) -> Stage:
    kept = solve_options(config)["directions"]
    bases = sum(4 * g.d_in * min(kept or g.d_in, g.d_in) for g in known.groups)
    widest = max(g.d_in for g in known.groups)
    count = len(known.groups)
    share = math.ceil(count / known.processes) / count  # of the busiest process
    seconds = share * sum(_solve_operations(g.d_in, kept) for g in known.groups) / known.wide_rate
    return Stage("solve", 2 * known.moments + bases + 10 * 8 * widest**2, bases, seconds, seconds)


def _training_seconds(
    known: _Known, config: FoLoraConfig, task_tokens: int | None, rows: int | None
) -> float | None:
    """None if the tokens of the rows are not known."""
    if not task_tokens:
        return None
    training = config.training
    tokens = training.num_train_epochs * task_tokens / known.processes
    if training.max_steps > 0 and rows:
        a_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
        tokens = training.max_steps * a_step * task_tokens / rows
    efficiency = TRAINING_EFFICIENCY.get(known.device.type, 1.0)
    return 3 * 2 * known.parameters * tokens / known.rate / efficiency


def basis_sizes(
    config: FoLoraConfig, groups: Sequence[InputGroup], without: int
) -> list[BasisSize]:
    """Bytes of the bases by number of directions; see `Plan.sizes`.

    Args:
        config: Says how many directions.
        groups: Shared inputs.
        without: Bytes of training without bases.
    """
    found = []
    for directions in dict.fromkeys((config.directions, None, config.adapter.r)):
        bases = sum(4 * g.d_in * min(directions or g.d_in, g.d_in) for g in groups)
        found.append(BasisSize(directions, bases, without + bases))
    return found


def widths(groups: Sequence[InputGroup]) -> list[tuple[int, int, int]]:
    """(d_in, number of groups, number of layers) for every width, widest first."""
    found = sorted({g.d_in for g in groups}, reverse=True)
    return [
        (
            d,
            sum(g.d_in == d for g in groups),
            sum(len(g.layers) for g in groups if g.d_in == d),
        )
        for d in found
    ]


def _solve_operations(d: int, kept: int | None) -> float:
    """In float64, for one shared input."""
    if kept is not None and uses_subspace_iteration(kept, d):
        return REDUCTION * d**3 + LEADING_VECTORS * d**2 * kept
    return (REDUCTION + ALL_VECTORS) * d**3


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBE, 4 * PROBE, generator=generator).to(device, dtype)
    best = min(_seconds(device, lambda: x @ x.T) for _ in range(5))
    return 8 * PROBE**3 / best


def _seconds(device: torch.device, work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started
