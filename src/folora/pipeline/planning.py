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
from itertools import product

import torch

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
class StageEstimate:
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
        coverage: Which layers are adapted, and their shared inputs.
        parameters: Number of parameters of the model.
        trainable: Number of trainable parameters of the adapter.
        stages: Estimates by stage.
        sizes: With the configured number of eigenvectors, then with all and with r, where these differ.
        batch: Rows per batch and tokens per row for which training's memory is computed.
        activations: Bytes of a forward and backward pass over this batch, included in training's.
        free: Bytes free on the device now.
    """

    coverage: Coverage
    parameters: int
    trainable: int
    stages: list[StageEstimate]
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
    given: int = 0,
) -> Plan:
    """Estimate a run: memory per process, disk and seconds in total.

    Args:
        config: With ``model`` set.
        task_tokens: Tokens of the training rows in one epoch, if known.
        rows: Number of training rows, if known.
        longest: Tokens of the longest row; default is ``data.max_length``.
        processes: Number of processes, each on its own accelerator or all on this CPU.
        given: Most tokens of a sampled sequence that the model does not write, such as a prompt's.

    Raises:
        ConfigError: `processes` is less than 1, the model is not found, or options do not fit it.
    """
    if processes < 1:
        raise ConfigError(f"--processes is {processes}, but must be >= 1")
    found = _Estimator(config, processes, given)
    training = config.training
    # Packed rows have the length that they are packed to.
    extra = training.model_extra or {}
    packed = extra.get("max_length") if extra.get("packing") else None
    batch = (training.per_device_train_batch_size, packed or longest or config.data.max_length)
    activations = found.activations(*batch)
    factors = found.trainable * 4 * (2 if config.method.init in NONZERO else 1)
    # Factors and two moments, also of frozen halves.
    without = found.weights + 3 * factors + activations
    sizes = [
        BasisSize(directions, found.bases(directions), without + found.bases(directions))
        for directions in dict.fromkeys((config.directions, None, config.adapter.r))
    ]
    seconds = found.training_seconds(task_tokens, rows)
    checkpoints = 2 * 4 * factors
    return Plan(
        coverage=found.coverage,
        parameters=found.parameters,
        trainable=found.trainable,
        stages=[
            found.sampling(),
            found.measuring(),
            found.solving(),
            StageEstimate("train", sizes[0].training, checkpoints, seconds, seconds),
            StageEstimate("export", factors, factors, None, None),
        ],
        sizes=sizes,
        batch=batch,
        activations=activations,
        free=free_bytes(found.device) // (processes if found.device.type == "cpu" else 1),
    )


class _Estimator:
    """Model, layers and the speed of this machine, and the estimates that follow from them."""

    def __init__(self, config: FoLoraConfig, processes: int, given: int) -> None:
        self.config, self.processes, self.given = config, processes, given
        self.device = device_of(config)
        self.model_config = load_config(config, required(config.model, "model"))
        self.skeleton, self.coverage = cover_config(config, self.model_config)
        warn_if_few_adapted(self.coverage)
        self.groups = self.coverage.groups
        self.dtype = dtype_for(config, self.device, self.model_config) or torch.bfloat16
        self.parameters = self.skeleton.num_parameters()
        self.weights = self.parameters * self.dtype.itemsize  # bytes of the base model per process
        if config.shard:
            blocks = self.model_config.get_text_config().num_hidden_layers
            self.weights = int(sharded_weight_bytes(self.weights, blocks, processes))
        shapes = self.coverage.layers.values()
        self.trainable = sum(config.adapter.r * (d_in + d_out) for d_in, d_out in shapes)
        self.moments = sum(4 * g.d_in**2 for g in self.groups)  # bytes of all second moments
        self.rate = _speed(self.device, self.dtype)  # operations per second of a matrix product
        # Sampling may end at the first check; with a base file there is none.
        sampling = config.sampling
        self.most = 0 if config.base is not None else sampling.num_sequences
        self.fewest = min(self.most, FIRST_LOOK) if config.ends_early else self.most
        self.length = (sampling.min_new_tokens + sampling.max_new_tokens) // 2 + given

    def bases(self, directions: int | None) -> int:
        """Bytes of all bases with this number of eigenvectors each."""
        return sum(4 * g.d_in * min(directions or g.d_in, g.d_in) for g in self.groups)

    def activations(self, rows: int, tokens: int) -> int:
        """Bytes of a step's forward and backward pass, computed on the meta device.

        Some architectures accept no 4D mask; experts are computed in bf16, the only dtype of torch's grouped
        products on the meta device. If a pass is too slow (a state-space model without its kernels), short
        rows are measured and extrapolated linearly. If it fails, the widths of the adapted layers give an
        estimate.
        """
        with suppress(AttributeError, ValueError):  # older transformers; a model without experts
            self.skeleton.set_experts_implementation("grouped_mm")
        layers, config = self.coverage.layers, self.config
        model = outline(self.skeleton, layers, config.adapter.r, config.method.init).train()

        def count(tokens: int, dtype: torch.dtype, masked: bool) -> int:
            found = step_bytes(
                model.to(dtype=dtype),  # type: ignore[call-arg]
                rows,
                tokens,
                on_cpu=self.device.type == "cpu",
                checkpointing=config.training.gradient_checkpointing,
                masked=masked,
            )
            return found * self.dtype.itemsize // dtype.itemsize

        for dtype, masked in product(dict.fromkeys((self.dtype, torch.bfloat16)), (True, False)):
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
        widths = sum(g.d_in for g in self.groups) + sum(d for _, d in layers.values())
        return ACTIVATION_FACTOR * widths * rows * tokens * self.dtype.itemsize

    def sampling(self) -> StageEstimate:
        """Weights and KV cache; nothing but weights if a server generates."""
        sampling, itemsize = self.config.sampling, self.dtype.itemsize
        disk = 8 * self.most * self.length
        if sampling.server is not None:
            return StageEstimate("sample", self.weights, disk, None, None)
        at_once = batch_size_for(
            self.device,
            self.model_config,
            itemsize,
            sampling,
            self.processes,
            self.weights,
            self.given,
        )
        tokens = sampling.max_new_tokens + self.given
        cache = cache_bytes(self.model_config, itemsize) * at_once * tokens

        def seconds(sequences: int) -> float:
            # For the process with most batches; batches are not divided, and the last counts as full.
            sequences = math.ceil(math.ceil(sequences / at_once) / self.processes) * at_once
            operations = 2 * self.parameters * sequences * self.length
            return operations / self.rate / DECODING_EFFICIENCY

        times = seconds(self.most), seconds(self.fewest)
        return StageEstimate("sample", self.weights + cache, disk, *times)

    def measuring(self) -> StageEstimate:
        """Forward passes over samples and task rows, once for each part of the moments that fits."""
        statistics = self.config.statistics
        room = room_for_moments(self.device, statistics.memory_gb, self.weights)
        parts = [sum(4 * g.d_in**2 for g in part) for part in passes(self.groups, room)]
        of_task = statistics.task_examples * min(self.config.data.max_length, 256)
        gram = GRAM_SHARE * sum(2 * g.d_in**2 for g in self.groups)

        def seconds(sequences: int) -> float:
            operations = len(parts) * 2 * self.parameters + gram
            return operations * (sequences * self.length + of_task) / self.rate / self.processes

        memory, times = self.weights + 2 * max(parts), (seconds(self.most), seconds(self.fewest))
        return StageEstimate("measure", memory, 2 * self.moments, *times)

    def solving(self) -> StageEstimate:
        """One eigenproblem for each shared input, in float64."""
        kept = solve_options(self.config)["directions"]
        count = len(self.groups)
        share = math.ceil(count / self.processes) / count  # of the process with most groups
        operations = share * sum(_solve_operations(g.d_in, kept) for g in self.groups)
        seconds = operations / _speed(self.device, torch.float64)
        widest = max(g.d_in for g in self.groups)
        memory = 2 * self.moments + self.bases(kept) + 10 * 8 * widest**2
        return StageEstimate("solve", memory, self.bases(kept), seconds, seconds)

    def training_seconds(self, task_tokens: int | None, rows: int | None) -> float | None:
        """Seconds of training; None if the number of tokens is not known."""
        if not task_tokens:
            return None
        training = self.config.training
        tokens = training.num_train_epochs * task_tokens / self.processes
        if training.max_steps > 0 and rows:
            a_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
            tokens = training.max_steps * a_step * task_tokens / rows
        tokens /= 1 - self.config.anchor_share
        efficiency = TRAINING_EFFICIENCY.get(self.device.type, 1.0)
        return 3 * 2 * self.parameters * tokens / self.rate / efficiency


def widths(groups: Sequence[InputGroup]) -> list[tuple[int, int, int]]:
    """(d_in, number of groups, number of layers) for every width, largest first."""
    found = []
    for d in sorted({g.d_in for g in groups}, reverse=True):
        same = [g for g in groups if g.d_in == d]
        found.append((d, len(same), sum(len(g.layers) for g in same)))
    return found


def _solve_operations(d: int, kept: int | None) -> float:
    """float64 operations for one shared input."""
    if kept is not None and uses_subspace_iteration(kept, d):
        return REDUCTION * d**3 + LEADING_VECTORS * d**2 * kept
    return (REDUCTION + ALL_VECTORS) * d**3


def _speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product; the fastest of five, the least disturbed."""
    x = torch.ones(PROBE, 4 * PROBE, device=device, dtype=dtype)

    def seconds() -> float:
        started = time.perf_counter()
        _ = x @ x.T
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - started

    return 8 * PROBE**3 / min(seconds() for _ in range(5))
