"""SAdam: Adam whose steps are taken, and gated, in a fixed basis of the input space.

A matrix parameter P of shape (rows, d) that multiplies inputs x as P x is stepped along the columns
of a basis T (d, d) instead of along the coordinate axes (arXiv:2606.00132, Eq. 18-24)::

    Gbar = G T                            gradient in the basis
    m, v = Adam's moments of Gbar         they live in the basis, and only mean something there
    step = m_hat / (sqrt(v_hat) + eps)    Adam's preconditioned step
    P   <- (1 - lr * weight_decay) P - lr * step diag(s) T'

The gate s (d,) says how much of the step each direction keeps. Projecting a gradient before Adam
would not do: Adam rescales each coordinate and so leaves the subspace; here the moments themselves
are kept in the basis. Parameter groups without a basis are stepped by torch's own AdamW.

This file needs nothing but torch, so that it can be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

BASIS_KEYS = ("basis", "gate")


@contextmanager
def full_fp32_matmul() -> Iterator[None]:
    """Run fp32 matrix products in full fp32, whatever TF32 or bf16 switch the user has set."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class SAdam(Optimizer):
    """Adam in a spectral basis with a gate on every direction; AdamW where there is no basis.

    Args:
        params: Parameters or groups. A group may hold ``"basis"`` T, shape (d, d), and ``"gate"`` s,
            shape (d,) (all ones if absent); all its parameters then have shape (rows, d) and
            share T, and their products with T are done in one. Arithmetic and moments of such a
            group are float32 (float64 for float64 parameters) whatever the parameters' dtype. A
            group without a basis is stepped exactly as by ``torch.optim.AdamW``.
        lr: Learning rate, finite and >= 0.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the root of the second moment, >= 0.
        weight_decay: Decoupled decay in the original coordinates, >= 0.

    Raises:
        ValueError: A value is outside of its interval, a shape does not fit, a basis is not finite,
            or `load_state_dict` is given moments that belong to another basis.

    The basis is not part of ``state_dict()``; a random projection of it (a (d,) vector that changes
    with any sign, order or rotation of the columns) is, and loading compares it.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its numbers and, if it has one, its basis."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_hyperparameters(group)
            if "gate" in group and group.get("basis") is None:
                raise ValueError("a group has a gate but no basis; give both, or neither")
            if group.get("basis") is None:
                group.pop("basis", None)
            else:
                _prepare_basis(group)
        except ValueError as error:
            self.param_groups.pop()
            raise ValueError(f"SAdam, parameter group {len(self.param_groups)}: {error}") from error

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; `closure` may re-evaluate the model and return the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError("SAdam does not support sparse gradients")
            if "basis" in group:
                self._step_in_basis(group, params)
            else:
                grads = [p.grad for p in params]
                _adamw(group, params, grads, [self._moments(p, p.dtype) for p in params])
        return loss

    def _step_in_basis(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """One gated step in the basis for all parameters of a group (Eq. 18-24)."""
        basis, gate = _on_device(group, params[0].device)
        rows = [len(p) for p in params]
        with full_fp32_matmul():
            stacked = torch.cat([p.grad.to(basis.dtype) for p in params])  # type: ignore[union-attr]
            gbar = stacked @ basis
            # AdamW on a zero parameter leaves -lr * m_hat / (sqrt(v_hat) + eps) in it.
            step = torch.zeros_like(gbar)
            moments = [self._moments(p, basis.dtype) for p in params]
            _adamw(group, list(step.split(rows)), list(gbar.split(rows)), moments, decay=False)
            update = (step * gate) @ basis.T
        shrink = 1.0 - group["lr"] * group["weight_decay"]
        for p, delta in zip(params, update.split(rows), strict=True):
            if p.dtype == basis.dtype:
                p.mul_(shrink).add_(delta)
            else:  # one rounding, at the end
                p.copy_(p.to(basis.dtype).mul_(shrink).add_(delta))

    def _moments(self, p: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """State of a parameter, made on first use."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros(p.shape, dtype=dtype, device=p.device)
            state["exp_avg_sq"] = torch.zeros(p.shape, dtype=dtype, device=p.device)
        return state

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with each basis and gate replaced by ``basis_fingerprint``, shape (d,)."""
        state: dict[str, Any] = super().state_dict()
        for group in state["param_groups"]:
            if "basis" in group:
                group["basis_fingerprint"] = basis_fingerprint(group["basis"])
                for key in BASIS_KEYS:
                    del group[key]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state after checking that its moments belong to this optimizer's bases."""
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"the saved state has {len(saved_groups)} parameter groups, this optimizer has "
                f"{len(self.param_groups)}"
            )
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            _check_same_basis(index, group, saved.get("basis_fingerprint"))
        bases = [{k: group[k] for k in BASIS_KEYS if k in group} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, basis, saved in zip(self.param_groups, bases, saved_groups, strict=True):
            group.pop("basis_fingerprint", None)
            group.update(basis)
            if basis:
                # torch casts moments to the parameter's dtype; those of a basis are wider.
                for p, key in zip(group["params"], saved["params"], strict=True):
                    for name in ("exp_avg", "exp_avg_sq"):
                        if key in state_dict["state"]:
                            value = state_dict["state"][key][name]
                            self.state[p][name] = value.to(
                                device=p.device, dtype=basis["basis"].dtype, copy=True
                            )


def basis_fingerprint(basis: Tensor) -> Tensor:
    """Project a basis on a fixed random vector: (d, d) -> (d,) float64 on the CPU.

    A linear sketch in place of a hash: equal bases agree to rounding on any device, while another
    sign, order or rotation of the columns moves the sketch by the size of the change.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64)
    return (basis.detach().cpu().double() @ probe).contiguous()


def _adamw(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Any]],
    decay: bool = True,
) -> None:
    """Torch's own AdamW arithmetic on given tensors."""
    beta1, beta2 = group["betas"]
    adamw(
        params,
        grads,
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"] if decay else 0.0,
        eps=group["eps"],
        maximize=False,
    )


def _check_hyperparameters(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= float(group[name]) < float("inf"):
            raise ValueError(f"{name} is {group[name]}, but must be finite and >= 0")
    for index, beta in enumerate(group["betas"]):
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"betas[{index}] is {beta}, but must lie in [0, 1)")


def _prepare_basis(group: dict[str, Any]) -> None:
    """Check shapes and bring basis and gate to the dtype in which the group is stepped."""
    basis: Tensor = group["basis"]
    if basis.ndim != 2 or basis.shape[0] != basis.shape[1]:
        raise ValueError(f"the basis has shape {tuple(basis.shape)}, but must be square")
    d = basis.shape[0]
    gate = group.get("gate")
    gate = basis.new_ones(d) if gate is None else gate
    if gate.shape != (d,):
        raise ValueError(f"the gate has shape {tuple(gate.shape)}, but the basis asks for ({d},)")
    for p in group["params"]:
        if p.ndim != 2 or p.shape[1] != d:
            raise ValueError(
                f"a parameter has shape {tuple(p.shape)}, but the basis asks for (rows, {d})"
            )
    if not (torch.isfinite(basis).all() and torch.isfinite(gate).all()):
        raise ValueError("the basis or the gate has values that are not finite")
    wide = any(p.dtype == torch.float64 for p in group["params"])
    dtype = torch.float64 if wide else torch.float32
    group["basis"] = basis.detach().to(dtype)
    group["gate"] = gate.detach().to(dtype)


def _on_device(group: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Basis and gate on the parameters' device; moved once if the model has moved since."""
    for key in BASIS_KEYS:
        if group[key].device != device:
            group[key] = group[key].to(device)
    return group["basis"], group["gate"]


def _check_same_basis(index: int, group: dict[str, Any], saved: Tensor | None) -> None:
    if ("basis" in group) != (saved is not None):
        have, had = ("a", "no") if "basis" in group else ("no", "a")
        raise ValueError(f"parameter group {index} has {have} basis, its saved state had {had} one")
    if saved is None:
        return
    own = basis_fingerprint(group["basis"])
    same_shape = saved.shape == own.shape
    scale = float(own.abs().max()) or 1.0
    if not same_shape or float((saved.cpu().double() - own).abs().max()) > 1e-5 * scale:
        raise ValueError(
            f"the saved state of parameter group {index} belongs to another basis, and moments "
            "mean nothing outside of theirs (eigenvectors are defined only up to sign and rotation)."
            " Resume with the basis that the run was started with, or start afresh."
        )
