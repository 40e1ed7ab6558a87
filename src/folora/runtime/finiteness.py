"""NaN and Inf checks that name the layer where the values first appear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from folora.errors import NumericsError
from folora.runtime.tensors import to_local

LARGEST_GRADIENT = 1e15  # the square of a larger one overflows float32


def check_finite_weights(model: nn.Module) -> None:
    """Raise NumericsError naming the first parameter that holds NaN or Inf."""
    for name, p in model.named_parameters():
        if not p.is_meta and not all(map(_is_finite, _stored(p))):
            raise NumericsError(
                f"parameter {name} of the model holds NaN or Inf. The checkpoint is damaged, or "
                "its values overflow in this dtype; try --dtype float32."
            )


@torch.no_grad()
def non_finite_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient holds NaN, Inf, or values above `LARGEST_GRADIENT`.

    One pass over the gradients and one synchronization if all are finite. Of gradients that FSDP2
    shards, only the local part is checked.
    """
    gradients = {n: to_local(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    found = {n: g for n, g in gradients.items() if g.numel()}
    if _is_in_range(torch.nn.utils.get_total_norm(found.values(), norm_type=float("inf"))):
        return []
    return [n for n, g in found.items() if not _is_in_range(g.abs().max())]


@torch.no_grad()
def first_non_finite_module(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Run a forward pass and describe, for a message, the first module that outputs NaN or Inf."""
    names = {module: name for name, module in model.named_modules() if not [*module.children()]}
    first: list[str] = []

    def check(module: nn.Module, args: Any, output: Any) -> None:
        outputs = output if isinstance(output, list | tuple) else (output,)
        tensors = [t for t in outputs if isinstance(t, Tensor)]
        if not first and module in names and not all(map(_is_finite, tensors)):
            first.append(names[module])

    with register_module_forward_hook(check):
        model(**inputs)
    if first:
        return f"in the forward pass {first[0]} is the first module with a non-finite output"
    return "the forward pass is finite, so the loss or the backward pass is not"


def _stored(weight: Tensor) -> Iterator[Tensor]:
    """The plain tensors of a weight on this process; several if torchao quantized it."""
    own: Any = to_local(weight)
    if not hasattr(own, "__tensor_flatten__"):
        yield own
        return
    for name in own.__tensor_flatten__()[0]:
        yield from _stored(getattr(own, name))


def _is_finite(plain: Tensor) -> bool:
    if not plain.is_floating_point():
        return True
    if plain.itemsize == 1:  # isfinite does not support float8
        plain = plain.float()
    return bool(torch.isfinite(plain).all())


def _is_in_range(largest: Tensor) -> bool:
    return bool(largest < LARGEST_GRADIENT)  # False for NaN
