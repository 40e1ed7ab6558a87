"""The proxy set: sequences that the pretrained model wrote itself (paper 3.4), in memory and as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folora.runtime.artifacts import read_artifact, write_artifact
from folora.runtime.fingerprints import tokens_fingerprint
from folora.runtime.storage import fitting


@dataclass(frozen=True)
class ProxySet:
    """Sampled sequences, ready for the model.

    Attributes:
        calibration: Token ids with the start token in front, for C_pre.
        held_out: The same, set aside for the meter.
        rejected: How many sequences were rejected, by reason.
    """

    calibration: list[list[int]]
    held_out: list[list[int]]
    rejected: dict[str, int] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens."""
        return tokens_fingerprint([*self.calibration, [], *self.held_out])


def write_proxy_set(folder: Path, proxies: ProxySet, facts: dict[str, Any]) -> None:
    """Write the finished set of a folder; see `load_proxy_set`."""
    counts = [len(proxies.calibration) + len(proxies.held_out), len(proxies.held_out)]
    own = {"sequences": counts, "rejected": proxies.rejected, "fingerprint": proxies.fingerprint}
    write_artifact(folder / "set", "samples", proxies_to_tensors(proxies), {**facts, **own})


def load_proxy_set(folder: Path, expected: dict[str, Any] | None = None) -> ProxySet:
    """Read the finished set of a folder. Raises ArtifactError as `read_artifact`."""
    artifact = read_artifact(folder / "set", "samples", expected)
    manifest = artifact.manifest
    with fitting(folder / "set"):
        held_out = manifest["sequences"][1]
        return proxies_from_tensors(artifact.tensors, held_out, manifest["rejected"])


def proxies_to_tensors(proxies: ProxySet) -> dict[str, Tensor]:
    """All sequences end to end and their lengths, held-out ones last; int64."""
    rows = [*proxies.calibration, *proxies.held_out]
    flat = [token for row in rows for token in row]
    return {"tokens": torch.tensor(flat), "lengths": torch.tensor([len(row) for row in rows])}


def proxies_from_tensors(
    tensors: Mapping[str, Tensor], held_out: int, rejected: dict[str, int]
) -> ProxySet:
    """Inverse of `proxies_to_tensors`. Raises ValueError if lengths do not fit the tokens."""
    tokens, counts = tensors["tokens"], tensors["lengths"]
    if any(t.dtype != torch.int64 or t.ndim != 1 for t in (tokens, counts)):
        raise ValueError("tokens and lengths are not rows of int64")
    lengths = counts.tolist()
    if sum(lengths) != len(tokens) or min(lengths, default=1) < 1:
        raise ValueError(f"lengths of sequences do not add up to {len(tokens)} tokens")
    if type(held_out) is not int or not 0 <= held_out < len(lengths):
        raise ValueError(f"{held_out!r:.80} of {len(lengths)} sequences are held out")
    if int(tokens.min()) < 0:
        raise ValueError(f"{int(tokens.min())} is no token")
    rows = [row.tolist() for row in tokens.split(lengths)]
    cut = len(rows) - held_out
    return ProxySet(rows[:cut], rows[cut:], rejected)
