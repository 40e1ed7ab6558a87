"""Parameters sharded by rows over processes (FSDP2) are stepped as the reference steps whole ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig
from support.processes import in_processes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from benchmarks.tiny import make_llama
from folora.adapters.adapter import attach, lora_factors
from folora.adapters.constraint import project_after_step, protected_spaces
from folora.calibration.inputs import find_groups, target_layers
from folora.optim.fused import FusedSAdam
from folora.optim.sadam import SAdam
from folora.runtime import distributed
from folora.runtime.finiteness import non_finite_gradients
from folora.runtime.tensors import full_tensor
from folora.spectral.layers import solve
from folora.spectral.moments import Moments

Array = np.ndarray[Any, Any]

STEPS, ROWS = 6, 12
ROUNDING = 1e-6


def network(sharded: bool) -> nn.Sequential:
    """Layers of 5, 2 and 4 rows: over three processes 2, 2, 1 and 1, 1, 0."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Linear(8, 5, bias=False), nn.Linear(5, 2, bias=False), nn.Linear(2, 4)
    )  # fmt: skip
    if sharded:
        mesh = init_device_mesh("cpu", (distributed.world_size(),))
        for layer in made:
            fully_shard(layer, mesh=mesh)
        fully_shard(made, mesh=mesh)
    return made


def groups(net: nn.Sequential, seed: int = 1) -> list[dict[str, Any]]:
    """A cut basis, a whole one, and none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    cut, every, gate = draw(8, 3), draw(5, 5), draw(3).sigmoid()
    return [
        {"params": [net[0].weight], "basis": cut, "gate": gate, "scale": 0.7},
        {"params": [net[1].weight], "basis": every},
        {"params": [*net[2].parameters()]},
    ]


def optimizer(net: nn.Sequential, kind: type[SAdam] = FusedSAdam, seed: int = 1) -> SAdam:
    return kind(groups(net, seed), lr=1e-2, weight_decay=0.1)


def steps(
    net: nn.Sequential, opt: SAdam, numbers: range, after: Callable[[int], None] = lambda n: None
) -> list[Array]:
    """Each process takes its rows of every step; the whole weights at the end."""
    for number in numbers:
        rows = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(number))
        own = rows.chunk(distributed.world_size())[distributed.rank()]
        opt.zero_grad()
        net(own).square().mean().backward()
        opt.step()
        after(number)
    return [full_tensor(p.detach()).numpy() for p in net.parameters()]


@pytest.fixture(scope="module")
def alone() -> list[Array]:
    """The weights that one process ends with, by the reference."""
    net = network(sharded=False)
    return steps(net, optimizer(net, SAdam), range(STEPS))


def furthest(found: list[Any], wanted: list[Array]) -> float:
    assert all(isinstance(one, list) for one in found), found
    return max(
        float(np.abs(a - b).max()) for one in found for a, b in zip(one, wanted, strict=True)
    )


@pytest.mark.parametrize("count", [2, 3])
def test_fsdp2_steps_as_one_process_does(count: int, alone: list[Array]) -> None:
    def work() -> list[Array]:
        net = network(sharded=True)
        assert all(isinstance(p, DTensor) for p in net.parameters())
        opt = optimizer(net)
        found = steps(net, opt, range(STEPS))
        for p, k in ((net[0].weight, 3), (net[1].weight, 5)):
            moments = opt.state[p]["exp_avg"]
            # Nothing of them is anywhere but with the rows, and an empty part counts steps as well.
            assert moments.shape == (len(p), k)
            assert moments.to_local().shape == (len(p.to_local()), k)
            assert float(opt.state[p]["step"]) == STEPS
        return found

    found = in_processes(count, work)
    assert furthest(found, alone) < ROUNDING


def test_a_checkpoint_resumes_with_another_number_of_processes(
    alone: list[Array], tmp_path: Path
) -> None:
    """By torch.distributed.checkpoint: written by two processes, resumed by two, three and one."""
    half = STEPS // 2

    def written() -> list[Array]:
        net = network(sharded=True)
        opt = optimizer(net)

        def save(number: int) -> None:
            if number == half - 1:
                dcp.save(state(net, opt), checkpoint_id=tmp_path)

        return steps(net, opt, range(STEPS), save)

    def resumed(sharded: bool = True) -> list[Array]:
        net = network(sharded)
        opt = optimizer(net, FusedSAdam if sharded else SAdam)
        load(net, opt, tmp_path)
        return steps(net, opt, range(half, STEPS))

    undisturbed = in_processes(2, written)
    assert furthest(undisturbed, alone) < ROUNDING
    assert furthest(in_processes(2, resumed), undisturbed[0]) == 0.0
    assert furthest(in_processes(3, resumed), alone) < ROUNDING
    assert furthest([resumed(sharded=False)], alone) < ROUNDING


def test_a_checkpoint_of_another_basis_is_refused(tmp_path: Path) -> None:
    def work() -> str:
        net = network(sharded=True)
        opt = optimizer(net)
        steps(net, opt, range(1))
        dcp.save(state(net, opt), checkpoint_id=tmp_path)
        other = optimizer(net, seed=2)
        with pytest.raises(ValueError, match="belongs to another basis"):
            load(net, other, tmp_path)
        return "refused"

    assert in_processes(2, work) == ["refused"] * 2


def state(net: nn.Module, opt: SAdam) -> dict[str, Any]:
    return {"net": get_model_state_dict(net), "opt": get_optimizer_state_dict(net, opt)}


def load(net: nn.Module, opt: SAdam, folder: Path) -> None:
    found = state(net, opt)
    dcp.load(found, checkpoint_id=folder)
    set_model_state_dict(net, found["net"])
    set_optimizer_state_dict(net, opt, found["opt"])


def test_parameters_sharded_by_columns_are_refused() -> None:
    def work() -> None:
        mesh = init_device_mesh("cpu", (2,))
        p = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
        opt = FusedSAdam([{"params": [p], "basis": torch.eye(6)}])
        p.grad = torch.ones_like(p)
        opt.step()

    for said in in_processes(2, work):
        assert said.startswith("ValueError: a parameter of shape (4, 6) with a basis is sharded as")
        assert "rows must stay whole" in said


def test_partial_gradients_are_reduced() -> None:
    """DTensor's own rules may leave a gradient as parts of a sum; Adam needs the sum."""

    def work() -> list[Array]:
        mesh = init_device_mesh("cpu", (2,))
        p = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]))
        part = torch.full((4, 6), 1.0 + 2 * distributed.rank())
        p.grad = DTensor.from_local(part, mesh, [Partial()])
        FusedSAdam([{"params": [p], "basis": torch.eye(6)}], lr=1.0, eps=4.0).step()
        return [full_tensor(p.detach()).numpy()]

    # m_hat / (sqrt(v_hat) + eps) = 4 / (4 + 4)
    assert furthest(in_processes(2, work), [np.full((4, 6), 0.5)]) < ROUNDING


def test_a_non_finite_gradient_is_reported_by_the_process_that_holds_it() -> None:
    def work() -> list[str]:
        net = network(sharded=True)
        net(torch.ones(1, 8)).sum().backward()
        assert net[1].weight.grad is not None
        own = net[1].weight.grad.to_local()
        assert non_finite_gradients(net) == []  # in the third process a part is empty
        if distributed.rank() == 1:
            own[0, 0] = float("nan")
        return non_finite_gradients(net)

    assert in_processes(3, work) == [[], ["1.weight"], []]


def test_a_constraint_holds_for_sharded_parameters() -> None:
    """A frozen half and protected spaces; A and B over three processes, as in one."""

    def work() -> list[Array]:
        model = make_llama(num_hidden_layers=1)
        probe = {"input_ids": torch.tensor([[1, 1]])}
        groups = find_groups(model, target_layers(model, "all-linear"), probe)
        moments = Moments({g.name: torch.eye(g.d_in) for g in groups}, 1, tuple(groups))
        bases = solve(moments, moments, tau=1e-3)
        adapted = attach(
            model, bases, LoraConfig(r=2, lora_alpha=2), init="minor_singular", protect=2
        )
        fresh = lora_factors(copy.deepcopy(adapted))
        if distributed.world_size() > 1:
            fully_shard(adapted, mesh=init_device_mesh("cpu", (distributed.world_size(),)))
        opt = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.0)
        project_after_step(opt, adapted)
        ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            opt.zero_grad()
            adapted(input_ids=ids, labels=ids).loss.backward()
            opt.step()
        name = "model.layers.0.mlp.down_proj"
        a, b, _ = lora_factors(adapted)[name]
        spaces = protected_spaces(adapted.get_base_model().get_submodule(name), "default")
        assert spaces is not None
        assert float((a @ spaces.right).norm()) < 1e-5 * float(a.norm())
        assert float((spaces.left.T @ b).norm()) < 1e-5 * float(b.norm())
        assert torch.equal(a[2:], fresh[name][0][2:]) and torch.equal(
            b[:, 2:], fresh[name][1][:, 2:]
        )
        return [a.numpy(), b.numpy()]

    assert furthest(in_processes(3, work), work()) < 1e-4
