"""FusedSAdam takes the reference's steps in every mode, and its states are the reference's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.closeness import assert_near
from support.references import drive, gradients, orthogonal_and_gate, params, reference

from folora.optim import fused
from folora.optim.fused import FusedSAdam
from folora.optim.sadam import SAdam
from folora.runtime.tensors import full_fp32_matmul

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
STEPS = 20


def group(
    columns: slice = slice(None), d: int = 8, seed: int = 0, gated: bool = True, **more: Any
) -> dict[str, Any]:
    """A group's basis, the given columns of a random one, and what else it holds."""
    basis, gate = orthogonal_and_gate(d, seed)
    found = {"basis": basis[:, columns], **({"gate": gate[columns]} if gated else {}), **more}
    return {"d": d, **found}


CUT = slice(0, 3)
MODES: dict[str, list[dict[str, Any]]] = {
    "whole basis": [group()],
    "cut basis": [group(CUT)],
    "no gate": [group(CUT, gated=False)],
    "no basis": [{"d": 8}],
    "scale": [group(CUT, scale=0.5)],
    "weight decay": [group(CUT, weight_decay=0.1), {"d": 8, "weight_decay": 0.1}],
    "equal shapes": [group(CUT, seed=s, scale=1.0 + s) for s in range(4)],
    "unequal shapes": [group(CUT), group(d=5, seed=1), group(slice(2, 4), d=12, seed=2), {"d": 8}],
    "other hyperparameters": [
        group(CUT), group(CUT, seed=1, lr=3e-2), group(CUT, seed=2, betas=(0.8, 0.95)),
        group(CUT, seed=3, eps=1e-3), group(CUT, seed=4),
    ],
}  # fmt: skip


def made(kind: type[SAdam], mode: str, dtype: torch.dtype) -> tuple[list[Any], SAdam]:
    """Two parameters for each group of a mode, and their optimizer."""
    groups = MODES[mode]
    ps = params([(rows, found["d"]) for found in groups for rows in (2, 3)], dtype)
    return ps, kind(
        [{**found, "params": ps[2 * n : 2 * n + 2]} for n, found in enumerate(groups)], lr=1e-2
    )


def grads_for(ps: list[Any], steps: int = STEPS, missing: bool = False) -> list[list[Any]]:
    found: list[list[Any]] = gradients([tuple(p.shape) for p in ps], steps)
    if missing:  # of one parameter, of a whole group, of all
        for number, step in enumerate(found):
            if number % 5 == 2:
                step[0] = None
            if number % 5 == 3:
                step[-2:] = [None, None]
        found[7] = [None] * len(ps)
    return found


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_steps_are_those_of_the_reference(mode: str, dtype: torch.dtype, missing: bool) -> None:
    found = []
    for kind in (SAdam, FusedSAdam):
        ps, optimizer = made(kind, mode, dtype)
        drive(optimizer, ps, grads_for(ps, missing=missing))
        found.append(ps)
    for p, q in zip(*found, strict=True):
        assert_near(q, p, roundings=10)


@pytest.mark.parametrize("kinds", [(SAdam, FusedSAdam), (FusedSAdam, SAdam)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_states_are_interchangeable(
    mode: str, dtype: torch.dtype, kinds: tuple[type[SAdam], type[SAdam]]
) -> None:
    ps, undisturbed = made(kinds[0], mode, dtype)
    first, before = made(kinds[0], mode, dtype)
    grads = grads_for(ps)
    drive(undisturbed, ps, grads)
    drive(before, first, grads[: STEPS // 2])
    second, after = made(kinds[1], mode, dtype)
    for p, q in zip(second, first, strict=True):
        p.data.copy_(q.data)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    drive(after, second, grads[STEPS // 2 :])
    for p, q in zip(ps, second, strict=True):
        assert_near(q, p, roundings=10)
    for one, other in zip(undisturbed.state.values(), after.state.values(), strict=True):
        assert {k: (v.shape, v.dtype) for k, v in one.items()} == {
            k: (v.shape, v.dtype) for k, v in other.items()
        }


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_basis_it_is_fused_adamw_to_the_last_bit(dtype: torch.dtype) -> None:
    shapes = [(4, 6), (5, 3)]
    ours, theirs = params(shapes, dtype), params(shapes, dtype)
    grads = gradients(shapes, 50)
    drive(FusedSAdam(ours, lr=1e-2, weight_decay=0.05), ours, grads)
    drive(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.05, fused=True), theirs, grads)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_stepped_together_are_stepped_as_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, also when groups without a gradient leave others of a stack."""
    found = []
    for most, wanted in ((2**24, [[4, 1]]), (1, [[1]] * 5)):
        monkeypatch.setattr(fused, "MAX_ELEMENTS", {"cpu": most})
        monkeypatch.setitem(MODES, "together", [*MODES["equal shapes"], group(d=5, seed=1)])
        ps, optimizer = made(FusedSAdam, "together", dtype)
        drive(optimizer, ps, grads_for(ps, missing=True))
        bundles = fused._bundles([*map(optimizer._active, optimizer.param_groups)])
        assert [[len(stack) for stack in bundle] for bundle in bundles] == wanted
        found.append(ps)
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


def test_bases_of_a_stack_are_kept_once() -> None:
    """The groups hold views of the stack, which is made once."""
    ps, optimizer = made(FusedSAdam, "equal shapes", torch.float32)
    grads = grads_for(ps)
    drive(optimizer, ps, grads[:1])
    stack = optimizer.param_groups[0]["stack"]
    drive(optimizer, ps, grads[1:])
    for one, basis in zip(optimizer.param_groups, stack.basis, strict=True):
        assert one["stack"] is stack
        assert one["basis"].data_ptr() == basis.data_ptr()


def test_a_gate_that_is_replaced_holds_from_the_next_step_on() -> None:
    found = []
    for kind in (SAdam, FusedSAdam):
        ps, optimizer = made(kind, "equal shapes", torch.float64)
        grads = grads_for(ps)
        drive(optimizer, ps, grads[:5])
        optimizer.param_groups[1]["gate"] = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        drive(optimizer, ps, grads[5:])
        found.append(ps)
    for p, q in zip(*found, strict=True):
        assert_near(q, p, roundings=100)


def test_the_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    found = []
    for kind in (SAdam, FusedSAdam):
        ps, optimizer = made(kind, "unequal shapes", torch.float64)

        def closure(ps: list[Any] = ps, optimizer: SAdam = optimizer) -> float:
            optimizer.zero_grad()
            loss = torch.stack([p.square().sum() for p in ps]).sum()
            loss.backward()
            return float(loss.detach())

        found.append([optimizer.step(closure) for _ in range(10)])
    assert found[0] == pytest.approx(found[1])
    assert found[1][-1] < found[1][0]


def test_a_compiled_step_is_the_step() -> None:
    found = []
    for compiled in (False, True):
        ps, optimizer = made(FusedSAdam, "unequal shapes", torch.float32)
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend="aot_eager")  # type: ignore[method-assign]
        drive(optimizer, ps, grads_for(ps, steps=5))
        found.append(ps)
    for p, q in zip(*found, strict=True):
        assert_near(p, q, roundings=10)


def test_fp32_products_ignore_and_restore_the_users_switch() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with full_fp32_matmul():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(RuntimeError), full_fp32_matmul():
            raise RuntimeError
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_equations_in_float32_whatever_the_users_switch() -> None:
    (a,) = params([(4, 64)], torch.float32)
    basis, gate = orthogonal_and_gate(64)
    grads = gradients([(4, 64)], 10)
    expected = reference(a.detach().double(), [g for (g,) in grads], basis, gate, 1e-2)
    torch.set_float32_matmul_precision("medium")
    try:
        drive(FusedSAdam([{"params": [a], "basis": basis, "gate": gate}], lr=1e-2), [a], grads)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_near(a.double(), expected, roundings=1e3, dtype=torch.float32)
