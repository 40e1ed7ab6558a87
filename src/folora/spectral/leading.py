"""Eigenpairs of a symmetric matrix: all of them, or the leading ones by subspace iteration."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from folora.errors import NumericsError

logger = logging.getLogger(__name__)

FEW = 4  # times as many directions as are wanted, from which they are looked for alone
LEADING_RESIDUAL = 1e-6  # |M v - gamma v| / gamma
MAX_ITERATIONS = 40
GROWTH = 1e12


def uses_subspace_iteration(count: int, d: int) -> bool:
    """Whether so many leading directions of d are looked for alone."""
    return FEW * count <= d


def largest_eigenpairs(matrix: Tensor, count: int | None, name: str) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric matrix, descending, and their vectors; None for all."""
    if count is not None and uses_subspace_iteration(count, len(matrix)):
        if found := _leading(matrix, count):
            return found
        logger.info("%s: %d directions are not found alone; all are solved for", name, count)
    values, vectors = eigh(matrix, name)
    return values.flip(0)[:count], vectors.flip(1)[:, :count]


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """A few leading eigenpairs of a positive semidefinite matrix, by products with it; None if they tarry.

    Subspace iteration with Rayleigh-Ritz. Between two looks a Chebyshev polynomial that stays within
    [-1, 1] on what lies below the subspace, and grows beyond, drives the subspace towards what is wanted.
    Vectors are orthonormal however far it has come, and their values are their own Rayleigh quotients.
    """
    d = len(matrix)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(d, min(d, count + max(8, count // 2)), generator=generator).to(matrix)
    subspace = torch.linalg.qr(matrix @ start).Q
    for _ in range(MAX_ITERATIONS):
        image = matrix @ subspace
        values, rotation = eigh(subspace.T @ image, "a subspace")
        values, rotation = values.flip(0), rotation.flip(1)
        subspace, image = subspace @ rotation, image @ rotation
        residuals = (image - subspace * values)[:, :count].norm(dim=0)
        rounding = 10 * d * torch.finfo(values.dtype).eps * values[0].abs()
        if bool((residuals <= LEADING_RESIDUAL * values[:count].abs() + rounding).all()):
            return values[:count], signed(subspace[:, :count])
        # Of degree 4, or less where it would grow so much that rounding hides the trailing vectors.
        half = max(float(values[-1]), 1e-12 * float(values[0])) / 2
        degree = int(math.log(GROWTH) / math.log(4 * float(values[0]) / half))
        before, now = subspace, image / half - subspace
        for _ in range(min(max(degree, 1), 4) - 1):
            before, now = now, 2 * ((matrix @ now) / half - now) - before
        subspace = torch.linalg.qr(now / now.norm(dim=0)).Q
    return None


def eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Symmetric eigenproblem on the matrix's device, else on the CPU."""
    safe = matrix.cpu()  # a failed cuSOLVER call can leave the device's copy unreadable
    try:
        values, vectors = torch.linalg.eigh(matrix)
        if bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all()):
            return values, signed(vectors)
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        logger.warning("%s: eigh failed on %s (%s)", name, matrix.device, error)
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(safe)
        if bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all()):
            return values.to(matrix.device), signed(vectors.to(matrix.device))
    raise NumericsError(f"{name}: the eigenvalue problem did not converge. Raise tau.")


def signed(vectors: Tensor) -> Tensor:
    """Columns with the sign at which their largest entry is positive, whatever found them."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)
