"""Eigenpairs of a symmetric matrix: all by `eigh`, or the leading ones by subspace iteration."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from folora.errors import NumericsError

logger = logging.getLogger(__name__)

SUBSPACE_RATIO = 4  # use subspace iteration from this many dimensions per requested eigenpair
LEADING_RESIDUAL = 1e-6  # |M v - gamma v| / gamma
MAX_ITERATIONS = 40
GROWTH = 1e12  # of the Chebyshev polynomial between orthogonalizations


def uses_subspace_iteration(count: int, d: int) -> bool:
    """Whether the `count` leading eigenpairs of a (d, d) matrix are computed by subspace iteration."""
    return SUBSPACE_RATIO * count <= d


def largest_eigenpairs(matrix: Tensor, count: int | None, name: str) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues of a symmetric matrix, descending, and their vectors; None for all."""
    if count is not None and uses_subspace_iteration(count, len(matrix)):
        if found := _leading(matrix, count):
            return found
        logger.info(
            "%s: subspace iteration for %d eigenpairs did not converge; computing all", name, count
        )
    values, vectors = eigh(matrix, name)
    return values.flip(0)[:count], vectors.flip(1)[:, :count]


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Leading eigenpairs of a positive semidefinite matrix by Chebyshev-filtered subspace iteration.

    Every iteration solves the Rayleigh-Ritz problem, tests convergence, and applies a Chebyshev polynomial
    that is bounded by 1 on the unwanted part of the spectrum and grows above it. Vectors are orthonormal and
    values are their Rayleigh quotients. Returns None if it does not converge.
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
            return values[:count], fix_signs(subspace[:, :count])
        # Degree at most 4; less where rounding would hide the trailing vectors.
        half = max(float(values[-1]), 1e-12 * float(values[0])) / 2
        degree = int(math.log(GROWTH) / math.log(4 * float(values[0]) / half))
        before, now = subspace, image / half - subspace
        for _ in range(min(max(degree, 1), 4) - 1):
            before, now = now, 2 * ((matrix @ now) / half - now) - before
        subspace = torch.linalg.qr(now / now.norm(dim=0)).Q
    return None


def eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Symmetric eigenproblem on the matrix's device, or on the CPU if that fails. Raises NumericsError."""
    on_cpu = matrix.cpu()  # a failed cuSOLVER call can leave the device's copy unreadable
    for where in [matrix] if matrix.device.type == "cpu" else [matrix, on_cpu]:
        try:
            values, vectors = torch.linalg.eigh(where)
        except RuntimeError as error:  # torch.linalg.LinAlgError is one
            logger.warning("%s: eigh failed on %s (%s)", name, where.device, error)
            continue
        if bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all()):
            return values.to(matrix.device), fix_signs(vectors.to(matrix.device))
    raise NumericsError(f"{name}: the eigenvalue problem did not converge. Raise tau.")


def fix_signs(vectors: Tensor) -> Tensor:
    """Flip the sign of columns whose entry of largest magnitude is negative."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -vectors, vectors)
