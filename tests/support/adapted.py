"""Adapters on tiny models: trained for a few steps, copied into PEFT's own LoRA, and their activation memory."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from folora.adapters.adapter import attach
from folora.calibration.inputs import find_groups, target_layers
from folora.calibration.moments import second_moments
from folora.optim.sadam import SAdam
from folora.spectral.layers import Spectrum, solve
from folora.training.optimizer import param_groups

IDS = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(5))


def bases_for(
    model: PreTrainedModel, r: int = 4, targets: str = "all-linear", tau: float = 1e-3
) -> Spectrum:
    def batch(seed: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 50, (6, 20), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    groups = find_groups(model, target_layers(model, targets), batch(0))
    pre, task = (second_moments(model, groups, [batch(s)]) for s in (1, 2))
    return solve(pre, task, tau=tau, null_rank=r)


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


def in_peft(own: PeftModel, base: PreTrainedModel) -> PeftModel:
    """The same factors in an adapter of PEFT alone, on another base model."""
    config: Any = own.peft_config["default"]
    plain = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        fan_in_fan_out=config.fan_in_fan_out,
        target_modules=[
            name for name, m in own.get_base_model().named_modules() if isinstance(m, LoraLayer)
        ],
    )
    theirs: Any = get_peft_model(base, plain)
    theirs.load_state_dict(own.state_dict(), strict=False)
    return theirs  # type: ignore[no-any-return]


def saved_bytes(model: PeftModel) -> tuple[int, Tensor, dict[str, Tensor]]:
    """Bytes saved for the backward pass beside parameters, the loss, and gradients by name."""
    stores = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
    saved: list[Tensor] = []  # keeps all tensors alive, so that no address is reused

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        stores.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return sum(stores.values()), loss.detach(), grads
