"""NaN and Inf checks that name the layer where the values first appear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
    """Run a forward pass and describe, for a message, the first module that outputs NaN or Inf.

    Args:
        model: Any model; it is not changed.
        inputs: Keyword arguments of its forward pass.
    """
    first: list[str] = []

    def check(name: str, output: Any) -> None:
        tensors = output if isinstance(output, list | tuple) else (output,)
        if not first and not all(bool(torch.isfinite(t).all()) for t in tensors if _is_real(t)):
            first.append(name)

    with _after_each(model, check):
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


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def _after_each(model: nn.Module, callback: Callable[[str, Any], None]) -> Iterator[None]:
    """Call `callback(name, output)` after each module without submodules; hooks are removed at exit."""
    handles = []

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args, output: callback(name, output)

    try:
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                handles.append(module.register_forward_hook(hook_for(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
