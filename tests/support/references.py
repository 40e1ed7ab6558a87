"""Independent float64 references of the mathematics, and random inputs for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def moment(d: int, rank: int | None = None, seed: int = 0, decay: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rank or 4 * d, d, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -decay, d, dtype=torch.float64)
    return x.T @ x / len(x)


def gradients(shapes: list[tuple[int, int]], steps: int, seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        for _ in range(steps)
    ]


def orthogonal_and_gate(d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A basis that is not orthogonal (as T), and a gate."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return basis, torch.rand(d, generator=generator, dtype=torch.float64)


def params(
    shapes: list[tuple[int, int]], dtype: torch.dtype = torch.float64
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype))
        for s in shapes
    ]


def drive(
    optimizer: torch.optim.Optimizer, ps: list[Any], grads: Sequence[Sequence[torch.Tensor | None]]
) -> None:
    for step in grads:
        for p, g in zip(ps, step, strict=True):
            p.grad = None if g is None else g.to(p.dtype)
        optimizer.step()


def reference(
    a: torch.Tensor,
    grads: list[torch.Tensor],
    basis: torch.Tensor,
    gate: torch.Tensor,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    decay: float = 0.0,
) -> torch.Tensor:
    """Eq. 18-24 as written, in float64, by single rows and columns."""
    a = a.clone()
    m = v = a.new_zeros(len(a), basis.shape[1])
    for t, g in enumerate(grads, start=1):
        gbar = torch.einsum("ri,ij->rj", g, basis)
        m = betas[0] * m + (1 - betas[0]) * gbar
        v = betas[1] * v + (1 - betas[1]) * gbar**2
        step = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        a = a - lr * decay * a - lr * torch.einsum("rj,j,ij->ri", step, gate, basis)
    return a
