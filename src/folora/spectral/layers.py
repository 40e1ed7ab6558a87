"""From the statistics of all groups to their bases: what the adapter and the optimizer read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from folora.errors import ConfigError
from folora.runtime import distributed
from folora.runtime.shapes import Float
from folora.runtime.storage import fitting
from folora.spectral.eigenproblem import Eigenbasis, generalized_eigenbasis, smallest_eigenvectors
from folora.spectral.groups import InputGroup, group_of


@dataclass(frozen=True)
class GroupBasis:
    """The solved spectrum of one shared input, or its k leading directions, in float32.

    Attributes:
        group: The layers that read this input.
        basis: T, shape (d_in, k).
        gamma: Shape (k,), descending.
        task_trace: trace(C_task).
        null_basis: U_perp, shape (d_in, r); None if it was not asked for.
    """

    group: InputGroup
    basis: Float[Tensor, "d k"]
    gamma: Float[Tensor, " k"]
    task_trace: float
    null_basis: Float[Tensor, "d r"] | None = None


def check_rank(groups: Sequence[InputGroup], r: int) -> None:
    """Raise ConfigError if r exceeds the width of some layer's input."""
    for group in groups:
        if r > group.d_in:
            raise ConfigError(
                f"adapter.r is {r}, but {group.name} has d_in = {group.d_in}; r must lie in "
                f"[1, {min(g.d_in for g in groups)}]"
            )


def solve(
    groups: Sequence[InputGroup],
    c_pre: Mapping[str, Tensor],
    c_task: Mapping[str, Tensor],
    *,
    tau: float,
    null_rank: int = 0,
    directions: int | None = None,
    eigenbasis: Eigenbasis = generalized_eigenbasis,
    device: torch.device | None = None,
    on_group: Callable[[], None] = lambda: None,
) -> list[GroupBasis]:
    """Solve every group (Eq. 10-15), each of several processes its share; all get the same bases.

    Args:
        groups: Which layers share an input.
        c_pre: By group name, (d_in, d_in).
        c_task: By group name, (d_in, d_in).
        tau: Relative ridge.
        null_rank: How many of C_pre's smallest eigenvectors are wanted; 0 for none.
        directions: How many leading columns of each basis are wanted; None for all.
        eigenbasis: Which basis; see `spectrum.BASES`.
        device: Where to compute; default is where each C_pre lies. Results lie with C_pre.
        on_group: Called after each group, for progress.

    Raises:
        NumericsError: See `generalized_eigenbasis`; the layer is named.
        ConfigError: `null_rank` exceeds a width.
    """
    check_rank(groups, null_rank)

    def one(group: InputGroup) -> GroupBasis:
        home = c_pre[group.name].device
        pre = c_pre[group.name].to(device or home)
        task = c_task[group.name].to(device or home)
        spectrum = eigenbasis(pre, task, tau=tau, name=group.name, directions=directions)
        null = smallest_eigenvectors(pre, null_rank, group.name) if null_rank else None
        return GroupBasis(
            group,
            spectrum.basis.float().contiguous().to(home),
            spectrum.gamma.float().to(home),
            spectrum.task_trace,
            None if null is None else null.float().to(home),
        )

    places = {(device or c_pre[group.name].device).type for group in groups}
    # On an accelerator one fills it, and several would fill its memory.
    at_once = torch.get_num_threads() if places == {"cpu"} else 1

    def own_share() -> list[GroupBasis]:
        solved = []
        for basis in _one_thread_each(one, distributed.mine(groups), at_once):
            solved.append(basis)
            on_group()
        return solved

    own = iter(distributed.agree(own_share))
    owners = (number % distributed.count() for number in range(len(groups)))
    # The owner's own bytes: another process might find other signs.
    return [distributed.sent(next(own) if o == distributed.rank() else None, o) for o in owners]  # type: ignore[misc]


def _one_thread_each(
    work: Callable[[InputGroup], GroupBasis], groups: Sequence[InputGroup], at_once: int
) -> Iterator[GroupBasis]:
    """Work on so many groups at once, in order.

    On the CPU an eigenproblem gains little from a second thread, so each gets one; that also makes the
    result independent of the number of threads.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(work, groups)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # interrupted, it does not wait for LAPACK
        torch.set_num_threads(threads)  # part of the setting is shared by all threads


def bases_to_tensors(
    bases: Sequence[GroupBasis],
) -> tuple[dict[str, Tensor], list[dict[str, object]]]:
    """Tensors and JSON facts of solved groups, for an artifact."""
    tensors: dict[str, Tensor] = {}
    facts: list[dict[str, object]] = []
    for b in bases:
        tensors[f"{b.group.name}/basis"] = b.basis
        tensors[f"{b.group.name}/gamma"] = b.gamma
        if b.null_basis is not None:
            tensors[f"{b.group.name}/null_basis"] = b.null_basis
        facts.append(
            {
                "layers": b.group.layers,
                "d_in": b.group.d_in,
                "task_trace": b.task_trace,
            }
        )
    return tensors, facts


def bases_from_tensors(tensors: Mapping[str, Tensor], facts: Any) -> list[GroupBasis]:
    """Inverse of `bases_to_tensors`; `facts` are whatever a manifest holds.

    Raises:
        ArtifactError: They are no facts of groups, or do not fit the tensors.
    """
    with fitting("the spectrum"):
        return [_basis_of(tensors, fact) for fact in facts]


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
        raise ValueError(f"the spectrum of {group.name} is not finite, or negative")
    return GroupBasis(group, basis, gamma, float(fact["task_trace"]), null)
