"""Second moments of layers' inputs, in memory and as a folder (B.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from folora.runtime.artifacts import read_artifact, write_artifact
from folora.runtime.shapes import Float
from folora.runtime.storage import malformed_is_damaged
from folora.spectral.groups import InputGroup, group_of

KIND = "moments"  # in manifests


@dataclass(frozen=True)
class Moments:
    """Second moments of layers' inputs: C = X'X / tokens of every distinct input.

    Attributes:
        matrices: By group name, (d_in, d_in) float32.
        tokens: Number of tokens in the mean.
        groups: The layers of each input.
        halves: The moments of the even and of the odd sequences only, for the groups for which they were
            requested.
    """

    matrices: dict[str, Float[Tensor, "_d _d"]]
    tokens: int
    groups: tuple[InputGroup, ...] = ()
    halves: tuple[Moments, ...] = ()

    def save(self, folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write a folder that `load` reads; `halves` are left out.

        Args:
            folder: The folder to create.
            facts: JSON values for the manifest, such as fingerprints of the model.

        Raises:
            ArtifactError: It cannot be written.
        """
        values = {"tokens": self.tokens, "groups": [group.fact for group in self.groups]}
        write_artifact(Path(folder), KIND, self.matrices, {**(facts or {}), **values})

    @classmethod
    def load(cls, folder: str | Path, expected: Mapping[str, Any] | None = None) -> Moments:
        """Read what `save` wrote.

        Args:
            folder: The folder.
            expected: Values that the manifest must hold.

        Raises:
            ArtifactError: Missing, damaged, or not moments.
            MismatchError: A value differs from `expected`.
        """
        artifact = read_artifact(Path(folder), KIND, expected)
        with malformed_is_damaged(folder):
            groups = tuple(group_of(fact) for fact in artifact.manifest["groups"])
            for group in groups:
                matrix = artifact.tensors[group.name]
                if matrix.shape != (group.d_in, group.d_in) or matrix.dtype != torch.float32:
                    raise ValueError(
                        f"the matrix of {group.name} is {tuple(matrix.shape)} {matrix.dtype}"
                    )
            tokens = artifact.manifest["tokens"]
            if type(tokens) is not int or tokens < 1:
                raise ValueError(f"{tokens!r:.80} is not a number of tokens")
        return cls({g.name: artifact.tensors[g.name] for g in groups}, tokens, groups)
