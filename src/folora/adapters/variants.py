"""The forward pass of folora's adapters, as a PEFT `LoraVariant`.

An initialization with B0 A0 /= 0 must not change the model before the first step. Its adapter is an ordinary LoRA
adapter of rank 2r, A = [A1; A0] and B = [B1, -B0], whose first halves are trained, from A1 = A0 and B1 = B0. PEFT
therefore saves, loads, copies, combines and merges it as any other. The variant adds what training needs: the two
halves cancel exactly at step 0, the second half gets no gradient, and inputs are saved for the backward pass in
their own dtype (`low_rank`). OPLoRA's projections are in `constraint`.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import LoraVariant
from torch import Tensor

from folora.adapters.constraint import ProtectedSpaces, protected_spaces
from folora.adapters.low_rank import update
from folora.errors import ConfigError
from folora.runtime.tensors import full_fp32_matmul, full_tensor


class FoLoraVariant(LoraVariant):
    """LoRA with an optional frozen part, which saves its input in the input's dtype for the backward pass.

    Args:
        trained: The first `trained` rows of A and columns of B are trained; None for all.
    """

    def __init__(self, trained: int | None = None) -> None:
        self.trained = trained

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Output of the base layer plus the update."""
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        if spaces := protected_spaces(module, active_adapter):
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

    def allows(self, grad: Tensor, spaces: ProtectedSpaces | None) -> bool:
        """Whether a gradient of B, (d_out, r), is zero where frozen and outside protected spaces."""
        frozen = self.trained is not None and bool(grad[:, self.trained :].any())
        return not frozen and (spaces is None or spaces.exclude(grad))


def check_first_steps(layer: Any, adapter: str, name: str) -> None:
    """Register a hook that raises if a kernel bypasses the variant or the optimizer ignores the constraint.

    The hook checks the first gradient of B and, with a constraint, B after the first step; then it is removed.
    A fused kernel that computes B A x itself would also train the frozen half.

    Args:
        layer: Has a `FoLoraVariant` with a frozen part, or protected spaces.
        adapter: Name of the adapter.
        name: Name of the layer, for messages.

    Raises:
        ConfigError: In the backward pass.
    """
    variant, spaces = layer.lora_variant[adapter], protected_spaces(layer, adapter)
    weight = layer.lora_B[adapter].weight
    start = float(weight.detach().norm())

    def check(b: Tensor) -> None:
        if b.grad is not None and not variant.allows(b.grad, spaces):
            raise ConfigError(
                f"{name}: the frozen half of the adapter gets a gradient, or the gradient is not projected, because a "
                "fused kernel bypasses PEFT's LoRA variants. Disable fused LoRA kernels, or use a method with "
                "init 'eigen' without a constraint, such as folora."
            )
        if spaces is not None and float(b.detach().norm()) == start:
            return  # no step yet
        handle.remove()
        if spaces is not None and not spaces.exclude(b.detach()):
            raise ConfigError(
                f"{name}: the optimizer leaves OPLoRA's subspace. Use the optimizer that `prepare` returns, or call "
                "folora.adapters.constraint.project_after_step(optimizer, model) before training."
            )

    active = weight.requires_grad  # False while another adapter is active; the hook requires True
    handle = weight.requires_grad_().register_post_accumulate_grad_hook(check)
    weight.requires_grad_(active)


def layer_factors(module: Any, adapter: str) -> tuple[Tensor, Tensor, float]:
    """A (k, d_in), B (d_out, k) and kappa of a LoRA layer, whose update is kappa B A.

    Factors sharded by FSDP2 are gathered, so all processes must call it.
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
