"""Layers are solved concurrently with the results of solving one at a time, and errors propagate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.closeness import assert_near
from support.references import moment

from folora.errors import ArtifactError, ConfigError, MismatchError, NumericsError
from folora.runtime.artifacts import read_artifact, write_artifact
from folora.spectral.eigenproblem import energy_share, generalized_eigenbasis
from folora.spectral.groups import InputGroup
from folora.spectral.layers import Spectrum, solve
from folora.spectral.moments import Moments

GROUPS = tuple(
    InputGroup((f"layer{i}", f"twin{i}"), d) for i, d in enumerate((8, 33, 5, 16, 8, 21))
)
PRE, TASK = (
    Moments({g.name: moment(g.d_in, seed=at + i) for i, g in enumerate(GROUPS)}, 1, GROUPS)
    for at in (0, 50)
)


@pytest.mark.parametrize("threads", [1, 3])
def test_solving_together_matches_solving_one_at_a_time(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ticks: list[int] = []
        found = solve(PRE, TASK, tau=1e-3, null_rank=2, on_group=lambda: ticks.append(1))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found.groups == GROUPS
    assert len(ticks) == len(GROUPS)
    for b in found:
        alone = generalized_eigenbasis(
            PRE.matrices[b.group.name], TASK.matrices[b.group.name], tau=1e-3
        )
        assert_near(b.basis.abs(), alone.basis.abs())
        assert b.null_basis is not None
        assert b.null_basis.shape == (b.group.d_in, 2)


def test_an_error_in_one_group_is_raised_and_named() -> None:
    bad = Moments({**TASK.matrices, "layer3": torch.full((16, 16), float("nan"))}, 1, GROUPS)
    with pytest.raises(NumericsError, match="layer3"):
        solve(PRE, bad, tau=1e-3)
    with pytest.raises(ConfigError, match="layer2 has d_in = 5"):
        solve(PRE, TASK, tau=1e-3, null_rank=6)


@pytest.mark.parametrize("level", [1e-2, 1.0, 3.0])
def test_the_concentration_of_a_task_is_that_of_its_leading_eigenvectors(level: float) -> None:
    """Text has next to nothing in the last two of 16 inputs, and the task `level` there and 1 elsewhere."""
    group = InputGroup(("layer",), 16)
    pre, task = (
        Moments({"layer": torch.diag(torch.tensor([1.0] * 14 + [last] * 2))}, 1, (group,))
        for last in (1e-3, level)
    )
    found = solve(pre, task, tau=1e-4).concentration(task, 2)
    assert found == pytest.approx(16 / 2 * 2 * level / (14 + 2 * level))
    random = torch.linalg.qr(torch.randn(400, 16, 2, generator=torch.Generator().manual_seed(0))).Q
    shares = [energy_share(task.matrices["layer"], columns) for columns in random]
    assert sum(shares) / len(shares) == pytest.approx(2 / 16, rel=0.1)


def test_a_spectrum_round_trips(tmp_path: Path) -> None:
    spectrum = solve(PRE, TASK, tau=1e-3, null_rank=2)
    spectrum.save(tmp_path / "spectrum", {"model": "m"})
    again = Spectrum.load(tmp_path / "spectrum", {"model": "m"})
    assert again.groups == spectrum.groups == GROUPS
    for a, b in zip(spectrum, again, strict=True):
        assert a.task_trace == b.task_trace
        assert torch.equal(a.basis, b.basis)
        assert torch.equal(a.gamma, b.gamma)
        assert a.null_basis is not None and b.null_basis is not None
        assert torch.equal(a.null_basis, b.null_basis)
    with pytest.raises(MismatchError, match="another model"):
        Spectrum.load(tmp_path / "spectrum", {"model": "n"})


def test_moments_round_trip(tmp_path: Path) -> None:
    narrow = Moments({n: m.float() for n, m in PRE.matrices.items()}, 7, GROUPS)
    narrow.save(tmp_path / "moments")
    again = Moments.load(tmp_path / "moments")
    assert (again.tokens, again.groups) == (7, GROUPS)
    assert all(torch.equal(m, again.matrices[n]) for n, m in narrow.matrices.items())


def test_moments_of_other_layers_are_refused() -> None:
    with pytest.raises(MismatchError, match="measure both with the same layers"):
        solve(PRE, Moments(TASK.matrices, 1, GROUPS[:3]))


def spoiled(kind: str, folder: Path) -> Path:
    """A spectrum with inconsistent tensors, as a file with a valid checksum may hold."""
    solve(*(Moments(m.matrices, 1, GROUPS[:2]) for m in (PRE, TASK)), tau=1e-3, null_rank=2).save(
        folder / "good"
    )
    good = read_artifact(folder / "good", Spectrum.kind)
    tensors, facts = dict(good.tensors), [dict(fact) for fact in good.manifest["groups"]]
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
    groups = {"no list": 3, "no facts": [3], "a mapping": {"layers": []}}.get(kind, facts)
    write_artifact(folder / "spectrum", Spectrum.kind, tensors, {"groups": groups})
    return folder / "spectrum"


@pytest.mark.parametrize(
    "kind",
    ["no tensor", "narrow", "flat", "scalar gamma", "float64", "integers", "short null", "nan", "negative",
     "no layers", "a word for layers", "numbers for layers", "another width", "a huge width", "no width",
     "no trace", "a huge trace", "no list", "no facts", "a mapping"],
)  # fmt: skip
def test_mismatched_tensors_are_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="spectrum has unexpected contents"):
        Spectrum.load(spoiled(kind, tmp_path))
