"""Estimate a run's memory, disk and time before it starts.

Sizes are computed on the meta device, without the model's weights. Times are estimated from a short
benchmark on this machine (a matrix product in the model's dtype, and one in float64), accurate to a factor
of about three.
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
from folora.adapters.coverage import Coverage, cover_config, warn_if_few_adapted
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

PROBE = 512  # size of the benchmark's matrices
# Activation memory divided by that of the inputs and outputs of adapted layers; measured 2 to 10.
ACTIVATION_FACTOR = 6
# Tokens of a short row, and maximum seconds of a pass over a full row on the meta device.
SHORT_TOKENS, MAX_SECONDS = 16, 20
# Relative to the rate of a large product: decoding; and training, where on a CPU TRL's loss takes about half.
DECODING_EFFICIENCY, TRAINING_EFFICIENCY = 0.15, {"cpu": 0.25}
# float64 operations of the eigenproblem, measured: reduction to standard form and all eigenvectors, relative
# to d_in^3; k leading eigenvectors, relative to k d_in^2.
REDUCTION, ALL_VECTORS, LEADING_VECTORS = 2.4, 17, 60


@dataclass(frozen=True)
class Stage:
    """Estimated requirements of one stage.

    Attributes:
        name: Name of the stage.
        memory: Bytes.
        disk: Bytes.
        seconds: Upper estimate; None if it depends on unknown data.
        soonest: The same if sampling stops at the first check.
    """

    name: str
    memory: int
    disk: int
    seconds: float | None
    soonest: float | None


@dataclass(frozen=True)
class BasisSize:
    """Memory of training for a number of eigenvectors per basis.

    Attributes:
        directions: Number of eigenvectors; None for all.
        bases: Bytes of all bases.
        training: Bytes of training in total.
    """

    directions: int | None
    bases: int
    training: int


@dataclass(frozen=True)
class Plan:
    """The estimates that `folora plan` prints.

    Attributes:
        coverage: Which layers are adapted.
        groups: Shared inputs.
        layers: Number of adapted layers.
        parameters: Number of parameters of the model.
        trainable: Number of trainable parameters of the adapter.
        stages: Estimates by stage.
        sizes: With the configured number of eigenvectors, then with all and with r, where these differ.
        batch: Rows per batch and tokens per row for which training's memory is computed.
        activations: Bytes of a forward and backward pass over this batch, included in training's.
        free: Bytes free on the device now.
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
        """The configured size if it fits into free memory, else a smaller one that fits, else None."""
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
    """Estimate a run: memory per process, disk and seconds in total.

    Args:
        config: With ``model`` set.
        task_tokens: Tokens of the training rows in one epoch, if known.
        rows: Number of training rows, if known.
        longest: Tokens of the longest row; default is ``data.max_length``.
        processes: Number of processes, each on its own accelerator or all on this CPU.

    Raises:
        ConfigError: `processes` is less than 1, the model is not found, or options do not fit it.
    """
    if processes < 1:
        raise ConfigError(f"--processes is {processes}, but must be >= 1")
    known = _workload(config, processes)
    training = config.training
    # Packed rows have the length that they are packed to.
    extra = training.model_extra or {}
    packed = extra.get("max_length") if extra.get("packing") else None
    batch = (training.per_device_train_batch_size, packed or longest or config.data.max_length)
    activations = _activations(known, config, batch)
    factors = known.trainable * 4 * (2 if config.method.init in NONZERO else 1)
    without = (
        known.weights + 3 * factors + activations
    )  # factors and two moments, also of frozen halves
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
class _Workload:
    """Model, layers, number of processes and speed, on which all estimates are based."""

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
    """Bytes of the base model per process."""
    rate: float
    """Operations per second of a matrix product in the model's dtype."""
    float64_rate: float
    """The same in float64."""

    @property
    def moments(self) -> int:
        """Bytes of all second moments."""
        return sum(4 * g.d_in**2 for g in self.groups)


def _workload(config: FoLoraConfig, processes: int) -> _Workload:
    device = device_of(config)
    model_config = load_config(config, required(config.model, "model"))
    skeleton, coverage = cover_config(config, model_config)
    warn_if_few_adapted(coverage)
    groups, layers = coverage.groups, coverage.layers
    dtype = dtype_for(config, device, model_config) or torch.bfloat16
    parameters = sum(p.numel() for p in skeleton.parameters())
    weights = parameters * dtype.itemsize
    if config.shard:
        blocks = model_config.get_text_config().num_hidden_layers
        weights = int(sharded_weight_bytes(weights, blocks, processes))
    return _Workload(
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
        float64_rate=_speed(device, torch.float64),
    )


def _activations(known: _Workload, config: FoLoraConfig, batch: tuple[int, int]) -> int:
    """Bytes of a step's forward and backward pass, computed on the meta device.

    Some architectures accept no 4D mask; experts are computed in bf16, the only dtype of torch's grouped
    products on the meta device. If a pass is too slow (a state-space model without its kernels), short rows
    are measured and extrapolated linearly. If it fails, the widths of the adapted layers give an estimate.
    """
    with suppress(AttributeError, ValueError):  # older transformers; a model without experts
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
                short = count(SHORT_TOKENS, dtype, masked)
                seconds = time.perf_counter() - began
                if seconds * tokens / SHORT_TOKENS < MAX_SECONDS:
                    return count(tokens, dtype, masked)
                per_token = (count(2 * SHORT_TOKENS, dtype, masked) - short) / SHORT_TOKENS
                return int(short + per_token * (tokens - SHORT_TOKENS))
            except Exception as error:  # whatever the model's code raises
                logger.debug("a step on the meta device: %s", error)
    logger.info(
        "activation memory is a rough estimate: this architecture does not run on the meta device"
    )
    widths = sum(g.d_in for g in known.groups) + sum(d for _, d in known.layers.values())
    return ACTIVATION_FACTOR * widths * rows * tokens * known.dtype.itemsize


def _text_stages(known: _Workload, config: FoLoraConfig) -> tuple[Stage, Stage]:
    """Estimates of sampling and of measuring the moments."""
    sampling, processes = config.sampling, known.processes
    length = (sampling.min_new_tokens + sampling.max_new_tokens) // 2
    most = 0 if config.base is not None else sampling.num_sequences
    fewest = min(most, FIRST_LOOK) if config.ends_early else most
    at_once = batch_size_for(
        known.device, known.model_config, known.dtype.itemsize, sampling, processes, known.weights
    )
    per_token = cache_bytes(known.model_config, known.dtype.itemsize)
    cache = per_token * at_once * sampling.max_new_tokens
    room = room_for_moments(known.device, config.statistics.memory_gb, known.weights)
    parts = [sum(4 * g.d_in**2 for g in part) for part in passes(known.groups, room)]
    of_task = config.statistics.task_examples * min(config.data.max_length, 256)
    forward = 2 * known.parameters
    gram = GRAM_SHARE * sum(2 * g.d_in**2 for g in known.groups)
    elsewhere = sampling.server is not None

    def sampling_seconds(sequences: int) -> float | None:
        if elsewhere:
            return None
        # For the process with most batches; batches are not divided, and the last counts as full.
        sequences = math.ceil(math.ceil(sequences / at_once) / processes) * at_once
        return forward * sequences * length / known.rate / DECODING_EFFICIENCY

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


def _solving(known: _Workload, config: FoLoraConfig) -> Stage:
    kept = solve_options(config)["directions"]
    bases = sum(4 * g.d_in * min(kept or g.d_in, g.d_in) for g in known.groups)
    widest = max(g.d_in for g in known.groups)
    count = len(known.groups)
    share = math.ceil(count / known.processes) / count  # of the process with most groups
    seconds = (
        share * sum(_solve_operations(g.d_in, kept) for g in known.groups) / known.float64_rate
    )
    memory = 2 * known.moments + bases + 10 * 8 * widest**2
    return Stage("solve", memory, bases, seconds, seconds)


def _training_seconds(
    known: _Workload, config: FoLoraConfig, task_tokens: int | None, rows: int | None
) -> float | None:
    """Seconds of training; None if the number of tokens is not known."""
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
    """Bytes of the bases by number of eigenvectors; see `Plan.sizes`.

    Args:
        config: Gives the number of eigenvectors.
        groups: Shared inputs.
        without: Bytes of training without bases.
    """
    found = []
    for directions in dict.fromkeys((config.directions, None, config.adapter.r)):
        bases = sum(4 * g.d_in * min(directions or g.d_in, g.d_in) for g in groups)
        found.append(BasisSize(directions, bases, without + bases))
    return found


def widths(groups: Sequence[InputGroup]) -> list[tuple[int, int, int]]:
    """(d_in, number of groups, number of layers) for every width, largest first."""
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
    """float64 operations for one shared input."""
    if kept is not None and uses_subspace_iteration(kept, d):
        return REDUCTION * d**3 + LEADING_VECTORS * d**2 * kept
    return (REDUCTION + ALL_VECTORS) * d**3


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product."""
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
