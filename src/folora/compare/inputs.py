"""What the arms of a comparison share: layers, samples, second moments, the spectrum, and text to replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

from folora.calibration.base_file import tensors_sha256
from folora.calibration.inputs import target_layers
from folora.config import FoLoraConfig
from folora.errors import ConfigError
from folora.metrics.budget import More
from folora.pipeline.further_text import further_text
from folora.pipeline.run import Run
from folora.pipeline.stages import solve_all, solve_options
from folora.runtime.fingerprints import tokens_fingerprint
from folora.spectral.layers import Spectrum
from folora.spectral.moments import Moments


@dataclass(frozen=True)
class RealText:
    """Text of the kind that the model was pretrained on, for methods that replay it.

    Attributes:
        source: Name of the text.
        texts: Gives the first so many token sequences.
    """

    source: str
    texts: Callable[[int], Sequence[list[int]]]


class Inputs:
    """The results of a run's first two stages, as arms with these configs use them; missing ones are computed.

    Args:
        run: The run.
        configs: Of all arms.
        pre: Another C_pre than the run's.
        real_text: For arms that replay it.
        h_norm: Whether every eigenvector is needed.
    """

    def __init__(
        self,
        run: Run,
        configs: Sequence[FoLoraConfig],
        pre: Moments | None,
        real_text: RealText | None,
        h_norm: bool,
    ) -> None:
        self.run, self.pre, self.real_text = run, pre, real_text
        self.shared = run.share()
        # One solve for all initializations, with the most eigenvectors that any arm needs.
        needed = [solve_options(config) for config in configs]
        counts = [options["directions"] for options in needed]
        self._most = {
            "null_rank": max(options["null_rank"] for options in needed),
            "directions": None if h_norm or None in counts else max(counts),
        }
        self._solved = lru_cache(maxsize=1)(self._solve)

    @cached_property
    def more(self) -> More | None:
        """What generates further held-out text, once for all arms."""
        more = further_text(self.run.context, self.shared.samples.load())
        return cache(more) if more else None

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens in the means of C_pre and C_task."""
        pre = self.pre.tokens if self.pre else self.shared.keep.manifest["tokens"]
        return pre, self.shared.task.manifest["tokens"]

    def spectrum(self, config: FoLoraConfig) -> Spectrum:
        """The spectrum of the layers that an arm adapts; that of the last basis is kept."""
        options = {**solve_options(config), **self._most}
        return self._solved(frozenset(options.items())).of_layers(adapted_layers(self.run, config))

    def replayed(self, config: FoLoraConfig) -> Sequence[list[int]] | None:
        """The real texts that an arm replays; None if it replays none."""
        share, rows = config.method.replay, len(self.run.context.task.train)
        if config.method.replay_text != "real" or self.real_text is None:
            return None
        return self.real_text.texts(math.ceil(share / (1 - share) * rows))

    def made_from(self, replayed: Sequence[list[int]] | None) -> dict[str, Any]:
        """Fingerprints of all that an arm uses, which replays these texts."""
        if replayed is None or self.real_text is None:
            return self._facts
        found = [self.real_text.source, tokens_fingerprint(replayed)]
        return {**self._facts, "replayed_text": found}

    @cached_property
    def _facts(self) -> dict[str, Any]:
        keep = self.shared.keep.manifest["sha256"]
        if self.pre is not None:
            keep = tensors_sha256({name: m.cpu() for name, m in self.pre.matrices.items()})
        return {
            **self.run.context.facts,
            "data": self.run.context.task.fingerprint,
            "samples": self.shared.samples.manifest["fingerprint"],
            "statistics": [keep, self.shared.task.manifest["sha256"]],
        }

    def _solve(self, options: frozenset[tuple[str, Any]]) -> Spectrum:
        keep = self.pre or self.shared.keep.load()
        return solve_all(self.run.context, keep, self.shared.task.load(), **dict(options))


def adapted_layers(run: Run, config: FoLoraConfig) -> set[str]:
    """The layers that an arm adapts. Raises ConfigError if they are not among the run's."""
    measured = {name for group in run.context.groups for name in group.layers}
    asked = config.adapter.target_modules
    if asked == run.config.adapter.target_modules:
        return measured
    wanted = {*target_layers(run.context.model, asked)}
    if other := sorted(wanted - measured):
        raise ConfigError(
            f"adapter.target_modules is {asked!r}, which adapts {other[0]}, but arms share second moments, which the "
            "comparison measures for its own adapter.target_modules alone; these must include an arm's"
        )
    return wanted
