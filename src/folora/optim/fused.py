"""FusedSAdam: the update of `sadam.SAdam` with few kernels, also for parameters sharded by rows.

On a GPU the cost of an optimizer step is kernel launches. Products with the bases are therefore batched
over all groups of one shape, and the moments of all groups with the same hyperparameters are updated by
torch's fused AdamW. No operation mixes rows, so for a DTensor (FSDP2) each process updates its own shard
and stores the moments of that shard only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import tensor as dtensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim.adamw import adamw

from folora.optim.sadam import SAdam, move_basis
from folora.runtime.tensors import full_fp32_matmul, to_local

# Maximum elements of the parameters in one bundle, and of the bases in one stack; sized for the CPU cache.
MAX_ELEMENTS = {"cpu": 2**22, "cuda": 2**24}

Moments = Sequence[list[Tensor]]
"""``exp_avg``, ``exp_avg_sq`` and ``step`` of a list of parameters."""


@dataclass(frozen=True)
class ActiveGroup:
    """The local shards of a group's parameters that have a gradient; whole parameters unless they are DTensors.

    Attributes:
        group: The parameter group.
        params: The parameters.
        grads: Their gradients.
        moments: Their optimizer state.
    """

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    moments: Moments


@dataclass(frozen=True)
class Stack:
    """The bases of groups of one shape, stacked in one tensor; the groups hold views of it.

    Attributes:
        basis: (n, d, k).
        gate: (n, 1, k).
        scale: (n, 1, 1).
        parts: The basis, gate and scale that each group holds.
    """

    basis: Tensor
    gate: Tensor
    scale: Tensor
    parts: list[tuple[Tensor, Tensor, float]]


class FusedSAdam(SAdam):
    """`SAdam` with fused kernels: same arguments, groups and state, and the same update up to rounding.

    Matrix products are full float32, regardless of torch's precision settings. Parameters may be DTensors;
    in a group with a basis they must be sharded by rows, and each process holds the whole basis.
    """

    basis_keys = (*SAdam.basis_keys, "stack")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; `closure` may re-evaluate the model and return the loss."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        active = [found for group in self.param_groups if (found := self._active(group)).params]
        for one in active:
            if "basis" not in one.group:
                _adamw(one.group, one.params, one.grads, one.moments)
        for bundle in _bundles(one for one in active if "basis" in one.group):
            self._step_in_bases(bundle)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `SAdam`; the fused kernel needs the step counts on the parameters' device."""
        super().load_state_dict(state_dict)
        for p in (p for group in self.param_groups for p in group["params"] if p in self.state):
            self.state[p]["step"] = self.state[p]["step"].to(p.device, torch.float32)

    def _active(self, group: dict[str, Any]) -> ActiveGroup:
        """The parameters of a group to update; their state is initialized on first use."""
        found = ActiveGroup(group, [], [], ([], [], []))
        for p in group["params"]:
            if (grad := p.grad) is None:
                continue
            if grad.is_sparse:
                raise RuntimeError("SAdam does not support sparse gradients")
            move_basis(group, p.device)
            if isinstance(p, DTensor) and isinstance(grad, DTensor):
                # Completes a pending reduction over processes.
                grad = grad.redistribute(p.device_mesh, p.placements)
            if not (state := self.state[p]):
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = _zeros(p, group.get("basis"))
            found.params.append(to_local(p))
            found.grads.append(to_local(grad))
            for name, values in zip(("exp_avg", "exp_avg_sq", "step"), found.moments, strict=True):
                values.append(to_local(state[name]))
        return found

    def _step_in_bases(self, bundle: list[list[ActiveGroup]]) -> None:
        """Update groups with the same hyperparameters (Eq. 18-24); groups of one shape are stacked."""
        stacks = [_stack([one.group for one in stacked]) for stacked in bundle]
        params = [[p for one in stacked for p in one.params] for stacked in bundle]
        active = [one for stacked in bundle for one in stacked]
        moments = [[m for one in active for m in one.moments[kind]] for kind in range(3)]
        group = bundle[0][0].group
        with full_fp32_matmul():
            gbars = []
            for stack, stacked in zip(stacks, bundle, strict=True):
                grads = [g for one in stacked for g in one.grads]
                n, d, _ = stack.basis.shape
                g = (grads[0] if len(grads) == 1 else torch.cat(grads)).view(n, -1, d)
                gbars.append((g.to(stack.basis.dtype) @ stack.basis).mul_(stack.scale))
            # AdamW applied to zeros turns them into -lr * m_hat / (sqrt(v_hat) + eps).
            zeros = gbars[0].new_zeros(sum(g.numel() for g in gbars))
            parts = zeros.split([g.numel() for g in gbars])
            steps = [part.view_as(g) for part, g in zip(parts, gbars, strict=True)]
            _adamw(group, _rows(steps, params), _rows(gbars, params), moments, decay=False)
            del gbars, g
            updates = [
                (step.mul_(stack.scale) * stack.gate) @ stack.basis.mT
                for step, stack in zip(steps, stacks, strict=True)
            ]
        shrink = 1.0 - group["lr"] * group["weight_decay"]
        _apply([p for ps in params for p in ps], _rows(updates, params), shrink)


def _zeros(p: Tensor, basis: Tensor | None) -> Tensor:
    """Zeros for a moment of p, sharded as p is: (rows, k) for p (rows, d) with a basis (d, k)."""
    if basis is None:
        return torch.zeros_like(p)
    shape = (len(p), basis.shape[1])
    if not isinstance(p, DTensor):
        return torch.zeros(shape, dtype=basis.dtype, device=p.device)
    if not all(x in (Shard(0), Replicate()) for x in p.placements):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} with a basis is sharded as {p.placements}, but its rows "
            "must stay whole: Shard(0), which is what FSDP2 does by default"
        )
    return dtensor.zeros(
        shape, dtype=basis.dtype, device_mesh=p.device_mesh, placements=p.placements
    )


def _bundles(active: Iterable[ActiveGroup]) -> list[list[list[ActiveGroup]]]:
    """Groups to update together: bundles share hyperparameters, the stacks in a bundle share shapes."""
    stacks: dict[tuple[Any, ...], list[ActiveGroup]] = {}
    for one in active:
        group, basis = one.group, one.group["basis"]
        alike = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        place = (basis.dtype, basis.device)
        lengths = tuple([len(p) for p in one.params])
        stacks.setdefault(((*alike, *place), basis.shape, lengths), []).append(one)
    bundles: list[list[list[ActiveGroup]]] = []
    last, size = None, 0
    for (alike, (d, k), _), found in stacks.items():
        most = MAX_ELEMENTS.get(found[0].params[0].device.type, MAX_ELEMENTS["cpu"])
        rows = sum(len(p) for p in found[0].params)
        count = max(1, most // (d * max(rows, k)))
        for stack in (found[start : start + count] for start in range(0, len(found), count)):
            size += len(stack) * rows * d
            if alike != last or size > most:
                bundles.append([])
                size = len(stack) * rows * d
            bundles[-1].append(stack)
            last = alike
    return bundles


def _stack(groups: list[dict[str, Any]]) -> Stack:
    """The stacked bases of groups; rebuilt if the basis of a group has been replaced."""
    held = [(group["basis"], group["gate"], group["scale"]) for group in groups]
    found: Stack | None = groups[0].get("stack")
    if found is not None and len(found.parts) == len(held):
        pairs = zip(found.parts, held, strict=True)
        if all(a is b for one, other in pairs for a, b in zip(one, other, strict=True)):
            return found
    bases, gates, scales = zip(*held, strict=True)
    alone = len(groups) == 1
    basis, gate = (p[0][None] if alone else torch.stack(p) for p in (bases, gates))
    scale = gate.new_tensor(scales)[:, None, None]
    found = Stack(basis, gate[:, None], scale, [*zip(basis, gate, scales, strict=True)])
    for group, (own_basis, own_gate, _) in zip(groups, found.parts, strict=True):
        group |= {"basis": own_basis, "gate": own_gate, "stack": found}
    return found


def _rows(stacked: list[Tensor], params: list[list[Tensor]]) -> list[Tensor]:
    """Split stacked tensors into one tensor per parameter."""
    pairs = zip(stacked, params, strict=True)
    return [part for x, ps in pairs for part in x.flatten(0, 1).split([len(p) for p in ps])]


def _adamw(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    moments: Moments,
    decay: bool = True,
) -> None:
    """Torch's fused AdamW on the given tensors."""
    first, second, steps = moments
    beta1, beta2 = group["betas"]
    adamw(
        params, grads, first, second, [], steps,
        lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"],
        weight_decay=group["weight_decay"] if decay else 0.0,
        amsgrad=False, maximize=False, fused=True,
    )  # fmt: skip


def _apply(params: list[Tensor], deltas: list[Tensor], shrink: float) -> None:
    """Multiply parameters by `shrink` and add the updates; narrower dtypes are rounded once, at the end."""
    pairs = [*zip(params, deltas, strict=True)]
    if alike := [(p, delta) for p, delta in pairs if p.dtype == delta.dtype]:
        if shrink != 1.0:
            torch._foreach_mul_([p for p, _ in alike], shrink)
        torch._foreach_add_([p for p, _ in alike], [delta for _, delta in alike])
    for p, delta in pairs:
        if p.dtype != delta.dtype:
            p.copy_(p.to(delta.dtype).mul_(shrink).add_(delta))
