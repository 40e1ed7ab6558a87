"""The calibration set: text that represents what to keep (paper 3.4), in memory and as a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from folora.config import BOS
from folora.runtime.artifacts import Saveable
from folora.runtime.fingerprints import tokens_fingerprint


@dataclass(frozen=True)
class CalibrationSet(Saveable):
    """Token sequences that the base model generated, or that the user gave.

    Attributes:
        calibration: Token ids of each sequence, beginning with the start token or a chat template's first;
            C_pre is measured on them.
        held_out: The same for the held-out sequences, on which forgetting is measured.
        rejected: Number of generated sequences that the filters rejected, by reason.
        sources: Source of each sequence, first of those of `calibration`; empty if not recorded.
    """

    kind: ClassVar[str] = "calibration_set"

    calibration: list[list[int]]
    held_out: list[list[int]]
    rejected: dict[str, int] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        tokens = sum(map(len, self.calibration)) + sum(map(len, self.held_out))
        shares = ", ".join(f"{name} {share:.2g}" for name, share in self.shares.items())
        return (
            f"CalibrationSet({len(self.calibration)} sequences and {len(self.held_out)} held out, "
            f"{tokens} tokens, sources: {shares})"
        )

    def by_source(self, *, held_out_only: bool = True) -> dict[str, list[list[int]]]:
        """The held-out sequences, or all, of each source; of ``""`` if it is not recorded."""
        rows = [*self.calibration, *self.held_out]
        found: dict[str, list[list[int]]] = {}
        for i in range(len(self.calibration) if held_out_only else 0, len(rows)):
            found.setdefault(self.sources[i] if self.sources else "", []).append(rows[i])
        return found

    @property
    def shares(self) -> dict[str, float]:
        """Share of each source of all sequences; those that record none are of BOS alone."""
        count = len(self.sources)
        return {n: self.sources.count(n) / count for n in dict.fromkeys(self.sources)} or {BOS: 1.0}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens."""
        return tokens_fingerprint([*self.calibration, [], *self.held_out])

    def to_artifact(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """``tokens``, all sequences concatenated, held-out ones last, their ``lengths`` and ``sources``; 1-D int64."""
        rows = [*self.calibration, *self.held_out]
        flat = [token for row in rows for token in row]
        tensors = {
            "tokens": torch.tensor(flat),
            "lengths": torch.tensor([len(row) for row in rows]),
        }
        names = [*dict.fromkeys(self.sources)]
        if names:
            tensors["sources"] = torch.tensor([names.index(name) for name in self.sources])
        counts = [len(rows), len(self.held_out)]
        return tensors, {
            "sequences": counts, "rejected": self.rejected, "sources": names, "fingerprint": self.fingerprint,
        }  # fmt: skip

    @classmethod
    def from_artifact(
        cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]
    ) -> CalibrationSet:
        """Inverse of `to_artifact`. Raises ValueError if lengths and tokens do not match."""
        tokens, counts, held_out = tensors["tokens"], tensors["lengths"], manifest["sequences"][1]
        if any(t.dtype != torch.int64 or t.ndim != 1 for t in (tokens, counts)):
            raise ValueError("tokens and lengths are not 1-D int64")
        lengths = counts.tolist()
        if sum(lengths) != len(tokens) or min(lengths, default=1) < 1:
            raise ValueError(f"the lengths do not add up to {len(tokens)} tokens")
        if type(held_out) is not int or not 0 <= held_out < len(lengths):
            raise ValueError(f"{held_out!r:.80} of {len(lengths)} sequences are held out")
        if int(tokens.min()) < 0:
            raise ValueError(f"{int(tokens.min())} is not a token id")
        rows = [row.tolist() for row in tokens.split(lengths)]
        cut, names = len(rows) - held_out, manifest.get("sources", [])
        sources = [names[i] for i in tensors["sources"].tolist()] if names else []
        if sources and len(sources) != len(rows):
            raise ValueError(f"there are {len(sources)} sources of {len(rows)} sequences")
        return cls(rows[:cut], rows[cut:], manifest["rejected"], sources)
