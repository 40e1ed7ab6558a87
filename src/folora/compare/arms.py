"""An arm of a comparison, one training: a method with changed options; and whether a line of results is its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from folora.compare.results import REMEDY, Line
from folora.config import BOS, FoLoraConfig
from folora.errors import ArtifactError, MismatchError

EARLIER = {"sampling.sources": {BOS: 1.0}}


@dataclass(frozen=True)
class Arm:
    """One training: a method, and changed options by dotted name."""

    method: str
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method and all changes."""
        parts = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in self.changes.items()]
        return "--".join([self.method, *parts]).replace("/", "_")


def arms(
    methods: Sequence[str], learning_rates: Sequence[float], **knobs: Sequence[Any]
) -> list[Arm]:
    """Every combination of methods, learning rates and further options, as ``**{"training.seed": (0, 1)}``."""
    names = ("training.learning_rate", *knobs)
    values = list(product(learning_rates, *knobs.values()))
    return [Arm(name, dict(zip(names, v, strict=True))) for name in methods for v in values]


def checked_arm(
    line: Line, config: FoLoraConfig, made_from: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The result in a line, after checking that it has this config and these fingerprints of its inputs.

    Raises:
        ArtifactError: It has other options.
        MismatchError: It was made from another model, dataset, samples or moments.
    """
    result, wanted = line.values, json.loads(json.dumps(config.differences()))
    found = result.get("config")
    found = found if isinstance(found, dict) else {}
    # Earlier results name no sources; `made_from` tells samples of other sources apart.
    found, wanted = {**EARLIER, **found}, {**EARLIER, **wanted}
    if found != wanted:
        other = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
        raise ArtifactError(f"{line.place} has other options ({', '.join(other)}); {REMEDY}")
    stated = result.get("made_from")
    stated = stated if isinstance(stated, dict) else {}
    for name, value in (made_from or {}).items():
        if stated.get(name) != value:
            raise MismatchError(
                f"{line.place} was made with a different {name.replace('_', ' ')} than this comparison; "
                f"{REMEDY}, or give another output folder"
            )
    return result
