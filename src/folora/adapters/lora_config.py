"""Which fields of a user's LoraConfig are supported, and the config that is written with an adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from copy import copy, deepcopy
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn

from folora.adapters.lora_refusals import with_parents
from folora.errors import ConfigError, nearest

PASSED = frozenset(
    {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "modules_to_save", "task_type",
        "base_model_name_or_path", "revision", "auto_mapping", "inference_mode",
    }
)  # fmt: skip
"""Fields of LoraConfig with the same meaning as in PEFT."""

DECIDED = frozenset({"target_modules", "fan_in_fan_out", "peft_version"})
"""Fields determined by the spectrum, the model and the installed PEFT; the first two are checked."""

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT adds to ``modules_to_save``, by task type."""

REMEDIES = {
    "use attach's argument `init` instead": (
        "init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    ),
    "leave it out; the adapted layers are those of the spectrum, so calibrate on fewer layers": (
        "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters",
    ),
    "leave it out; all layers have the same r and lora_alpha": ("rank_pattern", "alpha_pattern"),
    "leave it out; biases are frozen": ("bias", "lora_bias"),
    "name the embedding in modules_to_save instead": ("trainable_token_indices",),
}  # fmt: skip
"""Remedies and the unsupported fields that they apply to."""


class SortedLoraConfig(LoraConfig):
    """PEFT's LoraConfig, saved with sets as sorted lists.

    The order of a set depends on PYTHONHASHSEED. In memory ``target_modules`` remains a set, as PEFT requires.
    """

    def to_dict(self) -> dict[str, Any]:
        """As in PEFT, with sorted lists."""
        values: dict[str, Any] = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}


def lora_config(
    config: LoraConfig, names: Iterable[str], r: int, alpha: float, **changes: Any
) -> LoraConfig:
    """A config of an ordinary LoRA adapter on named layers, with the `PASSED` fields of a user's config.

    lora_alpha is written as an integer if it is one up to rounding.
    """
    passed = {name: deepcopy(getattr(config, name)) for name in PASSED} | changes
    if passed["modules_to_save"]:
        passed["modules_to_save"] = list(dict.fromkeys(passed["modules_to_save"]))
    passed["base_model_name_or_path"] = resolvable(passed["base_model_name_or_path"])
    if math.isclose(alpha, round(alpha), rel_tol=1e-12):
        alpha = round(alpha)
    return SortedLoraConfig(
        **passed | {"r": r, "lora_alpha": alpha, "target_modules": sorted(names)}
    )


def check_lora_config(config: LoraConfig) -> None:
    """Check that `attach` supports a LoraConfig.

    Raises:
        ConfigError: It is not a LoraConfig, a value is outside its interval, or a field that is neither
            in `PASSED` nor in `DECIDED` differs from its default, including fields that later versions
            of PEFT add.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"config is a {type(config).__name__}, but must be a peft.LoraConfig")
    plain = LoraConfig()
    for name in (field.name for field in fields(config)):
        value = getattr(config, name)
        if name not in PASSED | DECIDED and value != getattr(plain, name, MISSING):
            found = (remedy for remedy, names in REMEDIES.items() if name in names)
            remedy = next(found, "leave it out; folora trains ordinary LoRA adapters")
            raise ConfigError(f"LoraConfig: {name} is {value!r}, which is not supported: {remedy}")
    for name, allowed, interval in (
        ("r", type(config.r) is int and config.r >= 1, "be an integer >= 1"),
        ("lora_alpha", 0 < config.lora_alpha < math.inf, "be > 0"),
        ("lora_dropout", 0 <= config.lora_dropout < 1, "lie in [0, 1)"),
    ):
        if not allowed:
            value = getattr(config, name)
            raise ConfigError(f"LoraConfig: {name} is {value!r}, but must {interval}")


def check_modules(
    model: nn.Module, config: LoraConfig, names: Collection[str], conv1d: bool
) -> None:
    """Check that a config fits the layers to adapt, which may already have adapters.

    Raises:
        ConfigError: ``target_modules`` does not select exactly these layers, ``modules_to_save`` names an
            unknown or adapted module, or ``fan_in_fan_out`` does not fit.
    """
    if config.fan_in_fan_out and not conv1d:
        raise ConfigError(
            "LoraConfig: fan_in_fan_out is True, but the layers are not Conv1D; leave it out"
        )
    if config.target_modules is not None:
        found, wanted = _selected(model, config), set(names)
        if found != wanted:
            name = min(found ^ wanted)
            what = "selects" if name in found else "does not select"
            raise ConfigError(
                f"LoraConfig: target_modules {what} {name}, and {len(found & wanted)} of the spectrum's "
                f"{len(wanted)} layers; leave it out, or solve a spectrum for the layers that it selects"
            )
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for target in config.modules_to_save or ():
        if not any(name.endswith(target) for name in modules):
            ends = sorted({name.rsplit(".", 1)[-1] for name in modules})
            raise ConfigError(
                f"LoraConfig: modules_to_save: {target!r} is not a module of {type(model).__name__}"
                f"{nearest(target, ends)}"
            )
    saved = (*(config.modules_to_save or ()), *HEADS.get(config.task_type or "", ()))
    for name in names:
        # As in PEFT, any module whose name ends with an entry is trained.
        if any(part.endswith(saved) for part in with_parents(name)):
            raise ConfigError(
                f"LoraConfig: {name} is adapted, but modules_to_save or task_type {config.task_type} "
                "trains it in full; leave it out of the spectrum or of modules_to_save"
            )


def resolvable(name: str | None) -> str | None:
    """The name of a base model, independent of the working directory: local folders become absolute."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def _selected(model: nn.Module, config: LoraConfig) -> set[str]:
    """The modules that PEFT would adapt for ``target_modules``."""
    expanded = _maybe_include_all_linear_layers(copy(config), model)
    inner = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        for part, _ in model.get_submodule(name).named_modules()
    }
    names = (name for name, _ in model.named_modules() if name and name not in inner)
    return {name for name in names if check_target_module_exists(expanded, name)}
