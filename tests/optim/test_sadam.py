"""SAdam: reductions to torch's AdamW, a float64 transcription of Eq. 18-24, and exact resume."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.closeness import assert_near
from support.references import drive, gradients, orthogonal_and_gate, params, reference

import folora
from folora.optim import sadam
from folora.optim.offload import Room
from folora.optim.sadam import Complement, SAdam, basis_fingerprint
from folora.runtime.tensors import full_fp32_matmul


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (3, 17), (20, 8)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_matches_the_equations(shape: tuple[int, int], decay: float) -> None:
    basis, gate = orthogonal_and_gate(shape[1])
    (a,) = params([shape])
    start = a.detach().clone()
    grads = gradients([shape], 60)
    optimizer = SAdam(
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
def test_identity_basis_is_adamw(dtype: torch.dtype, decay: float) -> None:
    """Within roundings, not equal: AdamW may fuse p + step into one rounding, we add twice."""
    shapes = [(4, 6), (2, 6)]
    ours, theirs = params(shapes, dtype), params(shapes, dtype)
    grads = gradients(shapes, 50)
    drive(
        SAdam([{"params": ours, "basis": torch.eye(6), "gate": torch.ones(6)}], lr=1e-2, weight_decay=decay),
        ours, grads,
    )  # fmt: skip
    drive(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=decay), theirs, grads)
    for p, q in zip(ours, theirs, strict=True):
        assert_near(p, q, roundings=10)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_basis_it_is_adamw_to_the_last_bit(dtype: torch.dtype, fused: bool) -> None:
    shapes = [(4, 6), (5, 3)]
    ours, theirs = params(shapes, dtype), params(shapes, dtype)
    grads = gradients(shapes, 50)
    drive(SAdam(ours, lr=1e-2, weight_decay=0.05, fused=fused), ours, grads)
    drive(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.05, fused=fused), theirs, grads)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_one_optimizer_holds_both_kinds() -> None:
    basis, gate = orthogonal_and_gate(6)
    a, b = params([(4, 6), (5, 4)])
    (b2,) = params([(4, 6), (5, 4)])[1:]
    start = a.detach().clone()
    grads = gradients([(4, 6), (5, 4)], 30)
    drive(
        SAdam([{"params": [a], "basis": basis, "gate": gate}, {"params": [b]}], lr=1e-2),
        [a, b],
        grads,
    )
    drive(torch.optim.AdamW([b2], lr=1e-2, weight_decay=0.0), [b2], [[g[1]] for g in grads])
    assert torch.equal(b, b2)
    assert_near(a, reference(start, [g[0] for g in grads], basis, gate, 1e-2), roundings=1e5)


def test_sign_and_order_of_columns_change_nothing() -> None:
    basis, gate = orthogonal_and_gate(8)
    order, signs = torch.randperm(8), torch.randn(8).sign()
    grads = gradients([(3, 8)], 40)
    (a,), (b,) = params([(3, 8)]), params([(3, 8)])
    drive(SAdam([{"params": [a], "basis": basis, "gate": gate}], lr=1e-2), [a], grads)
    other = {"params": [b], "basis": (basis * signs)[:, order], "gate": gate[order]}
    drive(SAdam([other], lr=1e-2), [b], grads)
    assert_near(a, b, roundings=1e3)


def test_parameters_of_a_group_do_not_see_each_other() -> None:
    basis, gate = orthogonal_and_gate(6)
    shapes = [(4, 6), (2, 6), (1, 6)]
    together, alone = params(shapes), params(shapes)
    grads = gradients(shapes, 20)
    drive(SAdam([{"params": together, "basis": basis, "gate": gate}], lr=1e-2), together, grads)
    groups = [{"params": [p], "basis": basis, "gate": gate} for p in alone]
    drive(SAdam(groups, lr=1e-2), alone, grads)
    for p, q in zip(together, alone, strict=True):
        assert_near(p, q, roundings=1e3)


def test_gate_zero_never_moves_and_dense_weights_work() -> None:
    """Appendix D: a weight is stepped as A is; closed directions stay closed under Adam."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64)).Q
    gate = torch.ones(10, dtype=torch.float64)
    gate[3:6] = 0
    (w,) = params([(7, 10)])
    start = w.detach().clone()
    drive(
        SAdam([{"params": [w], "basis": basis, "gate": gate}], lr=0.1),
        [w],
        gradients([(7, 10)], 30),
    )
    moved = (w - start) @ basis
    assert moved[:, 3:6].abs().max() < 1e-12
    assert moved[:, :3].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resume_is_exact(dtype: torch.dtype, tmp_path: Any) -> None:
    basis, gate = orthogonal_and_gate(6)
    shapes = [(4, 6), (5, 4)]
    grads = gradients(shapes, 40)

    def make() -> tuple[list[Any], SAdam]:
        ps = params(shapes, dtype)
        return ps, SAdam(
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


def test_state_holds_no_basis_and_another_basis_is_refused() -> None:
    basis, gate = orthogonal_and_gate(6)
    (a,) = params([(4, 6)])
    optimizer = SAdam([{"params": [a], "basis": basis, "gate": gate}], lr=1e-2)
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
            SAdam([{"params": [a], "basis": other, "gate": gate}]).load_state_dict(state)
    with pytest.raises(ValueError, match="basis"):
        SAdam([a]).load_state_dict(state)
    again = SAdam([{"params": [a], "basis": basis.clone()}])
    own = again.param_groups[0]["basis_fingerprint"]
    again.load_state_dict(copy.deepcopy(state))
    assert again.param_groups[0]["basis_fingerprint"] is own  # a state may come from another device


def test_fingerprint_survives_storage_in_float32() -> None:
    basis, _ = orthogonal_and_gate(32)
    a, b = basis_fingerprint(basis), basis_fingerprint(basis.float())
    assert (a - b).abs().max() < 1e-5 * a.abs().max()


def test_per_group_lr_scheduler_and_clipping() -> None:
    basis, gate = orthogonal_and_gate(6)
    a, b = params([(4, 6), (5, 4)])
    optimizer = SAdam(
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


def test_accumulated_gradients_count_once() -> None:
    basis, gate = orthogonal_and_gate(6)
    (a,), (b,) = params([(4, 6)]), params([(4, 6)])
    x = torch.randn(8, 6, dtype=torch.float64)
    one = SAdam([{"params": [a], "basis": basis, "gate": gate}], lr=1e-2)
    two = SAdam([{"params": [b], "basis": basis, "gate": gate}], lr=1e-2)
    for _ in range(5):
        one.zero_grad()
        ((x @ a.T).sin().sum() / 8).backward()
        one.step()
        two.zero_grad()
        for half in x.split(4):
            ((half @ b.T).sin().sum() / 8).backward()
        two.step()
    assert_near(a, b, roundings=1e3)


def test_closure_and_missing_gradients() -> None:
    basis, gate = orthogonal_and_gate(6)
    a, frozen = params([(4, 6), (2, 6)])
    before = frozen.detach().clone()
    optimizer = SAdam([{"params": [a, frozen], "basis": basis, "gate": gate}], lr=1e-2)

    def closure() -> float:
        optimizer.zero_grad()
        loss = a.square().sum()
        loss.backward()
        return float(loss)

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
        ({"basis": torch.full((6, 6), float("nan"))}, "finite"),
        ({"basis": None}, "gate but no basis"),
        ({"basis": None, "gate": None, "scale": 2.0}, "scale but no basis"),
        ({"complement": Complement(torch.ones(6, 5), torch.ones(6), 0.1)}, r"asks for \(6, 6\)"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    (a,) = params([(4, 6)])
    group = {"params": [a], "basis": torch.eye(6), "gate": torch.ones(6), **change}
    with pytest.raises(ValueError, match=message):
        SAdam([group])


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


def pair(d: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """H and a basis T with T'HT = I, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * d, d, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -1.5, d, dtype=torch.float64)
    h = x.T @ x / len(x)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return h, torch.linalg.inv(torch.linalg.cholesky(h)).T @ rotation


def test_a_cut_basis_is_the_whole_one_with_the_rest_closed() -> None:
    _, basis = pair(12)
    gate = torch.linspace(1, 0.2, 12, dtype=torch.float64)
    gate[5:] = 0
    (whole,), (cut,) = params([(3, 12)]), params([(3, 12)])
    grads = gradients([(3, 12)], 40)
    drive(SAdam([{"params": [whole], "basis": basis, "gate": gate}], lr=1e-2), [whole], grads)
    optimizer = SAdam([{"params": [cut], "basis": basis[:, :5], "gate": gate[:5]}], lr=1e-2)
    drive(optimizer, [cut], grads)
    assert_near(whole, cut, roundings=1e3)
    assert optimizer.state[cut]["exp_avg"].shape == (3, 5)


def test_scale_multiplies_the_basis() -> None:
    basis, gate = orthogonal_and_gate(8)
    (a,), (b,) = params([(3, 8)]), params([(3, 8)])
    grads = gradients([(3, 8)], 40)
    drive(SAdam([{"params": [a], "basis": 3.5 * basis, "gate": gate}], lr=1e-2), [a], grads)
    scaled = SAdam([{"params": [b], "basis": basis, "gate": gate, "scale": 3.5}], lr=1e-2)
    drive(scaled, [b], grads)
    assert_near(a, b, roundings=1e3)
    other = SAdam([{"params": [b], "basis": basis, "gate": gate, "scale": 3.4}], lr=1e-2)
    with pytest.raises(ValueError, match="another basis"):
        other.load_state_dict(scaled.state_dict())


@pytest.mark.parametrize("on_host", [False, True])
def test_a_narrow_basis_is_widened_for_its_products(on_host: bool, monkeypatch: Any) -> None:
    """Blocks of three columns; the reference is a float32 basis of the same values."""
    monkeypatch.setattr(sadam, "COLUMNS_AT_ONCE", 3)
    basis, gate = orthogonal_and_gate(8)
    narrow = basis.to(torch.bfloat16)
    (a,), (b,) = (params([(3, 8)], torch.float32) for _ in range(2))
    grads = gradients([(3, 8)], 40)
    group = {"params": [a], "basis": narrow, "gate": gate, "on_host": on_host}
    optimizer = SAdam([group], lr=1e-2)
    drive(optimizer, [a], grads)
    drive(SAdam([{"params": [b], "basis": narrow.float(), "gate": gate}], lr=1e-2), [b], grads)
    assert optimizer.param_groups[0]["basis"].dtype == torch.bfloat16
    assert_near(a, b)


def test_without_a_gpu_nothing_is_sent_ahead() -> None:
    """What is comes behind the backward pass on one; see test_cuda.py."""
    basis, gate = orthogonal_and_gate(8)
    (a,), (b,) = (params([(3, 8)], torch.float32) for _ in range(2))
    group = {"basis": basis.float(), "gate": gate.float(), "on_host": True}
    ahead, plain = (SAdam([{**group, "params": [p]}], lr=1e-2) for p in (a, b))
    for optimizer, p in ((ahead, a), (plain, b)):
        for _ in range(5):
            with optimizer.ahead() if optimizer is ahead else nullcontext():
                p.square().sum().backward()
            assert not p._post_accumulate_grad_hooks
            optimizer.step()
    assert torch.equal(a, b)


def test_room_is_what_is_let_go_of_and_not_taken_again() -> None:
    room = Room()
    assert room.takes(10, held=90, peak=100)
    assert not room.takes(10, held=100, peak=100)
    assert room.before == 100
    assert room.takes(10, held=80, peak=100)
    rising = Room()
    assert rising.takes(5, held=50, peak=100)
    assert rising.takes(5, held=75, peak=100)  # a layer computed anew: 20 more than was left
    assert not rising.takes(5, held=76, peak=100)  # 76 + 20 + 5
    assert rising.takes(5, held=75, peak=100)


def test_a_complement_moves_what_the_basis_lacks_and_nothing_else() -> None:
    """As its formula says, in float64; and in the metric of H it keeps off the span of T_k."""
    h, basis = pair(10)
    k, floor = 4, 0.3
    t, gate = basis[:, :k], torch.linspace(1, 0.4, k, dtype=torch.float64)
    dual = h @ t
    weight = torch.linspace(0.5, 2, 10, dtype=torch.float64)
    (a,) = params([(3, 10)])
    start = a.detach().clone()
    grads = gradients([(3, 10)], 30)
    group = {"params": [a], "basis": t, "gate": gate, "scale": 0.7}
    drive(SAdam([{**group, "complement": Complement(dual, weight, floor)}], lr=1e-2), [a], grads)

    frame = (torch.eye(10, dtype=torch.float64) - t @ dual.T) @ torch.diag(weight)
    together = 0.7 * torch.cat([t, frame], dim=1)
    gates = torch.cat([gate, torch.full((10,), floor, dtype=torch.float64)])
    expected = reference(start, [g for (g,) in grads], together, gates, 1e-2)
    assert_near(a, expected, roundings=1e3)

    (b,) = params([(3, 10)])
    drive(SAdam([{**group, "params": [b]}], lr=1e-2), [b], grads)
    moved = a - b
    assert moved.abs().max() > 1e-3
    assert (moved @ dual).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_groups_that_are_stepped_together_are_stepped_as_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, whatever their shapes, gates, scales and complements; other rates are kept apart.

    Some groups have no gradient now and then, so that others are left of a stack.
    """
    (h, basis), (_, other) = pair(8), pair(8, seed=1)
    kinds: list[dict[str, Any]] = [
        {"basis": basis, "gate": torch.linspace(1, 0.1, 8)},
        {"basis": basis[:, :3], "scale": 0.5},
        {"basis": basis[:, :3], "complement": Complement(h @ basis[:, :3], torch.ones(8), 0.3)},
        {"basis": basis.bfloat16(), "lr": 3e-2},
        {"basis": basis[:, :5], "weight_decay": 0.1},
        {"basis": other[:, :5], "weight_decay": 0.1, "scale": 2.0},
        {"basis": other[:, :3], "gate": torch.tensor([1.0, 0.5, 0.2])},
        {"basis": basis[:, 1:4]},
        {},
    ]
    shapes = [(rows, 8) for _ in kinds for rows in (2, 3)]
    grads: list[list[Any]] = gradients(shapes, 20)
    for number, step in enumerate(grads):
        if number % 7 == 3:
            step[2] = step[3] = step[8] = None

    def after(most: int) -> tuple[list[Any], list[list[int]]]:
        monkeypatch.setattr(sadam, "TOGETHER", {"cpu": most})
        ps = params(shapes, dtype)
        groups = [{"params": ps[2 * n : 2 * n + 2], **kind} for n, kind in enumerate(kinds)]
        optimizer = SAdam(groups, lr=1e-2)
        drive(optimizer, ps, grads)
        due = [(group, group["params"]) for group in optimizer.param_groups[:-1]]
        stacks = [*sadam._stacks(due)]
        assert all(
            g["basis"].data_ptr() == b.data_ptr()
            for s in stacks
            for (g, _), b in zip(s.work, s.bases.basis, strict=True)
        )
        return ps, [[len(stack.work) for stack in bundle] for bundle in sadam._bundles(stacks)]

    together, bundles = after(2**24)
    alone, single = after(1)
    assert (bundles, single) == ([[1, 3, 1], [1], [2]], [[1]] * 8)
    assert all(torch.equal(p, q) for p, q in zip(together, alone, strict=True))


@pytest.mark.parametrize(("k", "with_complement"), [(3, True), (4, False)])
def test_moments_of_another_cut_are_refused(k: int, with_complement: bool) -> None:
    h, basis = pair(8)
    (a,) = params([(3, 8)])

    def make(k: int, with_complement: bool) -> SAdam:
        t = basis[:, :k]
        rest = Complement(h @ t, torch.ones(8), 0.1) if with_complement else None
        return SAdam([{"params": [a], "basis": t, "complement": rest}])

    saved = make(4, True)
    drive(saved, [a], gradients([(3, 8)], 2))
    make(4, True).load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="another basis"):
        make(k, with_complement).load_state_dict(saved.state_dict())


def test_a_compiled_step_is_the_step() -> None:
    basis, gate = orthogonal_and_gate(6)
    shapes = [(4, 6), (5, 4)]
    grads = gradients(shapes, 5)
    found = []
    for compiled in (False, True):
        ps = params(shapes, torch.float32)
        optimizer = SAdam(
            [{"params": ps[:1], "basis": basis, "gate": gate}, {"params": ps[1:]}], lr=1e-2
        )
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend="aot_eager")  # type: ignore[method-assign]
        drive(optimizer, ps, grads)
        found.append(ps)
    for p, q in zip(*found, strict=True):
        assert_near(p, q, roundings=10)


def test_public_name() -> None:
    assert folora.SAdam is SAdam
