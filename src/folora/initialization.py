"""How LoRA's A and B start: pure functions of the statistics.

Each gives A0 of shape (r, d_in). `null_space` also needs B0 = W0 A0' / kappa, which `adapter.attach`
computes by running the base layer on A0's rows, so that quantized layers need no special case.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from folora.errors import NumericsError


def null_space(null_basis: Float[Tensor, "d r"]) -> Float[Tensor, "r d"]:
    """A0 = U_perp': the directions that the model's own text uses least (B.3)."""
    return null_basis.T.contiguous()


def leading_eigenvectors(basis: Float[Tensor, "d d"], r: int) -> Float[Tensor, "r d"]:
    """A0 with orthonormal rows that span the first r columns of T: most utility per forgetting.

    Raises:
        NumericsError: r is outside of [1, d].
    """
    if not 1 <= r <= basis.shape[1]:
        raise NumericsError(f"r is {r}, but must lie in [1, {basis.shape[1]}]")
    # Columns of T differ in length by orders of magnitude; QR needs only their directions.
    columns = torch.nn.functional.normalize(basis[:, :r].double(), dim=0)
    return torch.linalg.qr(columns).Q.T.contiguous()


def kaiming(r: int, d_in: int, generator: torch.Generator) -> Float[Tensor, "r d"]:
    """LoRA's usual start of A: uniform in +-1/sqrt(d_in), float32 on the CPU."""
    bound = 1 / math.sqrt(d_in)
    return torch.empty(r, d_in).uniform_(-bound, bound, generator=generator)
