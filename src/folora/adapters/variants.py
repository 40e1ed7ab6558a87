"""The forward pass of folora's adapters, as a variant of PEFT's LoRA layer.

An initialization with B0 A0 /= 0 must not change the model before the first step. Its adapter is an ordinary LoRA
adapter of rank 2r, A = [A1; A0] and B = [B1, -B0], of which only the first halves are trained (A1 = A0 and B1 = B0 at
first). So PEFT saves, loads, copies, combines and merges it without knowing of folora. The variant adds what
training needs: the two halves cancel to the last bit at the start, the second gets no gradient, and inputs are kept as
they are for the backward pass (`lowrank`). OPLoRA's projections are in `constraint`.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

from folora.adapters.constraint import ProtectedSpaces, spaces_of
from folora.adapters.low_rank import update
from folora.errors import ConfigError
from folora.runtime.tensors import full_fp32_matmul, full_tensor


class FoLoraVariant(LoraVariant):
    """LoRA of which a part may be frozen, and whose inputs are kept as they are for the backward pass.

    Args:
        trained: Number of A's rows and B's columns that are trained, the first; None for all.
    """

    def __init__(self, trained: int | None = None) -> None:
        self.trained = trained

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Result of the base layer plus the update."""
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        if spaces := spaces_of(module, active_adapter):
            a, b = spaces.projecting(a, b)
        x, trained = (
            module.lora_dropout[active_adapter](x),
            module.lora_variant[active_adapter].trained,
        )
        return result + update(x, a, b, module.scaling[active_adapter], trained)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The merged weight, as a new tensor."""
        return orig_weight + _delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge in place."""
        orig_weight.data += _delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the adapter, as a new tensor."""
        return orig_weight - _delta(module, active_adapter).to(orig_weight.dtype)

    def takes(self, grad: Tensor, spaces: ProtectedSpaces | None) -> bool:
        """Whether a gradient of B, (d_out, r), is one that this variant gives."""
        frozen = self.trained is not None and bool(grad[:, self.trained :].any())
        return not frozen and (spaces is None or spaces.hold(grad))


def check_first_steps(layer: Any, adapter: str, name: str) -> None:
    """Refuse a kernel that bypasses the variant, or an optimizer that ignores the constraint.

    Looks at the first gradient of B, and under a constraint at B after the first step; then its hook is gone.
    A kernel that computes B A x by itself would train the frozen half too, as another method does.

    Args:
        layer: With a `FoLoraVariant` that freezes a part, or with protected spaces.
        adapter: Which adapter.
        name: Of the layer, for messages.

    Raises:
        ConfigError: In the backward pass.
    """
    variant, spaces = layer.lora_variant[adapter], spaces_of(layer, adapter)
    weight = layer.lora_B[adapter].weight
    start = float(weight.detach().norm())

    def check(b: Tensor) -> None:
        if b.grad is not None and not variant.takes(b.grad, spaces):
            raise ConfigError(
                f"{name}: the frozen half of the adapter gets a gradient, or the gradient is not projected. A fused "
                "kernel computes this layer and bypasses PEFT's LoRA variants. Switch fused LoRA kernels off, or "
                "use a method with init 'eigen' and no constraint, such as folora."
            )
        if spaces is not None and float(b.detach().norm()) == start:
            return  # no step yet
        handle.remove()
        if spaces is not None and not spaces.hold(b.detach()):
            raise ConfigError(
                f"{name}: the optimizer leaves OPLoRA's subspace. Train with the optimizer that `prepare` gives, or "
                "call folora.adapters.constraint.keep_off(optimizer, model) first."
            )

    active = weight.requires_grad  # False while another adapter is active, and torch wants it True
    handle = weight.requires_grad_().register_post_accumulate_grad_hook(check)
    weight.requires_grad_(active)


def layer_factors(module: Any, adapter: str) -> tuple[Tensor, Tensor, float]:
    """A (k, d_in), B (d_out, k) and kappa of a LoRA layer, whose update is kappa B A.

    Factors that FSDP2 has sharded are gathered: then all processes have to call it.
    """
    a, b = (full_tensor(part[adapter].weight.detach()) for part in (module.lora_A, module.lora_B))
    return a, b, float(module.scaling[adapter])


def product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """kappa B A in full float32, shape (d_out, d_in)."""
    with full_fp32_matmul():
        return (b.float() @ a.float()) * scaling


def _delta(module: Any, adapter: str) -> Tensor:
    """The update in the layout of the base weight."""
    dense = product(*layer_factors(module, adapter))
    return dense.T if getattr(module, "fan_in_fan_out", False) else dense
