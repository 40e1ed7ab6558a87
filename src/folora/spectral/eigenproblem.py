"""From two second moments to a gated eigenbasis: pure functions of matrices (Eq. 10-17).

How useful is an update direction v to the task, and how much does it disturb what the model
already does? With inputs x, an update along v moves the response by v'x, so its mean square is
v' C_task v on the task and v' C_pre v on the model's own text. The quotient of the two,

    gamma = (v' C_task v) / (v' H v),        H = C_pre + tau * mean(diag C_pre) * I,

is a generalized Rayleigh quotient; its stationary directions are the columns of a basis T with
T' H T = I and T' C_task T = diag(gamma). Directions with a small gamma get a small gate.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from folora.config import LAMBDA, S_MIN, TAU
from folora.errors import NumericsError
from folora.runtime.shapes import Float, Float64
from folora.spectral.leading import eigh, largest_eigenpairs

logger = logging.getLogger(__name__)

ASYMMETRY = 1e-4  # of the largest entry; fp32 accumulation leaves about 1e-6
NEGATIVITY = 1e-5  # of the Frobenius norm; likewise
RESIDUAL = 1e-6
RIDGE_RETRIES = 6
SMALLEST_RIDGE = 1e-10
SOLVE_BLOCKS = 4  # of rows


@dataclass(frozen=True)
class Eigenpairs:
    """Generalized eigenbasis of one pair (C_task, H), or its first k columns; everything float64.

    Attributes:
        basis: T, shape (d, k), columns v_i in the order of `gamma`.
        gamma: Shape (k,), descending, >= 0.
        tau: The relative ridge that was used; larger than asked for if Cholesky needed it.
        task_trace: trace(C_task), which `step_scale` needs.
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
    """Return a second moment as a symmetric float64 matrix, or say what is wrong with it.

    Args:
        matrix: Shape (d, d), floating point.
        what: Name for messages, for example ``"C_pre of model.layers.0.mlp.up_proj"``.

    Raises:
        NumericsError: Wrong shape or dtype, NaN or Inf, asymmetric, or with an eigenvalue that is
            negative beyond rounding.
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
            "A second moment X'X / tokens has none; was the file made by something else?"
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
    not positive definite in float64 the ridge is raised tenfold, at most `RIDGE_RETRIES` times,
    with a warning; `Eigenpairs.tau` tells what was used.

    Args:
        c_pre: Second moment of the inputs on the model's own text, shape (d, d).
        c_task: The same on the task, shape (d, d).
        tau: Ridge relative to the mean of C_pre's diagonal, >= 0.
        name: Layer to name in messages.
        directions: Only so many leading columns are wanted, which is quicker; None or more than d:
            all.

    Returns:
        The basis, on the device of `c_pre`. Columns are defined up to rotation where gammas coincide;
        L'v of a column v, with H = LL', has its largest entry positive.

    Raises:
        NumericsError: See `checked_moment`; also unequal shapes, a zero C_pre, a negative `tau`, or
            a pair for which no ridge within bounds works.
    """
    pre, task, mean_power = _checked_pair(c_pre, c_task, tau, name)
    h, lower, used = _factor(pre, tau, name)
    reduced = _congruent(lower, task)
    gamma, rotation = largest_eigenpairs(reduced, directions, name)
    basis = torch.linalg.solve_triangular(lower.T, rotation, upper=True)

    identity = torch.eye(len(gamma), dtype=gamma.dtype, device=gamma.device)
    orthogonality = float((basis.T @ h @ basis - identity).abs().max())
    image = basis.T @ task @ basis
    scale = max(float(gamma.abs().max()), torch.finfo(torch.float64).tiny)
    diagonality = float((image - torch.diag(gamma)).abs().max()) / scale
    if not (orthogonality < 1e-2 and diagonality < 1e-2):
        raise NumericsError(
            f"{name}: the eigenbasis is not usable, max|T'HT - I| is {orthogonality:.3g} and "
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
) -> Eigenpairs:
    """Ablation: T = V Lambda^(-1/2) with H = V Lambda V', a basis that knows C_pre alone.

    Every column is scored by its own quotient, gamma_i = t_i' C_task t_i, so that only the basis
    differs from `generalized_eigenbasis`; `Eigenpairs.diagonality` tells how far it is from
    diagonalizing C_task. Arguments and errors as there.
    """
    return _whitened(c_pre, c_task, tau, name, directions, symmetric=False)


def symmetric_whitening(
    c_pre: Tensor,
    c_task: Tensor,
    *,
    tau: float = TAU,
    name: str = "layer",
    directions: int | None = None,
) -> Eigenpairs:
    """Ablation: T = H^(-1/2), the metric of the penalty without a rotation towards the task.

    Columns are scored as in `pretraining_eigenbasis`. Arguments and errors as there.
    """
    return _whitened(c_pre, c_task, tau, name, directions, symmetric=True)


Eigenbasis = Callable[..., Eigenpairs]

BASES: dict[str, Eigenbasis] = {
    "generalized": generalized_eigenbasis,
    "pretraining": pretraining_eigenbasis,
    "whitening": symmetric_whitening,
}


def spectral_gate(
    gamma: Float[Tensor, " k"], lam: float = LAMBDA, s_min: float = S_MIN
) -> Float[Tensor, " k"]:
    """Share of Adam's step that each direction keeps: max(gamma / (gamma + lam), s_min) (Eq. 16-17).

    Args:
        gamma: Shape (k,), >= 0, any floating dtype.
        lam: The gamma at which the step is halved, >= 0. With means over tokens, gamma = 1 reads
            "as useful to the task as it is used by the pretrained model".
        s_min: Floor of the gate, in [0, 1].

    Returns:
        The gate, shape (k,), values in [s_min, 1], same dtype and device.

    Raises:
        NumericsError: A value is outside of its interval, or gamma is negative or not finite.
    """
    if not 0.0 <= lam < float("inf"):
        raise NumericsError(f"lambda is {lam}, but must be finite and >= 0")
    if not 0.0 <= s_min <= 1.0:
        raise NumericsError(f"s_min is {s_min}, but must lie in [0, 1]")
    if not torch.isfinite(gamma).all() or bool((gamma < 0).any()):
        raise NumericsError("gamma has negative values or values that are not finite")
    # With lam = 0 a direction of no use keeps the limit of gamma / (gamma + lam) at gamma = 0.
    gate = torch.where(gamma > 0, gamma / (gamma + lam), torch.zeros_like(gamma))
    return gate.clamp(min=s_min)


def step_scale(gamma: Float[Tensor, " k"], gate: Float[Tensor, " k"], task_trace: float) -> float:
    """The number c by which T is multiplied so that learning rates carry over from Adam.

    A unit step of random signs moves the task response by trace(C_task) in plain Adam and by
    c^2 sum(gamma s^2) here; c makes the two equal. Zero C_task leaves T alone.

    Args:
        gamma: Of the directions that are stepped, shape (k,).
        gate: Theirs, shape (k,).
        task_trace: trace(C_task).
    """
    moved = float((gamma.double() * gate.double() ** 2).sum())
    return (task_trace / moved) ** 0.5 if moved > 0 else 1.0


def smallest_eigenvectors(c_pre: Tensor, r: int, name: str = "layer") -> Float64[Tensor, "d r"]:
    """U_perp: the `r` eigenvectors of C_pre with the smallest eigenvalues, smallest first (B.3).

    Raises:
        NumericsError: See `checked_moment`; also r outside of [1, d].
    """
    pre = checked_moment(c_pre, f"C_pre of {name}")
    if not 1 <= r <= len(pre):
        raise NumericsError(f"{name}: r is {r}, but must lie in [1, {len(pre)}] (its d_in)")
    return eigh(pre, name)[1][:, :r].contiguous()


def off_diagonal_mass(c_pre: Tensor, c_task: Tensor, name: str = "layer") -> float:
    """How far C_pre and C_task are from one eigenbasis, in [0, 1] (figure 1a).

    With V the eigenvectors of C_pre: sum over i != j of (V' C_task V)_ij^2, over ||C_task||_F^2.
    Zero if V diagonalizes C_task as well, so that C_pre alone would give the joint basis; zero also
    for a zero C_task.

    Raises:
        NumericsError: See `checked_moment`; also unequal shapes or a zero C_pre.
    """
    pre, task, _ = _checked_pair(c_pre, c_task, 0.0, name)
    vectors = eigh(pre, name)[1]
    squares = (vectors.T @ task @ vectors) ** 2
    total = float(squares.sum())
    return float((squares - torch.diag(squares.diagonal())).sum()) / total if total > 0 else 0.0


def _checked_pair(
    c_pre: Tensor, c_task: Tensor, tau: float, name: str
) -> tuple[Tensor, Tensor, float]:
    """Both moments in float64, divided by C_pre's mean power so that constants are relative, and it."""
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
            f"C_pre of {name} is zero: the layer saw no input on the model's own text, so nothing "
            "says what an update there would disturb. Leave the layer out of target_modules."
        )
    return pre / mean_power, task / mean_power, mean_power


def _whitened(
    c_pre: Tensor,
    c_task: Tensor,
    tau: float,
    name: str,
    directions: int | None,
    *,
    symmetric: bool,
) -> Eigenpairs:
    """H's own eigenvectors over the roots of its eigenvalues, turned back by V' if symmetric."""
    pre, task, mean_power = _checked_pair(c_pre, c_task, tau, name)
    values, vectors = eigh(pre, name)
    values = values + tau
    rounding = len(values) * torch.finfo(values.dtype).eps * float(values[-1])
    if float(values[0]) <= rounding:
        raise NumericsError(
            f"{name}: C_pre + tau mean(diag) I has the eigenvalue {float(values[0]):.3g} at tau = "
            f"{tau:g}, but must be positive definite. Give a larger tau."
        )
    basis = vectors / values.sqrt()
    if symmetric:
        basis = basis @ vectors.T
    image = basis.T @ task @ basis
    gamma, order = image.diagonal().clamp(min=0.0).sort(descending=True)
    basis, image = basis[:, order], image[order][:, order]
    error = _ridged(basis.T @ _ridged(pre, tau) @ basis, -1.0)
    scale = max(float(gamma[0]), torch.finfo(torch.float64).tiny)
    return Eigenpairs(
        basis=basis[:, :directions] / mean_power**0.5,
        gamma=gamma[:directions],
        tau=tau,
        task_trace=float(task.diagonal().sum()) * mean_power,
        orthogonality=_largest_entry(error),
        diagonality=float((image - torch.diag(gamma)).abs().max()) / scale,
    )


def _factor(pre: Tensor, tau: float, name: str) -> tuple[Tensor, Tensor, float]:
    """H, its lower Cholesky factor and the ridge used, for a C_pre of unit mean power."""
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
        f"{name}: C_pre + tau mean(diag) I is not positive definite even at tau = {ridge:g} (asked "
        f"for: {tau:g}). Give a larger tau, or measure C_pre on more text."
    )


def _ridged(matrix: Tensor, ridge: float) -> Tensor:
    """A copy with so much added to the diagonal."""
    found = matrix.clone()
    found.diagonal().add_(ridge)
    return found


def _largest_entry(matrix: Tensor) -> float:
    """max |entry|; not finite if an entry is not."""
    return float(torch.linalg.vector_norm(matrix, math.inf))


def _congruent(lower: Tensor, symmetric: Tensor) -> Tensor:
    """L^(-1) S L^(-T) for a symmetric S: the second solve is of what lies on or above the diagonal alone."""
    half = torch.linalg.solve_triangular(lower, symmetric, upper=False).T
    found = torch.zeros_like(half)
    width = -(-len(half) // SOLVE_BLOCKS)
    for start in range(0, len(half), width):
        rows = slice(start, start + width)
        left = half[rows, start:] - lower[rows, :start] @ found[:start, start:]
        found[rows, start:] = torch.linalg.solve_triangular(lower[rows, rows], left, upper=False)
    return found.triu() + found.triu(1).T
