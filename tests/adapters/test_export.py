"""An export is an ordinary PEFT adapter or model folder, readable without folora, with the same bytes every time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapted import IDS, trained
from support.adapter_files import write
from support.closeness import assert_near
from transformers import AutoModelForCausalLM

from benchmarks.tiny import MAKERS, make_llama
from folora.adapters.adapter import lora_factors
from folora.adapters.export import export_adapter, export_merged, truncate, write_adapter
from folora.errors import ConfigError

PLAIN = """
import sys, torch
sys.modules["folora"] = None  # importing folora is an error here
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
torch.save(model(torch.load(sys.argv[3])).logits, sys.argv[4])
merged = model.merge_and_unload()
torch.save(merged(torch.load(sys.argv[3])).logits, sys.argv[5])
"""


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_export_loads_without_folora(kind: str, tmp_path: Path) -> None:
    model = MAKERS[kind]()
    model.save_pretrained(tmp_path / "base")
    adapted = trained(model)
    report = export_adapter(adapted, tmp_path / "adapter")
    assert report.rank == 8
    assert report.relative_error == 0
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "folora.json",
    }  # fmt: skip
    torch.save(IDS, tmp_path / "ids")
    arguments = [str(tmp_path / n) for n in ("base", "adapter", "ids", "out", "merged")]
    subprocess.run([sys.executable, "-c", PLAIN, *arguments], check=True, cwd=tmp_path)
    expected = adapted(IDS).logits
    assert_near(torch.load(tmp_path / "out"), expected)
    assert_near(torch.load(tmp_path / "merged"), expected)


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_merged_export(kind: str, tmp_path: Path) -> None:
    adapted = trained(MAKERS[kind]())
    expected = adapted(IDS).logits
    export_merged(adapted, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_near(loaded(IDS).logits, expected)
    assert torch.equal(adapted(IDS).logits, expected)


def test_an_export_with_b0_zero_has_rank_r(tmp_path: Path) -> None:
    assert export_adapter(trained(make_llama(), "eigen"), tmp_path / "a").rank == 4


def test_a_truncated_export_reports_its_error(tmp_path: Path) -> None:
    adapted = trained(make_llama())
    full = {n: s * b @ a for n, (a, b, s) in lora_factors(adapted).items()}
    report = export_adapter(adapted, tmp_path / "a", rank=3)
    model = PeftModel.from_pretrained(make_llama(), str(tmp_path / "a"))
    cut = {n: s * b @ a for n, (a, b, s) in lora_factors(model).items()}
    lost = sum(float((full[n] - cut[n]).square().sum()) for n in full) ** 0.5
    whole = sum(float(m.square().sum()) for m in full.values()) ** 0.5
    assert report.rank == 3
    assert report.relative_error == pytest.approx(lost / whole, rel=1e-3)
    assert report.worst_relative_error >= report.relative_error
    with pytest.raises(ConfigError, match="rank is 9"):
        export_adapter(adapted, tmp_path / "b", rank=9)


def test_truncate_is_the_best_approximation() -> None:
    a, b = torch.randn(6, 20).double(), torch.randn(15, 6).double()
    cut_a, cut_b, lost, whole = truncate(a, b, 2)
    s = torch.linalg.svdvals(b @ a)
    assert lost == pytest.approx(float((s[2:] ** 2).sum()))
    assert whole == pytest.approx(float((s**2).sum()))
    assert float((b @ a - cut_b @ cut_a).square().sum()) == pytest.approx(lost)


def test_files_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    """A process with another PYTHONHASHSEED writes the same bytes."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    code = f"from support.adapter_files import write; write({str(tmp_path / 'other')!r})"
    subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    write(str(tmp_path / "own"))
    files = sorted(p.relative_to(tmp_path / "own") for p in (tmp_path / "own").rglob("*.*"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "own" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


@pytest.mark.parametrize(
    ("rank", "needed"), [(1, 8), (8, 8), (24, 32), (256, 256), (257, 320), (512, 512), (513, None)]
)
def test_the_lora_rank_for_vllm_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rank: int, needed: int | None
) -> None:
    caplog.set_level("INFO", logger="folora")
    factors = {"layer": (torch.ones(rank, 3), torch.ones(2, rank), 0.5)}
    write_adapter(factors, tmp_path / "a", LoraConfig())
    assert f"rank {rank}: " in caplog.text
    assert (f"--max-lora-rank {needed}" if needed else "too large for vLLM") in caplog.text


def test_layers_with_several_ranks_and_scales_are_exported_as_one_adapter(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False,
        rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 5, "up_proj": 1},
    )  # fmt: skip
    model: Any = get_peft_model(make_llama(), config)
    export_adapter(model, tmp_path / "a")
    loaded = PeftModel.from_pretrained(make_llama(), str(tmp_path / "a"))
    assert_near(loaded(IDS).logits, model.eval()(IDS).logits)
