"""Rivals: methods of a comparison whose adapter is not folora's pairs A, B, but another of PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from transformers import PreTrainedModel

from folora.config import FoLoraConfig
from folora.errors import ConfigError
from folora.methods import Method
from folora.training.prepared import AdapterKind

OF_LORA = ("init", "basis", "step_scale", "optimizer", "constraint", "protect", "freeze_a")


@dataclass(frozen=True)
class Rival:
    """A method with an adapter of its own.

    Attributes:
        method: Its name, title and loss; ``adapter="own"``, and ``optimizer="adamw"`` and ``init="kaiming"``, which need no moments.
        kind: Its adapter. The model's output is unchanged until the first step.
        check: Refuses a model, layers or options that it cannot adapt or honour. Raises ConfigError.
    """

    method: Method
    kind: AdapterKind
    check: Callable[[PreTrainedModel, Collection[str], FoLoraConfig], None]

    def check_arm(
        self, model: PreTrainedModel, layers: Collection[str], config: FoLoraConfig
    ) -> None:
        """Refuse, before sampling starts, what it cannot adapt or honour. Raises ConfigError."""
        for name in OF_LORA:
            if (value := getattr(config.method, name)) != getattr(self.method, name):
                raise ConfigError(
                    f"method.{name} is {value!r}, but {self.method.name} has an adapter of its own; leave it out"
                )
        self.check(model, layers, config)
