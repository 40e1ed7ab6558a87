"""Solve the eigenproblem of every adapted layer: from `Moments` to a `Spectrum`, which can be saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor

from folora.config import TAU
from folora.errors import ConfigError, MismatchError
from folora.runtime import distributed
from folora.runtime.artifacts import Saveable
from folora.runtime.shapes import Float
from folora.spectral.eigenproblem import (
    Eigenbasis,
    energy_share,
    generalized_eigenbasis,
    smallest_eigenvectors,
)
from folora.spectral.groups import InputGroup, group_of
from folora.spectral.moments import Moments


@dataclass(frozen=True)
class GroupBasis:
    """The eigenbasis of one layer input, or its k leading columns, in float32.

    Attributes:
        group: The layers with this input.
        basis: T, shape (d_in, k).
        gamma: Shape (k,), descending.
        task_trace: trace(C_task).
        null_basis: U_perp, shape (d_in, r); None if it was not requested.
    """

    group: InputGroup
    basis: Float[Tensor, "d k"]
    gamma: Float[Tensor, " k"]
    task_trace: float
    null_basis: Float[Tensor, "d r"] | None = None

    def __repr__(self) -> str:
        return (
            f"GroupBasis({self.group.name}: {len(self.gamma)} of {self.group.d_in} directions, "
            f"gamma {self.gamma[0]:.3g} to {self.gamma[-1]:.3g})"
        )


def check_rank(groups: Iterable[InputGroup], r: int) -> None:
    """Raise ConfigError if r exceeds the input width of a layer."""
    for group in groups:
        if r > group.d_in:
            raise ConfigError(
                f"adapter.r is {r}, but {group.name} has d_in = {group.d_in}; r must lie in "
                f"[1, {min(g.d_in for g in groups)}]"
            )


@dataclass(frozen=True)
class Spectrum(Sequence[GroupBasis], Saveable):
    """The eigenbases of all adapted layers, one for each distinct input.

    Attributes:
        bases: In the order of the forward pass.
    """

    kind: ClassVar[str] = "spectrum"

    bases: tuple[GroupBasis, ...]

    def __repr__(self) -> str:
        layers = sum(len(group.layers) for group in self.groups)
        return f"Spectrum({len(self)} inputs of {layers} layers)"

    def __getitem__(self, index: Any) -> Any:
        return self.bases[index]

    def __len__(self) -> int:
        return len(self.bases)

    @property
    def groups(self) -> tuple[InputGroup, ...]:
        """The layers of each input."""
        return tuple(basis.group for basis in self.bases)

    def of_layers(self, names: Collection[str]) -> Spectrum:
        """The bases of some of its layers."""
        kept = ((b, tuple(n for n in b.group.layers if n in names)) for b in self.bases)
        return Spectrum(
            tuple(replace(b, group=replace(b.group, layers=own)) for b, own in kept if own)
        )

    def concentration(self, task: Moments, r: int) -> float:
        """How much of the task's energy the r leading eigenvectors hold, over r random directions.

        The median over the groups of d / r times their share of trace(C_task). Below 1 the task has no directions of
        its own: what it uses, text uses as much.
        """
        return median(
            energy_share(task.matrices[b.group.name], b.basis[:, :r]) * b.group.d_in / r
            for b in self.bases
        )

    def to_artifact(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """``NAME/basis``, ``NAME/gamma`` and ``NAME/null_basis`` of each group, and the groups."""
        tensors: dict[str, Tensor] = {}
        for b in self.bases:
            tensors |= {f"{b.group.name}/basis": b.basis, f"{b.group.name}/gamma": b.gamma}
            if b.null_basis is not None:
                tensors[f"{b.group.name}/null_basis"] = b.null_basis
        return tensors, {
            "groups": [{**b.group.fact, "task_trace": b.task_trace} for b in self.bases]
        }

    @classmethod
    def from_artifact(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> Spectrum:
        """Inverse of `to_artifact`."""
        return cls(tuple(_basis_of(tensors, fact) for fact in manifest["groups"]))


def solve(
    keep: Moments,
    task: Moments,
    *,
    tau: float = TAU,
    null_rank: int = 0,
    directions: int | None = None,
    eigenbasis: Eigenbasis = generalized_eigenbasis,
    device: torch.device | None = None,
    on_group: Callable[[], None] = lambda: None,
) -> Spectrum:
    """Solve the generalized eigenproblem of every group (Eq. 10-15).

    With several processes the groups are sharded over them; all get the same bases.

    Args:
        keep: C_pre, measured on the calibration set.
        task: C_task, measured on the task, of the same layers.
        tau: Relative ridge.
        null_rank: Number of eigenvectors of C_pre with the smallest eigenvalues; 0 for none.
        directions: Number of leading columns of each basis; None for all.
        eigenbasis: The basis; see `eigenproblem.BASES`.
        device: Where to compute; default is the device of each C_pre. Results are on that of C_pre.
        on_group: Called after each group, for progress.

    Raises:
        NumericsError: See `generalized_eigenbasis`; the layer is named.
        ConfigError: `null_rank` exceeds a width.
        MismatchError: `keep` and `task` are of different layers.
    """
    groups = keep.groups
    if groups != task.groups:
        raise MismatchError(
            f"C_pre was measured on the inputs of {len(groups)} groups of layers, C_task on "
            f"{len(task.groups)}, and the groups differ; measure both with the same layers"
        )
    check_rank(groups, null_rank)

    def solve_group(group: InputGroup) -> GroupBasis:
        home = keep.matrices[group.name].device
        pre = keep.matrices[group.name].to(device or home)
        c_task = task.matrices[group.name].to(device or home)
        found = eigenbasis(pre, c_task, tau=tau, name=group.name, directions=directions)
        null = smallest_eigenvectors(pre, null_rank, group.name) if null_rank else None
        return GroupBasis(
            group,
            found.basis.float().contiguous().to(home),
            found.gamma.float().to(home),
            found.task_trace,
            None if null is None else null.float().to(home),
        )

    device_types = {(device or keep.matrices[group.name].device).type for group in groups}
    # One eigenproblem occupies an accelerator; several would need more of its memory.
    workers = torch.get_num_threads() if device_types == {"cpu"} else 1

    def solve_shard() -> list[GroupBasis]:
        solved = []
        for basis in _one_thread_each(solve_group, distributed.shard(groups), workers):
            solved.append(basis)
            on_group()
        return solved

    own = iter(distributed.raise_together(solve_shard))
    bases = []
    for number in range(len(groups)):  # broadcast: another process might round differently
        owner = number % distributed.world_size()
        mine = next(own) if owner == distributed.rank() else None
        bases.append(distributed.broadcast(mine, owner))
    return Spectrum(tuple(bases))  # type: ignore[arg-type]


def _one_thread_each(
    work: Callable[[InputGroup], GroupBasis], groups: Sequence[InputGroup], workers: int
) -> Iterator[GroupBasis]:
    """Apply `work` to the groups in a pool of threads; yield the results in order.

    Each worker runs torch with one thread: on the CPU an eigenproblem gains little from a second one, and
    the result does not depend on the number of threads.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(work, groups)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an interruption LAPACK goes on
        torch.set_num_threads(threads)  # the setting is partly global


def _basis_of(tensors: Mapping[str, Tensor], fact: Any) -> GroupBasis:
    group = group_of(fact)
    basis, gamma = tensors[f"{group.name}/basis"], tensors[f"{group.name}/gamma"]
    null = tensors.get(f"{group.name}/null_basis")
    if any(t.dtype != torch.float32 for t in (basis, gamma, *([] if null is None else [null]))):
        raise ValueError(f"the basis of {group.name} is not float32")
    if basis.shape != (group.d_in, len(gamma)) or gamma.ndim != 1:
        raise ValueError(f"the basis of {group.name} has shape {tuple(basis.shape)}")
    if null is not None and (null.ndim != 2 or len(null) != group.d_in):
        raise ValueError(f"the null basis of {group.name} has shape {tuple(null.shape)}")
    if not all(bool(t.isfinite().all()) for t in (basis, gamma)) or bool((gamma < 0).any()):
        raise ValueError(f"the spectrum of {group.name} has non-finite or negative values")
    return GroupBasis(group, basis, gamma, float(fact["task_trace"]), null)
