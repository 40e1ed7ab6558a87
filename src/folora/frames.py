"""An update that starts from somewhere, or must keep off something: the frozen parts around B A.

`Lean` is LoRA itself, as a variant in PEFT's sense that keeps less for the backward pass (`lowrank`).
A start with B0 A0 /= 0 has to be taken off again for the model to compute W0 x before the first step.
Folding it into W0 would change the base; instead the adapter carries it: `Framed`, another variant,
computes

    W0 x + kappa P_L (B A - B0 A0) P_R x,

which is W0 x to the last bit as long as A = A0 and B = B0. The projections are OPLoRA's, identities
unless asked for: on the update itself, so that no optimizer can leave their subspace.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from folora.lowrank import update
from folora.sadam import full_fp32_matmul, whole

FRAME = "lora_frame"  # PEFT saves what has "lora_" in its name


class Frame(nn.Module):
    """The frozen parts of one layer's update; buffers, so that they travel with the adapter.

    Args:
        anchor: A0 (r, d_in) and B0 (d_out, r), or None for an update that starts at zero.
        protected: U_k (d_out, k) and V_k (d_in, k) with orthonormal columns, or None.
    """

    a0: Tensor | None
    b0: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def __init__(
        self, anchor: tuple[Tensor, Tensor] | None, protected: tuple[Tensor, Tensor] | None
    ) -> None:
        super().__init__()
        for name, tensor in zip(("a0", "b0"), anchor or (None, None), strict=True):
            self.register_buffer(name, tensor)
        for name, tensor in zip(("left", "right"), protected or (None, None), strict=True):
            self.register_buffer(name, tensor)

    @property
    def anchor(self) -> tuple[Tensor, Tensor] | None:
        """A0 and B0."""
        return None if self.a0 is None or self.b0 is None else (self.a0, self.b0)

    def forward(self, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """kappa P_L (B A - B0 A0) P_R x, shape (..., d_out)."""
        if self.right is not None:
            x = x.to(self.right.dtype)
            x = x - (x @ self.right) @ self.right.T
        moved = update(x, a, b, scaling, self.anchor)
        if self.left is not None:
            moved = moved - (moved @ self.left) @ self.left.T
        return moved

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The same update as the product of two factors."""
        if self.anchor is not None:
            a0, b0 = self.anchor
            a, b = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
        with full_fp32_matmul():
            if self.right is not None:
                a = a - (a @ self.right) @ self.right.T
            if self.left is not None:
                b = b - self.left @ (self.left.T @ b)
        return a, b


class Lean(LoraVariant):
    """LoRA whose layers keep their inputs for the backward pass as they are."""

    @staticmethod
    def moved(x: Tensor, module: Any, adapter: str) -> Tensor:
        """kappa B A x."""
        return update(x, *_trained(module, adapter))

    @classmethod
    def forward(
        cls, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Result of the base layer plus the update."""
        return result + cls.moved(module.lora_dropout[active_adapter](x), module, active_adapter)

    @staticmethod
    def delta(module: Any, adapter: str) -> Tensor:
        """The update in the layout of the base weight."""
        dense = product(*layer_factors(module, adapter))
        return dense.T if getattr(module, "fan_in_fan_out", False) else dense

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The merged weight, as a new tensor."""
        return orig_weight + Lean.delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge in place."""
        orig_weight.data += Lean.delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the adapter, as a new tensor."""
        return orig_weight - Lean.delta(module, active_adapter).to(orig_weight.dtype)


class Framed(Lean):
    """LoRA whose update goes through a `Frame`."""

    @staticmethod
    def moved(x: Tensor, module: Any, adapter: str) -> Tensor:
        """The framed update, times kappa."""
        moved: Tensor = getattr(module, FRAME)[adapter](x, *_trained(module, adapter))
        return moved


def _trained(module: Any, adapter: str) -> tuple[Tensor, Tensor, float]:
    """A, B and kappa as they are in a forward pass."""
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return a, b, module.scaling[adapter]


def layer_factors(module: Any, adapter: str) -> tuple[Tensor, Tensor, float]:
    """A (k, d_in), B (d_out, k) and kappa of a LoRA layer, whose update is exactly kappa B A.

    What FSDP2 has shared out is gathered: then all processes have to call it.
    """
    a = whole(module.lora_A[adapter].weight.detach())
    b = whole(module.lora_B[adapter].weight.detach())
    if adapter in getattr(module, FRAME, {}):
        a, b = getattr(module, FRAME)[adapter].factors(a, b)
    return a, b, float(module.scaling[adapter])


def product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """kappa B A in full float32, shape (d_out, d_in)."""
    with full_fp32_matmul():
        return (b.float() @ a.float()) * scaling
