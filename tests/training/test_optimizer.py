"""The optimizer is built from a PEFT model and a spectrum, also when both are loaded in a new process."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from support import second_process
from support.adapted import IDS, bases_for
from torch import Tensor

import folora
from benchmarks.tiny import make_gpt2, make_llama
from folora.adapters.adapter import attach, lora_factors
from folora.adapters.export import export_adapter
from folora.adapters.initialization import INITIALIZATIONS, NONZERO
from folora.errors import ConfigError
from folora.spectral.layers import GroupBasis, Spectrum

R = 4
CONFIG = LoraConfig(r=R, lora_alpha=6, task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])


def steps(model: PeftModel, optimizer: torch.optim.Optimizer, count: int = 2) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def loaded(folder: Path, **values: Any) -> PeftModel:
    found: PeftModel = PeftModel.from_pretrained(
        make_llama(), str(folder), **{"is_trainable": True, **values}
    )
    return found


def factors(model: PeftModel) -> list[Tensor]:
    return [part.clone() for a, b, _ in lora_factors(model).values() for part in (a, b)]


@pytest.mark.parametrize("init", sorted(INITIALIZATIONS))
def test_training_resumes_from_a_folder_by_peft_and_a_saved_spectrum(
    init: str, tmp_path: Path
) -> None:
    model = make_llama()
    bases = bases_for(model)
    adapted = attach(model, bases, CONFIG, init=init)
    optimizer = folora.optimizer(adapted, bases, lr=1e-2, directions=6)
    steps(adapted, optimizer)
    adapted.save_pretrained(str(tmp_path))
    state = copy.deepcopy(optimizer.state_dict())

    again = loaded(tmp_path)
    bases.save(tmp_path / "spectrum")
    other = folora.optimizer(again, Spectrum.load(tmp_path / "spectrum"), 1e-2, directions=6)
    other.load_state_dict(state)
    frozen = factors(again)
    for one, made in ((adapted, optimizer), (again, other)):
        steps(one, made)
    assert all(torch.equal(x, y) for x, y in zip(factors(again), factors(adapted), strict=True))
    assert torch.equal(again(IDS).logits, adapted(IDS).logits)
    for before, after in zip(frozen, factors(again), strict=True):
        rest = (slice(R, None),) if len(after) < before.shape[1] else (slice(None), slice(R, None))
        assert not torch.equal(before, after)
        assert torch.equal(before[rest], after[rest])


@pytest.mark.parametrize("init", ["eigen", "null_space"])
def test_another_process_trains_from_saved_files_to_the_same_bits(
    init: str, tmp_path: Path
) -> None:
    """Model, moments, spectrum and a fresh adapter are all that a started interpreter gets."""
    model = make_llama()
    model.save_pretrained(tmp_path / "base")
    keep, task = (folora.calibrate(model, [{"input_ids": ids}]) for ids in (IDS, IDS.flip(1)))
    spectrum = folora.solve(keep, task, null_rank=R)
    adapted = attach(model, spectrum, LoraConfig(r=R, task_type="CAUSAL_LM"), init=init)
    for name, part in {"keep": keep, "task": task, "spectrum": spectrum}.items():
        part.save(tmp_path / name)
    adapted.save_pretrained(str(tmp_path / "fresh"))
    second_process.trained(adapted, spectrum).save_pretrained(str(tmp_path / "first"))

    command = [sys.executable, second_process.__file__, tmp_path, str(torch.get_num_threads())]
    places = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fresh, first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("fresh", "first", "second")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(part, second[name]) for name, part in first.items())
    assert not any(torch.equal(part, fresh[name]) for name, part in first.items())


@pytest.mark.parametrize("init", sorted(NONZERO))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_a_frozen_half_is_recognized_in_an_export(
    make: Any, init: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make()
    bases = bases_for(model)
    adapted = attach(model.to(dtype), bases, LoraConfig(r=R, use_rslora=True), init=init)
    # Weight decay shrinks the frozen half, here to less than a third.
    steps(adapted, folora.optimizer(adapted, bases, lr=1e-2, lr_b_ratio=2.0, weight_decay=30.0))
    for rank, trained in ((None, R), (R, None)):  # a truncated export has no frozen half
        export_adapter(adapted, tmp_path / "a", rank=rank)
        again = PeftModel.from_pretrained(make().to(dtype), str(tmp_path / "a"), is_trainable=True)
        folora.optimizer(again, bases, lr=1e-2)
        layer: Any = again.get_base_model().get_submodule(bases[0].group.name)
        assert layer.lora_variant["default"].trained == trained


@pytest.mark.parametrize("init", sorted(set(INITIALIZATIONS) - NONZERO))
def test_an_adapter_without_a_frozen_half_is_trained_as_a_whole(init: str, tmp_path: Path) -> None:
    model = make_llama()
    bases = bases_for(model)
    attach(model, bases, CONFIG, init=init).save_pretrained(str(tmp_path))
    again = loaded(tmp_path)
    optimizer = folora.optimizer(again, bases, lr=1e-2)
    before = factors(again)
    steps(again, optimizer)
    assert all(
        bool((x != y).all(dim=1 if len(x) == R else 0).any()) and not torch.equal(x[-1], y[-1])
        for x, y in zip(before, factors(again), strict=True)
    )


def test_parameters_and_learning_rates() -> None:
    model = make_llama()
    bases = bases_for(model)
    adapted = attach(model, bases, CONFIG, init="null_space")
    optimizer = folora.optimizer(
        adapted, bases, 1e-3, lr_b_ratio=4.0, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6
    )
    groups = optimizer.param_groups
    assert isinstance(optimizer, folora.SAdam)
    assert len(groups) == len(bases) + 2
    assert ["basis" in group for group in groups] == [True] * len(bases) + [False] * 2
    assert [group["lr"] for group in groups] == [1e-3] * (len(bases) + 1) + [4e-3]
    assert {group["weight_decay"] for group in groups} == {0.1}
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.8, 0.9), 1e-6)}
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(set(listed)) == len(listed)
    assert set(listed) == {id(p) for p in adapted.parameters() if p.requires_grad}


def test_modules_to_save_are_stepped_by_adamw() -> None:
    model = make_llama()
    bases = bases_for(model)
    adapted = attach(model, bases, CONFIG)
    optimizer = folora.optimizer(adapted, bases, 1e-2, weight_decay=0.1)
    (weight,) = optimizer.param_groups[-2]["params"]
    other = torch.nn.Parameter(weight.detach().clone())
    plain = torch.optim.AdamW([other], lr=1e-2, weight_decay=0.1, fused=True)
    for _ in range(3):
        steps(adapted, optimizer, 1)
        other.grad = weight.grad
        plain.step()
        assert torch.equal(weight, other)


def test_a_constraint_holds_without_further_calls() -> None:
    model = make_llama()
    bases = bases_for(model)
    adapted = attach(model, bases, LoraConfig(r=R), protect=2)
    steps(adapted, folora.optimizer(adapted, bases, 1e-2), 4)  # the first steps are checked


def test_mismatched_adapters_and_spectra_are_refused_by_name(tmp_path: Path) -> None:
    model = make_llama()
    bases = bases_for(model)
    adapted = attach(model, bases, LoraConfig(r=R))

    def refuses(message: str, model: PeftModel, bases: Sequence[GroupBasis], **values: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            folora.optimizer(model, bases, 1e-3, **values)

    refuses(r"no LoRA adapter 'other', but default", adapted, bases, adapter_name="other")
    refuses(r"adapter has the layer \S+k_proj, the spectrum does not", adapted, bases[1:])
    wide = make_llama(hidden_size=64)
    refuses(r"has d_in = 32, but 64 in the spectrum", adapted, bases_for(wide))
    adapted.save_pretrained(str(tmp_path))
    refuses("is frozen.*is_trainable=True", loaded(tmp_path, is_trainable=False), bases)
    attach(adapted, bases, LoraConfig(r=R), adapter_name="second")
    refuses(r"set_adapter\('second'\)", adapted, bases, adapter_name="second")
    with pytest.raises(ValueError, match="lr is -1"):
        folora.optimizer(adapted, bases, -1)
