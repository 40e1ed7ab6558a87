"""SAdam: Adam whose steps are taken, and gated, in a fixed basis of the input space.

A matrix parameter P of shape (rows, d) that multiplies inputs x as P x is stepped along the columns of
a basis T (d, k) instead of the coordinate axes (arXiv:2606.00132, Eq. 18-24)::

    Gbar = G T                                   gradient in the basis
    m    = beta1 m + (1 - beta1) Gbar            Adam's moments, in the basis
    v    = beta2 v + (1 - beta2) Gbar^2
    step = m_hat / (sqrt(v_hat) + eps)           bias-corrected
    P    = (1 - lr weight_decay) P - lr step diag(s) T'

The gate s (k,) says how much of its step each direction takes; nothing outside the span of T's columns
moves. Projecting the gradient and then using plain Adam would not do: Adam rescales each coordinate.

This is the reference: it needs nothing but torch, so that the file can be copied. `fused.FusedSAdam` takes
the same steps with fewer kernels, and accepts DTensor parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

FINGERPRINT = "basis_fingerprint"


class SAdam(Optimizer):
    """Adam in a spectral basis with a gate on every direction; AdamW where there is no basis.

    Args:
        params: Parameters or groups. A group may hold ``"basis"`` T, shape (d, k) with k <= d; all its
            parameters then have shape (rows, d). With it may come ``"gate"`` s, shape (k,) (default:
            ones), and ``"scale"``, a number that multiplies T (1.0). Arithmetic, T and moments of such a
            group are float32 (float64 if a parameter is). Matrix products follow torch's precision
            switches: leave TF32 off. A group without a basis is stepped as by ``torch.optim.AdamW``.
        lr: Learning rate, finite and >= 0.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the root of the second moment, finite and >= 0.
        weight_decay: Decoupled decay in the original coordinates, finite and >= 0.

    Raises:
        ValueError: A value or shape does not fit, a basis is not finite, or `load_state_dict` is given
            moments that belong to another basis.

    The basis is not part of ``state_dict()``. A random projection of it, shape (d,), is: it changes with
    any sign, order or rotation of the columns, and loading compares it.
    """

    basis_keys: tuple[str, ...] = ("basis", "gate", "scale")  # of a group; not part of a state

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
        """Add a group after checking its numbers and, if it has one, its basis."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_hyperparameters(group)
            if group.get("basis") is not None:
                group |= _checked_basis(group)
            elif given := [k for k in self.basis_keys if group.get(k) is not None]:
                raise ValueError(f"a group has {given[0]} but no basis; give both, or neither")
            else:
                group.pop("basis", None)
        except ValueError as error:
            self.param_groups.pop()
            raise ValueError(f"SAdam, parameter group {len(self.param_groups)}: {error}") from error

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with ``basis_fingerprint``, shape (d,), instead of each basis."""
        state = super().state_dict()
        for group in state["param_groups"]:
            for key in self.basis_keys:
                group.pop(key, None)
            if FINGERPRINT in group:  # torch.distributed.checkpoint loads into what it is given
                group[FINGERPRINT] = group[FINGERPRINT].clone()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state after checking that its moments belong to this optimizer's bases."""
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
            # torch casts moments to the parameter's dtype; those of a basis are wider.
            for p, number in zip(group["params"], source["params"], strict=True):
                for name in ("exp_avg", "exp_avg_sq"):
                    if basis and number in state_dict["state"]:
                        value = state_dict["state"][number][name]
                        self.state[p][name] = value.to(p.device, basis["gate"].dtype, copy=True)


def basis_fingerprint(basis: Tensor, scale: float = 1.0) -> Tensor:
    """Project a basis on a fixed random vector: (d, k) -> (d,), float64 on the CPU.

    Not a hash: equal bases agree to rounding on any device; other signs, orders or rotations do not.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64)
    return scale * (basis.detach().double() @ probe.to(basis.device)).cpu()


def move_basis(group: dict[str, Any], device: torch.device) -> None:
    """Move a group's basis and gate, if it has them, to where the model has moved."""
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
        raise ValueError(f"the gate has shape {tuple(gate.shape)}, but the basis asks for ({k},)")
    for p in params:
        if p.ndim != 2 or p.shape[1] != d:
            raise ValueError(f"a parameter has shape {tuple(p.shape)}, but must be (rows, {d})")
    if not (torch.isfinite(basis).all() and torch.isfinite(gate).all()):
        raise ValueError("the basis or the gate has values that are not finite")
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    scale = float(group.get("scale", 1.0))
    fingerprint = basis_fingerprint(basis, scale)
    basis, gate = (part.to(params[0].device, dtype) for part in (basis, gate))
    return {"basis": basis, "gate": gate, "scale": scale, FINGERPRINT: fingerprint}


def _check_same_basis(index: int, own: Tensor | None, saved: Tensor | None) -> None:
    if (own is None) != (saved is None):
        have, had = ("no", "a") if own is None else ("a", "no")
        raise ValueError(f"parameter group {index} has {have} basis, its saved state had {had} one")
    if own is None or saved is None:
        return
    largest = float(own.abs().max()) or 1.0
    if saved.shape != own.shape or float((saved.cpu() - own).abs().max()) > 1e-5 * largest:
        raise ValueError(
            f"the saved state of parameter group {index} belongs to another basis, and moments mean "
            "nothing outside theirs (eigenvectors are defined only up to sign and rotation). Resume with "
            "the basis that the run was started with, or start afresh."
        )
