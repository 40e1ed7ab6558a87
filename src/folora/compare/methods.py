"""Methods as points in one space: start x optimizer x constraint x complement.

Each is a few changes of a config by dotted name, so that an ablation is one word changed and every
method runs through the same code. Learning rate, seed and a method's own strength are changed on top.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from folora.config import FoLoraConfig
from folora.errors import ConfigError, nearest


@dataclass(frozen=True)
class Method:
    """A method: how tables call it, what it changes, and what it is."""

    title: str
    about: str
    changes: dict[str, Any] = field(default_factory=dict)


_ADAMW: dict[str, Any] = {"training.optimizer": "adamw"}
_LORA: dict[str, Any] = {**_ADAMW, "adapter.init": "kaiming"}
_WHOLE: dict[str, Any] = {"spectrum.directions": "all"}

METHODS: dict[str, Method] = {
    "folora": Method("folora", "the defaults of this library"),
    "folora-null": Method(
        "folora, null-space start",
        "the paper's start, at our step scale",
        {**_WHOLE, "adapter.init": "null_space"},
    ),
    "folora-paper": Method(
        "FoLoRA as in the paper",
        "arXiv:2606.00132: null-space start, basis unscaled",
        {
            **_WHOLE,
            "adapter.init": "null_space",
            "spectrum.step_scale": "paper",
            "spectrum.s_min": 0.3,
        },
    ),
    "lora": Method("LoRA", "arXiv:2106.09685", _LORA),
    "lora-decay": Method(
        "LoRA, weight decay", "decoupled decay of A and B", {**_LORA, "training.weight_decay": 1.0}
    ),
    "lora-r2": Method("LoRA, rank 2", "a smaller adapter", {**_LORA, "adapter.r": 2}),
    "milora": Method("MiLoRA", "arXiv:2406.09044", {**_ADAMW, "adapter.init": "minor_singular"}),
    "corda": Method(
        "CorDA (KPM)",
        "arXiv:2406.05223; tau is its damping, .01 as in PEFT",
        {**_ADAMW, "adapter.init": "corda", "spectrum.tau": 0.01},
    ),
    "lora-null": Method("LoRA-Null", "arXiv:2503.02659", {**_ADAMW, "adapter.init": "lora_null"}),
    "lora-null-v2": Method(
        "LoRA-Null v2",
        "arXiv:2503.02659 with A frozen",
        {**_ADAMW, "adapter.init": "lora_null", "adapter.freeze_a": True},
    ),
    "oplora": Method(
        "OPLoRA",
        "arXiv:2510.13003, k = r unless said otherwise",
        {**_LORA, "adapter.constraint": "oplora"},
    ),
    "kaiming-sadam": Method(
        "SAdam, Kaiming start", "the optimizer alone", {**_WHOLE, "adapter.init": "kaiming"}
    ),
    "eigen-adamw": Method("AdamW, eigen start", "the default start alone", _ADAMW),
    "null-adamw": Method(
        "AdamW, null-space start",
        "the paper's start alone",
        {**_ADAMW, "adapter.init": "null_space"},
    ),
    "null-zero": Method(
        "folora, A0 in the null space, B0 = 0",
        "the paper's directions without its B0",
        {**_WHOLE, "adapter.init": "null_space_zero"},
    ),
    "all-directions": Method(
        "folora, all directions", "the whole basis instead of its first r columns", _WHOLE
    ),
    "gate-off": Method("folora, gate off", "all ones", {**_WHOLE, "spectrum.s_min": 1.0}),
    "gate-open": Method("folora, s_min 0", "no floor", {**_WHOLE, "spectrum.s_min": 0.0}),
    "basis-pretraining": Method(
        "folora, basis of C_pre", "V Lambda^(-1/2)", {**_WHOLE, "spectrum.basis": "pretraining"}
    ),
    "basis-whitening": Method(
        "folora, T = H^(-1/2)", "no rotation", {**_WHOLE, "spectrum.basis": "whitening"}
    ),
    "lora-fa": Method(
        "LoRA-FA", "arXiv:2308.03303: A frozen where it starts", {**_LORA, "adapter.freeze_a": True}
    ),
    "eigen-frozen": Method(
        "eigen start, A frozen",
        "only B is trained, so that the update reads r chosen directions and no others",
        {**_ADAMW, "adapter.freeze_a": True},
    ),
    "null-frozen": Method(
        "null space, A frozen",
        "A0 on C_pre's smallest eigenvectors and left there, B0 = 0",
        {**_ADAMW, "adapter.init": "null_space_zero", "adapter.freeze_a": True},
    ),
    "lora-kl": Method("LoRA + KL", "KL to the base", {**_LORA, "training.kl_weight": 1.0}),
    "lora-masked-kl": Method(
        "LoRA + Mask-the-Target", "arXiv:2605.29498", {**_LORA, "training.masked_kl_weight": 1.0}
    ),
    "lora-replay": Method(
        "LoRA + replay", "10 % of the rows are self-samples", {**_LORA, "training.replay": 0.1}
    ),
    "folora-kl": Method("folora + KL", "KL to the base", {"training.kl_weight": 1.0}),
    "folora-masked-kl": Method(
        "folora + Mask-the-Target", "arXiv:2605.29498", {"training.masked_kl_weight": 1.0}
    ),
    "folora-replay": Method(
        "folora + replay", "10 % of the rows are self-samples", {"training.replay": 0.1}
    ),
}


def method(name: str) -> Method:
    """A method by its name. Raises ConfigError, with the nearest right name."""
    if name not in METHODS:
        raise ConfigError(
            f"unknown method {name!r}{nearest(name, METHODS)}; there are {', '.join(METHODS)}"
        )
    return METHODS[name]


def configured(base: FoLoraConfig, name: str, changes: dict[str, Any]) -> FoLoraConfig:
    """The config of an arm: a base, a method's changes on it, and more changes on top.

    Raises:
        ConfigError: Unknown method or option, or a value out of its interval.
    """
    return base.changed({**method(name).changes, **changes})
