"""Groups are solved side by side with the results of one at a time, and errors come through."""

from __future__ import annotations

import pytest
import torch
from test_spectrum import moment

from folora.activations import InputGroup
from folora.errors import ConfigError, NumericsError
from folora.solving import bases_from_tensors, bases_to_tensors, solve
from folora.spectrum import generalized_eigenbasis

GROUPS = [InputGroup((f"layer{i}", f"twin{i}"), d) for i, d in enumerate((8, 33, 5, 16, 8, 21))]
PRE = {g.name: moment(g.d_in, seed=i) for i, g in enumerate(GROUPS)}
TASK = {g.name: moment(g.d_in, seed=50 + i) for i, g in enumerate(GROUPS)}


@pytest.mark.parametrize("threads", [1, 3])
def test_same_as_one_at_a_time(threads: int) -> None:
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
        assert torch.allclose(b.basis.abs().double(), alone.basis.abs(), rtol=1e-4, atol=1e-5)
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
