"""Tiny models with an adapter, trained for a few steps."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from folora.adapters.adapter import attach
from folora.calibration.inputs import find_groups, target_layers
from folora.calibration.moments import second_moments
from folora.optim.sadam import SAdam
from folora.spectral.layers import Spectrum, solve
from folora.training.optimizer import param_groups

IDS = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(5))


def bases_for(model: PreTrainedModel, r: int = 4, targets: str = "all-linear") -> Spectrum:
    def batch(seed: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 50, (6, 20), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    groups = find_groups(model, target_layers(model, targets), batch(0))
    pre, task = (second_moments(model, groups, [batch(s)]) for s in (1, 2))
    return solve(pre, task, tau=1e-3, null_rank=r)


def trained(model: PreTrainedModel, init: str = "null_space", steps: int = 5) -> PeftModel:
    bases = bases_for(model)
    adapted = attach(model, bases, LoraConfig(r=4, lora_alpha=8), init=init)
    optimizer = SAdam(param_groups(adapted, bases, lr=1e-2))
    adapted.train()
    for _ in range(steps):
        optimizer.zero_grad()
        adapted(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return adapted.eval()
