"""The activation-memory estimate, made on the meta device, matches the profiler's peak of a step on the CPU."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.speed.steps import peak_of
from benchmarks.tiny import MAKERS
from folora.adapters.adapter import attach, outline
from folora.adapters.low_rank import narrow_inputs
from folora.calibration.inputs import target_layers
from folora.config import AdapterConfig, FoLoraConfig
from folora.pipeline.activation_memory import AllocationTracker, loss_bytes, step_bytes
from folora.pipeline.context import coverage_of
from folora.spectral.layers import solve
from folora.spectral.moments import Moments

ROWS, TOKENS, RANK = 4, 64, 2


def counted(real: PreTrainedModel, checkpointing: bool) -> int:
    """On the meta device; TRL's tile, which the profiled step does not have, left out."""
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(real.config)
    model = outline(
        skeleton.to(dtype=real.dtype), target_layers(skeleton, "all-linear"), RANK, "eigen"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("folora.pipeline.activation_memory.loss_bytes", lambda *_: 0)
        return step_bytes(model.train(), ROWS, TOKENS, on_cpu=True, checkpointing=checkpointing)


def profiled(real: PreTrainedModel, checkpointing: bool) -> int:
    groups = coverage_of(real, FoLoraConfig(adapter=AdapterConfig(r=RANK)), 1).groups
    c = Moments({g.name: torch.eye(g.d_in) for g in groups}, 1, tuple(groups))
    model = attach(
        real, solve(c, c, tau=1e-3, directions=RANK), LoraConfig(r=RANK, lora_alpha=RANK)
    ).train()
    if checkpointing:
        real.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 40, (ROWS, TOKENS))
    # As in a padded batch.
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, -1] = 0

    def step() -> None:
        model.zero_grad()
        with narrow_inputs(model):
            inner = real.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            hidden = inner.last_hidden_state
            hidden.backward(torch.empty_like(hidden))

    step()
    model.zero_grad()
    return peak_of(step)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_estimated_bytes_of_a_step_match_the_profiler(
    name: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    real = MAKERS[name]().to(dtype)
    real.requires_grad_(False)
    found, truth = counted(real, checkpointing), profiled(real, checkpointing)
    assert 0.9 < found / truth < 1.1


def test_checkpointing_needs_far_less_and_the_loss_is_counted() -> None:
    real = MAKERS["llama"]()
    assert counted(real, True) < 0.8 * counted(real, False)
    hidden = torch.empty(2, 30, 8, dtype=torch.bfloat16, device="meta")
    gradients = 2 * 30 * 8 * (4 + 2)
    assert loss_bytes(hidden, 100, False) == 60 * 100 * 2 + gradients
    assert loss_bytes(hidden, 100, True) == 60 * 100 * (2 + 4 * 7) + gradients
    assert loss_bytes(hidden, 10**6, False) == 60 * 32768 * 2 + gradients


def test_freed_tensors_are_not_counted() -> None:
    known = torch.empty(1000, device="meta")
    with AllocationTracker([known]) as tracker:
        kept = torch.empty(10, device="meta")
        for _ in range(3):
            del_me = torch.empty(100, device="meta")
            del del_me
        seen = known.view(10, 100)
        assert tracker.allocated() == 40
    assert tracker.peak == 440
    assert kept.shape == (10,) and seen.shape == (10, 100)
