"""Second moments of layers' inputs, in memory and as a folder (B.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from folora.runtime.artifacts import Saveable
from folora.runtime.shapes import Float
from folora.spectral.groups import InputGroup, group_of


@dataclass(frozen=True)
class Moments(Saveable):
    """Second moments of layers' inputs: C = X'X / tokens of every distinct input.

    Attributes:
        matrices: By group name, (d_in, d_in) float32.
        tokens: Number of tokens in the mean.
        groups: The layers of each input.
        halves: The moments of the even and of the odd sequences only, for the groups for which they were
            requested; they are not saved.
    """

    kind: ClassVar[str] = "moments"

    matrices: dict[str, Float[Tensor, "_d _d"]]
    tokens: int
    groups: tuple[InputGroup, ...] = ()
    halves: tuple[Moments, ...] = ()

    def __repr__(self) -> str:
        return f"Moments({len(self.matrices)} inputs, mean over {self.tokens} tokens)"

    def to_artifact(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The matrices by group name, the number of tokens and the groups."""
        groups = [group.fact for group in self.groups]
        return self.matrices, {"tokens": self.tokens, "groups": groups}

    @classmethod
    def from_artifact(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> Moments:
        """Inverse of `to_artifact`."""
        groups = tuple(group_of(fact) for fact in manifest["groups"])
        for group in groups:
            matrix = tensors[group.name]
            if matrix.shape != (group.d_in, group.d_in) or matrix.dtype != torch.float32:
                raise ValueError(
                    f"the matrix of {group.name} is {tuple(matrix.shape)} {matrix.dtype}"
                )
        tokens = manifest["tokens"]
        if type(tokens) is not int or tokens < 1:
            raise ValueError(f"{tokens!r:.80} is not a number of tokens")
        return cls({g.name: tensors[g.name] for g in groups}, tokens, groups)
