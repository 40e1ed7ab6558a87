"""Cost of set-up and training on 1 to 64 GPUs, extrapolated from measurements by counts of operations.

The measurements are of Qwen3-1.7B on one GPU: the paper's 1146 s of sampling and 241 s of second moments, and our
eigenproblems (an H200, 128 eigenvectors: 32 ms for an input of 2048, 119 ms for one of 6144). Sampling is
proportional to the active parameters per token, second moments to forward pass and Gram matrices, an
eigenproblem to the cube of the width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from folora.calibration.moments import GRAM_SHARE, SHARE_OF_FREE, passes
from folora.compare.tables import Table
from folora.runtime.memory import sharded_weight_bytes
from folora.spectral.groups import InputGroup

SEQUENCES, LENGTH, BATCH = 2000, 512, 64
RANK = 16
GPUS = (1, 8, 64)
BYTES = 80e9  # of a GPU
POINTS = {"sample": 1146.0, "measure": 241.0, "solve": 84 * 0.032 + 28 * 0.119}  # seconds


@dataclass(frozen=True)
class Size:
    """A model's size.

    Attributes:
        inputs: Width of each kind of shared input, and how many there are.
        layers: Sum of d_in + d_out over the adapted layers.
        parameters: In all.
        active: Parameters used by a token.
        blocks: How many.
    """

    inputs: tuple[tuple[int, int], ...]
    layers: int
    parameters: float
    active: float
    blocks: int

    def held(self, gpus: int) -> float:
        """Bytes of bf16 weights per GPU; several GPUs shard them (``--shard``)."""
        return sharded_weight_bytes(2 * self.parameters, self.blocks, gpus)

    def passes(self, gpus: int) -> int | None:
        """Passes over the texts for C_pre; None if the weights leave no memory for it."""
        room = (BYTES - self.held(gpus)) * SHARE_OF_FREE
        block = [
            InputGroup((f"width {d}",), d) for d, n in self.inputs for _ in range(n // self.blocks)
        ]
        widest = 4 * max(group.d_in for group in block) ** 2
        return len(passes(block * self.blocks, room)) if room > widest else None

    @property
    def squares(self) -> float:
        """Sum of d_in squared over shared inputs: the numbers in C_pre."""
        return float(sum(n * d * d for d, n in self.inputs))

    @property
    def gram(self) -> float:
        """Operations per token for Gram matrices; an expert's input counts for its own tokens only."""
        return 2 * GRAM_SHARE * self.squares * self.active / self.parameters

    @property
    def forward(self) -> float:
        """Operations per token of the forward pass."""
        return 2 * self.active


def dense(hidden: int, inner: int, attention: int, kv: int, blocks: int, parameters: float) -> Size:
    """A model of LLaMA's build; `attention` and `kv` are widths of all heads together."""
    inputs = ((hidden, 2 * blocks), (attention, blocks), (inner, blocks))
    layers = blocks * (3 * hidden + attention + 2 * kv + attention + hidden + 3 * (hidden + inner))
    return Size(inputs, layers, parameters, parameters, blocks)


def experts(hidden: int, inner: int, number: int, used: int, blocks: int) -> Size:
    """A mixture of experts: an expert's gate and up projections share an input, its down projection has its own."""
    inputs = ((hidden, blocks * (2 + number)), (inner, blocks * number))
    each = 3 * hidden * inner
    shared = blocks * 4 * hidden * hidden
    layers = blocks * (8 * hidden + number * 3 * (hidden + inner))
    return Size(
        inputs, layers, shared + blocks * number * each, shared + blocks * used * each, blocks
    )


MODELS = {
    "Qwen3-1.7B": dense(2048, 6144, 2048, 1024, 28, 1.7e9),
    "7B (LLaMA 2)": dense(4096, 11008, 4096, 4096, 32, 6.7e9),
    "32B (Qwen3)": dense(5120, 25600, 8192, 1024, 64, 32.8e9),
    "70B (LLaMA 3)": dense(8192, 28672, 8192, 1024, 80, 70.6e9),
    "100B, 128 experts": experts(4096, 1408, 128, 8, 44),
}
POINT = MODELS["Qwen3-1.7B"]


def seconds(size: Size, gpus: int) -> dict[str, float]:
    """Seconds of each set-up stage, on the busiest process."""
    batches = math.ceil(SEQUENCES / BATCH)
    cubes = sorted((float(d) ** 3 for d, n in size.inputs for _ in range(n)), reverse=True)
    busiest = max(sum(cubes[rank::gpus]) for rank in range(gpus))
    return {
        "sample": POINTS["sample"]
        * size.active
        / POINT.active
        * math.ceil(batches / gpus)
        / batches,
        "measure": POINTS["measure"]
        * ((size.passes(gpus) or math.nan) * size.forward + size.gram)
        / (POINT.forward + POINT.gram)
        / gpus,
        "solve": POINTS["solve"] * busiest / sum(n * float(d) ** 3 for d, n in POINT.inputs),
    }


def time_table() -> Table:
    """Seconds of set-up by model and number of GPUs."""
    rows = []
    for name, size in MODELS.items():
        found = {gpus: seconds(size, gpus) for gpus in GPUS}
        rows.append(
            (
                name,
                *(
                    _time(found[gpus][stage] if size.passes(gpus) else math.nan)
                    for stage in POINTS
                    for gpus in GPUS
                ),
            )
        )
    header = ("model", *(f"{stage}, {gpus}" for stage in POINTS for gpus in GPUS))
    caption = (
        f"Estimates for the paper's {SEQUENCES} sequences of {LENGTH} tokens, by number of GPUs; extrapolated from the paper's times for "
        f"Qwen3-1.7B on one GPU, and ours for the eigenproblems on an H200. Sampling is distributed in batches of {BATCH}, solving by "
        "shared inputs; measuring takes the passes over the texts of "
        "the next table. –: the bf16 weights do not fit one GPU of 80 GB."
    )
    return Table(header, tuple(rows), caption)


def bytes_table() -> Table:
    """Memory per GPU, traffic and disk by model."""
    rows = [(name, *_bytes(size)) for name, size in MODELS.items()]
    header = (
        "model", "weights, bf16", "C_pre", "passes, 1", "passes, 8", "eigenvectors", "adapter and moments", "training, 1",
        "training, 8", "traffic: second moments", "traffic: bases", "traffic: one step", "disk",
    )  # fmt: skip
    caption = (
        f"r {RANK}. One GPU of 80 GB holds the weights; 8 GPUs hold a shard each (`--shard`). C_pre is measured in half of the memory "
        "that is left, in as many passes over the texts as needed. Training: weights, eigenvectors, adapter and moments, without "
        "activations and without unsharded embedding and head. Traffic: sent and received by one process, without gathered weights: sums of C_pre and C_task by "
        "ring all-reduce, the bases once, the adapter's gradients every step. Disk: C_pre, C_task, eigenvectors, two checkpoints."
    )
    return Table(header, tuple(rows), caption)


def _bytes(size: Size) -> Iterator[str]:
    moments = 4 * size.squares
    columns = 4.0 * RANK * sum(n * d for d, n in size.inputs)
    trainable = 4.0 * RANK * size.layers
    state = 4 * trainable  # factors, gradients, two moments
    yield from map(_size, (2 * size.parameters, moments))
    yield from (str(size.passes(gpus) or "–") for gpus in (1, 8))
    yield from map(_size, (columns, state))
    for gpus in (1, 8):
        needed = size.held(gpus) + columns + state
        yield _size(needed) if needed < BYTES else "–"
    yield from map(_size, (2 * 2 * moments, columns, 2 * trainable))
    yield _size(2 * moments + columns + 2 * 3 * trainable)


def _time(value: float) -> str:
    if math.isnan(value):
        return "–"
    if value < 100:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
