"""Where numbers stop being numbers: NaN and Inf are found where they arise, and named by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from folora.errors import NumericsError
from folora.runtime.tensors import to_local

LARGEST_GRADIENT = 1e15  # beyond it second moments leave float32


def check_finite_weights(model: nn.Module) -> None:
    """Raise NumericsError naming the first parameter that holds NaN or Inf."""
    for name, p in model.named_parameters():
        if not p.is_meta and not all(map(_is_finite, _stored(p))):
            raise NumericsError(
                f"parameter {name} of the model holds NaN or Inf. The checkpoint is damaged, or "
                "its values overflow in this dtype (--dtype float32)."
            )


@torch.no_grad()
def non_finite_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient holds NaN, Inf, or what overflows when squared.

    One pass over the gradients and one synchronization, as long as all of them are sound. Of gradients
    that FSDP2 has shared out, only this process's part is looked at.
    """
    gradients = {n: to_local(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    found = {n: g for n, g in gradients.items() if g.numel()}
    if _sound(torch.nn.utils.get_total_norm(found.values(), norm_type=float("inf"))):
        return []
    return [n for n, g in found.items() if not _sound(g.abs().max())]


@torch.no_grad()
def first_non_finite_module(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Run the model forward and say, for a message, which module is the first to give NaN or Inf.

    Args:
        model: Any model; nothing of it is changed.
        inputs: Its keyword arguments.
    """
    first: list[str] = []

    def look(name: str, output: Any) -> None:
        tensors = output if isinstance(output, list | tuple) else (output,)
        if not first and not all(bool(torch.isfinite(t).all()) for t in tensors if _is_real(t)):
            first.append(name)

    with _after_each(model, look):
        model(**inputs)
    if first:
        return f"in the forward pass {first[0]} is the first to give values that are not finite"
    return "the forward pass is finite, so it is the loss or the backward pass"


def _stored(weight: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold a weight on this process: several if it is quantized by torchao."""
    own: Any = to_local(weight)
    if not hasattr(own, "__tensor_flatten__"):
        yield own
        return
    for name in own.__tensor_flatten__()[0]:
        yield from _stored(getattr(own, name))


def _is_finite(plain: Tensor) -> bool:
    if not plain.is_floating_point():
        return True
    if plain.itemsize == 1:  # torch has no isfinite of float8
        plain = plain.float()
    return bool(torch.isfinite(plain).all())


def _sound(largest: Tensor) -> bool:
    return bool(largest < LARGEST_GRADIENT)  # False for NaN


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def _after_each(model: nn.Module, see: Callable[[str, Any], None]) -> Iterator[None]:
    """Call `see(name, output)` after each module without submodules; no hook outlives the block."""
    handles = []

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args, output: see(name, output)

    try:
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                handles.append(module.register_forward_hook(hook_for(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
