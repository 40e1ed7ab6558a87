"""Which layers PEFT's LoRA does not support, and why, found by attaching it to a weightless copy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from folora.errors import ConfigError
from folora.runtime.contexts import keeping_requires_grad

MAX_REASON = 200


def lora_refusals(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """The layers that PEFT's LoRA does not support, with the reason.

    PEFT refuses some layers by name (``out_proj`` of Mamba), and maps others to the fused weights of
    experts (``gate_proj`` next to Qwen3-MoE's), also when an adapter is loaded.

    Raises:
        ConfigError: PEFT supports each type of layer, but not all of them together.
    """
    if not names or _lora_refusal(model, names) is None:
        return {}
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(wildcard_name(name), []).append(name)
    refused: dict[str, str] = {}
    for same in kinds.values():
        if reason := _lora_refusal(model, same):
            refused |= dict.fromkeys(same, reason)
    taken = [name for name in names if name not in refused]
    if taken and (reason := _lora_refusal(model, taken)):
        raise ConfigError(f"PEFT's LoRA cannot be attached to {type(model).__name__}: {reason}")
    return refused


def _lora_refusal(model: nn.Module, names: Sequence[str]) -> str | None:
    """Why PEFT cannot attach LoRA to exactly these layers, or load it; None if it can."""
    shell = _shell(model, {})
    try:
        with keeping_requires_grad(model):
            config = LoraConfig(r=1, target_modules=list(names))
            inject_adapter_in_model(config, shell, low_cpu_mem_usage=True)
        wrapped = {name: m for name, m in shell.named_modules() if isinstance(m, BaseTunerLayer)}
        if wrapped.keys() != set(names):
            return "PEFT maps its name to the fused weights of experts"
        exported = {
            f"{name}.lora_{part}.weight": getattr(m, f"lora_{part}")["default"].weight
            for name, m in wrapped.items()
            for part in "AB"
        }
        loaded: Any = set_peft_model_state_dict(shell, exported)
    except Exception as error:  # of PEFT, by the kind of layer
        return f"PEFT: {short(error)}"
    if loaded.unexpected_keys:
        return "PEFT renames it when loading an adapter, so its weights would be lost"
    return None


def _shell(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A copy of a module tree that shares all parameters and attributes, but not the child links."""
    if id(module) not in made:
        made[id(module)] = shell = object.__new__(type(module))
        shell.__dict__ |= module.__dict__ | {"_parameters": {**module._parameters}, "_modules": {}}
        for name, part in module._modules.items():
            shell._modules[name] = None if part is None else _shell(part, made)
    return made[id(module)]


def wildcard_name(name: str) -> str:
    """A module's name with ``*`` for each index, so that it is the same in all blocks."""
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)


def with_parents(name: str) -> list[str]:
    """The names of a module's parents, outermost first, and its own."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def short(error: Exception) -> str:
    """An error's text on one line, truncated to `MAX_REASON` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."
