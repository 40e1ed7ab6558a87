"""How far C_pre and C_task are from a common eigenbasis, by layer: ``python -m benchmarks.spectra``.

Reads the statistics that a run left behind and keeps a few numbers of each shared input, so that
figures 1a and 2a need no model and no matrices.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folora.config import LAMBDA, S_MIN, TAU
from folora.pipeline.stages import KeepMoments, TaskMoments
from folora.runtime.artifacts import software_versions
from folora.runtime.storage import write_text
from folora.spectral.eigenproblem import (
    checked_pair,
    energy_share,
    generalized_eigenbasis,
    spectral_gate,
)
from folora.spectral.leading import eigh
from folora.spectral.moments import Moments

FORMAT = "spectra/2"
QUANTILES = 33


def off_diagonal_mass(c_pre: Tensor, c_task: Tensor, name: str = "layer") -> float:
    """How far C_pre and C_task are from a common eigenbasis, in [0, 1] (figure 1a).

    With V the eigenvectors of C_pre: sum over i != j of (V' C_task V)_ij^2, over ||C_task||_F^2.
    Zero if V diagonalizes C_task as well, or if C_task is zero.

    Raises:
        NumericsError: See `checked_moment`; also unequal shapes or a zero C_pre.
    """
    pre, task, _ = checked_pair(c_pre, c_task, 0.0, name)
    vectors = eigh(pre, name)[1]
    squares = (vectors.T @ task @ vectors) ** 2
    total = float(squares.sum())
    return float((squares - torch.diag(squares.diagonal())).sum()) / total if total > 0 else 0.0


def shares(c_pre: Tensor, c_task: Tensor, columns: Tensor) -> dict[str, float]:
    """Shares of the energy (trace) of C_pre and of C_task that lie in the span of some columns."""
    both = (("pre", c_pre), ("task", c_task))
    return {name: _rounded(energy_share(c, columns)) for name, c in both}


def group_spectrum(name: str, c_pre: Tensor, c_task: Tensor, r: int) -> dict[str, Any]:
    """Numbers of one shared input, at the default tau, lambda and s_min.

    Returns:
        ``off_diagonal``: see `off_diagonal_mass`; ``gamma``: quantiles, descending; ``open``: share
        of the directions whose gate is above its floor; ``half``: how many leading directions carry
        half of the sum of gamma; ``gate``: least gate of the `r` leading directions; ``leading`` and
        ``null``: `shares` of these, and of the r smallest eigenvectors of C_pre.
    """
    pairs = generalized_eigenbasis(c_pre, c_task, name=name)
    gamma, gate = pairs.gamma, spectral_gate(pairs.gamma, LAMBDA, S_MIN)
    quantiles = torch.quantile(gamma, torch.linspace(1, 0, QUANTILES, dtype=gamma.dtype))
    return {
        "name": name,
        "d": len(gamma),
        "off_diagonal": _rounded(off_diagonal_mass(c_pre, c_task, name)),
        "gamma": [_rounded(float(value)) for value in quantiles],
        "open": _rounded(float((gate > S_MIN).double().mean())),
        "half": int((gamma.cumsum(0) < gamma.sum() / 2).sum()) + 1,
        "gate": _rounded(float(gate[:r].min())),
        "leading": shares(c_pre, c_task, pairs.basis[:, :r]),
        "null": shares(c_pre, c_task, eigh(c_pre.double(), name)[1][:, :r]),
    }


def run_spectra(folder: Path, model: str, task: str, r: int, command: str) -> dict[str, Any]:
    """What the file of a run holds. Raises ArtifactError if its moments are not there."""
    pre, on_task = (
        Moments.load(folder / stage.path).matrices for stage in (KeepMoments, TaskMoments)
    )
    return {
        "format": FORMAT,
        "model": model,
        "task": task,
        "command": command,
        "versions": software_versions(),
        "r": r,
        "tau": TAU,
        "lambda": LAMBDA,
        "s_min": S_MIN,
        "groups": [group_spectrum(name, pre[name], on_task[name], r) for name in sorted(pre)],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description="Write a summary of every layer's spectrum.")
    parser.add_argument("--run", type=Path, required=True, help="folder of a folora run")
    parser.add_argument("--model", required=True, help="name of the model in tables")
    parser.add_argument("--task", required=True, help="name of the task in tables")
    parser.add_argument("--r", type=int, default=16, help="rank of the adapter; default: 16")
    parser.add_argument("--output", type=Path, required=True, help="the .json to write")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    command = f"python -m benchmarks.spectra {shlex.join(given)}"
    found = run_spectra(options.run, options.model, options.task, options.r, command)
    write_text(options.output, json.dumps(found) + "\n")


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


if __name__ == "__main__":
    main()
