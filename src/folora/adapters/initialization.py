"""Initializations of LoRA's A and B: pure functions of a weight and the statistics of its input.

Each returns A0 (r, d_in) and Y0 = kappa B0 (d_out, r), so that the initial update is Y0 A0; Y0 is None if B0 = 0.
The compared methods differ only in initialization, optimizer and constraint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from folora.errors import ConfigError, NumericsError
from folora.runtime.shapes import Float
from folora.runtime.tensors import full_fp32_matmul
from folora.spectral.layers import GroupBasis

MAX_ANGLE = 1e-2  # radians between two matrices that count as parallel; bf16 rounding is below

Initialization = tuple[Tensor, Tensor | None]
"""A0 (r, d_in), and Y0 (d_out, r) or None for B0 = 0."""


@dataclass(frozen=True)
class Site:
    """The inputs of an initialization for one layer.

    Attributes:
        spectrum: The solved spectrum of the layer's input.
        image: x (n, d_in) -> W0 x (n, d_out), computed by the base layer, which also covers quantized
            and transposed layers.
        r: Rank.
        generator: For random initializations.
    """

    spectrum: GroupBasis
    image: Callable[[Tensor], Tensor]
    r: int
    generator: torch.Generator

    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """W0 in float64."""
        identity = torch.eye(self.spectrum.group.d_in, device=self.spectrum.basis.device)
        return self.image(identity).double().T

    def null_basis(self) -> Float[Tensor, "d_in r"]:
        """U_perp. Raises ConfigError if the spectrum was solved without it."""
        found = self.spectrum.null_basis
        if found is None or found.shape[1] < self.r:
            have = 0 if found is None else found.shape[1]
            raise ConfigError(
                f"{self.spectrum.group.name}: the null-space initialization needs the {self.r} eigenvectors of "
                f"C_pre with the smallest eigenvalues, the spectrum has {have}. Solve with null_rank={self.r}."
            )
        return found[:, : self.r]


def null_space(null_basis: Float[Tensor, "d r"]) -> Float[Tensor, "r d"]:
    """A0 = U_perp': the directions with the least energy on the model's own text (B.3)."""
    return null_basis.T.contiguous()


def leading_eigenvectors(basis: Float[Tensor, "d k"], r: int) -> Float[Tensor, "r d"]:
    """A0 with orthonormal rows spanning the first r columns of T, which have the largest gamma.

    Raises:
        NumericsError: r is outside of [1, k].
    """
    if not 1 <= r <= basis.shape[1]:
        raise NumericsError(f"r is {r}, but must lie in [1, {basis.shape[1]}]")
    # Norms of T's columns differ by orders of magnitude; the span depends on directions only.
    columns = torch.nn.functional.normalize(basis[:, :r].double(), dim=0)
    return torch.linalg.qr(columns).Q.T.contiguous()


def kaiming(r: int, d_in: int, generator: torch.Generator) -> Float[Tensor, "r d"]:
    """LoRA's default initialization of A: uniform in +-1/sqrt(d_in), float32 on the CPU."""
    bound = 1 / math.sqrt(d_in)
    return torch.empty(r, d_in).uniform_(-bound, bound, generator=generator)


def minor_singular(
    weight: Float[Tensor, "d_out d_in"], r: int
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """MiLoRA (arXiv:2406.09044): the r smallest singular triples of W0, sqrt(S) in each factor.

    Raises:
        NumericsError: r exceeds the number of singular values.
    """
    return _smallest_triples(weight, r)


def corda(
    weight: Float[Tensor, "d_out d_in"], basis: Float[Tensor, "d_in d_in"], r: int
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """CorDA, knowledge-preserving (arXiv:2406.05223): the r smallest triples of W0 H, times H^(-1).

    H is recovered from T, since T T' = H^(-1); CorDA's damping of the covariance is tau.

    Raises:
        NumericsError: r exceeds the number of singular values.
    """
    inverse = basis.double() @ basis.double().T
    a, image = _smallest_triples(weight @ torch.linalg.inv(inverse), r)
    return a @ inverse, image


def balanced_null_space(
    weight: Float[Tensor, "d_out d_in"], null_basis: Float[Tensor, "d_in r"]
) -> tuple[Float[Tensor, "r d_in"], Float[Tensor, "d_out r"]]:
    """LoRA-Null (arXiv:2503.02659): W0 U_perp U_perp' by its SVD, sqrt(S) in each factor.

    The product equals that of `null_space`; the factors have balanced norms.
    """
    a, image = _smallest_triples(weight @ null_basis.double(), null_basis.shape[1])
    return a @ null_basis.double().T, image


def leading_singular_spaces(
    weight: Float[Tensor, "d_out d_in"], k: int
) -> tuple[Float[Tensor, "d_out k"], Float[Tensor, "d_in k"]]:
    """U_k and V_k, the singular vectors that OPLoRA (arXiv:2510.13003) protects.

    Raises:
        NumericsError: k exceeds the number of singular values.
    """
    if not 1 <= k <= min(weight.shape):
        raise NumericsError(f"protect is {k}, but must lie in [1, {min(weight.shape)}]")
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    return u[:, :k].contiguous(), vh[:k].T.contiguous()


def image_of(base: Any) -> Callable[[Tensor], Tensor]:
    """x -> W0 x for rows of x, for any layer type and dtype."""
    weight, bias = base.weight, getattr(base, "bias", None)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32

    def image(x: Tensor) -> Tensor:
        with full_fp32_matmul():
            out = base(x.to(weight.device, dtype))
        return out if bias is None else out - bias

    return image


def subtracts_weight(
    a: Float[Tensor, "r d_in"], b: Float[Tensor, "d_out r"], image: Callable[[Tensor], Tensor]
) -> bool:
    """Whether B A subtracts a part of W0, as the frozen half of an initialization in `NONZERO` does.

    That is, -B A is a positive multiple of W0 P with P the projection onto A's row space, or of Q W0 with Q
    the projection onto B's column space. Multiple, because weight decay also shrinks the frozen half.
    """
    if not bool(b.any()):
        return False
    a, b = a.double(), b.double()
    if _same_direction(image(a.float()).double().T, -b @ (a @ a.T)):
        return True
    weight = image(torch.eye(a.shape[1], device=a.device)).double().T
    return _same_direction(b.T @ weight, -(b.T @ b) @ a)


def _same_direction(x: Tensor, y: Tensor) -> bool:
    """Whether x is a positive multiple of y, up to rounding."""
    cosine = float((x * y).sum() / (x.norm() * y.norm()))
    return x.numel() > 1 and cosine > 1 - MAX_ANGLE**2 / 2


def _smallest_triples(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """sqrt(S) V' (r, d_in) and U sqrt(S) (d_out, r) of the r smallest singular triples."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    if r > len(s):
        raise NumericsError(f"r is {r}, but the weight has only {len(s)} singular values")
    root = s[-r:].sqrt()
    return root[:, None] * vh[-r:], u[:, -r:] * root


def _null_space_of(site: Site) -> Initialization:
    a0 = null_space(site.null_basis())
    return a0, site.image(a0).T


INITIALIZATIONS: dict[str, Callable[[Site], Initialization]] = {
    "eigen": lambda site: (leading_eigenvectors(site.spectrum.basis, site.r), None),
    "null_space": _null_space_of,
    "null_space_zero": lambda site: (null_space(site.null_basis()), None),
    "kaiming": lambda site: (kaiming(site.r, site.spectrum.group.d_in, site.generator), None),
    "minor_singular": lambda site: minor_singular(site.weight(), site.r),
    "corda": lambda site: corda(site.weight(), site.spectrum.basis, site.r),
    "lora_null": lambda site: balanced_null_space(site.weight(), site.null_basis()),
}

NONZERO = frozenset({"null_space", "minor_singular", "corda", "lora_null"})
"""Initializations with B0 A0 /= 0; a frozen half subtracts it, so the adapter has rank 2r."""

NEED_NULL_BASIS = frozenset({"null_space", "null_space_zero", "lora_null"})
NEED_WHOLE_BASIS = frozenset({"corda"})
NEED_SINGULAR_VALUES = frozenset({"minor_singular", "corda", "lora_null"})


def check_singular_values(
    layers: Mapping[str, tuple[int, int]], init: str, r: int, protect: int
) -> None:
    """Raise ConfigError if a layer has fewer singular values than the initialization or OPLoRA's k needs.

    `layers` has (d_in, d_out) by name.
    """
    for wanted, what in (
        (r if init in NEED_SINGULAR_VALUES else 0, f"adapter.r with method.init = {init!r}"),
        (protect, "method.protect (default: adapter.r)"),
    ):
        for name, dims in layers.items():
            if wanted > min(dims):
                raise ConfigError(
                    f"{what} is {wanted}, but {name} has {min(dims)} singular values; it must lie in "
                    f"[1, {min(map(min, layers.values()))}]"
                )
