"""Replacements for functions that older versions of other libraries lack; `make matrix` tests those versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from folora.runtime.compat import base_state, base_state_fallback, trainer_options

VALUES = {"activation_checkpointing": True, "warmup_steps": 0.1, "seed": 3}


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ({"activation_checkpointing": bool, "warmup_steps": float, "seed": int}, VALUES),
        (
            {"gradient_checkpointing": bool, "warmup_steps": float, "seed": int},
            {"gradient_checkpointing": True, "warmup_steps": 0.1, "seed": 3},
        ),
        (
            {
                "gradient_checkpointing": bool,
                "warmup_steps": int,
                "warmup_ratio": float,
                "seed": int,
            },
            {"gradient_checkpointing": True, "warmup_ratio": 0.1, "seed": 3},
        ),
    ],
    ids=["5.23", "5", "4"],
)
def test_options_have_the_names_of_the_installed_transformers(
    types: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert trainer_options(VALUES, types) == expected


def test_base_weights_match_those_of_peft(model: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = [name for name, _ in model.named_modules() if name.endswith(("norm", "ln_f"))][-1:]
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=head)
    adapted: PeftModel = get_peft_model(model, config)
    for state in (base_state_fallback(adapted), base_state(adapted)):
        assert state.keys() == before.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
