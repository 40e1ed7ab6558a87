"""SAdam: Adam in a fixed basis of the input space, with a gate on each direction.

A matrix parameter P of shape (rows, d) that multiplies inputs x as P x is updated along the columns of
a basis T (d, k) instead of the coordinate axes (arXiv:2606.00132, Eq. 18-24)::

    Gbar = G T                                   gradient in the basis
    m    = beta1 m + (1 - beta1) Gbar            Adam's moments, in the basis
    v    = beta2 v + (1 - beta2) Gbar^2
    step = m_hat / (sqrt(v_hat) + eps)           bias-corrected
    P    = (1 - lr weight_decay) P - lr step diag(s) T'

The gate s (k,) scales the step of each direction; the update lies in the span of T's columns. Projecting
the gradient before plain Adam is not equivalent, because Adam rescales each coordinate.

This is the reference implementation. It depends on torch only, so that the file can be copied.
`fused.FusedSAdam` computes the same update with fewer kernels and accepts DTensor parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

FINGERPRINT = "basis_fingerprint"


class SAdam(Optimizer):
    """Adam in a spectral basis with a gate on each direction; AdamW for groups without a basis.

    Args:
        params: Parameters or parameter groups. A group may have ``"basis"`` T, shape (d, k) with k <= d;
            its parameters must then have shape (rows, d). Optional with it: ``"gate"`` s, shape (k,)
            (default: ones), and ``"scale"``, a factor of T (default: 1.0). T, moments and arithmetic are
            then float32, or float64 if a parameter is float64; matrix products follow torch's precision
            settings: leave TF32 off. Groups without a basis are updated as by ``torch.optim.AdamW``.
        lr: Learning rate, finite and >= 0.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the square root of the second moment, finite and >= 0.
        weight_decay: Decoupled weight decay in the original coordinates, finite and >= 0.

    Raises:
        ValueError: A value or shape is invalid, a basis is not finite, or the state given to
            `load_state_dict` belongs to another basis.

    ``state_dict()`` does not contain the basis but a fingerprint, shape (d,): a random projection that
    changes with the sign, order or rotation of the columns. `load_state_dict` compares it.
    """

    basis_keys: tuple[str, ...] = ("basis", "gate", "scale")  # group entries left out of the state

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))  # noqa: C408

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; `closure` may re-evaluate the model and return the loss."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("SAdam does not support sparse gradients")
                move_basis(group, p.device)
                T, s, c = (group.get(key) for key in ("basis", "gate", "scale"))
                g = p.grad if T is None else c * (p.grad.to(T.dtype) @ T)
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
                state["step"] += 1
                t, m, v = float(state["step"]), state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
                step = m_hat / (v_hat.sqrt() + group["eps"])
                if T is not None:
                    step = (c * step * s) @ T.T
                shrink = 1 - group["lr"] * group["weight_decay"]
                p.copy_(shrink * p.to(step.dtype) - group["lr"] * step)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after validating its hyperparameters and its basis, if any."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_hyperparameters(group)
            if group.get("basis") is not None:
                group |= _checked_basis(group)
            elif given := [k for k in self.basis_keys if group.get(k) is not None]:
                raise ValueError(f"{given[0]} is given without a basis; give both or neither")
            else:
                group.pop("basis", None)
        except ValueError as error:
            self.param_groups.pop()
            raise ValueError(f"SAdam, parameter group {len(self.param_groups)}: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with ``basis_fingerprint``, shape (d,), in place of each basis."""
        state = super().state_dict()
        for group in state["param_groups"]:
            for key in self.basis_keys:
                group.pop(key, None)
            if FINGERPRINT in group:  # torch.distributed.checkpoint loads in place
                group[FINGERPRINT] = group[FINGERPRINT].clone()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state after checking that its moments belong to the bases of this optimizer."""
        saved, own = state_dict["param_groups"], self.param_groups
        if len(saved) != len(own):
            raise ValueError(f"the state has {len(saved)} parameter groups, not {len(own)}")
        for index, group in enumerate(own):
            _check_same_basis(index, group.get(FINGERPRINT), saved[index].get(FINGERPRINT))
        keys = (*self.basis_keys, FINGERPRINT)
        bases = [{key: group[key] for key in keys if key in group} for group in own]
        super().load_state_dict(state_dict)
        for group, basis, source in zip(self.param_groups, bases, saved, strict=True):
            group |= basis
            # torch casts moments to the parameter's dtype; in a basis they are float32 or float64.
            for p, number in zip(group["params"], source["params"], strict=True):
                for name in ("exp_avg", "exp_avg_sq"):
                    if basis and number in state_dict["state"]:
                        value = state_dict["state"][number][name]
                        self.state[p][name] = value.to(p.device, basis["gate"].dtype, copy=True)


def basis_fingerprint(basis: Tensor, scale: float = 1.0) -> Tensor:
    """Project a basis onto a fixed random vector: (d, k) -> (d,), float64 on the CPU.

    Equal bases agree up to rounding on any device; bases with other signs, orders or rotations differ.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64)
    return scale * (basis.detach().double() @ probe.to(basis.device)).cpu()


def move_basis(group: dict[str, Any], device: torch.device) -> None:
    """Move a group's basis and gate, if any, to the device of its parameters."""
    if "basis" in group and group["basis"].device != device:
        group |= {key: group[key].to(device) for key in ("basis", "gate")}


def _check_hyperparameters(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= float(group[name]) < float("inf"):
            raise ValueError(f"{name} is {group[name]}, but must be finite and >= 0")
    for index, beta in enumerate(group["betas"]):
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"betas[{index}] is {beta}, but must lie in [0, 1)")


def _checked_basis(group: dict[str, Any]) -> dict[str, Any]:
    """Basis, gate, scale and fingerprint of a group, in the dtype and on the device of its steps."""
    basis, params = group["basis"].detach(), group["params"]
    if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
        raise ValueError(f"the basis has shape {tuple(basis.shape)}, but must be (d, k), k <= d")
    d, k = basis.shape
    gate = torch.ones(k) if group.get("gate") is None else group["gate"].detach()
    if gate.shape != (k,):
        raise ValueError(f"the gate has shape {tuple(gate.shape)}, but the basis needs ({k},)")
    for p in params:
        if p.ndim != 2 or p.shape[1] != d:
            raise ValueError(f"a parameter has shape {tuple(p.shape)}, but must be (rows, {d})")
    if not (torch.isfinite(basis).all() and torch.isfinite(gate).all()):
        raise ValueError("the basis or the gate contains NaN or Inf")
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    scale = float(group.get("scale", 1.0))
    fingerprint = basis_fingerprint(basis, scale)
    basis, gate = (part.to(params[0].device, dtype) for part in (basis, gate))
    return {"basis": basis, "gate": gate, "scale": scale, FINGERPRINT: fingerprint}


def _check_same_basis(index: int, own: Tensor | None, saved: Tensor | None) -> None:
    if (own is None) != (saved is None):
        now, then = ("no", "a") if own is None else ("a", "no")
        raise ValueError(f"parameter group {index} has {now} basis, its saved state {then} basis")
    if own is None or saved is None:
        return
    largest = float(own.abs().max()) or 1.0
    if saved.shape != own.shape or float((saved.cpu() - own).abs().max()) > 1e-5 * largest:
        raise ValueError(
            f"the saved state of parameter group {index} belongs to another basis; its moments are valid in "
            "that basis only (eigenvectors are unique only up to sign and rotation). Resume with the basis "
            "that the run started with, or train from the beginning."
        )
