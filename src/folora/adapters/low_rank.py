"""A LoRA update that saves the layer's input for the backward pass without casting it.

PEFT casts the input of every adapted layer to the adapter's float32, and autograd saves the float32
copies: seven copies of four tensors in a Llama block. Here the original (for example bf16) tensor is
saved, once for all layers that share it, and cast again in the backward pass. Values and gradients are
the same, except for rounding where kappa is not 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad

from folora.runtime.shapes import Float


def update(
    x: Float[Tensor, "*rows d_in"],
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    scaling: float = 1.0,
    trained: int | None = None,
) -> Float[Tensor, "*rows d_out"]:
    """kappa B A x in the dtype of A and B, or in the autocast dtype under autocast.

    Args:
        x: Input of any floating dtype; saved for the backward pass without a copy.
        a: Factor A.
        b: Factor B.
        scaling: kappa, applied to A x, which has r features, not to the output.
        trained: The first `trained` rows of A and columns of B are trained. The others get a zero
            gradient, and their product is computed separately, so that the update is exactly zero where
            they are A and -B of the first. None: all are trained.
    """
    kind = x.device.type  # autocast is not available on the meta device
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return _product(x, _parts(a, b, trained), scaling)
    return _Update.apply(x, a, b, scaling, trained)  # type: ignore[no-any-return, no-untyped-call]


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, trained: int | None
    ) -> Tensor:
        (first_a, first_b), *frozen = _parts(a, b, trained)
        wide = x.to(a.dtype)
        inner = _scaled(linear(wide, first_a), scaling)
        ctx.scaling, ctx.trained = scaling, trained
        ctx.save_for_backward(x, a, b, inner)
        out = linear(inner, first_b)
        return out + _product(wide, frozen, scaling) if frozen else out

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, inner = ctx.saved_tensors
        needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        of_inner = _scaled(grad @ b, ctx.scaling)
        of_x = of_a = of_b = None
        if needs_x:
            of_x = (of_inner @ a).to(x.dtype)
        if needs_a:
            of_a = _rows(of_inner[..., : ctx.trained]).T @ _rows(x).to(a.dtype)
            of_a = pad(of_a, (0, 0, 0, len(a) - len(of_a)))
        if needs_b:
            of_b = _rows(grad).T @ _rows(inner)
            of_b = pad(of_b, (0, b.shape[1] - of_b.shape[1]))
        return of_x, of_a, of_b, None, None


Factors = tuple[Tensor, Tensor]


def _parts(a: Tensor, b: Tensor, trained: int | None) -> list[Factors]:
    """The trained part of A and B, and the frozen rest, detached.

    Both are contiguous copies: with views of different strides, kernels would round differently.
    """
    if trained is None:
        return [(a, b)]
    first, rest = (a[:trained], b[:, :trained]), (a[trained:].detach(), b[:, trained:].detach())
    return [(_copy(part_a), _copy(part_b)) for part_a, part_b in (first, rest)]


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _product(x: Tensor, parts: Sequence[Factors], scaling: float) -> Tensor:
    return reduce(add, (linear(_scaled(linear(x, a), scaling), b) for a, b in parts))


def _scaled(x: Tensor, scaling: float) -> Tensor:
    return x if scaling == 1.0 else x * scaling


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@contextmanager
def narrow_inputs(model: PeftModel) -> Iterator[None]:
    """Disable PEFT's cast of adapter inputs, if every active adapter has a variant that does its own.

    For custom training loops; `FoLoraTrainer` does this already.
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
