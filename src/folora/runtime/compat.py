"""Differences between supported versions of other libraries, one function each.

All other code is written for the newest versions; docs/compatibility.md lists those that are tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peft.utils import save_and_load
from torch import Tensor


def base_state_fallback(model: Any) -> dict[str, Tensor]:
    """The base model's state dict by its original names, for versions of PEFT that lack a function for it."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }


base_state: Callable[[Any], dict[str, Tensor]] = getattr(
    save_and_load, "get_base_model_state_dict", base_state_fallback
)
"""PEFT's function since version 0.19."""


def trainer_options(values: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """Rename options of TrainingArguments from Transformers 5.23 to the version that has options `types`."""
    found = dict(values)
    if "activation_checkpointing" not in types:  # before Transformers 5.23
        found["gradient_checkpointing"] = found.pop("activation_checkpointing")
    if types["warmup_steps"] is int:  # before Transformers 5, which also accepts a ratio there
        steps = found.pop("warmup_steps")
        found |= {"warmup_ratio": steps} if steps < 1 else {"warmup_steps": int(steps)}
    return found
