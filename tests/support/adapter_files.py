"""Write an adapter in both file formats, for a process whose files are compared with another's."""

from __future__ import annotations

import torch
from peft import LoraConfig

from benchmarks.tiny import make_llama
from folora.adapters.adapter import attach
from folora.adapters.export import export_adapter
from folora.calibration.inputs import find_groups, target_layers
from folora.spectral.layers import solve
from folora.spectral.moments import Moments


def write(folder: str) -> None:
    """``saved`` by PEFT and ``exported`` by folora."""
    model = make_llama()
    batch = {"input_ids": torch.tensor([[1, 1]])}
    groups = find_groups(model, target_layers(model, "all-linear"), batch)
    moments = Moments({g.name: torch.eye(g.d_in) for g in groups}, 1, tuple(groups))
    adapted = attach(
        model,
        solve(moments, moments, tau=1e-3),
        LoraConfig(r=2, lora_alpha=2),
        init="minor_singular",
    )
    adapted.save_pretrained(f"{folder}/saved")
    export_adapter(adapted, f"{folder}/exported")
