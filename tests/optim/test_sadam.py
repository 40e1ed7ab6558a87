"""SAdam, reference and fused: reductions to AdamW, the equations in float64, resuming, refusals."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.closeness import assert_near
from support.references import drive, gradients, orthogonal_and_gate, params, reference

import folora
from folora.optim import sadam
from folora.optim.fused import FusedSAdam
from folora.optim.sadam import SAdam, basis_fingerprint


@pytest.fixture(params=[SAdam, FusedSAdam])
def kind(request: pytest.FixtureRequest) -> type[SAdam]:
    return request.param


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (3, 17), (20, 8)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_matches_the_equations(kind: type[SAdam], shape: tuple[int, int], decay: float) -> None:
    basis, gate = orthogonal_and_gate(shape[1])
    (a,) = params([shape])
    start = a.detach().clone()
    grads = gradients([shape], 60)
    optimizer = kind(
        [{"params": [a], "basis": basis, "gate": gate}],
        lr=3e-2,
        betas=(0.8, 0.95),
        weight_decay=decay,
    )
    drive(optimizer, [a], grads)
    expected = reference(start, [g for (g,) in grads], basis, gate, 3e-2, (0.8, 0.95), decay=decay)
    assert_near(a, expected, roundings=1e5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_identity_basis_is_adamw(kind: type[SAdam], dtype: torch.dtype, decay: float) -> None:
    """Within roundings, not equal: AdamW may fuse p + step into one rounding, we add twice."""
    shapes = [(4, 6), (2, 6)]
    ours, theirs = params(shapes, dtype), params(shapes, dtype)
    grads = gradients(shapes, 50)
    drive(
        kind([{"params": ours, "basis": torch.eye(6), "gate": torch.ones(6)}], lr=1e-2, weight_decay=decay),
        ours, grads,
    )  # fmt: skip
    drive(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=decay), theirs, grads)
    for p, q in zip(ours, theirs, strict=True):
        assert_near(p, q, roundings=10)


def test_groups_with_and_without_a_basis_share_an_optimizer(kind: type[SAdam]) -> None:
    basis, gate = orthogonal_and_gate(6)
    a, b = params([(4, 6), (5, 4)])
    (b2,) = params([(4, 6), (5, 4)])[1:]
    start = a.detach().clone()
    grads = gradients([(4, 6), (5, 4)], 30)
    drive(
        kind([{"params": [a], "basis": basis, "gate": gate}, {"params": [b]}], lr=1e-2),
        [a, b],
        grads,
    )
    drive(torch.optim.AdamW([b2], lr=1e-2, weight_decay=0.0), [b2], [[g[1]] for g in grads])
    assert_near(b, b2, roundings=10)
    assert_near(a, reference(start, [g[0] for g in grads], basis, gate, 1e-2), roundings=1e5)


def test_sign_and_order_of_columns_change_nothing(kind: type[SAdam]) -> None:
    basis, gate = orthogonal_and_gate(8)
    order, signs = torch.randperm(8), torch.randn(8).sign()
    grads = gradients([(3, 8)], 40)
    (a,), (b,) = params([(3, 8)]), params([(3, 8)])
    drive(kind([{"params": [a], "basis": basis, "gate": gate}], lr=1e-2), [a], grads)
    other = {"params": [b], "basis": (basis * signs)[:, order], "gate": gate[order]}
    drive(kind([other], lr=1e-2), [b], grads)
    assert_near(a, b, roundings=1e3)


def test_parameters_of_a_group_are_independent(kind: type[SAdam]) -> None:
    basis, gate = orthogonal_and_gate(6)
    shapes = [(4, 6), (2, 6), (1, 6)]
    together, alone = params(shapes), params(shapes)
    grads = gradients(shapes, 20)
    drive(kind([{"params": together, "basis": basis, "gate": gate}], lr=1e-2), together, grads)
    groups = [{"params": [p], "basis": basis, "gate": gate} for p in alone]
    drive(kind(groups, lr=1e-2), alone, grads)
    for p, q in zip(together, alone, strict=True):
        assert_near(p, q, roundings=1e3)


def test_a_direction_with_gate_zero_never_moves_in_a_dense_weight(kind: type[SAdam]) -> None:
    """Appendix D: a weight is stepped as A is; closed directions stay closed under Adam."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64)).Q
    gate = torch.ones(10, dtype=torch.float64)
    gate[3:6] = 0
    (w,) = params([(7, 10)])
    start = w.detach().clone()
    drive(
        kind([{"params": [w], "basis": basis, "gate": gate}], lr=0.1),
        [w],
        gradients([(7, 10)], 30),
    )
    moved = (w - start) @ basis
    assert moved[:, 3:6].abs().max() < 1e-12
    assert moved[:, :3].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resume_is_exact(kind: type[SAdam], dtype: torch.dtype, tmp_path: Any) -> None:
    basis, gate = orthogonal_and_gate(6)
    shapes = [(4, 6), (5, 4)]
    grads = gradients(shapes, 40)

    def make() -> tuple[list[Any], SAdam]:
        ps = params(shapes, dtype)
        return ps, kind(
            [{"params": [ps[0]], "basis": basis, "gate": gate}, {"params": [ps[1]]}], lr=1e-2
        )

    whole, optimizer = make()
    drive(optimizer, whole, grads)
    first, optimizer = make()
    drive(optimizer, first, grads[:20])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    second, resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for p, q in zip(second, first, strict=True):
        p.data.copy_(q.data)
    drive(resumed, second, grads[20:])
    assert all(torch.equal(p, q) for p, q in zip(whole, second, strict=True))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert resumed.state[second[0]]["exp_avg"].dtype == wide


def test_state_holds_no_basis_and_another_basis_is_refused(kind: type[SAdam]) -> None:
    basis, gate = orthogonal_and_gate(6)
    (a,) = params([(4, 6)])
    optimizer = kind([{"params": [a], "basis": basis, "gate": gate}], lr=1e-2)
    drive(optimizer, [a], gradients([(4, 6)], 3))
    state = optimizer.state_dict()
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert "basis" not in state["param_groups"][0]
    assert "basis" in optimizer.param_groups[0]
    flipped = basis.clone()
    flipped[:, 2] *= -1
    swapped = basis[:, [1, 0, 2, 3, 4, 5]]
    for other in (flipped, swapped, -basis, basis * 1.01):
        with pytest.raises(ValueError, match="another basis"):
            kind([{"params": [a], "basis": other, "gate": gate}]).load_state_dict(state)
    with pytest.raises(ValueError, match="basis"):
        kind([a]).load_state_dict(state)
    again = kind([{"params": [a], "basis": basis.clone()}])
    own = again.param_groups[0]["basis_fingerprint"]
    again.load_state_dict(copy.deepcopy(state))
    assert again.param_groups[0]["basis_fingerprint"] is own  # a state may come from another device


def test_fingerprint_survives_storage_in_float32() -> None:
    basis, _ = orthogonal_and_gate(32)
    a, b = basis_fingerprint(basis), basis_fingerprint(basis.float())
    assert (a - b).abs().max() < 1e-5 * a.abs().max()


def test_per_group_lr_scheduler_and_clipping(kind: type[SAdam]) -> None:
    basis, gate = orthogonal_and_gate(6)
    a, b = params([(4, 6), (5, 4)])
    optimizer = kind(
        [{"params": [a], "basis": basis, "gate": gate, "lr": 1e-2}, {"params": [b], "lr": 4e-2}]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(
            [1e-2 * 0.5**step, 4e-2 * 0.5**step]
        )
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        torch.nn.utils.clip_grad_norm_([a, b], 1.0)
        optimizer.step()
        schedule.step()


def test_accumulated_gradients_count_once(kind: type[SAdam]) -> None:
    basis, gate = orthogonal_and_gate(6)
    (a,), (b,) = params([(4, 6)]), params([(4, 6)])
    x = torch.randn(8, 6, dtype=torch.float64)
    one = kind([{"params": [a], "basis": basis, "gate": gate}], lr=1e-2)
    two = kind([{"params": [b], "basis": basis, "gate": gate}], lr=1e-2)
    for _ in range(5):
        one.zero_grad()
        ((x @ a.T).sin().sum() / 8).backward()
        one.step()
        two.zero_grad()
        for half in x.split(4):
            ((half @ b.T).sin().sum() / 8).backward()
        two.step()
    assert_near(a, b, roundings=1e3)


def test_closure_and_missing_gradients(kind: type[SAdam]) -> None:
    basis, gate = orthogonal_and_gate(6)
    a, frozen = params([(4, 6), (2, 6)])
    before = frozen.detach().clone()
    optimizer = kind([{"params": [a, frozen], "basis": basis, "gate": gate}], lr=1e-2)

    def closure() -> float:
        optimizer.zero_grad()
        loss = a.square().sum()
        loss.backward()
        return float(loss.detach())

    losses = [optimizer.step(closure) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert torch.equal(frozen, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"basis": torch.ones(6, 7), "gate": torch.ones(7)}, "k <= d"),
        ({"basis": torch.ones(6)}, "k <= d"),
        ({"basis": torch.eye(5), "gate": torch.ones(5)}, "shape"),
        ({"gate": torch.ones(5)}, "gate"),
        ({"basis": torch.full((6, 6), float("nan"))}, "NaN or Inf"),
        ({"basis": None}, "gate is given without a basis"),
        ({"basis": None, "gate": None, "scale": 2.0}, "scale is given without a basis"),
    ],
)
def test_refuses(kind: type[SAdam], change: dict[str, Any], message: str) -> None:
    (a,) = params([(4, 6)])
    group = {"params": [a], "basis": torch.eye(6), "gate": torch.ones(6), **change}
    with pytest.raises(ValueError, match=message):
        kind([group])


def test_a_truncated_basis_is_the_whole_one_with_a_zero_gate_beyond(kind: type[SAdam]) -> None:
    basis, _ = orthogonal_and_gate(12)
    gate = torch.linspace(1, 0.2, 12, dtype=torch.float64)
    gate[5:] = 0
    (whole,), (cut,) = params([(3, 12)]), params([(3, 12)])
    grads = gradients([(3, 12)], 40)
    drive(kind([{"params": [whole], "basis": basis, "gate": gate}], lr=1e-2), [whole], grads)
    optimizer = kind([{"params": [cut], "basis": basis[:, :5], "gate": gate[:5]}], lr=1e-2)
    drive(optimizer, [cut], grads)
    assert_near(whole, cut, roundings=1e3)
    assert optimizer.state[cut]["exp_avg"].shape == (3, 5)


def test_scale_multiplies_the_basis(kind: type[SAdam]) -> None:
    basis, gate = orthogonal_and_gate(8)
    (a,), (b,) = params([(3, 8)]), params([(3, 8)])
    grads = gradients([(3, 8)], 40)
    drive(kind([{"params": [a], "basis": 3.5 * basis, "gate": gate}], lr=1e-2), [a], grads)
    scaled = kind([{"params": [b], "basis": basis, "gate": gate, "scale": 3.5}], lr=1e-2)
    drive(scaled, [b], grads)
    assert_near(a, b, roundings=1e3)
    other = kind([{"params": [b], "basis": basis, "gate": gate, "scale": 3.4}], lr=1e-2)
    with pytest.raises(ValueError, match="another basis"):
        other.load_state_dict(scaled.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_basis_is_used_in_the_dtype_of_the_arithmetic(
    kind: type[SAdam], dtype: torch.dtype
) -> None:
    basis, gate = orthogonal_and_gate(8)
    given = basis.to(dtype)
    (a,), (b,) = (params([(3, 8)], torch.float32) for _ in range(2))
    grads = gradients([(3, 8)], 40)
    optimizer = kind([{"params": [a], "basis": given, "gate": gate}], lr=1e-2)
    drive(optimizer, [a], grads)
    drive(kind([{"params": [b], "basis": given.float(), "gate": gate}], lr=1e-2), [b], grads)
    assert optimizer.param_groups[0]["basis"].dtype == torch.float32
    assert torch.equal(a, b)


def test_moments_of_another_number_of_columns_are_refused(kind: type[SAdam]) -> None:
    basis, _ = orthogonal_and_gate(8)
    (a,) = params([(3, 8)])
    saved = kind([{"params": [a], "basis": basis[:, :4]}])
    drive(saved, [a], gradients([(3, 8)], 2))
    kind([{"params": [a], "basis": basis[:, :4]}]).load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="another basis"):
        kind([{"params": [a], "basis": basis[:, :3]}]).load_state_dict(saved.state_dict())


def test_another_number_of_groups_is_refused(kind: type[SAdam]) -> None:
    ps = params([(4, 6), (5, 4)])
    saved = kind([{"params": [p]} for p in ps]).state_dict()
    with pytest.raises(ValueError, match="the state has 2 parameter groups, not 1"):
        kind(ps).load_state_dict(saved)


def test_sparse_gradients_are_refused(kind: type[SAdam]) -> None:
    (a,) = params([(4, 6)])
    a.grad = torch.ones(4, 6, dtype=a.dtype).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        kind([a]).step()


def test_a_copy_steps_as_the_original(kind: type[SAdam]) -> None:
    basis, gate = orthogonal_and_gate(6)
    shapes = [(4, 6), (4, 6), (5, 4)]
    grads = gradients(shapes, 10)
    ps = params(shapes)
    groups = [{"params": [p], "basis": basis, "gate": gate} for p in ps[:2]]
    optimizer = kind([*groups, {"params": ps[2:]}], lr=1e-2)
    drive(optimizer, ps, grads[:5])
    twin = copy.deepcopy(optimizer)
    copies = [p for group in twin.param_groups for p in group["params"]]
    drive(optimizer, ps, grads[5:])
    drive(twin, copies, grads[5:])
    assert all(torch.equal(p, q) for p, q in zip(ps, copies, strict=True))


def test_public_name() -> None:
    assert folora.SAdam is FusedSAdam


def test_the_reference_may_be_copied_alone(tmp_path: Path) -> None:
    """One file of at most 200 lines that needs torch and nothing of ours."""
    source = Path(sadam.__file__).read_text()
    assert len(source.splitlines()) <= 200
    (tmp_path / "copied.py").write_text(source)
    code = "import sys, copied; print(copied.SAdam.__name__, 'folora' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["SAdam", "False"]
