"""The dtype of a loaded model: the checkpoint's, or one that the CPU has kernels for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.tiny import make_gpt2, make_llama, make_tokenizer, tiny_config
from folora import prepare
from folora.errors import ConfigError, DataError
from folora.pipeline.planning import plan
from folora.pipeline.run import Run
from folora.runtime import loading
from folora.runtime.loading import dtype_for, is_slow_here, load_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A folder with a checkpoint in bf16."""
    folder = tmp_path / "narrow"
    make_llama().to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def cpu_of(monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    narrow = (torch.bfloat16, torch.float16)
    monkeypatch.setattr(loading, "is_slow_here", lambda dtype: slow and dtype in narrow)


@pytest.mark.parametrize("slow", [True, False])
def test_auto_dtype_is_the_checkpoints_unless_the_cpu_has_no_kernels_for_it(
    narrow: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    cpu_of(monkeypatch, slow)
    auto = tiny_config(model=str(narrow), dtype="auto")
    expected = torch.float32 if slow else torch.bfloat16
    model_config = AutoConfig.from_pretrained(narrow)
    assert load_model(auto, str(narrow)).dtype == expected
    assert dtype_for(auto, CPU, model_config) == expected
    assert dtype_for(auto, GPU, model_config) == torch.bfloat16
    assert load_model(auto, str(narrow), as_stored=True).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_requested_slow_dtype_is_used_with_a_warning(
    narrow: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, dtype: str
) -> None:
    asked = tiny_config(model=str(narrow), dtype=dtype)
    cpu_of(monkeypatch, slow=False)
    assert load_model(asked, str(narrow)).dtype == getattr(torch, dtype)
    assert "slower" not in caplog.text
    cpu_of(monkeypatch, slow=True)
    assert load_model(asked, str(narrow)).dtype == getattr(torch, dtype)
    assert f"matrix products in {dtype} are many times slower" in caplog.text


@pytest.mark.parametrize("slow", [True, False])
def test_a_slow_dtype_of_a_model_in_memory_is_reported_first(
    narrow: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, slow: bool
) -> None:
    cpu_of(monkeypatch, slow)
    model = AutoModelForCausalLM.from_pretrained(narrow)
    with pytest.raises(DataError):
        prepare(model, make_tokenizer(), [])
    assert ("dtype=torch.float32" in caplog.text) == slow


def test_prepare_loads_a_model_by_its_name(model_folder: Path, rows_file: Path) -> None:
    config = tiny_config(dataset=str(rows_file))
    prepared = prepare(str(model_folder), config=config)
    assert prepared.model.get_base_model().name_or_path == str(model_folder)
    assert len(prepared.task.train) + len(prepared.task.held_out) == 40
    with pytest.raises(ConfigError, match="needs a dataset"):
        prepare(str(model_folder))
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        prepare(str(model_folder), dataset="none.jsonl")
    with pytest.raises(ConfigError, match=r"folder \./none does not exist"):
        prepare("./none", config=config)
    with pytest.raises(ConfigError, match="needs the tokenizer"):
        prepare(make_gpt2(), dataset=[{"prompt": "a", "completion": "b"}])


def test_float32_checkpoints_stay_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_of(monkeypatch, slow=True)
    make_gpt2().double().save_pretrained(tmp_path)
    assert load_model(tiny_config(dtype="auto"), str(tmp_path)).dtype == torch.float64
    assert not is_slow_here(torch.float32)


def test_plan_uses_the_dtype_that_is_loaded(narrow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = tiny_config(model=str(narrow), dtype="auto")
    found = []
    for slow in (False, True):
        cpu_of(monkeypatch, slow)
        planned = plan(auto)
        found.append((planned.stages[0].memory, planned.parameters))
    (there, parameters), (here, _) = found
    assert here - there > 2 * parameters  # and a larger cache


def test_a_merged_export_has_the_checkpoints_dtype(
    narrow: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_of(monkeypatch, slow=True)
    named = {"model": str(narrow), "dataset": str(rows_file), "output": str(tmp_path / "run")}
    run = Run(tiny_config(**named, dtype="auto"))
    run.run()
    assert run.context.model.dtype == torch.float32
    run.export(tmp_path / "merged", kind="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
