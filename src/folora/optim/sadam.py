"""SAdam: Adam whose steps are taken, and gated, in a fixed basis of the input space.

A matrix parameter P of shape (rows, d) that multiplies inputs x as P x is stepped along the columns
of a basis T (d, d) instead of along the coordinate axes (arXiv:2606.00132, Eq. 18-24)::

    Gbar = G T                            gradient in the basis
    m, v = Adam's moments of Gbar         they live in the basis, and only mean something there
    step = m_hat / (sqrt(v_hat) + eps)    Adam's preconditioned step
    P   <- (1 - lr * weight_decay) P - lr * step diag(s) T'

The gate s (d,) says how much of the step each direction keeps. Projecting a gradient before Adam
would not do: Adam rescales each coordinate and so leaves the subspace; here the moments themselves
are kept in the basis. Parameter groups without a basis are stepped by torch's own AdamW.

A basis may be cut to its first k columns T_k (d, k), with moments (rows, k). What lies beyond is then
closed, which is exact for a gate that is zero there, or stepped as a whole through a `Complement`.

Nothing of a step mixes rows. A parameter whose rows are shared out over processes (a DTensor, as FSDP2
makes them) is therefore stepped by each process for its own rows, with moments shared out likewise.

This file and `transit` need nothing but torch, so that they can be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from folora.optim.offload import Transit
from folora.runtime.tensors import full_fp32_matmul, own_part, whole

BASIS_KEYS = ("basis", "gate", "scale", "complement", "on_host", "stack")
FINGERPRINT = "basis_fingerprint"  # what stands for them in a state
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "fused")
# Numbers of parameters in one go, and of bases in one stack: more leave a CPU's cache; a GPU waits for the host.
TOGETHER = {"cpu": 2**22, "cuda": 2**24}
COLUMNS_AT_ONCE = 2048  # of a basis kept in another dtype, widened for its products

Work = tuple[dict[str, Any], list[Tensor]]
"""A parameter group, and those of its parameters that have a gradient."""

Moments = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""``exp_avg``, ``exp_avg_sq`` and ``step`` of some parameters."""


@dataclass(frozen=True)
class Complement:
    """How the directions beyond a cut basis are stepped without storing them.

    With T'HT = I the projection on their span along T_k's is P = I - T_k (H T_k)'. They are stepped
    in the frame of the d columns of P diag(w)::

        Gbar_c = (G - G T_k (H T_k)') diag(w)                in the frame
        X      = step_c diag(w)
        P      <- P - lr * gate * (X - X H T_k T_k')         back, and off the span of T_k

    Attributes:
        dual: H T_k, shape (d, k), any floating dtype.
        weight: w, shape (d,).
        gate: Share of the step that they keep, in [0, 1].
    """

    dual: Tensor
    weight: Tensor
    gate: float


@dataclass(frozen=True)
class Bases:
    """What groups of one shape are stepped with.

    Attributes:
        basis: Where the parameters are, (n, d, k).
        gate: (n, 1, k).
        scale: (n, 1, 1), or of one group a number.
        parts: Those of each group; of the tensors they are parts.
    """

    basis: Tensor
    gate: Tensor
    scale: Tensor | float
    parts: list[dict[str, Any]]


@dataclass(frozen=True)
class Stack:
    """Groups of one shape, whose products with their bases are made in one."""

    work: list[Work]
    bases: Bases


class SAdam(Optimizer):
    """Adam in a spectral basis with a gate on every direction; AdamW where there is no basis.

    Args:
        params: Parameters or groups. A group may hold ``"basis"`` T, shape (d, k) with k <= d;
            all its parameters then have shape (rows, d) and share T, and their products with T are
            done in one. With it may come ``"gate"`` s, shape (k,) (default: ones); ``"scale"``, a
            number that multiplies T (1); ``"complement"``, a `Complement` (what T lacks is closed);
            and ``"on_host"``: leave T on the device where it lies, in pinned memory for speed, and
            bring it over for each step, the next one while this one is used, or before; see `ahead`
            (False: T moves to the parameters' device and stays). A T that is a DTensor stays shared out over its processes
            and is gathered for each step. Arithmetic and moments of such a group are float32
            (float64 for float64 parameters) whatever the dtype of parameters and T.
            Parameters may be DTensors, those of a basis sharded by rows.
            A group without a basis is stepped exactly as by ``torch.optim.AdamW(fused=...)``.
        lr: Learning rate, finite and >= 0.
        betas: Decay of the two moments, each in [0, 1).
        eps: Added to the root of the second moment, >= 0.
        weight_decay: Decoupled decay in the original coordinates, >= 0.
        fused: Use torch's fused kernel for the moments, as its AdamW would.

    Groups that differ in basis and gate alone share their products, if they are small enough; their bases
    are parts of one tensor then.

    Raises:
        ValueError: A value is outside of its interval, a shape does not fit, a basis is not finite,
            or `load_state_dict` is given moments that belong to another basis.

    The basis is not part of ``state_dict()``; a random projection of it (a (d,) vector that changes
    with any sign, order or rotation of the columns) is, and loading compares it.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = True,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused
        }  # fmt: skip
        super().__init__(params, defaults)
        self._transit = Transit()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its numbers and, if it has one, its basis."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_hyperparameters(group)
            if group.get("basis") is None:
                if given := [k for k in BASIS_KEYS if group.get(k) is not None]:
                    raise ValueError(f"a group has {given[0]} but no basis; give both, or neither")
                group.pop("basis", None)
            else:
                _prepare_basis(group)
        except ValueError as error:
            self.param_groups.pop()
            raise ValueError(f"SAdam, parameter group {len(self.param_groups)}: {error}") from error

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; `closure` may re-evaluate the model and return the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        due = [(g, p) for g in self.param_groups if (p := _with_gradient(g))]
        for group, params in due:
            _follow(group, params[0].device)
        for group, params in due:
            if "basis" not in group:
                moments = self._moments(group, params)
                _adamw(group, [*map(own_part, params)], [*map(_own_gradient, params)], moments)
        for together in self._bundled([one for one in due if "basis" in one[0]]):
            self._step_in_bases(together)
        self._transit.let_go()  # there may have been no gradients after all
        return loss

    def ahead(self) -> AbstractContextManager[None]:
        """Bring bases over from the host behind the backward pass that runs in this block.

        Each is sent as soon as its parameter has its gradient, if the device then holds no more than it
        has held before: into what the pass lets go of. The next step uses them, and has them left to
        bring for which there was no room. For the last backward pass before a step; without a GPU, or
        bases on the host, it does nothing. No hook outlives the block.
        """
        hosted = [g for g in self.param_groups if g.get("on_host") and "basis" in g]
        return self._transit.behind([(g["basis"], g["params"][0]) for g in hosted])

    def _bundled(self, due: list[Work]) -> Iterator[list[Stack]]:
        """Groups with a basis, and their bases where the parameters are, as many at once as have room."""
        yield from _bundles(_stacks(one for one in due if not _is_away(one[0])))
        away = [one for one in due if _is_away(one[0])]
        for group, params in away:
            if isinstance(group["basis"], DTensor):
                yield [_alone((group, params), whole(group["basis"]).to(params[0].device))]
        hosted = [one for one in away if not isinstance(one[0]["basis"], DTensor)]
        sent = self._transit.sent()
        come = [one for one in hosted if id(one[0]["basis"]) in sent]
        come.sort(key=lambda one: sent[id(one[0]["basis"])])
        yield from _bundles(self._brought(come))
        for stack in self._brought([o for o in hosted if id(o[0]["basis"]) not in sent]):
            yield [stack]

    def _brought(self, hosted: list[Work]) -> Iterator[Stack]:
        """Groups whose bases lie on the host, one by one when theirs has come."""
        due = [(group["basis"], params[0].device) for group, params in hosted]
        for one, basis in zip(hosted, self._transit.bring(due), strict=True):
            yield _alone(one, basis)

    def _step_in_bases(self, stacks: list[Stack]) -> None:
        """One gated step of groups that differ in shape and basis alone (Eq. 18-24).

        Products with the bases are made for a stack at once, all else for all of them: on a GPU it is the
        number of kernels that takes time, not their size.
        """
        work = [one for stack in stacks for one in stack.work]
        owns = [[own_part(p) for _, params in stack.work for p in params] for stack in stacks]
        moments: Moments = ([], [], [])
        for group, params in work:
            gate, complement = group["gate"], group["complement"]
            columns = len(gate) + (0 if complement is None else len(group["basis"]))
            for all_of_them, own in zip(
                moments, self._moments(group, params, gate.dtype, columns), strict=True
            ):
                all_of_them += own
        with full_fp32_matmul():
            gbars = [_gradient_in_bases(stack) for stack in stacks]
            # AdamW on zeros leaves -lr * m_hat / (sqrt(v_hat) + eps) in them.
            zeros = gbars[0].new_zeros(sum(g.numel() for g in gbars))
            parts = zeros.split([g.numel() for g in gbars])
            steps = [part.view_as(g) for part, g in zip(parts, gbars, strict=True)]
            rows = [[p.shape[0] for p in own] for own in owns]
            _adamw(work[0][0], _split(steps, rows), _split(gbars, rows), moments, decay=False)
            del gbars
            updates = [*map(_gated_updates, stacks, steps)]
        shrink = 1.0 - work[0][0]["lr"] * work[0][0]["weight_decay"]
        _move([*chain(*owns)], _split(updates, rows), shrink)

    def _moments(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        dtype: torch.dtype | None = None,
        columns: int | None = None,
    ) -> Moments:
        """This process's part of the parameters' states, which are made on first use.

        Args:
            group: The parameters'.
            params: Those that have a gradient.
            dtype: Of the moments, if not the parameters' own.
            columns: Of the moments, if not as many as the parameters'.
        """
        for p in params:
            if not (state := self.state[p]):
                # The fused kernel counts steps where it runs, the others on the host.
                state["step"] = torch.zeros((), device=p.device if group["fused"] else "cpu")
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = _zeros_like(p, dtype or p.dtype, columns)
        states = [self.state[p] for p in params]
        first, second, steps = (
            [own_part(state[name]) for state in states]
            for name in ("exp_avg", "exp_avg_sq", "step")
        )
        return first, second, steps

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_transit", Transit())  # no part of a state
        for group in self.param_groups:
            group.setdefault("fused", False)  # states of before there was a choice

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with each basis and what goes with it replaced by ``basis_fingerprint``, (d,)."""
        state: dict[str, Any] = super().state_dict()
        for group in state["param_groups"]:
            for key in BASIS_KEYS:
                group.pop(key, None)
            if FINGERPRINT in group:  # torch.distributed.checkpoint loads into what it is given
                group[FINGERPRINT] = group[FINGERPRINT].clone()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state after checking that its moments belong to this optimizer's bases."""
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"the saved state has {len(saved_groups)} parameter groups, this optimizer has "
                f"{len(self.param_groups)}"
            )
        for index, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            _check_same_basis(index, group, saved.get(FINGERPRINT))
        own = (*BASIS_KEYS, FINGERPRINT)
        bases = [{k: g[k] for k in own if k in g} for g in self.param_groups]
        super().load_state_dict(state_dict)
        for group, basis, saved in zip(self.param_groups, bases, saved_groups, strict=True):
            group.update(basis)
            if basis:
                # torch casts moments to the parameter's dtype; those of a basis are wider.
                for p, key in zip(group["params"], saved["params"], strict=True):
                    for name in ("exp_avg", "exp_avg_sq"):
                        if key in state_dict["state"]:
                            value = state_dict["state"][key][name]
                            self.state[p][name] = value.to(
                                device=p.device, dtype=basis["gate"].dtype, copy=True
                            )


def basis_fingerprint(basis: Tensor, scale: float = 1.0) -> Tensor:
    """Project a basis on a fixed random vector: (d, k) -> (d,) float64 on the CPU.

    A linear sketch in place of a hash: equal bases agree to rounding on any device, while another
    sign, order or rotation of the columns moves the sketch by the size of the change.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64)
    return scale * (basis.detach().double() @ probe.to(basis.device)).cpu()


def _own_gradient(p: Tensor) -> Tensor:
    """The gradient of the part of p that this process has."""
    grad = p.grad
    assert grad is not None
    if isinstance(p, DTensor) and isinstance(grad, DTensor):  # it may be a sum not yet added up
        grad = grad.redistribute(p.device_mesh, p.placements)
    return own_part(grad)


def _zeros_like(p: Tensor, dtype: torch.dtype, columns: int | None) -> Tensor:
    """Zeros in the shape of p, or with another number of columns, shared out as p is."""
    shape = tuple(p.shape) if columns is None else (len(p), columns)
    own = own_part(p)
    zeros = torch.zeros(
        own.shape if columns is None else (len(own), columns), dtype=dtype, device=p.device
    )
    if not isinstance(p, DTensor):
        return zeros
    if columns is not None and not all(x in (Shard(0), Replicate()) for x in p.placements):
        raise ValueError(
            f"a parameter of shape {shape} with a basis is sharded as {p.placements}, but its rows must "
            "stay whole: Shard(0), which is what FSDP2 does by default"
        )
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        zeros, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _is_away(group: dict[str, Any]) -> bool:
    """Whether a basis is brought over for each step."""
    return group["on_host"] or isinstance(group["basis"], DTensor)


def _follow(group: dict[str, Any], device: torch.device) -> None:
    """Bring what belongs to a basis, and the basis unless it is away, to where the model has moved."""
    if "basis" not in group or group["gate"].device == device:
        return
    group["gate"] = group["gate"].to(device)
    if not _is_away(group):
        group["basis"] = group["basis"].to(device)
        group.pop("stack", None)
    if group["complement"] is not None:
        rest: Complement = group["complement"]
        group["complement"] = Complement(rest.dual.to(device), rest.weight.to(device), rest.gate)


def _stacks(work: Iterable[Work]) -> Iterator[Stack]:
    """Groups that are stepped alike and have the same shapes, as many as `TOGETHER` allows."""
    alike: dict[Any, list[Work]] = {}
    for group, params in work:
        basis: Tensor = group["basis"]
        rows = tuple([p.shape[0] for p in params])
        # A complement is dear to stack and not for speed.
        alone = id(group) if group["complement"] is not None else None
        key = (*_manner(group), rows, basis.shape, basis.dtype, alone)
        alike.setdefault(key, []).append((group, params))
    for found in alike.values():
        d, k = found[0][0]["basis"].shape
        rows_of_a_group = sum(len(own_part(p)) for p in found[0][1])
        most = max(1, _together(found[0]) // (d * max(rows_of_a_group, k)))
        for start in range(0, len(found), most):
            part = found[start : start + most]
            yield Stack(part, _stacked([group for group, _ in part]))


def _together(one: Work) -> int:
    return TOGETHER.get(one[1][0].device.type, TOGETHER["cpu"])


def _stacked(groups: list[dict[str, Any]]) -> Bases:
    """The bases of groups in one tensor, of which theirs are parts from then on."""
    if len(groups) == 1:
        return _bases(groups)
    found: Bases | None = groups[0].get("stack")
    if (
        found is None
        or len(found.parts) != len(groups)
        or any(
            g[n] is not o
            for g, own in zip(groups, found.parts, strict=True)
            for n, o in own.items()
        )
    ):
        found = _bases(groups)
        for group, part in zip(groups, found.parts, strict=True):
            group |= {**part, "stack": found}
    return found


def _alone(one: Work, basis: Tensor) -> Stack:
    """A group with its basis, which lies elsewhere, brought to its parameters."""
    return Stack([one], _bases([{**one[0], "basis": basis}]))


def _bases(groups: list[dict[str, Any]]) -> Bases:
    """What groups of one shape are stepped with, put together."""
    scales = [group["scale"] for group in groups]
    if len(groups) == 1:
        basis, gate = groups[0]["basis"], groups[0]["gate"]
        return Bases(basis[None], gate[None, None], scales[0], [])
    basis = torch.stack([group["basis"] for group in groups])
    gate = torch.stack([group["gate"] for group in groups])
    scale = gate.new_tensor(scales)[:, None, None]
    parts = [
        {"basis": b, "gate": g, "scale": s} for b, g, s in zip(basis, gate, scales, strict=True)
    ]
    return Bases(basis, gate[:, None], scale, parts)


def _bundles(stacks: Iterable[Stack]) -> Iterator[list[Stack]]:
    """Stacks next to each other that are stepped alike, as many as `TOGETHER` allows."""
    found: list[Stack] = []
    size = 0
    for stack in stacks:
        own = len(stack.work) * sum(own_part(p).numel() for p in stack.work[0][1])
        other = found and _manner(found[0].work[0][0]) != _manner(stack.work[0][0])
        if found and (other or size + own > _together(stack.work[0])):
            yield found
            found, size = [], 0
        found.append(stack)
        size += own
    if found:
        yield found


def _manner(group: dict[str, Any]) -> tuple[Any, ...]:
    """What a group's step depends on besides its basis."""
    gate: Tensor = group["gate"]
    return *(group[key] for key in HYPERPARAMETERS), gate.dtype, gate.device


def _gradient_in_bases(stack: Stack) -> Tensor:
    """Gbar of the parameters of a stack, (n, rows of a group, columns)."""
    group = stack.work[0][0]
    complement: Complement | None = group["complement"]
    grads = [_own_gradient(p) for _, params in stack.work for p in params]
    basis = stack.bases.basis
    n, d, _ = basis.shape
    stacked = (grads[0] if len(grads) == 1 else torch.cat(grads)).view(n, -1, d)
    stacked = stacked.to(group["gate"].dtype)
    gbar = _to_basis(stacked, basis)
    if complement is not None:
        rest = stacked - _from_basis(gbar, complement.dual)
        gbar = torch.cat([gbar, rest.mul_(complement.weight)], dim=-1)
    return gbar.mul_(stack.bases.scale)


def _gated_updates(stack: Stack, step: Tensor) -> Tensor:
    """A step in the bases, which is used up, as one of the parameters, (n, rows of a group, d)."""
    complement: Complement | None = stack.work[0][0]["complement"]
    basis, gate = stack.bases.basis, stack.bases.gate
    k = gate.shape[-1]
    step.mul_(stack.bases.scale)
    update = _from_basis(step[..., :k] * gate, basis)
    if complement is not None:
        off = step[..., k:] * (complement.gate * complement.weight)
        update += off - _from_basis(_to_basis(off, complement.dual), basis)
    return update


def _split(tensors: Iterable[Tensor], rows: Iterable[list[int]]) -> list[Tensor]:
    """The rows of each parameter out of those of each stack."""
    pairs = zip(tensors, rows, strict=True)
    return [part for tensor, own in pairs for part in tensor.flatten(0, 1).split(own)]


def _move(params: list[Tensor], deltas: list[Tensor], shrink: float) -> None:
    """Shrink parameters and add to them, with one rounding at the end where they are narrower."""
    pairs = [*zip(params, deltas, strict=True)]
    if alike := [(p, delta) for p, delta in pairs if p.dtype == delta.dtype]:
        if shrink != 1.0:
            torch._foreach_mul_([p for p, _ in alike], shrink)
        torch._foreach_add_([p for p, _ in alike], [delta for _, delta in alike])
    for p, delta in pairs:
        if p.dtype != delta.dtype:
            p.copy_(p.to(delta.dtype).mul_(shrink).add_(delta))


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    params = [p for p in group["params"] if p.grad is not None]
    if any(p.grad.is_sparse for p in params):
        raise RuntimeError("SAdam does not support sparse gradients")
    return params


def _to_basis(x: Tensor, basis: Tensor) -> Tensor:
    """x T, (..., rows, d) -> (..., rows, k), in x's dtype."""
    if basis.dtype == x.dtype:
        return x @ basis
    parts = basis.split(COLUMNS_AT_ONCE, dim=-1)
    return torch.cat([x @ part.to(x.dtype) for part in parts], dim=-1)


def _from_basis(y: Tensor, basis: Tensor) -> Tensor:
    """y T', (..., rows, k) -> (..., rows, d), in y's dtype."""
    if basis.dtype == y.dtype:
        return y @ basis.mT
    parts = zip(y.split(COLUMNS_AT_ONCE, dim=-1), basis.split(COLUMNS_AT_ONCE, dim=-1), strict=True)
    return sum((part @ columns.to(y.dtype).mT for part, columns in parts), y.new_zeros(()))


def _adamw(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    moments: Moments,
    decay: bool = True,
) -> None:
    """Torch's own AdamW arithmetic on given tensors."""
    beta1, beta2 = group["betas"]
    first, second, steps = moments
    adamw(
        params,
        grads,
        first,
        second,
        [],
        steps,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"] if decay else 0.0,
        eps=group["eps"],
        maximize=False,
        fused=group["fused"],
    )


def _check_hyperparameters(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= float(group[name]) < float("inf"):
            raise ValueError(f"{name} is {group[name]}, but must be finite and >= 0")
    for index, beta in enumerate(group["betas"]):
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"betas[{index}] is {beta}, but must lie in [0, 1)")


def _prepare_basis(group: dict[str, Any]) -> None:
    """Check what comes with a basis, fill in what is missing, and take the basis's fingerprint."""
    basis: Tensor = group["basis"].detach()
    if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
        raise ValueError(f"the basis has shape {tuple(basis.shape)}, but must be (d, k), k <= d")
    d, k = basis.shape
    wide = any(p.dtype == torch.float64 for p in group["params"])
    dtype = torch.float64 if wide else torch.float32
    device = group["params"][0].device
    gate = group.get("gate")
    gate = torch.ones(k) if gate is None else gate.detach()
    if gate.shape != (k,):
        raise ValueError(f"the gate has shape {tuple(gate.shape)}, but the basis asks for ({k},)")
    for p in group["params"]:
        if p.ndim != 2 or p.shape[1] != d:
            raise ValueError(
                f"a parameter has shape {tuple(p.shape)}, but the basis asks for (rows, {d})"
            )
    complement: Complement | None = group.get("complement")
    gathered = whole(basis)
    parts = [gathered, gate]
    if complement is not None:
        dual, weight = complement.dual.detach(), complement.weight.detach()
        if dual.shape != (d, k) or weight.shape != (d,):
            raise ValueError(
                f"the complement has a dual of shape {tuple(dual.shape)} and weights "
                f"{tuple(weight.shape)}, but the basis asks for ({d}, {k}) and ({d},)"
            )
        complement = Complement(dual.to(device), weight.to(device, dtype), complement.gate)
        parts += [dual, weight]
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise ValueError("the basis or the gate has values that are not finite")
    on_host = bool(group.get("on_host", False))
    # A narrow basis stays narrow in memory, and is widened when it is used.
    if wide or basis.dtype == torch.float64:
        basis = basis.to(dtype)
    scale = float(group.get("scale", 1.0))
    fingerprint = basis_fingerprint(gathered, scale)
    if complement is not None:
        fingerprint += complement.weight.double().cpu()
    group |= {
        "basis": basis if on_host or isinstance(basis, DTensor) else basis.to(device),
        "gate": gate.to(device, dtype),
        "scale": scale,
        "complement": complement,
        "on_host": on_host,
        FINGERPRINT: fingerprint,
    }


def _check_same_basis(index: int, group: dict[str, Any], saved: Tensor | None) -> None:
    if ("basis" in group) != (saved is not None):
        have, had = ("a", "no") if "basis" in group else ("no", "a")
        raise ValueError(f"parameter group {index} has {have} basis, its saved state had {had} one")
    if saved is None:
        return
    own = group[FINGERPRINT]
    same_shape = saved.shape == own.shape
    scale = float(own.abs().max()) or 1.0
    if not same_shape or float((saved.cpu().double() - own).abs().max()) > 1e-5 * scale:
        raise ValueError(
            f"the saved state of parameter group {index} belongs to another basis, and moments "
            "mean nothing outside of theirs (eigenvectors are defined only up to sign and rotation)."
            " Resume with the basis that the run was started with, or start afresh."
        )
