"""Eq. 10-17 against an independent solver, and invalid inputs."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.closeness import assert_near
from support.references import moment

from folora.errors import NumericsError
from folora.spectral import leading
from folora.spectral.eigenproblem import (
    BASES,
    Eigenbasis,
    Eigenpairs,
    checked_moment,
    generalized_eigenbasis,
    smallest_eigenvectors,
    spectral_gate,
    step_scale,
)


@pytest.mark.parametrize("d", [1, 2, 7, 64])
@pytest.mark.parametrize("tau", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("decay", [0.0, 4.0])
def test_matches_scipy(d: int, tau: float, decay: float) -> None:
    c_pre, c_task = moment(d, seed=1, decay=decay), moment(d, seed=2)
    found = generalized_eigenbasis(c_pre, c_task, tau=tau)
    h = c_pre.numpy() + tau * np.mean(np.diag(c_pre.numpy())) * np.eye(d)
    expected = scipy.linalg.eigh(c_task.numpy(), h, eigvals_only=True)[::-1].copy()
    assert_near(found.gamma, torch.from_numpy(expected), rtol=1e-8)
    t = found.basis
    assert_near(t.T @ torch.from_numpy(h) @ t, torch.eye(d).double(), roundings=1e6)
    image = t.T @ c_task @ t
    assert_near(image, torch.diag(found.gamma), roundings=1e6)
    assert found.tau == tau
    assert found.task_trace == pytest.approx(float(c_task.trace()))
    assert (found.gamma[:-1] >= found.gamma[1:]).all()


NUMBERS = torch.arange(200, dtype=torch.float64)
SPECTRA = {
    "power": 1 / (1 + NUMBERS),
    "steep": 0.5**NUMBERS,
    "cubed": (1 + NUMBERS) ** -3,
    "linear": 1 - NUMBERS / 200,
    "flat": torch.ones_like(NUMBERS),
    "spike": torch.where(NUMBERS == 0, 1e6, 1 / (1 + NUMBERS)),
    "rank 5": (NUMBERS < 5) * (1 + NUMBERS),
    "zero": torch.zeros_like(NUMBERS),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("count", [1, 16, 50])
def test_leading_eigenpairs_match_the_full_solve_for_any_spectrum(name: str, count: int) -> None:
    """Relative error below 1e-9 for each value, also for small ones beside a large one."""
    generator = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64)).Q
    matrix = (q * SPECTRA[name]) @ q.T
    found = leading._leading((matrix + matrix.T) / 2, count)
    assert found is not None
    values, vectors = found
    expected = SPECTRA[name].sort(descending=True).values[:count]
    rounding = 1e-12 * float(expected[0])
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=rounding)
    assert_near(vectors.T @ vectors, torch.eye(count).double(), roundings=1e3)
    residual = (matrix @ vectors - vectors * values).norm(dim=0)
    assert (residual <= 1.1e-6 * expected + 1e3 * rounding).all()


@pytest.mark.parametrize("count", [None, 5])
def test_eigenvector_signs_are_fixed(count: int | None) -> None:
    """Another number of processes or device rounds differently, and must not flip signs."""
    pre, task = moment(64, seed=1, decay=1), moment(64, seed=2, decay=1)
    h = pre + 1e-3 * pre.diagonal().mean() * torch.eye(64).double()
    rotation = (
        torch.linalg.cholesky(h).T @ generalized_eigenbasis(pre, task, directions=count).basis
    )
    largest = rotation.gather(0, rotation.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_slow_convergence_falls_back_to_the_full_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    pre, task = moment(40, seed=1), moment(40, seed=2)
    expected = generalized_eigenbasis(pre, task, directions=3)
    monkeypatch.setattr(leading, "MAX_ITERATIONS", 1)
    found = generalized_eigenbasis(pre, task, directions=3)
    assert_near(found.gamma, expected.gamma, roundings=1e3, rtol=1e-9)


@pytest.mark.parametrize("kind", sorted(BASES))
@pytest.mark.parametrize("count", [1, 3, 15, 40])
def test_a_truncated_basis_is_the_first_columns_of_the_full_one(kind: str, count: int) -> None:
    """1 and 3 of 20 use subspace iteration; 40 exceeds the width."""
    pre, task = moment(20, seed=1, decay=2), moment(20, seed=2)
    whole, part = BASES[kind](pre, task), BASES[kind](pre, task, directions=count)
    kept = min(count, 20)
    assert part.basis.shape == (20, kept)
    assert_near(part.gamma, whole.gamma[:kept], roundings=1e3, rtol=1e-9)
    signs = (part.basis * whole.basis[:, :kept]).sum(0).sign()
    assert_near(part.basis * signs, whole.basis[:, :kept], roundings=1e7)
    assert part.task_trace == whole.task_trace


def test_scaling_both_moments_changes_only_the_scale_of_the_basis() -> None:
    a = generalized_eigenbasis(moment(8, seed=1), moment(8, seed=2))
    b = generalized_eigenbasis(1e-6 * moment(8, seed=1), 1e-6 * moment(8, seed=2))
    assert_near(a.gamma, b.gamma, roundings=1e5)
    assert_near(a.basis.abs(), 1e-3 * b.basis.abs(), roundings=1e5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_floating_dtype_is_accepted(dtype: torch.dtype) -> None:
    c = torch.diag(torch.tensor([4.0, 2.0, 1.0])).to(dtype)
    found = generalized_eigenbasis(c, c, tau=0.0)
    assert found.basis.dtype == torch.float64
    assert_near(found.gamma, torch.ones(3).double(), roundings=1e3)


def test_rank_deficient_c_pre_raises_the_ridge_and_reports_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    c_pre = moment(16, rank=4, seed=1)
    found = generalized_eigenbasis(c_pre, moment(16, seed=2), tau=0.0, name="up_proj")
    assert found.tau > 0
    assert "up_proj" in caplog.text
    assert found.orthogonality < 1e-2


def test_rank_deficient_c_pre_needs_no_retry_with_a_ridge() -> None:
    found = generalized_eigenbasis(moment(16, rank=4, seed=1), moment(16, seed=2), tau=1e-4)
    assert found.tau == 1e-4
    assert found.orthogonality < 1e-6


def test_zero_c_task_has_zero_gamma_and_zero_c_pre_is_refused() -> None:
    zero = torch.zeros(4, 4)
    found = generalized_eigenbasis(moment(4), zero)
    assert found.gamma.eq(0).all()
    assert spectral_gate(found.gamma).eq(0.3).all()
    assert step_scale(found.gamma, spectral_gate(found.gamma), found.task_trace) == 1.0
    with pytest.raises(NumericsError, match="q_proj is zero"):
        generalized_eigenbasis(zero, moment(4), name="q_proj")


def broken(kind: str) -> torch.Tensor:
    c = moment(6)
    if kind == "nan":
        c[2, 3] = float("nan")
    if kind == "inf":
        c[0, 0] = float("inf")
    if kind == "asymmetric":
        c[0, 1] += 0.5
    if kind == "negative":
        c -= 2 * torch.eye(6)
    if kind == "not square":
        c = c[:, :4]
    if kind == "integer":
        c = c.long()
    return c


@pytest.mark.parametrize("basis", BASES.values())
def test_every_basis_reports_that_it_is_orthonormal_in_h(basis: Eigenbasis) -> None:
    assert basis(moment(6, seed=1), moment(6, seed=2)).orthogonality < 1e-10


def test_rounding_asymmetry_is_averaged_out() -> None:
    exact = moment(6)
    rounded = exact + 1e-5 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double()
    given = rounded.clone()
    assert torch.equal(checked_moment(given, "C"), (rounded + rounded.T) / 2)
    assert torch.equal(given, rounded)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "not finite"),
        ("inf", "not finite"),
        ("asymmetric", "not symmetric"),
        ("negative", "eigenvalue below"),
        ("not square", "shape"),
        ("integer", "dtype"),
    ],
)
@pytest.mark.parametrize("which", ["C_pre", "C_task"])
def test_bad_moments_are_refused_with_the_layer_named(kind: str, message: str, which: str) -> None:
    bad, good = broken(kind), moment(6)
    pair = (bad, good) if which == "C_pre" else (good, bad)
    with pytest.raises(NumericsError, match=message if kind != "not square" else "shape") as error:
        generalized_eigenbasis(*pair, name="layers.3.down_proj")
    assert "layers.3.down_proj" in str(error.value)


@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e60])
def test_eigenvalues_are_refused_below_the_tolerance(scale: float) -> None:
    rotation = torch.linalg.qr(moment(200)).Q

    def with_smallest(value: float) -> torch.Tensor:
        """Frobenius norm 1 up to the last eigenvalue."""
        eigenvalues = torch.full((200,), 199**-0.5, dtype=torch.float64)
        eigenvalues[-1] = value
        found = (rotation * eigenvalues) @ rotation.T * scale
        return (found + found.T) / 2

    checked_moment(with_smallest(-0.8e-5), "C")
    with pytest.raises(NumericsError, match="eigenvalue below"):
        checked_moment(with_smallest(-1.2e-5), "C")


def test_small_negative_eigenvalues_from_rounding_are_accepted() -> None:
    c = moment(32, rank=3).float()
    c -= 1e-7 * torch.eye(32)
    assert generalized_eigenbasis(moment(32), c).gamma.min() >= 0


@pytest.mark.parametrize("tau", [-1e-9, float("nan"), float("inf")])
def test_bad_tau_is_refused(tau: float) -> None:
    with pytest.raises(NumericsError, match="tau"):
        generalized_eigenbasis(moment(3), moment(3), tau=tau)


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(0, 99), st.floats(1e-4, 10), st.floats(0, 4))
def test_identities_hold_for_any_pair(d: int, seed: int, tau: float, decay: float) -> None:
    found = generalized_eigenbasis(
        moment(d, seed=seed, decay=decay), moment(d, rank=max(1, d // 2), seed=seed + 1), tau=tau
    )
    assert found.orthogonality < 1e-6
    assert found.diagonality < 1e-6


def test_gate_values() -> None:
    gamma = torch.tensor([9.0, 1.0, 0.5, 0.0])
    assert_near(spectral_gate(gamma), torch.tensor([0.9, 0.5, 1 / 3, 0.3]), roundings=4)
    assert spectral_gate(gamma, s_min=0.0)[-1] == 0
    assert spectral_gate(gamma, s_min=1.0).eq(1).all()
    assert spectral_gate(gamma, lam=0.0).tolist() == pytest.approx([1, 1, 1, 0.3])


@pytest.mark.parametrize(
    ("gamma", "lam", "s_min"),
    [([1.0], -1.0, 0.3), ([1.0], 1.0, 1.1), ([1.0], 1.0, -0.1), ([-1.0], 1.0, 0.3)],
)
def test_invalid_gate_options_are_refused(gamma: list[float], lam: float, s_min: float) -> None:
    with pytest.raises(NumericsError):
        spectral_gate(torch.tensor(gamma), lam, s_min)


def test_step_scale_makes_task_responses_equal() -> None:
    """Random unit steps in the scaled, gated basis change the output on the task as much as Adam's."""
    found = generalized_eigenbasis(moment(12, seed=1, decay=2), moment(12, seed=2))
    gate = spectral_gate(found.gamma)
    t = found.basis * step_scale(found.gamma, gate, found.task_trace)
    signs = torch.randn(20000, 12, dtype=torch.float64).sign()
    step = (signs * gate) @ t.T
    response = torch.einsum("ni,ij,nj->n", step, moment(12, seed=2), step).mean()
    assert float(response) == pytest.approx(found.task_trace, rel=0.05)


def test_smallest_eigenvectors() -> None:
    c = torch.diag(torch.tensor([3.0, 1.0, 2.0, 0.0]))
    u = smallest_eigenvectors(c, 2)
    assert_near(u.abs(), torch.eye(4).double()[:, [3, 1]])
    with pytest.raises(NumericsError, match="r is 5"):
        smallest_eigenvectors(c, 5, "o_proj")


pairs = st.tuples(st.integers(1, 12), st.integers(0, 999), st.floats(0, 3), st.floats(1e-4, 10))


def pair(d: int, seed: int, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """C_pre of any decay, and a C_task of half the rank."""
    return moment(d, seed=seed, decay=decay), moment(d, rank=max(1, d // 2), seed=seed + 1)


def orthogonal(d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]


def ridged(c_pre: torch.Tensor, tau: float) -> torch.Tensor:
    return c_pre + tau * c_pre.diagonal().mean() * torch.eye(len(c_pre), dtype=c_pre.dtype)


@settings(max_examples=40)
@given(pairs)
def test_any_pair_agrees_with_scipy(drawn: tuple[int, int, float, float]) -> None:
    """Values, T'HT = I and T'C_task T = diag(gamma), and the traces of both sides."""
    d, seed, decay, tau = drawn
    pre, task = pair(d, seed, decay)
    h = ridged(pre, tau)
    found = generalized_eigenbasis(pre, task, tau=tau)
    expected = scipy.linalg.eigh(task.numpy(), h.numpy(), eigvals_only=True)[::-1].copy()
    assert_near(found.gamma, torch.from_numpy(expected), roundings=5e6)
    t = found.basis
    assert_near(t.T @ h @ t, torch.eye(d).double(), roundings=5e7)
    assert_near(t.T @ task @ t, torch.diag(found.gamma), roundings=5e7)
    # T T' = H^-1, so the gammas sum to trace(H^-1 C_task), and trace(T'HT) is the width.
    assert_near(t @ t.T @ h, torch.eye(d).double(), roundings=5e9)
    assert float(found.gamma.sum()) == pytest.approx(float(torch.linalg.solve(h, task).trace()))


def assert_same_operator(
    one: Eigenpairs, basis: torch.Tensor, factor: float, other: Eigenpairs
) -> None:
    """T diag(gamma) T' and T T': equal when bases are, up to signs and rotations at equal gammas."""
    for a, b in ((factor * one.gamma, other.gamma), (one.gamma**0, other.gamma**0)):
        expected, found = (basis * a) @ basis.T, (other.basis * b) @ other.basis.T
        assert_near(expected, found, roundings=5e8)


@settings(max_examples=40)
@given(pairs, st.floats(1e-3, 1e3))
def test_scaling_the_task_scales_gamma_alone(
    drawn: tuple[int, int, float, float], factor: float
) -> None:
    d, seed, decay, tau = drawn
    pre, task = pair(d, seed, decay)
    one = generalized_eigenbasis(pre, task, tau=tau)
    other = generalized_eigenbasis(pre, factor * task, tau=tau)
    assert_near(other.gamma, factor * one.gamma, roundings=5e6)
    assert other.task_trace == pytest.approx(factor * one.task_trace)
    assert_same_operator(one, one.basis, factor, other)


@settings(max_examples=40)
@given(pairs, st.integers(0, 99))
def test_a_change_of_coordinates_transforms_the_basis(
    drawn: tuple[int, int, float, float], turn: int
) -> None:
    """In coordinates x' = Q'x: the same gammas, and Q'T for T."""
    d, seed, decay, tau = drawn
    pre, task = pair(d, seed, decay)
    q = orthogonal(d, turn)
    one = generalized_eigenbasis(pre, task, tau=tau)
    other = generalized_eigenbasis(q.T @ pre @ q, q.T @ task @ q, tau=tau)
    assert_near(other.gamma, one.gamma, roundings=5e6, rtol=1e-7)
    assert_same_operator(one, q.T @ one.basis, 1.0, other)


gammas = st.lists(st.floats(0, 1e12), min_size=1, max_size=20).map(
    lambda values: torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
)


@given(gammas, st.floats(0, 1e12), st.floats(0, 1))
def test_the_gate_is_monotone_and_bounded(gamma: torch.Tensor, lam: float, s_min: float) -> None:
    gate = spectral_gate(gamma, lam, s_min)
    assert bool((gate >= s_min).all() and (gate <= 1).all())
    rounding = 2 * torch.finfo(torch.float64).eps  # of a gate near 1
    assert bool((gate[:-1] >= gate[1:] - rounding).all())  # monotone in gamma
    assert bool((spectral_gate(gamma, 2 * lam + 1, s_min) <= gate + rounding).all())
    assert bool((spectral_gate(gamma, lam, 1.0) == 1).all())
    assert torch.equal(gate, spectral_gate(gamma, lam, 0.0).clamp(min=s_min))


@given(gammas, st.floats(0, 1))
def test_the_gate_reaches_its_limits(gamma: torch.Tensor, s_min: float) -> None:
    """lambda = 0: 1 wherever gamma > 0. A very large lambda: s_min."""
    used = gamma > 0
    assert bool((spectral_gate(gamma, 0.0, s_min)[used] == 1).all())
    assert bool((spectral_gate(gamma, 0.0, s_min)[~used] == s_min).all())
    torch.testing.assert_close(
        spectral_gate(gamma, 1e300, s_min), torch.full_like(gamma, s_min), rtol=0, atol=1e-9
    )
    least = float(gamma[used].min()) if used.any() else 1.0
    small = spectral_gate(gamma, 1e-9 * least, s_min)
    torch.testing.assert_close(small, spectral_gate(gamma, 0.0, s_min), rtol=0, atol=1e-8)
