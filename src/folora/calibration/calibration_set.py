"""The calibration set: text that stands for what the model must keep (paper 3.4), in memory and as a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folora.runtime.artifacts import read_artifact, write_artifact
from folora.runtime.fingerprints import tokens_fingerprint
from folora.runtime.storage import malformed_is_damaged

KIND = "calibration_set"
"""What manifests call it."""


@dataclass(frozen=True)
class CalibrationSet:
    """Token sequences that the base model generated.

    Attributes:
        calibration: Token ids of each sequence, the start token first; C_pre is measured on them.
        held_out: The same, set aside for the meter.
        rejected: Number of generated sequences that the filters rejected, by reason.
    """

    calibration: list[list[int]]
    held_out: list[list[int]]
    rejected: dict[str, int] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens."""
        return tokens_fingerprint([*self.calibration, [], *self.held_out])

    def save(self, folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write a folder that `load` reads.

        Args:
            folder: The folder to make.
            facts: JSON values for the manifest, such as fingerprints of the model.

        Raises:
            ArtifactError: It cannot be written.
        """
        counts = [len(self.calibration) + len(self.held_out), len(self.held_out)]
        own = {"sequences": counts, "rejected": self.rejected, "fingerprint": self.fingerprint}
        write_artifact(Path(folder), KIND, self.to_tensors(), {**(facts or {}), **own})

    @classmethod
    def load(cls, folder: str | Path, expected: Mapping[str, Any] | None = None) -> CalibrationSet:
        """Read what `save` wrote.

        Args:
            folder: The folder.
            expected: Facts that the manifest must hold with equal values.

        Raises:
            ArtifactError: Missing, damaged, or something else.
            MismatchError: The manifest holds other values than `expected`.
        """
        artifact = read_artifact(Path(folder), KIND, expected)
        manifest = artifact.manifest
        with malformed_is_damaged(folder):
            held_out = manifest["sequences"][1]
            return cls.from_tensors(artifact.tensors, held_out, manifest["rejected"])

    def to_tensors(self) -> dict[str, Tensor]:
        """All tokens in one row and the lengths of the sequences, held-out ones last; int64."""
        rows = [*self.calibration, *self.held_out]
        flat = [token for row in rows for token in row]
        return {"tokens": torch.tensor(flat), "lengths": torch.tensor([len(row) for row in rows])}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], held_out: int, rejected: dict[str, int]
    ) -> CalibrationSet:
        """Inverse of `to_tensors`. Raises ValueError if lengths do not fit the tokens."""
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
        return cls(rows[:cut], rows[cut:], rejected)
