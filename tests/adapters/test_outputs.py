"""Every way to save, export, merge or copy an adapter gives the logits of the trained model.

Each method is combined with each output, which PEFT or Transformers load over a fresh base without folora.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from support import adapted
from support.closeness import assert_near
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from benchmarks.tiny import MAKERS, make_llama, make_tokenizer, tiny_config
from folora.adapters.constraint import project_after_step
from folora.adapters.export import export_adapter, export_merged
from folora.adapters.initialization import INITIALIZATIONS, NONZERO
from folora.calibration.calibration_set import CalibrationSet
from folora.data.contents import Example
from folora.data.rows import TaskData
from folora.errors import ConfigError
from folora.spectral.layers import Spectrum
from folora.training.prepared import Prepared, assemble

R, ALPHA = 4, 8
IDS = adapted.IDS
METHODS: dict[str, dict[str, Any]] = {
    **{init: {"init": init} for init in INITIALIZATIONS},
    "oplora": {"init": "kaiming", "constraint": "oplora"},
    "null_space, oplora": {"init": "null_space", "constraint": "oplora"},
    "lora_null, A frozen": {"init": "lora_null", "freeze_a": True},
}


@dataclass(frozen=True)
class Trained:
    """A model trained by transformers' Trainer, its last checkpoint, and its logits."""

    prepared: Prepared
    checkpoint: Path
    logits: Tensor

    def copied(self) -> PeftModel:
        return copy.deepcopy(self.prepared.model)

    def saved(self, folder: Path) -> Path:
        self.prepared.model.save_pretrained(str(folder / "saved"))
        return folder / "saved"


@cache
def bases() -> Spectrum:
    return adapted.bases_for(make_llama(), R, tau=1e-2)


def untrained(method: str, model: Any = None) -> Prepared:
    config = tiny_config(
        adapter={"r": R, "alpha": ALPHA}, method={"name": "folora", **METHODS[method]}
    )
    task = TaskData([Example([1, 3, 4], [-100, 3, 4])], [])
    base = model or make_llama()
    return assemble(base, bases(), task, CalibrationSet([[1, 3, 4]], [[1, 5, 6]]), config)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    @cache
    def trained(method: str) -> Trained:
        folder = tmp_path_factory.mktemp("trainer")
        p = untrained(method)
        args = TrainingArguments(
            output_dir=str(folder), max_steps=4, save_steps=4, report_to="none", use_cpu=True,
            per_device_train_batch_size=2, lr_scheduler_type="constant", disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()]
        Trainer(p.model, args, train_dataset=rows, optimizers=(p.optimizer, None)).train()  # type: ignore[arg-type]
        return Trained(p, folder / "checkpoint-4", logits(p.model))

    return trained


@torch.no_grad()
def logits(model: Any, **kwargs: Any) -> Tensor:
    return model.eval()(input_ids=IDS, **kwargs).logits


def loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(make_llama(), str(folder))


def other(rank: int = 2) -> PeftModel:
    """Another adapter, made by PEFT alone."""
    torch.manual_seed(1)
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(make_llama(), config)  # type: ignore[return-value]


def with_reference(model: PeftModel) -> PeftModel:
    """A frozen copy of the adapter, made as TRL's DPO, KTO, GRPO and RLOO trainers make theirs."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    return model


def active(model: PeftModel, adapter: str) -> Tensor:
    model.set_adapter(adapter)
    return logits(model)


def next_to_another(t: Trained, folder: Path) -> Tensor:
    model = other()
    model.load_adapter(str(t.saved(folder)), "mine")
    return active(model, "mine")


def combined(kind: str) -> Callable[[Trained, Path], Tensor]:
    def output(t: Trained, folder: Path) -> Tensor:
        model, parts = with_reference(t.copied()), {"default": 0.25, "ref": 0.75}
        if kind == "linear":  # exact for a single adapter alone
            parts = {"default": 1.0}
        model.add_weighted_adapter([*parts], [*parts.values()], "sum", combination_type=kind)
        return active(model, "sum")

    return output


def hotswapped(t: Trained, folder: Path) -> Tensor:
    model = other(rank=2 * R)
    hotswap_adapter(model, str(t.saved(folder)), "default", torch_device="cpu")
    return logits(model)


def mixed(t: Trained, folder: Path) -> Tensor:
    model = with_reference(t.copied())
    names = ["default", "__base__", "ref", "__base__"]
    found = logits(model, adapter_names=names)
    assert_near(found[1::2], logits(make_llama())[1::2])
    return torch.stack([found[0], t.logits[1], found[2], t.logits[3]])


def exported(t: Trained, folder: Path) -> Tensor:
    t.prepared.export(folder / "exported")
    return logits(loaded(folder / "exported"))


def truncated(t: Trained, folder: Path) -> Tensor:
    """Truncated to half its rank; the rest of PEFT's dense update is then added to the base."""
    export_adapter(t.prepared.model, folder / "whole")
    rank = json.loads((folder / "whole" / "adapter_config.json").read_text())["r"] // 2
    export_adapter(t.prepared.model, folder / "cut", rank=rank)
    whole, cut = (loaded(folder / name).get_base_model() for name in ("whole", "cut"))
    model = loaded(folder / "cut")
    for name, layer in whole.named_modules():
        if hasattr(layer, "lora_A"):
            delta = layer.get_delta_weight("default").double()
            u, s, vh = torch.linalg.svd(delta)
            kept = (u[:, :rank] * s[:rank]) @ vh[:rank]
            found = cut.get_submodule(name).get_delta_weight("default").double()
            assert_near(found, kept, dtype=torch.float32)
            weight = model.get_base_model().get_submodule(name).base_layer.weight
            weight.data += (delta - kept).to(weight.dtype)
    return logits(model)


def merged_export(t: Trained, folder: Path) -> Tensor:
    export_merged(t.prepared.model, folder / "merged")
    return logits(AutoModelForCausalLM.from_pretrained(folder / "merged"))


def merged_and_unmerged(t: Trained, folder: Path) -> Tensor:
    model = t.copied()
    model.merge_adapter(safe_merge=True)
    assert_near(logits(model), t.logits, roundings=200)
    model.unmerge_adapter()
    return logits(model)


OUTPUTS: dict[str, Callable[[Trained, Path], Tensor]] = {
    "save_pretrained": lambda t, folder: logits(loaded(t.saved(folder))),
    "Trainer checkpoint": lambda t, folder: logits(loaded(t.checkpoint)),
    "export": exported,
    "export, truncated": truncated,
    "merge_and_unload": lambda t, folder: logits(t.copied().merge_and_unload()),
    "merge and unmerge": merged_and_unmerged,
    "merged export": merged_export,
    "load_adapter": next_to_another,
    "add_weighted_adapter, linear": combined("linear"),
    "add_weighted_adapter, cat": combined("cat"),
    "add_weighted_adapter, svd": combined("svd"),
    "TRL's ref": lambda t, folder: active(with_reference(t.copied()), "ref"),
    "hotswap": hotswapped,
    "mixed batch": mixed,
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("method", METHODS)
def test_the_output_is_the_trained_adapter(
    train: Callable[[str], Trained], tmp_path: Path, method: str, output: str
) -> None:
    trained = train(method)
    assert float((trained.logits - logits(make_llama())).abs().max()) > 0.05
    found = OUTPUTS[output](trained, tmp_path)
    assert_near(found, trained.logits, roundings=200)
    assert torch.equal(logits(trained.prepared.model), trained.logits)  # writing changes nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MAKERS)
def test_saving_is_exact_for_other_layers_and_dtypes(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    model = adapted.trained(MAKERS[kind]().to(dtype))
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(MAKERS[kind]().to(dtype), str(tmp_path))
    roundings = 200 if dtype == torch.float32 else 4
    assert_near(logits(again), logits(model), roundings=roundings)


@pytest.mark.parametrize("method", METHODS)
def test_disabling_or_unloading_restores_the_base(
    train: Callable[[str], Trained], method: str
) -> None:
    base, model = logits(make_llama()), train(method).copied()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model.unload()), base)


@pytest.mark.parametrize("method", METHODS)
def test_another_adapter_can_be_swapped_in(
    train: Callable[[str], Trained], tmp_path: Path, method: str
) -> None:
    theirs, model = other(), train(method).copied()
    theirs.save_pretrained(str(tmp_path / "other"))
    hotswap_adapter(model, str(tmp_path / "other"), "default", torch_device="cpu")
    assert_near(logits(model), logits(theirs), roundings=200)


def bypassed(layer: Any, x: Tensor) -> Tensor:
    """What a fused kernel computes: LoRA from the weights, bypassing the variant."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.base_layer(x) + (x @ a.T) @ b.T * layer.scaling["default"]


@pytest.mark.parametrize("method", METHODS)
def test_a_kernel_that_bypasses_the_variant_is_refused_at_the_first_step(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    model = untrained(method).model
    layer = model.get_base_model().get_submodule("model.layers.1.mlp.down_proj")
    monkeypatch.setattr(layer, "forward", lambda x: bypassed(layer, x))
    assert_near(logits(model), logits(make_llama()), roundings=500)
    wrong = method in NONZERO or method not in INITIALIZATIONS
    refused = pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.down_proj: .*fused")
    with refused if wrong else nullcontext():
        model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("method", [m for m in METHODS if "oplora" in m])
def test_an_optimizer_without_the_constraint_is_refused_after_one_step(method: str) -> None:
    prepared = untrained(method)
    optimizer = torch.optim.AdamW(prepared.model.parameters(), lr=1e-2)
    prepared.model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    wanted = r"optimizer leaves OPLoRA's subspace.*project_after_step"
    with pytest.raises(ConfigError, match=wanted):
        prepared.model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("method", METHODS)
def test_any_optimizer_keeps_the_frozen_half_and_hooks_are_removed(method: str) -> None:
    """AdamW without weight decay, and with it, which shrinks both halves equally."""
    for decay in (0.0, 0.5):
        prepared = untrained(method)
        parameters = dict(prepared.model.named_parameters())
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer = torch.optim.AdamW(prepared.model.parameters(), lr=1e-2, weight_decay=decay)
        project_after_step(optimizer, prepared.model)
        for _ in range(3):
            optimizer.zero_grad()
            prepared.model(IDS, labels=IDS).loss.backward()
            optimizer.step()
        for name, p in parameters.items():
            assert not p._post_accumulate_grad_hooks
            if "lora_" in name and method.split(",")[0] in NONZERO:
                old, new = (t if "lora_A" in name else t.T for t in (before[name], p))
                shrunk = (1 - 1e-2 * decay) ** 3 if p.requires_grad else 1.0
                torch.testing.assert_close(new[R:], old[R:] * shrunk, rtol=1e-6, atol=0)
                assert decay or torch.equal(new[R:], old[R:])
                assert torch.equal(new[:R], old[:R]) == (not p.requires_grad)


def test_weight_decay_alone_does_not_change_the_output() -> None:
    model = untrained("null_space").model
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5).step()
    assert torch.equal(logits(model), logits(make_llama()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("written", ["saved", "exported"])
def test_the_adapter_config_is_readable_by_other_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, written: str
) -> None:
    make_llama().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = untrained(method, AutoModelForCausalLM.from_pretrained("base")).model
    model.save_pretrained("saved")
    export_adapter(model, "exported")
    config = json.loads((tmp_path / written / "adapter_config.json").read_text())
    rank = 2 * R if method.split(",")[0] in NONZERO else R
    assert config["r"] == rank
    assert json.dumps(config["lora_alpha"]) == str(rank * ALPHA // R)  # 16, not 16.0
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"] is True
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    tensors = load_file(tmp_path / written / "adapter_model.safetensors")
    assert {len(t) for name, t in tensors.items() if "lora_A" in name} == {rank}
    assert {name.rsplit(".", 2)[1] for name in tensors} == {"lora_A", "lora_B"}


def test_a_hub_name_is_kept() -> None:
    model = make_llama()
    model.name_or_path = "someone/some-model"
    adapted = untrained("eigen", model).model
    assert adapted.peft_config["default"].base_model_name_or_path == "someone/some-model"


def test_trl_uses_a_copy_of_the_adapter_as_reference(tmp_path: Path) -> None:
    """DPO copies its reference from the adapter, so that the first loss is log 2."""
    trl = pytest.importorskip("trl")
    model = untrained("null_space").model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter[:, :R] += 0.02
    rows = [{"prompt": "1+1=", "chosen": "2.", "rejected": "3."}] * 4
    args = trl.DPOConfig(
        output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False,
        per_device_train_batch_size=2, learning_rate=0.0, logging_steps=1,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model, args=args, train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer()
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
