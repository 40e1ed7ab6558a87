"""OPLoRA's constraint (arXiv:2510.13003): the update is orthogonal to each weight's leading singular spaces.

The update is P_L B A P_R with P_L = I - U U' and P_R = I - V V'. A and B are stored projected, so that B A is
the update wherever they are read: gradients are projected in the backward pass
(`ProtectedSpaces.projecting`), and A and B after each step, since Adam's update leaves the subspace
(`project_after_step`). This is equivalent to projecting in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from folora.runtime.shapes import Float
from folora.runtime.tensors import full_fp32_matmul, full_tensor

# Name of the layers' ModuleDict; PEFT moves and deletes it with the adapter.
SPACES = "lora_protected"
TOLERANCE = 1e-3  # relative norm inside a protected space; float32 rounding is about 1e-6


class ProtectedSpaces(nn.Module):
    """U and V of one layer, with orthonormal columns, as non-persistent buffers."""

    left: Tensor
    right: Tensor

    def __init__(self, left: Float[Tensor, "d_out k"], right: Float[Tensor, "d_in k"]) -> None:
        super().__init__()
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def projected(
        self, a: Float[Tensor, "r d_in"], b: Float[Tensor, "d_out r"]
    ) -> tuple[Tensor, Tensor]:
        """A P_R and P_L B."""
        return _orthogonal(a, self.right), _orthogonal(b.T, self.left).T

    def projecting(
        self, a: Float[Tensor, "r d_in"], b: Float[Tensor, "d_out r"]
    ) -> tuple[Tensor, Tensor]:
        """A and B unchanged; their gradients are projected in the backward pass."""
        a, b = _ProjectedGradient.apply(a, self.right), _ProjectedGradient.apply(b.T, self.left).T
        return a, b

    def exclude(self, b: Float[Tensor, "d_out r"]) -> bool:
        """Whether B, or its gradient, is orthogonal to the protected output directions."""
        with full_fp32_matmul():
            return not bool((self.left.T @ b).norm() > TOLERANCE * b.norm())


class _ProjectedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, space: Tensor) -> Tensor:
        ctx.save_for_backward(space)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (space,) = ctx.saved_tensors
        return _orthogonal(grad, space), None


def _orthogonal(rows: Tensor, space: Tensor) -> Tensor:
    """The component of rows orthogonal to a space, (n, d) and (d, k) -> (n, d)."""
    with full_fp32_matmul():
        return rows - (rows @ space) @ space.T


def protected_spaces(layer: Any, adapter: str) -> ProtectedSpaces | None:
    """The protected spaces of a layer's adapter; None if it has no constraint."""
    found: dict[str, Any] = dict(getattr(layer, SPACES, {}))
    return found.get(adapter)


def protect_layer(layer: Any, adapter: str, spaces: ProtectedSpaces) -> None:
    """Store protected spaces with a layer's adapter."""
    if not hasattr(layer, SPACES):
        setattr(layer, SPACES, nn.ModuleDict())
        layer.adapter_layer_names = (*layer.adapter_layer_names, SPACES)
    getattr(layer, SPACES)[adapter] = spaces


def project_after_step(optimizer: Optimizer, model: PeftModel, adapter: str = "default") -> None:
    """Project A and B of constrained layers after every optimizer step.

    `prepare` and `optimizer` do this already. With A and B sharded by FSDP2, all processes must step together.

    Args:
        optimizer: Any torch optimizer; a step hook is registered if some layer is constrained.
        model: From `attach`.
        adapter: Name of the adapter.
    """
    layers = [
        m for m in model.modules() if isinstance(m, LoraLayer) and protected_spaces(m, adapter)
    ]

    def project(*_: Any) -> None:
        for layer in layers:
            if spaces := protected_spaces(layer, adapter):
                _project(layer, adapter, spaces)

    if layers:
        optimizer.register_step_post_hook(project)


@torch.no_grad()
def _project(layer: Any, adapter: str, spaces: ProtectedSpaces) -> None:
    """Project the trained part of A and B in place."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    whole_a, whole_b = full_tensor(a), full_tensor(b)
    trained = layer.lora_variant[adapter].trained or len(whole_a)
    new_a, new_b = spaces.projected(whole_a[:trained], whole_b[:, :trained])
    _write(a, torch.cat([new_a, whole_a[trained:]]))
    _write(b, torch.cat([new_b, whole_b[:, trained:]], dim=1))


def _write(p: Tensor, values: Tensor) -> None:
    """Set a parameter, sharded or not, unless it is frozen."""
    if isinstance(p, DTensor):
        values = distribute_tensor(values, p.device_mesh, p.placements, src_data_rank=None)
    if p.requires_grad:
        p.copy_(values)
