"""From two second moments to a gated eigenbasis: pure functions of matrices (Eq. 10-17).

How useful is an update direction v for the task, and how much does it change the model's existing
behaviour? With inputs x, an update along v changes the output by v'x, whose mean square is
v' C_task v on the task and v' C_pre v on the calibration set. The quotient of the two,

    gamma = (v' C_task v) / (v' H v),        H = C_pre + tau * mean(diag C_pre) * I,

is a generalized Rayleigh quotient; its stationary directions are the columns of a basis T with
T' H T = I and T' C_task T = diag(gamma). Directions with a small gamma get a small gate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from folora.config import LAMBDA, S_MIN, TAU
from folora.errors import NumericsError
from folora.runtime.shapes import Float, Float64
from folora.spectral.leading import eigh, largest_eigenpairs

logger = logging.getLogger(__name__)

ASYMMETRY = 1e-4  # relative to the largest entry; fp32 accumulation gives about 1e-6
NEGATIVITY = 1e-5  # relative to the Frobenius norm; likewise
RESIDUAL = 1e-6
RIDGE_RETRIES = 6
SMALLEST_RIDGE = 1e-10
SOLVE_BLOCKS = 4  # row blocks of the triangular solve


@dataclass(frozen=True)
class Eigenpairs:
    """Generalized eigenbasis of one pair (C_task, H), or its first k columns; all tensors float64.

    Attributes:
        basis: T, shape (d, k), columns v_i in the order of `gamma`.
        gamma: Shape (k,), descending, >= 0.
        tau: The relative ridge that was used; larger than requested if Cholesky failed with that one.
        task_trace: trace(C_task), for `step_scale`.
        orthogonality: max |T' H T - I|.
        diagonality: max |T' C_task T - diag(gamma)| over max(gamma[0], tiny).
    """

    basis: Float64[Tensor, "d k"]
    gamma: Float64[Tensor, " k"]
    tau: float
    task_trace: float
    orthogonality: float
    diagonality: float


def checked_moment(matrix: Tensor, what: str) -> Float64[Tensor, "d d"]:
    """Validate a second moment (d, d) and return it as a symmetric float64 matrix.

    Raises:
        NumericsError: Wrong shape or dtype, NaN or Inf, asymmetric, or with an eigenvalue that is
            negative beyond rounding. The message begins with `what`.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise NumericsError(f"{what} has shape {tuple(matrix.shape)}, but must be square")
    if not matrix.is_floating_point():
        raise NumericsError(f"{what} has dtype {matrix.dtype}, but must be floating point")
    largest = _largest_entry(matrix)
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(matrix)).sum())
        raise NumericsError(
            f"{what} has {bad} entries that are not finite; the activations overflowed or the "
            "weights hold NaN. Measure in bf16 or fp32 instead of fp16, and check the weights."
        )
    asymmetry = _largest_entry(matrix - matrix.T)
    if asymmetry > ASYMMETRY * largest:
        raise NumericsError(
            f"{what} is not symmetric: max|C - C'| is {asymmetry:.3g}, allowed is "
            f"{ASYMMETRY * largest:.3g}. A second moment X'X / tokens is symmetric."
        )
    wide = matrix.double()
    if asymmetry > 0:
        wide = (wide + wide.T) / 2
    slack = NEGATIVITY * float(torch.linalg.matrix_norm(wide))
    if largest > 0 and int(torch.linalg.cholesky_ex(_ridged(wide, slack)).info) != 0:
        raise NumericsError(
            f"{what} has an eigenvalue below -{slack:.3g}, which rounding does not explain. "
            "A second moment X'X / tokens has none. Check where the matrix comes from."
        )
    return wide


def generalized_eigenbasis(
    c_pre: Tensor,
    c_task: Tensor,
    *,
    tau: float = TAU,
    name: str = "layer",
    directions: int | None = None,
) -> Eigenpairs:
    """Solve C_task v = gamma H v with H = C_pre + tau mean(diag C_pre) I (Eq. 10-15).

    float64 throughout: Cholesky of H, two triangular solves, one symmetric eigenproblem. If H is
    not positive definite in float64, the ridge is raised tenfold with a warning, at most
    `RIDGE_RETRIES` times; `Eigenpairs.tau` is the final one.

    Args:
        c_pre: Second moment of the inputs on the calibration set, shape (d, d).
        c_task: The same on the task, shape (d, d).
        tau: Ridge relative to the mean of C_pre's diagonal, >= 0.
        name: Name of the layer, for messages.
        directions: Number of leading columns to compute; None for all. Fewer are faster.

    Returns:
        The basis, on the device of `c_pre`. Columns with equal gamma are defined up to rotation. Signs
        are fixed: with H = LL', the largest entry of L'v is positive for every column v.

    Raises:
        NumericsError: See `checked_moment`; also unequal shapes, a zero C_pre, a negative `tau`, or
            a pair for which no ridge within bounds works.
    """
    pre, task, mean_power = checked_pair(c_pre, c_task, tau, name)
    h, lower, used = _factor(pre, tau, name)
    reduced = _congruent(lower, task)
    gamma, rotation = largest_eigenpairs(reduced, directions, name)
    basis = torch.linalg.solve_triangular(lower.T, rotation, upper=True)

    orthogonality = _largest_entry(_ridged(basis.T @ h @ basis, -1.0))
    diagonality = _diagonality(basis.T @ task @ basis, gamma)
    if not (orthogonality < 1e-2 and diagonality < 1e-2):
        raise NumericsError(
            f"{name}: the eigenbasis is inaccurate: max|T'HT - I| is {orthogonality:.3g} and "
            f"max|T'C_task T - diag(gamma)| / gamma_1 is {diagonality:.3g}. Raise tau (now {used:g})."
        )
    if max(orthogonality, diagonality) > RESIDUAL:
        logger.warning(
            "%s: the eigenbasis is inexact: max|T'HT - I| = %.3g, relative max|T'C_task T - "
            "diag(gamma)| = %.3g; a larger tau (now %g) improves it",
            name, orthogonality, diagonality, used,
        )  # fmt: skip
    return Eigenpairs(
        basis=basis / mean_power**0.5,
        gamma=gamma.clamp(min=0.0),
        tau=used,
        task_trace=float(task.diagonal().sum()) * mean_power,
        orthogonality=orthogonality,
        diagonality=diagonality,
    )


def pretraining_eigenbasis(
    c_pre: Tensor,
    c_task: Tensor,
    *,
    tau: float = TAU,
    name: str = "layer",
    directions: int | None = None,
    symmetric: bool = False,
) -> Eigenpairs:
    """Ablation: T = V Lambda^(-1/2) with H = V Lambda V', a basis from C_pre only.

    If `symmetric`, T = V Lambda^(-1/2) V' = H^(-1/2), not rotated towards the task. Columns are scored by
    their Rayleigh quotient, gamma_i = t_i' C_task t_i, so that only the basis differs from
    `generalized_eigenbasis`; `Eigenpairs.diagonality` is its distance from diagonalizing C_task. Other
    arguments and errors as there.
    """
    pre, task, mean_power = checked_pair(c_pre, c_task, tau, name)
    values, vectors = eigh(pre, name)
    values = values + tau
    rounding = len(values) * torch.finfo(values.dtype).eps * float(values[-1])
    if float(values[0]) <= rounding:
        raise NumericsError(
            f"{name}: C_pre + tau mean(diag) I has the eigenvalue {float(values[0]):.3g} at tau = "
            f"{tau:g}, but must be positive definite. Raise tau."
        )
    basis = vectors / values.sqrt()
    if symmetric:
        basis = basis @ vectors.T
    image = basis.T @ task @ basis
    gamma, order = image.diagonal().clamp(min=0.0).sort(descending=True)
    basis, image = basis[:, order], image[order][:, order]
    return Eigenpairs(
        basis=basis[:, :directions] / mean_power**0.5,
        gamma=gamma[:directions],
        tau=tau,
        task_trace=float(task.diagonal().sum()) * mean_power,
        orthogonality=_largest_entry(_ridged(basis.T @ _ridged(pre, tau) @ basis, -1.0)),
        diagonality=_diagonality(image, gamma),
    )


Eigenbasis = Callable[..., Eigenpairs]

BASES: dict[str, Eigenbasis] = {
    "generalized": generalized_eigenbasis,
    "pretraining": pretraining_eigenbasis,
    "whitening": partial(pretraining_eigenbasis, symmetric=True),
}


def spectral_gate(
    gamma: Float[Tensor, " k"], lam: float = LAMBDA, s_min: float = S_MIN
) -> Float[Tensor, " k"]:
    """Factor of Adam's step along each direction: max(gamma / (gamma + lam), s_min) (Eq. 16-17).

    Args:
        gamma: Shape (k,), >= 0, any floating dtype.
        lam: The gamma at which the step is halved, >= 0. At gamma = 1 a direction has equal mean
            squares on the task and on the calibration set.
        s_min: Minimum of the gate, in [0, 1].

    Returns:
        The gate, shape (k,), values in [s_min, 1], same dtype and device.

    Raises:
        NumericsError: An option is outside its interval, or gamma is negative or not finite.
    """
    if not 0.0 <= lam < float("inf"):
        raise NumericsError(f"lambda is {lam}, but must be finite and >= 0")
    if not 0.0 <= s_min <= 1.0:
        raise NumericsError(f"s_min is {s_min}, but must lie in [0, 1]")
    if not torch.isfinite(gamma).all() or bool((gamma < 0).any()):
        raise NumericsError("gamma has negative or non-finite values")
    # gamma / (gamma + lam) is 0 / 0 for lam = 0 and gamma = 0; the gate is 0 there.
    gate = torch.where(gamma > 0, gamma / (gamma + lam), torch.zeros_like(gamma))
    return gate.clamp(min=s_min)


def step_scale(gamma: Float[Tensor, " k"], gate: Float[Tensor, " k"], task_trace: float) -> float:
    """The factor c of T with which Adam's learning rates can be used unchanged.

    A unit step of random signs changes the output on the task by a mean square of trace(C_task) in plain
    Adam and c^2 sum(gamma s^2) here; c makes the two equal.

    Args:
        gamma: Of the directions that are updated, shape (k,).
        gate: Their gate s, shape (k,).
        task_trace: trace(C_task).

    Returns:
        c; 1 if C_task is zero.
    """
    moved = float((gamma.double() * gate.double() ** 2).sum())
    return (task_trace / moved) ** 0.5 if moved > 0 else 1.0


def energy_share(c: Float[Tensor, "d d"], columns: Float[Tensor, "d r"]) -> float:
    """Share of trace(C) that lies in the span of some columns, in [0, 1]; 0 if C is zero."""
    span = torch.linalg.qr(columns.double()).Q
    total = float(c.diagonal().double().sum())
    return float(((c.double() @ span) * span).sum()) / total if total > 0 else 0.0


def smallest_eigenvectors(c_pre: Tensor, r: int, name: str = "layer") -> Float64[Tensor, "d r"]:
    """U_perp: the `r` eigenvectors of C_pre with the smallest eigenvalues, smallest first (B.3).

    Raises:
        NumericsError: See `checked_moment`; also r outside [1, d].
    """
    pre = checked_moment(c_pre, f"C_pre of {name}")
    if not 1 <= r <= len(pre):
        raise NumericsError(f"{name}: r is {r}, but must lie in [1, {len(pre)}] (its d_in)")
    return eigh(pre, name)[1][:, :r].contiguous()


def checked_pair(
    c_pre: Tensor, c_task: Tensor, tau: float, name: str
) -> tuple[Tensor, Tensor, float]:
    """Both moments in float64, divided by the mean of C_pre's diagonal, and that mean."""
    if not 0.0 <= tau < float("inf"):
        raise NumericsError(f"tau is {tau}, but must be finite and >= 0")
    if c_pre.shape != c_task.shape:
        raise NumericsError(
            f"{name}: C_pre has shape {tuple(c_pre.shape)} and C_task {tuple(c_task.shape)}; "
            "they must be measured on the same layer"
        )
    pre = checked_moment(c_pre, f"C_pre of {name}")
    task = checked_moment(c_task.to(pre.device), f"C_task of {name}")
    mean_power = float(pre.diagonal().mean())
    if mean_power <= 0.0:
        raise NumericsError(
            f"C_pre of {name} is zero: all inputs of the layer on the calibration set are zero, so forgetting "
            "cannot be measured. Leave the layer out of target_modules."
        )
    return pre / mean_power, task / mean_power, mean_power


def _factor(pre: Tensor, tau: float, name: str) -> tuple[Tensor, Tensor, float]:
    """H, its lower Cholesky factor and the final ridge, for a C_pre whose diagonal has mean 1."""
    ridge = tau
    for attempt in range(RIDGE_RETRIES + 1):
        h = _ridged(pre, ridge)
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) == 0 and math.isfinite(_largest_entry(lower)):
            return h, lower, ridge
        if attempt < RIDGE_RETRIES:
            raised = max(10 * ridge, SMALLEST_RIDGE)
            logger.warning(
                "%s: C_pre + tau I is not positive definite at tau = %g; trying tau = %g",
                name, ridge, raised,
            )  # fmt: skip
            ridge = raised
    raise NumericsError(
        f"{name}: C_pre + tau mean(diag) I is not positive definite even at tau = {ridge:g} "
        f"(requested: {tau:g}). Raise tau, or measure C_pre on more text."
    )


def _ridged(matrix: Tensor, ridge: float) -> Tensor:
    """matrix + ridge * I."""
    found = matrix.clone()
    found.diagonal().add_(ridge)
    return found


def _largest_entry(matrix: Tensor) -> float:
    """max |entry|; not finite if any entry is not finite."""
    return float(torch.linalg.vector_norm(matrix, math.inf))


def _diagonality(image: Tensor, gamma: Tensor) -> float:
    """max |image - diag(gamma)| over max(gamma)."""
    scale = max(_largest_entry(gamma), torch.finfo(torch.float64).tiny)
    return _largest_entry(image - torch.diag(gamma)) / scale


def _congruent(lower: Tensor, symmetric: Tensor) -> Tensor:
    """L^(-1) S L^(-T) for a symmetric S; the second solve computes only the upper triangle."""
    half = torch.linalg.solve_triangular(lower, symmetric, upper=False).T
    found = torch.zeros_like(half)
    width = -(-len(half) // SOLVE_BLOCKS)
    for start in range(0, len(half), width):
        rows = slice(start, start + width)
        left = half[rows, start:] - lower[rows, :start] @ found[:start, start:]
        found[rows, start:] = torch.linalg.solve_triangular(lower[rows, rows], left, upper=False)
    return found.triu() + found.triu(1).T
