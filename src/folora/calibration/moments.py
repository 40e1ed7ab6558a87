"""Measure second moments of the adapted layers' inputs: C = X'X / tokens (B.2).

Layers with the same input tensor (q, k and v; gate and up) share one matrix; `inputs.find_groups` finds
them in one forward pass. Padding is excluded.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from folora.calibration.inputs import (
    Batch,
    find_groups,
    layer_hooks,
    minimal_forward_options,
    target_layers,
)
from folora.config import StatisticsConfig
from folora.data.contents import Example
from folora.data.rows import batches
from folora.errors import DataError, NumericsError
from folora.runtime import distributed
from folora.runtime.contexts import evaluating, is_sharded
from folora.runtime.memory import free_bytes
from folora.runtime.progress import progress
from folora.runtime.shapes import Float
from folora.runtime.tensors import full_fp32_matmul
from folora.spectral.groups import InputGroup
from folora.spectral.moments import Moments

logger = logging.getLogger(__name__)

GRAM_BLOCKS = 4  # column blocks
GRAM_SHARE = (GRAM_BLOCKS + 1) / (2 * GRAM_BLOCKS)  # fraction of the products that is computed
# bf16 or fp16 rows per product on CUDA tensor cores, which truncate sums: with 4096 rows the largest entries are 1e-5
# too small, with 1024 2e-6; float32 without tensor cores is off by up to 5e-6.
NARROW_ROWS = 1024
CHECK_EVERY = 16  # batches between checks for NaN and Inf
SHARE_OF_FREE = 0.5  # of an accelerator's memory; the rest is for the forward pass


def passes(groups: Sequence[InputGroup], room: float) -> list[list[InputGroup]]:
    """Split groups, in their order, so that the matrices of each part fit into `room` bytes.

    A larger group is a part by itself.
    """
    parts: list[list[InputGroup]] = []
    left = 0.0
    for group in groups:
        size = 4 * group.d_in**2
        if not parts or size > left:
            parts.append([])
            left = room
        parts[-1].append(group)
        left -= size
    return parts


def room_for_moments(
    device: torch.device, memory_gb: float | None = None, taken: float = 0.0
) -> float:
    """Bytes that second moments may take on a device, the same in all processes.

    Without the limit `memory_gb` it is half of the free memory of an accelerator, of which `taken` bytes will
    be used for something else by then; on the CPU, where all matrices end up anyway, there is no limit.
    """
    if memory_gb is not None:
        return memory_gb * 1e9
    if device.type == "cpu":
        return float("inf")
    return min(distributed.all_gather(SHARE_OF_FREE * (free_bytes(device) - taken)))


def calibrate(
    model: nn.Module, batches: Iterable[Batch], layers: str | Sequence[str] = "all-linear"
) -> Moments:
    """Second moments of the inputs of a model's linear layers on any batches (B.2).

    Args:
        model: Any module; it runs in evaluation mode, without gradients.
        batches: Keyword arguments of its forward pass, tensors with the batch first. Tokens whose
            ``attention_mask`` is 0 are excluded; ``labels`` are ignored.
        layers: The layers, as PEFT's ``target_modules``.

    Raises:
        ConfigError: No layer matches, or the forward pass does not call one.
        NumericsError: An input is not finite; the layer is named.
        DataError: There are no batches, or a layer's input does not have the shape of the batch.
    """
    remaining = iter(batches)
    if (first := next(remaining, None)) is None:
        raise DataError("no batches to measure")
    inputs = _inputs(first, next(model.parameters()).device)
    groups = find_groups(model, target_layers(model, layers), inputs)
    return second_moments(model, groups, chain([first], remaining))


def measure(
    model: PreTrainedModel,
    groups: Sequence[InputGroup],
    examples: Sequence[Example],
    config: StatisticsConfig,
    what: str,
    store: bool = True,
) -> Moments:
    """`second_moments` of `what` over examples, with progress, in as many passes as fit the memory.

    If there are several passes, the matrices are on the host; if not `store`, this process keeps none.
    """
    parts = passes(groups, room_for_moments(model.device, config.memory_gb))
    matrices: dict[str, Tensor] = {}
    total = len(parts) * sum(len(e.input_ids) for e in examples)
    with progress(f"measuring {what} (tokens)", total) as tick:
        for part in parts:
            batched = batches(examples, config.batch_size)
            found = second_moments(model, part, batched, lambda n: tick(n, n))
            if store:
                several = len(parts) > 1
                matrices |= {n: m.cpu() if several else m for n, m in found.matrices.items()}
    return Moments(matrices, found.tokens, tuple(groups))


def second_moments(
    model: nn.Module,
    groups: Sequence[InputGroup],
    batches: Iterable[Batch],
    on_batch: Callable[[int], None] = lambda tokens: None,
    apart: Sequence[InputGroup] = (),
) -> Moments:
    """Mean of x x' over the unmasked tokens of all batches, for every group.

    With several processes the batches are sharded over them; all get the same matrices, which are float32 and
    on the device of their layer. Products are full float32, in any dtype or quantization of the model.

    Args:
        model: The base model.
        groups: From `find_groups`.
        batches: As in `calibrate`; without a mask (packed rows, with ``position_ids``) all tokens count.
        on_batch: Called with the number of tokens of each batch, for progress.
        apart: Groups that are also averaged over the even and the odd rows of all batches: `Moments.halves`.

    Raises:
        NumericsError, DataError: As `calibrate`.
    """
    leaders = {group.name: group for group in groups}
    halved = {group.name: group for group in apart}
    whole, halves = _Accumulator(), (_Accumulator(), _Accumulator())
    mask: Tensor | None = None  # (batch, tokens) bool: tokens that count
    even = torch.empty(0)  # bool, of the tokens that count: whether they are in even rows

    def accumulate(name: str, x: Tensor) -> None:
        if not counts:
            return
        rows = x.reshape(-1, x.shape[-1])
        if mask is not None:
            if mask.numel() != len(rows):
                raise DataError(
                    f"the input of {name} has {len(rows)} tokens, but the batch {mask.numel()}, so padding "
                    "cannot be excluded. Leave the layer out of adapter.target_modules."
                )
            rows = rows[mask.reshape(-1).to(rows.device)]
        whole.add(name, rows)
        if name in halved:
            here = even.to(rows.device)
            for half, part in zip(halves, (rows[here], rows[~here]), strict=True):
                half.add(name, part)

    sharded = is_sharded(model)
    counts = True
    options, device = minimal_forward_options(model), next(model.parameters()).device

    def accumulate_shard() -> None:
        nonlocal mask, even, counts
        remaining = iter(batches)
        row = 0  # over all processes
        for number in count(1):
            together = [*islice(remaining, distributed.world_size())]
            if not together:
                break
            counts = distributed.rank() < len(together)
            own = distributed.rank() if counts else 0
            sizes = [len(next(iter(batch.values()))) for batch in together]
            if counts or sharded:  # the others need this process's shard of the weights
                inputs = _inputs(together[own], device)
                # An entry per token; the first tensor in another modality.
                ids = inputs.get("input_ids", next(iter(inputs.values())))
                given = inputs.get("attention_mask")
                mask = None if given is None else given.bool()
                if halved:
                    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
                    numbers = row + sum(sizes[:own]) + torch.arange(len(mask), device=device)
                    even = (numbers % 2 == 0)[:, None].expand_as(mask)[mask]
                model(**inputs, **options)
            if counts:
                on_batch(int(ids.numel() if mask is None else mask.sum()))
            row += sum(sizes)
            if number % CHECK_EVERY == 0:  # fail early: a pass may take hours
                distributed.raise_together(lambda: _check_finite(whole.matrices))
        _check_finite(whole.matrices)

    with (
        evaluating(model),
        layer_hooks(model, leaders, accumulate),
        torch.no_grad(),
        full_fp32_matmul(),
    ):
        distributed.raise_together(accumulate_shard)
    found = whole.averaged(leaders, device)
    if not halved:
        return found
    return replace(found, halves=tuple(half.averaged(halved, device) for half in halves))


@dataclass
class _Accumulator:
    """Running sums of x x', valid in the upper triangle, and their numbers of rows."""

    matrices: dict[str, Tensor] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, rows: Tensor) -> None:
        if name not in self.matrices:
            d = rows.shape[1]
            self.matrices[name] = torch.zeros(d, d, dtype=torch.float32, device=rows.device)
        add_upper_gram(self.matrices[name], rows)
        self.rows[name] += len(rows)

    def averaged(self, groups: Mapping[str, InputGroup], device: torch.device) -> Moments:
        """Means over the rows of all processes. Raises DataError."""
        own = torch.tensor([self.rows[name] for name in groups], device=device)
        rows = dict(zip(groups, distributed.all_reduce_(own).tolist(), strict=True))
        tokens = max(rows.values(), default=0)
        if tokens == 0:
            raise DataError("no tokens to measure: every batch is empty or fully masked")
        for name, group in groups.items():
            if rows[name] == 0:
                raise DataError(
                    f"{name} was called on none of {tokens} tokens; leave it out of adapter.target_modules"
                )
            if name not in self.matrices:  # fewer batches than processes
                self.matrices[name] = torch.zeros(group.d_in, group.d_in, device=device)
            whole = distributed.all_reduce_(self.matrices[name].triu_())
            whole.add_(whole.triu(1).T).div_(rows[name])
        return Moments(self.matrices, tokens, tuple(groups.values()))


def _inputs(batch: Batch, device: torch.device) -> Batch:
    """A batch without its labels, on a device."""
    return {name: value.to(device) for name, value in batch.items() if name != "labels"}


def _check_finite(sums: dict[str, Tensor]) -> None:
    """Raise NumericsError naming the first layer whose input has NaN or Inf, or overflows when squared.

    Every entry is bounded by the diagonal, so only that is checked.
    """
    for name, total in sums.items():
        if not bool(torch.isfinite(total.diagonal()).all()):
            raise NumericsError(
                f"the inputs of {name} are not finite or overflow; the weights hold NaN, or the "
                "model needs bf16 or fp32 instead of fp16 (--dtype bfloat16)"
            )


def add_upper_gram(total: Float[Tensor, "d d"], rows: Float[Tensor, "n d"]) -> None:
    """Add x'x to the upper triangle of a float32 `total`, in place; entries below the diagonal are undefined.

    Blocks below the diagonal are not computed, as the product is symmetric. On CUDA, 16-bit rows are not
    converted: products of two 16-bit numbers are exact in float32. Tensor cores truncate sums, so few rows
    are added at a time.
    """
    if rows.is_cuda and torch.version.cuda is not None and rows.dtype.itemsize == 2:
        for part in rows.split(NARROW_ROWS):
            torch.addmm(total, part.T, part, out_dtype=total.dtype, out=total)  # type: ignore[call-overload]
        return
    rows = rows.to(total.dtype)
    d = rows.shape[1]
    width = -(-d // GRAM_BLOCKS)
    for start in range(0, d, width):
        end = min(start + width, d)
        total[:end, start:end].addmm_(rows[:, :end].T, rows[:, start:end])
