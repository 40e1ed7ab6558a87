"""Every architecture of the matrix works end to end, or is refused early with the correct reason."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.architectures import CASES, Case, build, table, tiny_config
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.compatibility import read_section
from benchmarks.tiny import make_tokenizer, rows
from benchmarks.tiny import tiny_config as smallest
from folora.adapters.adapter import attach
from folora.adapters.coverage import Coverage, cover_config
from folora.adapters.export import export_adapter, export_merged
from folora.calibration.moments import second_moments
from folora.config import AdapterConfig, FoLoraConfig
from folora.data.rows import batches, text_examples
from folora.errors import ConfigError
from folora.optim.sadam import SAdam
from folora.pipeline.context import coverage_of
from folora.pipeline.planning import plan
from folora.pipeline.prepare import prepare
from folora.pipeline.run import Run
from folora.runtime.architecture import check_config
from folora.spectral.layers import solve
from folora.spectral.moments import Moments
from folora.training.optimizer import param_groups

CONFIG = FoLoraConfig(adapter=AdapterConfig(r=2))
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(3))
ALL = bool(os.environ.get("FOLORA_TEST_ARCHITECTURES"))  # make architectures
ALIKE = frozenset(
    [
        "qwen2",
        "gemma",
        "olmo",
        "cohere",
        "granite",
        "stablelm",
        "ernie4_5",
        "exaone4",
        "helium",
        "seed_oss",
        "hunyuan_v1_dense",
        "arcee",
        "diffllama",
        "nanochat",
        "gpt_bigcode",
        "codegen",
        "persimmon",
        "glm",
        "xglm",
        "olmoe",
        "granitemoe",
        "minimax_m2",
        "dots1",
        "glm4_moe_lite",
        "ernie4_5_moe",
        "aria_text",
        "falcon_mamba",
    ]
)
"""Their layers are like those of another case; tested by `make architectures`."""
WORKING, REFUSED = ([c for c in CASES if bool(c.refused) is refused] for refused in (False, True))


def named(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def outlined(case: Case) -> Coverage:
    """From the config alone, as in `plan` and `run`."""
    config = CONFIG.replace(model="tiny")
    return cover_config(config, tiny_config(case.kind, **case.changes))[1]


def logits(model: Any) -> Tensor:
    mask = torch.ones_like(IDS)
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=mask, use_cache=False).logits


def moments(model: PreTrainedModel, found: Coverage, seed: int) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(3, 60, (n,), generator=generator).tolist() for n in (9, 4, 6, 8)]
    return second_moments(model, found.groups, batches(text_examples(texts), 2))


def close(found: Tensor, wanted: Tensor) -> None:
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=5e-5)


@named([c for c in WORKING if ALL or c.kind not in ALIKE])
def test_adapted_architectures_work(case: Case, tmp_path: Path) -> None:
    model = build(case)
    found = coverage_of(model, CONFIG, 1)
    assert {name.rsplit(".", 1)[-1] for name in found.layers} == set(case.adapted.split())
    patterns = case.left.split()
    assert all(any(fnmatch(name, p) for p in patterns) for name in found.left_out)
    assert all(any(fnmatch(name, p) for name in found.left_out) for p in patterns)
    if not case.head:
        outline = outlined(case)
        assert outline.groups == found.groups
        assert outline.left_out == found.left_out
        assert (outline.weights, outline.embeddings) == (found.weights, found.embeddings)

    before = logits(model)
    bases = solve(moments(model, found, 1), moments(model, found, 2), tau=1e-3)
    adapted = attach(model, bases, LoraConfig(r=2, lora_alpha=4))
    assert torch.equal(logits(adapted), before)
    optimizer = SAdam(param_groups(adapted, bases, lr=1e-2))
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = adapted(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    trained = logits(adapted)
    assert losses[0] != losses[1]
    assert float((trained - before).abs().max()) > 1e-3 * float(before.abs().max())

    export_adapter(adapted, tmp_path / "adapter")
    export_merged(adapted, tmp_path / "merged")
    stock = PeftModel.from_pretrained(build(case), str(tmp_path / "adapter")).eval()
    close(logits(stock), trained)
    close(logits(stock.merge_and_unload()), trained)
    close(logits(type(model).from_pretrained(tmp_path / "merged").eval()), trained)


@named(REFUSED)
def test_refused_architectures_are_refused_early(case: Case) -> None:
    with pytest.raises(ConfigError, match=case.refused):
        coverage_of(build(case), CONFIG, 1)
    config = tiny_config(case.kind, **case.changes)
    if case.head:
        config.architectures = [case.head]
        if case.head in OWN_HEAD:  # AutoModelForCausalLM gives the config's kind another head
            return
        with pytest.raises(ConfigError, match=r"must be a causal LM|AutoModelForImageTextToText"):
            check_config(config, "tiny")
    else:
        with pytest.raises(ConfigError, match=case.refused):
            outlined(case)


OWN_HEAD = {"LlamaModel", "BertModel", "ElectraForPreTraining"}


def test_the_matrix_covers_many_architectures() -> None:
    assert len({c.kind for c in CASES}) >= 80
    assert len({c.kind for c in WORKING}) >= 60
    assert len({c.name + str(c.changes) for c in CASES}) == len(CASES)


def test_the_documented_table_matches_the_cases() -> None:
    assert read_section("architectures")["rows"] == table()


def test_a_model_with_an_adapter_is_refused_and_unchanged() -> None:
    model = build(CASES[0])
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    for given in (adapted, model):
        with pytest.raises(ConfigError, match=r"already has an adapter .*merge_and_unload"):
            prepare(given, make_tokenizer(), rows())  # type: ignore[arg-type]
    assert any(p.requires_grad for p in adapted.parameters())
    with pytest.raises(ConfigError, match=r"before torch\.compile"):
        coverage_of(torch.nn.Linear(2, 2), CONFIG, 1)  # type: ignore[arg-type]


CAN_SAMPLE = [c for c in WORKING if not c.cannot_sample]
WHOLE = CAN_SAMPLE if ALL else []
SOME = ["mixtral", "deepseek_v3", "mamba", "qwen3_next", "gemma3"]


@named([c for c in WORKING if c.cannot_sample])
def test_models_that_cannot_generate_are_refused_first(case: Case) -> None:
    """By generating two tokens; `prepare` and a run make the generation engine first."""
    config = smallest(sampling={"start_token": "<s>"}, model=None)
    with pytest.raises(ConfigError, match="cannot generate text here"):
        prepare(build(case), make_tokenizer(), rows(), config)


@named(WHOLE or [c for c in WORKING if c.kind in SOME])
def test_prepare(case: Case) -> None:
    """With sampling; some architectures only, all by `make architectures`."""
    sampling = {"num_sequences": 32, "min_new_tokens": 32, "max_new_tokens": 32}
    config = smallest(sampling=sampling | {"start_token": "<s>"}, adapter={"r": 2}, model=None)
    model = build(case)
    model.generation_config.eos_token_id = 2  # type: ignore[union-attr]
    prepared = prepare(model, make_tokenizer(), rows(), config)
    assert prepared.samples.calibration
    loss = prepared.model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    prepared.optimizer.step()
    changed = prepared.model(input_ids=IDS, labels=IDS, use_cache=False).loss
    assert float(changed.detach()) != float(loss.detach())


def test_the_model_is_unchanged() -> None:
    model = build(CASES[0]).requires_grad_(True)
    before = {name: type(module) for name, module in model.named_modules()}
    coverage_of(model, CONFIG, 1)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_named_layers_that_cannot_be_adapted_are_refused() -> None:
    model = build(next(c for c in CASES if c.kind == "mamba"))
    config = FoLoraConfig(adapter={"r": 2, "target_modules": ["in_proj", "out_proj"]})
    with pytest.raises(ConfigError, match=r"selects backbone\.layers\.0\.mixer\.out_proj.*PEFT"):
        coverage_of(model, config, 1)


def test_experts_of_linear_layers_are_left_out() -> None:
    """As in older versions of transformers, and in custom model code."""
    model: Any = build(CASES[0])

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, 32)
            chosen = flat[:, :4].argmax(-1)
            out = torch.zeros_like(flat)
            for number, expert in enumerate(self.experts):
                out[chosen == number] = expert(flat[chosen == number])
            return out.reshape(x.shape)

    model.model.layers[1].mlp = Experts()
    found = coverage_of(model, CONFIG, 1)
    left = {name for name, reason in found.left_out.items() if "not one row per token" in reason}
    assert left == {f"model.layers.1.mlp.experts.{number}" for number in range(4)}


def test_adapting_less_than_half_of_the_weights_warns(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    case = next(c for c in CASES if c.kind == "mixtral")
    build(case).save_pretrained(tmp_path)
    found = plan(CONFIG.replace(model=str(tmp_path), device="cpu"))
    assert len(found.coverage.layers) == 8 and found.activations > 0
    assert "LoRA adapts 19.7 % of the weights outside embeddings" in caplog.text
    adapted, *others = found.coverage.lines()
    assert adapted.startswith("adapted: 17.4% of 35,232 weights (19.7% without embeddings)")
    experts = "model.layers.*.mlp.experts, 69.8% (MixtralExperts is not a linear layer)"
    assert f"not adapted: {experts}" in others


def test_a_run_reports_what_is_adapted(
    model_folder: Path, rows_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="folora")
    config = smallest(model=str(model_folder), dataset=str(rows_file), output=str(tmp_path / "run"))
    Run(config).check(needs_data=True)
    assert "adapted: 89.6% of" in caplog.text
    assert "not adapted: embeddings and output layer" in caplog.text
    assert "LoRA adapts" not in caplog.text


@pytest.mark.parametrize("kind", ["mamba", "jetmoe", "bloom", "qwen3_next", "llama4_text", "opt"])
def test_a_plan_covers_what_a_run_adapts(kind: str, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.kind == kind)
    tiny_config(kind, **case.changes).save_pretrained(tmp_path)
    assert plan(CONFIG.replace(model=str(tmp_path), device="cpu")).activations > 0
