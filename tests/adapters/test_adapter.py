"""The adapter does not change the output before the first step, and is saved and exported as ordinary LoRA."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from support.adapted import IDS, bases_for, trained
from support.closeness import assert_near
from transformers import PreTrainedModel

from benchmarks.tiny import make_llama
from folora.adapters.adapter import attach, lora_factors
from folora.adapters.initialization import kaiming, leading_eigenvectors
from folora.errors import ConfigError, NumericsError
from folora.metrics.meter import total_norm, update_norms
from folora.optim.sadam import SAdam
from folora.spectral.eigenproblem import spectral_gate
from folora.training.optimizer import gated_basis, param_groups

R4 = LoraConfig(r=4, lora_alpha=4)


@pytest.mark.parametrize("init", ["null_space", "eigen", "kaiming"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_changes_before_the_first_step(
    model: PreTrainedModel, init: str, dtype: torch.dtype
) -> None:
    bases = bases_for(model)
    model = model.to(dtype)
    before = model(IDS).logits
    adapted = attach(model, bases, R4, init=init)
    assert torch.equal(adapted(IDS).logits, before)
    if init == "null_space":
        assert all(b.abs().sum() > 0 for _, b, _ in lora_factors(adapted).values())


def test_disabling_the_adapter_restores_the_base_output(model: PreTrainedModel) -> None:
    before = model(IDS).logits
    weights = copy.deepcopy(model.state_dict())
    adapted = trained(model)
    after = adapted(IDS).logits
    assert (after - before).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(adapted(IDS).logits, before)
    assert torch.equal(adapted(IDS).logits, after)
    base = adapted.get_base_model().state_dict()
    for name, value in weights.items():
        stem, leaf = name.rsplit(".", 1)
        assert torch.equal(base.get(f"{stem}.base_layer.{leaf}", base.get(name)), value)


def test_two_adapters_do_not_affect_each_other(model: PreTrainedModel) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    alone = PeftModel(copy.deepcopy(model), config, adapter_name="other")
    expected = alone(IDS).logits
    adapted = trained(model)
    first = adapted(IDS).logits
    adapted.add_adapter("other", config)
    adapted.load_state_dict(
        {k: v for k, v in alone.state_dict().items() if ".other." in k}, strict=False
    )
    adapted.set_adapter("other")
    assert_near(adapted(IDS).logits, expected)
    adapted.set_adapter("default")
    assert torch.equal(adapted(IDS).logits, first)
    adapted.delete_adapter("other")
    assert torch.equal(adapted(IDS).logits, first)


def test_attaching_to_a_peft_model_adds_a_second_adapter() -> None:
    model = make_llama()
    bases = bases_for(model)
    adapted = attach(model, bases, R4, init="kaiming")
    before = adapted(IDS).logits
    again = attach(adapted, bases, LoraConfig(r=2), init="null_space", adapter_name="second")
    again.set_adapter("second")
    assert torch.equal(again(IDS).logits, before)
    again.delete_adapter("second")
    assert not any("second" in name for name, _ in again.named_buffers())


def test_merging_and_unmerging_do_not_change_the_output(model: PreTrainedModel) -> None:
    adapted = trained(model)
    expected = adapted(IDS).logits
    for safe in (False, True):
        adapted.merge_adapter(safe_merge=safe)
        assert_near(adapted(IDS).logits, expected)
        adapted.unmerge_adapter()
        assert_near(adapted(IDS).logits, expected)
    merged = adapted.merge_and_unload()
    assert_near(merged(IDS).logits, expected)


def test_a_saved_adapter_loads_over_an_attached_one(tmp_path: Path) -> None:
    """As saved by PEFT's ``save_pretrained``, with the frozen half."""
    adapted = trained(make_llama())
    adapted.save_pretrained(tmp_path)
    fresh = make_llama()
    other = attach(fresh, bases_for(fresh), LoraConfig(r=4, lora_alpha=8), init="null_space")
    other.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.equal(other(IDS).logits, adapted(IDS).logits)


def test_norms_against_dense_matrices() -> None:
    model = make_llama()
    bases = bases_for(model)
    adapted = attach(model, bases, R4, init="null_space")
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    norms = update_norms(lora_factors(adapted), bases)
    for b in bases:
        t = b.basis.double()
        h = torch.linalg.inv(t @ t.T)
        for name in b.group.layers:
            lora_a, lora_b, s = lora_factors(adapted)[name]
            dw = s * lora_b.double() @ lora_a.double()
            assert norms[name].frobenius == pytest.approx(float(dw.norm()), rel=1e-6)
            assert norms[name].h_norm == pytest.approx(
                float((dw @ h @ dw.T).trace().sqrt()), rel=1e-4
            )
    assert total_norm(norms).frobenius >= max(n.frobenius for n in norms.values())


def test_initializations() -> None:
    model = make_llama()
    (first, *_) = bases_for(model)
    a0 = leading_eigenvectors(first.basis, 4)
    assert_near(a0 @ a0.T, torch.eye(4), dtype=torch.float64)
    span = torch.linalg.lstsq(a0.T, first.basis[:, :4].double()).solution
    assert_near(a0.T @ span, first.basis[:, :4])
    generator = torch.Generator().manual_seed(0)
    assert kaiming(4, 100, generator).abs().max() <= 0.1
    with pytest.raises(NumericsError):
        leading_eigenvectors(first.basis, 33)


def test_a_refused_attach_leaves_the_model_unchanged() -> None:
    model = make_llama()
    bases = bases_for(model, r=2)
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(ConfigError, match="r is 33"):
        attach(model, bases, LoraConfig(r=33), init="kaiming")
    with pytest.raises(ConfigError, match="null_rank=4"):
        attach(model, bases, R4, init="null_space")
    with pytest.raises(ConfigError, match="init is 'nul'"):
        attach(model, bases, LoraConfig(r=2), init="nul")
    assert [n for n, _ in model.named_modules()] == names


def test_the_h_norm_of_a_truncated_basis_is_exact_or_nan() -> None:
    model = make_llama()
    bases = bases_for(model)
    adapted = attach(model, bases, R4)
    optimizer = SAdam(param_groups(adapted, bases, lr=0.1, directions=6))
    for _ in range(3):
        optimizer.zero_grad()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    cut = [
        replace(b, basis=b.basis[:, :6].contiguous(), gamma=b.gamma[:6], null_basis=None)
        for b in bases
    ]
    whole, part = (update_norms(lora_factors(adapted), bs) for bs in (bases, cut))
    for name, norms in whole.items():
        assert part[name].frobenius == norms.frobenius
        assert part[name].h_norm == pytest.approx(norms.h_norm, rel=1e-3)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += 0.01
    assert all(math.isnan(n.h_norm) for n in update_norms(lora_factors(adapted), cut).values())
    assert math.isnan(total_norm(update_norms(lora_factors(adapted), cut)).h_norm)


def test_groups_hold_the_leading_columns_and_the_gate_scale() -> None:
    model = make_llama()
    bases = bases_for(model)
    for b in bases:
        group = gated_basis(b, 1.0, 0.3, 6, "task")
        gate = spectral_gate(b.gamma[:6], 1.0, 0.3)
        moved = float((b.gamma[:6].double() * gate.double() ** 2).sum())
        assert group["scale"] == pytest.approx((b.task_trace / moved) ** 0.5, rel=1e-5)
        assert torch.equal(group["basis"], b.basis[:, :6])
        assert torch.equal(group["gate"], gate)


def test_param_groups_share_a_basis_by_input() -> None:
    model = make_llama()
    bases = bases_for(model)
    adapted = attach(model, bases, R4, init="null_space")
    groups = param_groups(adapted, bases, lr=1e-3, lr_b_ratio=4.0)
    assert len(groups) == len(bases) + 1
    assert len(groups[0]["params"]) == 3
    assert groups[-1]["lr"] == 4e-3
    assert "basis" not in groups[-1]
    listed = {id(p) for g in groups for p in g["params"]}
    assert listed == {id(p) for p in adapted.parameters() if p.requires_grad}
    plain = param_groups(adapted, bases, lr=1e-3, spectral=False)
    assert all("basis" not in g for g in plain)
    unscaled = param_groups(adapted, bases, lr=1e-3, step_scale="paper")
    assert (groups[0]["scale"] == 1, unscaled[0]["scale"] == 1) == (False, True)
    for group, b in zip(groups, bases, strict=False):  # the whole basis in fp32 is not copied
        assert group["basis"].data_ptr() == b.basis.data_ptr()
