"""An adapter on a base quantized by bitsandbytes behaves as on any other base.

On the CPU bitsandbytes 0.50 uses another kernel if gradients are enabled, so outputs are compared without
them; and its 4-bit layers give other outputs after ``state_dict()`` (called by PEFT's ``load_adapter``), so
adapters are loaded over a fresh model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from support.adapted import IDS, bases_for, trained
from support.closeness import assert_near
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from benchmarks.tiny import make_llama
from folora.adapters.adapter import attach
from folora.adapters.export import export_adapter, export_merged
from folora.adapters.initialization import INITIALIZATIONS
from folora.errors import ConfigError, NumericsError
from folora.runtime.finiteness import check_finite_weights

pytest.importorskip("bitsandbytes")


@pytest.fixture(params=["4bit", "8bit"])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], PreTrainedModel]:
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=request.param == "4bit",
        load_in_8bit=request.param == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    return lambda: AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    ).eval()


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("init", sorted(INITIALIZATIONS))
def test_nothing_changes_before_the_first_step(
    load: Callable[[], PreTrainedModel], init: str
) -> None:
    model = load()
    before = logits(model)
    adapted = attach(model, bases_for(model), LoraConfig(r=4, lora_alpha=4), init=init, protect=4)
    assert torch.equal(logits(adapted), before)


def test_training_and_export(load: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = load()
    before = logits(model)
    adapted = trained(model)
    after = logits(adapted)
    assert (after - before).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    with pytest.raises(ConfigError, match="quantized"):
        export_merged(adapted, tmp_path / "merged")
    export_adapter(adapted, tmp_path / "adapter")
    adapted.save_pretrained(str(tmp_path / "saved"))
    for folder in ("adapter", "saved"):
        loaded = PeftModel.from_pretrained(load(), str(tmp_path / folder)).eval()
        # These layers round their inputs to bf16 or int8, which amplifies a change of A by 1e-6.
        assert_near(logits(loaded), after, dtype=torch.bfloat16, roundings=4)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_weights_of_torchao_are_checked(kind: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = make_llama()
    quantization.quantize_(model.model, getattr(quantization, kind)())
    check_finite_weights(model)
    model.model.layers[1].mlp.up_proj.weight.scale[0] = float("nan")
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        check_finite_weights(model)
