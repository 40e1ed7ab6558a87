"""A low-rank update of a layer's output that keeps what it read as it is for the backward pass.

PEFT widens the input of every adapted layer to the adapter's float32, and autograd keeps the wide
copies: seven a block of LLaMA's build, of four tensors. Here the narrow tensor itself is kept, one for
all layers that read it, and widened again when gradients are formed. Values and gradients are the same,
but for kappa's rounding where it is not 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from folora.shapes import Float


def update(
    x: Float[Tensor, "*rows d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    scaling: float = 1.0,
    anchor: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "*rows d_out"]:
    """kappa (B A - B0 A0) x in the dtype of A and B; under autocast in autocast's.

    Args:
        x: Of any floating dtype; it is what is kept for the backward pass, not a copy.
        a: The factor that reads.
        b: The factor that writes.
        scaling: kappa; it meets the r numbers of a row in between, not the d_out.
        anchor: A0 and B0, frozen and shaped as A and B, or None for zero. Where they are equal to A and B
            the update is zero to the last bit.
    """
    kind = x.device.type  # the meta device has no autocast to ask about
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        moved = linear(_scaled(linear(x, a), scaling), b)
        return moved if anchor is None else moved - update(x, *anchor, scaling)
    a0, b0 = anchor or (None, None)
    return _Update.apply(x, a, b, scaling, a0, b0)  # type: ignore[no-any-return, no-untyped-call]


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, a0: Tensor | None, b0: Tensor | None
    ) -> Tensor:  # fmt: skip
        wide = x.to(a.dtype)
        inner = _scaled(linear(wide, a), scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(x, a, b, inner, a0, b0)
        moved = linear(inner, b)
        if a0 is None or b0 is None:
            return moved
        return moved - linear(_scaled(linear(wide, a0), scaling), b0)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, inner, a0, b0 = ctx.saved_tensors
        needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        of_inner = _scaled(grad @ b, ctx.scaling)
        of_x = of_a = of_b = None
        if needs_x:
            of_x = of_inner @ a
            if a0 is not None:
                of_x -= _scaled(grad @ b0, ctx.scaling) @ a0
            of_x = of_x.to(x.dtype)
        if needs_a:
            of_a = _rows(of_inner).T @ _rows(x).to(a.dtype)
        if needs_b:
            of_b = _rows(grad).T @ _rows(inner)
        return of_x, of_a, of_b, None, None, None


def _scaled(x: Tensor, scaling: float) -> Tensor:
    return x if scaling == 1.0 else x * scaling


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@contextmanager
def narrow_inputs(model: PeftModel) -> Iterator[None]:
    """Have PEFT hand the inputs of adapted layers on as they are, if every active adapter takes them so.

    For a training loop of one's own; `FoLoraTrainer` does it by itself.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    taken = all(
        name in layer.lora_variant
        for layer in layers
        for name in layer.active_adapters
        if name in layer.lora_A
    )
    with disable_input_dtype_casting(model, active=taken):
        yield
