"""Layers are solved concurrently with the results of solving one at a time, and errors propagate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.closeness import assert_near
from support.references import moment

from folora.errors import ArtifactError, ConfigError, NumericsError
from folora.spectral.eigenproblem import generalized_eigenbasis
from folora.spectral.groups import InputGroup
from folora.spectral.layers import bases_from_tensors, bases_to_tensors, solve

GROUPS = [InputGroup((f"layer{i}", f"twin{i}"), d) for i, d in enumerate((8, 33, 5, 16, 8, 21))]
PRE = {g.name: moment(g.d_in, seed=i) for i, g in enumerate(GROUPS)}
TASK = {g.name: moment(g.d_in, seed=50 + i) for i, g in enumerate(GROUPS)}


@pytest.mark.parametrize("threads", [1, 3])
def test_solving_together_matches_solving_one_at_a_time(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ticks: list[int] = []
        found = solve(GROUPS, PRE, TASK, tau=1e-3, null_rank=2, on_group=lambda: ticks.append(1))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [b.group for b in found] == GROUPS
    assert len(ticks) == len(GROUPS)
    for b in found:
        alone = generalized_eigenbasis(PRE[b.group.name], TASK[b.group.name], tau=1e-3)
        assert_near(b.basis.abs(), alone.basis.abs())
        assert b.null_basis is not None
        assert b.null_basis.shape == (b.group.d_in, 2)


def test_an_error_in_one_group_is_raised_and_named() -> None:
    bad = {**TASK, "layer3": torch.full((16, 16), float("nan"))}
    with pytest.raises(NumericsError, match="layer3"):
        solve(GROUPS, PRE, bad, tau=1e-3)
    with pytest.raises(ConfigError, match="layer2 has d_in = 5"):
        solve(GROUPS, PRE, TASK, tau=1e-3, null_rank=6)


def test_tensors_round_trip() -> None:
    bases = solve(GROUPS, PRE, TASK, tau=1e-3, null_rank=2)
    again = bases_from_tensors(*bases_to_tensors(bases))
    for a, b in zip(bases, again, strict=True):
        assert a.group == b.group
        assert a.task_trace == b.task_trace
        assert torch.equal(a.basis, b.basis)
        assert torch.equal(a.gamma, b.gamma)


def spoiled(kind: str) -> tuple[dict[str, torch.Tensor], Any]:
    """A spectrum whose parts do not fit each other, as a file of the right checksum may have it."""
    tensors, facts = bases_to_tensors(solve(GROUPS[:2], PRE, TASK, tau=1e-3, null_rank=2))
    first: Any = facts[0]
    changes: dict[str, Callable[[], object]] = {
        "no tensor": lambda: tensors.pop("layer0/basis"),
        "narrow": lambda: tensors.update({"layer0/basis": tensors["layer0/basis"][:, :3]}),
        "flat": lambda: tensors.update({"layer0/basis": tensors["layer0/basis"].flatten()}),
        "scalar gamma": lambda: tensors.update({"layer0/gamma": torch.tensor(1.0)}),
        "float64": lambda: tensors.update({"layer0/basis": tensors["layer0/basis"].double()}),
        "integers": lambda: tensors.update(
            {"layer0/null_basis": tensors["layer0/null_basis"].long()}
        ),
        "short null": lambda: tensors.update({"layer0/null_basis": torch.zeros(3, 2)}),
        "nan": lambda: tensors["layer0/gamma"].fill_(float("nan")),
        "negative": lambda: tensors["layer0/gamma"].neg_(),
        "no layers": lambda: first.update(layers=[]),
        "a word for layers": lambda: first.update(layers="layer0"),
        "numbers for layers": lambda: first.update(layers=[1, 2]),
        "another width": lambda: first.update(d_in=9),
        "a huge width": lambda: first.update(d_in=float("inf")),
        "no width": lambda: first.pop("d_in"),
        "no trace": lambda: first.update(task_trace=None),
        "a huge trace": lambda: first.update(task_trace=10**400),
    }
    changes[kind]() if kind in changes else None
    return tensors, {"no list": 3, "no facts": [3], "a mapping": {"layers": []}}.get(kind, facts)


@pytest.mark.parametrize(
    "kind",
    ["no tensor", "narrow", "flat", "scalar gamma", "float64", "integers", "short null", "nan", "negative",
     "no layers", "a word for layers", "numbers for layers", "another width", "a huge width", "no width",
     "no trace", "a huge trace", "no list", "no facts", "a mapping"],
)  # fmt: skip
def test_mismatched_tensors_are_refused(kind: str) -> None:
    with pytest.raises(ArtifactError, match="the spectrum does not hold what it should"):
        bases_from_tensors(*spoiled(kind))
