"""Layers with the same input tensor, which share one second moment and one basis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class InputGroup:
    """Layers with the same input tensor of width `d_in`; named after the first layer."""

    layers: tuple[str, ...]
    d_in: int

    @property
    def fact(self) -> dict[str, Any]:
        """A JSON value for manifests; see `group_of`."""
        return {"layers": list(self.layers), "d_in": self.d_in}

    @property
    def name(self) -> str:
        """Name of the first layer, in the order of the forward pass."""
        return self.layers[0]


def group_of(fact: Mapping[str, Any]) -> InputGroup:
    """Inverse of `InputGroup.fact`. Raises ValueError."""
    layers, d_in = fact["layers"], fact["d_in"]
    named = isinstance(layers, list | tuple) and layers and all(isinstance(n, str) for n in layers)
    if not named or type(d_in) is not int or d_in < 1:
        raise ValueError(f"{fact!r:.80} is not a group of layers")
    return InputGroup(tuple(layers), d_in)
