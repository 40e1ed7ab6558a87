"""Second moments of what the adapted layers read: C = X'X / tokens (B.2).

Layers that read the same tensor (q, k and v; gate and up) share one matrix. Which ones do is found
by watching one forward pass: two layers belong together if they are handed the very same tensor
object, unchanged in between. Padding never counts.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice

import torch
from torch import Tensor, nn

from folora.calibration.inputs import (
    Batch,
    find_groups,
    layer_hooks,
    minimal_forward_options,
    target_layers,
)
from folora.errors import DataError, NumericsError
from folora.runtime import distributed
from folora.runtime.contexts import evaluating, is_sharded
from folora.runtime.memory import free_bytes
from folora.runtime.shapes import Float
from folora.runtime.tensors import full_fp32_matmul
from folora.spectral.groups import InputGroup
from folora.spectral.moments import Moments

logger = logging.getLogger(__name__)

GRAM_BLOCKS = 4  # of columns
GRAM_SHARE = (GRAM_BLOCKS + 1) / (2 * GRAM_BLOCKS)  # of the products that are left then
# Rows of bf16 or fp16 in one sum of CUDA's matrix units: of 4096 the largest sums are 1e-5 too small, of 1024 2e-6,
# and float32's own (no matrix units) are off by up to 5e-6.
NARROW_ROWS = 1024
LOOK_EVERY = 16  # batches
SHARE_OF_FREE = 0.5  # of an accelerator's memory; the rest is for the forward pass


def passes(groups: Sequence[InputGroup], room: float) -> list[list[InputGroup]]:
    """Split groups, in their order, so that the matrices of each part fit.

    Args:
        groups: From `find_groups`.
        room: Bytes for the matrices of a part; a group that needs more has a part of its own.
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

    Args:
        device: Where the model computes.
        memory_gb: As many, if given; otherwise half of what is free on an accelerator, and no limit on
            the CPU, where they stay anyway.
        taken: Bytes that something else will have taken by then.
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
            ``attention_mask`` is 0 do not count; ``labels`` are ignored.
        layers: Which layers, as PEFT's ``target_modules``.

    Raises:
        ConfigError: No layer matches, or one takes no part in the forward pass.
        NumericsError: An input is not finite; the layer is named.
        DataError: There are no batches, or a layer's input does not have the shape of the batch.
    """
    remaining = iter(batches)
    if (first := next(remaining, None)) is None:
        raise DataError("no batches to measure")
    inputs = _inputs(first, _device(model))
    groups = find_groups(model, target_layers(model, layers), inputs)
    return second_moments(model, groups, chain([first], remaining))


def second_moments(
    model: nn.Module,
    groups: Sequence[InputGroup],
    batches: Iterable[Batch],
    on_batch: Callable[[int], None] = lambda tokens: None,
    apart: Sequence[InputGroup] = (),
) -> Moments:
    """Average x x' over the unmasked tokens of all batches, for every group.

    Of several processes each takes its share of the batches; all get the same matrices.

    Args:
        model: The base model, any dtype or quantization; products are full float32.
        groups: From `find_groups`.
        batches: Model inputs, tensors with the batch first. Tokens whose ``attention_mask`` is 0 do not
            count; without a mask (packed rows, with ``position_ids``) all count. ``labels`` are ignored.
        on_batch: Called with the tokens of each batch, for progress.
        apart: Which of the groups are averaged over the even rows of all batches and over the odd ones, too.

    Returns:
        One float32 matrix a group, on the device where its layer lives; two `halves` if any are apart.

    Raises:
        NumericsError: An activation is not finite; the layer is named.
        DataError: No tokens, or a layer's input does not have the shape of the batch.
    """
    leaders = {group.name: group for group in groups}
    halved = {group.name: group for group in apart}
    whole, halves = _Accumulator(), (_Accumulator(), _Accumulator())
    mask: Tensor | None = None  # (batch, tokens) bool: what counts
    even = torch.empty(0)  # of the tokens that count, bool: whether they are of even rows

    def accumulate(name: str, x: Tensor) -> None:
        if not counts:
            return
        rows = x.reshape(-1, x.shape[-1])
        if mask is not None:
            if mask.numel() != len(rows):
                raise DataError(
                    f"{name} reads {len(rows)} tokens of a batch of {mask.numel()}, so padding "
                    "cannot be told from text there. Leave it out of adapter.target_modules."
                )
            rows = rows[mask.reshape(-1).to(rows.device)]
        whole.add(name, rows)
        if name in halved:
            here = even.to(rows.device)
            for half, part in zip(halves, (rows[here], rows[~here]), strict=True):
                half.add(name, part)

    shared_out = is_sharded(model)
    counts = True
    options, device = minimal_forward_options(model), _device(model)

    def own_share() -> None:
        nonlocal mask, even, counts
        remaining = iter(batches)
        row = 0  # of all processes together
        for number in count(1):
            together = [*islice(remaining, distributed.count())]
            if not together:
                break
            counts = distributed.rank() < len(together)
            own = distributed.rank() if counts else 0
            sizes = [len(next(iter(batch.values()))) for batch in together]
            if counts or shared_out:  # the others need this process's part of the weights
                inputs = _inputs(together[own], device)
                given = inputs.get("attention_mask")
                mask = None if given is None else given.bool()
                if halved:
                    if mask is None:
                        mask = torch.ones_like(_ids(inputs), dtype=torch.bool)
                    even = _even_rows(mask, row + sum(sizes[:own]))[mask]
                model(**inputs, **options)
            if counts:
                on_batch(int(_ids(inputs).numel() if mask is None else mask.sum()))
            row += sum(sizes)
            if number % LOOK_EVERY == 0:  # hours may be left
                distributed.raise_together(lambda: _check_finite(whole.matrices))
        _check_finite(whole.matrices)

    with (
        evaluating(model),
        layer_hooks(model, leaders, accumulate),
        torch.no_grad(),
        full_fp32_matmul(),
    ):
        distributed.raise_together(own_share)
    found = whole.averaged(leaders, device)
    if not halved:
        return found
    return replace(found, halves=tuple(half.averaged(halved, device) for half in halves))


@dataclass
class _Accumulator:
    """Sums of x x' so far, of which the upper triangles count, and their numbers of rows."""

    matrices: dict[str, Tensor] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, rows: Tensor) -> None:
        if name not in self.matrices:
            d = rows.shape[1]
            self.matrices[name] = torch.zeros(d, d, dtype=torch.float32, device=rows.device)
        add_upper_gram(self.matrices[name], rows)
        self.rows[name] += len(rows)

    def averaged(self, groups: Mapping[str, InputGroup], device: torch.device) -> Moments:
        """Over the rows of all processes. Raises DataError."""
        own = torch.tensor([self.rows[name] for name in groups], device=device)
        rows = dict(zip(groups, distributed.all_reduce_(own).tolist(), strict=True))
        tokens = max(rows.values(), default=0)
        if tokens == 0:
            raise DataError("no tokens to measure: every batch is empty or fully masked")
        for name, group in groups.items():
            if rows[name] == 0:
                raise DataError(f"{name} saw no input in {tokens} tokens")
            if name not in self.matrices:  # fewer batches than processes
                self.matrices[name] = torch.zeros(group.d_in, group.d_in, device=device)
            whole = distributed.all_reduce_(self.matrices[name].triu_())
            whole.add_(whole.triu(1).T).div_(rows[name])
        return Moments(self.matrices, tokens, tuple(groups.values()))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _inputs(batch: Batch, device: torch.device) -> Batch:
    """A batch without its labels, on a device."""
    return {name: value.to(device) for name, value in batch.items() if name != "labels"}


def _ids(inputs: Batch) -> Tensor:
    """What has an entry for every token: ``input_ids``, or the first tensor of another modality."""
    return inputs.get("input_ids", next(iter(inputs.values())))


def _even_rows(mask: Tensor, first: int) -> Tensor:
    """Of the shape of a mask (rows, tokens), of which the first is row `first`."""
    numbers = first + torch.arange(len(mask), device=mask.device)
    return (numbers % 2 == 0)[:, None].expand_as(mask)


def _check_finite(sums: dict[str, Tensor]) -> None:
    """Raise NumericsError naming the first layer of the forward pass that read NaN, Inf or too much.

    No product is larger than the largest square, so the diagonal tells.
    """
    for name, total in sums.items():
        if not bool(torch.isfinite(total.diagonal()).all()):
            raise NumericsError(
                f"the inputs of {name} are not finite or overflow; the weights hold NaN, or the "
                "model needs bf16 or fp32 instead of fp16 (--dtype bfloat16)"
            )


def add_upper_gram(total: Float[Tensor, "d d"], rows: Float[Tensor, "n d"]) -> None:
    """Add x'x to the upper triangle of `total`, in place; what lies below it is left undefined.

    The product is symmetric, so that blocks below the diagonal need not be computed. Products of two
    16-bit numbers are exact in float32, so CUDA's matrix units form the whole of it from the rows as they
    are; the units cut off what a sum has no digits for, so they add up few rows at a time.

    Args:
        total: Float32.
        rows: Any floating dtype.
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
