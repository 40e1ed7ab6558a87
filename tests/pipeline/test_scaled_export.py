"""Any PEFT LoRA adapter is scaled to a budget; what cannot be scaled is refused before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import folora
from benchmarks.tiny import make_tokenizer, tiny_config, tiny_task, write_model
from folora.calibration.base_file import read_base_file
from folora.cli.main import main
from folora.config import FoLoraConfig
from folora.errors import ConfigError
from folora.metrics.budget import ENOUGH, kl_by_scale
from folora.metrics.meter import by_source
from folora.pipeline import scaled_export
from folora.pipeline.context import Context
from folora.pipeline.further_text import further_text
from folora.pipeline.run import Run
from folora.pipeline.scaled_export import check_adapter_folder, export_scaled

BUDGET = 0.02


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "model")


def adapter(base: Path, folder: Path, **changes: Any) -> Path:
    """An adapter by PEFT alone, with random weights."""
    torch.manual_seed(0)
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], **changes}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **values)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def options(base: Path) -> list[str]:
    config = tiny_config()
    given = {"num_sequences": 64, "min_new_tokens": 32, "max_new_tokens": 40, "batch_size": 32}
    flags = [f for n, v in given.items() for f in (f"--sampling.{n}", str(v))]
    return ["--model", str(base), "--device", "cpu", "--dtype", config.dtype, *flags]


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"up_proj": 32}}, {"rank_pattern": {"q_proj": 2}},
     {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=str,
)  # fmt: skip
def test_an_adapter_by_peft_is_scaled_to_the_budget(
    base: Path, tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    given = adapter(base, tmp_path / "given", **changes)
    target = tmp_path / "scaled"
    words = ["export", "--adapter", str(given), "--to", str(target), "--budget", str(BUDGET)]
    assert main([*words, *options(base)]) == 0
    assert "Budget of 0.02 nats per token kept" in capsys.readouterr().out
    texts = [[0, *torch.randint(50, (40,)).tolist()] for _ in range(16)]
    model = AutoModelForCausalLM.from_pretrained(base)
    before = kl_by_scale(PeftModel.from_pretrained(model, str(given)), texts)[1.0].mean
    model = AutoModelForCausalLM.from_pretrained(base)
    after = kl_by_scale(PeftModel.from_pretrained(model, str(target)), texts)[1.0].mean
    assert after < before
    old, new = (load_file(f / "adapter_model.safetensors") for f in (given, target))
    scales = set()
    for name, tensor in old.items():
        if "lora_B" in name or "lora_embedding_B" in name:
            scales.add(round(float((new[name] / tensor).nanmedian()), 4))
        else:
            assert torch.equal(new[name], tensor)
    assert len(scales) == 1 and 0 < scales.pop() < 1
    assert (target / "adapter_config.json").read_bytes() == (
        given / "adapter_config.json"
    ).read_bytes()


def test_the_promise_holds_on_other_text_of_the_base(base: Path, tmp_path: Path) -> None:
    config = tiny_config(
        model=str(base), budget=BUDGET, sampling={"num_sequences": 128, "tolerance": None}
    )
    fit = export_scaled(config, adapter(base, tmp_path / "given"), tmp_path / "scaled")
    assert fit.kept.upper <= BUDGET and fit.kept.upper >= 0.9 * BUDGET
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), make_tokenizer()
    other = folora.sample(model, tokenizer, config.sampling, seed=7)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "scaled")
    )
    found = kl_by_scale(model, other.calibration)[1.0]
    assert 0.5 * BUDGET < found.mean <= BUDGET


def test_the_text_of_a_base_file_is_filled_up_where_it_does_not_show_the_budget_kept(
    tmp_path: Path,
) -> None:
    config = tiny_task(tmp_path).replace(budget=0.02)
    given = adapter(Path(str(config.model)), tmp_path / "given")
    file = tmp_path / "base.safetensors"
    Run(config).base(file)
    few = len(read_base_file(file).samples.held_out)
    own = export_scaled(config.replace(base=str(file)), given, tmp_path / "scaled")
    assert few < ENOUGH and own.kept.sequences == ENOUGH
    assert own.kept.upper <= 0.02 and own.scale < 1


REFUSALS = {
    "use_dora": ({"use_dora": True}, "DoRA's update is not linear"),
    "bias": ({"bias": "lora_only"}, "trained biases"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "whole trained modules"),
    "trainable_token_indices": ({"trainable_token_indices": [1]}, "trained tokens"),
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base's weights"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_scaled_is_refused_by_name(base: Path, tmp_path: Path, name: str) -> None:
    changes, words = REFUSALS[name]
    given = adapter(base, tmp_path / "given")
    file = given / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ConfigError, match=words):
        check_adapter_folder(given)


def test_other_adapters_and_folders_are_refused_before_a_model_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaled_export, "Context", None)
    given = adapter(base, tmp_path / "given")
    other = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
    )
    other.save_pretrained(str(tmp_path / "ia3"))
    (tmp_path / "bin").mkdir()
    shutil.copy(given / "adapter_config.json", tmp_path / "bin")
    (tmp_path / "bin" / "adapter_model.bin").write_bytes(b"")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    cases = [
        (tmp_path / "ia3", tmp_path / "to", "is a IA3 adapter"),
        (tmp_path / "bin", tmp_path / "to", "save adapter_model.bin as safetensors"),
        (tmp_path / "none", tmp_path / "to", "has no adapter_config.json"),
        (given, given, "is the adapter itself"),
        (given, tmp_path / "mine", "adapter_config.json"),
    ]
    config = tiny_config(model=str(base), budget=BUDGET)
    for source, target, words in cases:
        with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
            export_scaled(config, source, target)
    words = ["export", "--adapter", str(given), "--model", str(base)]
    for more, message in (
        (["--to", str(tmp_path / "to")], "--budget is required"),
        (["--budget", "0.1"], "--to is required"),
        (["--budget", "0.1", "--to", str(tmp_path / "to"), "--rank", "2"], "leave --rank"),
        (["--budget", "-1", "--to", str(tmp_path / "to")], "budget is -1"),
    ):
        assert main([*words, *more]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "mine" / "adapter_config.json").read_text() == "{}"


def test_a_run_with_a_budget_keeps_it_and_its_export_can_be_tighter(tmp_path: Path) -> None:
    config = tiny_task(tmp_path).replace(budget=0.004)
    config = config.changed({"training.learning_rate": 5e-2, "training.max_steps": 12})
    run = Run(config)
    report = run.run()
    fit, half, double = report["budget"]
    assert fit["kept"]["upper"] <= 0.004 and fit["scale"] < 1
    assert half["scale"] < fit["scale"] < double["scale"]
    assert report["adapted"]["kl"] == pytest.approx(fit["kept"]["mean"], rel=1e-3)
    assert report["adapted"]["task_loss"] == pytest.approx(fit["task_loss"], rel=1e-3)

    texts = judged_text(config, run)

    def kl(folder: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(config.model)
        loaded = PeftModel.from_pretrained(model, str(folder))
        return kl_by_scale(loaded, texts)[1.0].mean

    assert kl(run.folder / "5-adapter") == pytest.approx(fit["kept"]["mean"], rel=1e-2)
    tight = Run(config.replace(budget=0.001))
    tight.export(tmp_path / "tight")
    tight.export(tmp_path / "tight2", rank=2)
    assert kl(tmp_path / "tight") <= 0.001 and kl(tmp_path / "tight2") <= 0.001
    tight.export(tmp_path / "merged", kind="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(config.model)
    plain = PeftModel.from_pretrained(plain, str(tmp_path / "tight")).merge_and_unload()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-4, atol=1e-5)


def judged_text(config: FoLoraConfig, run: Run) -> list[list[int]]:
    """The held-out text of a run on which a budget that binds is kept."""
    more = further_text(Context(config), run.samples())
    assert more is not None
    return [*run.samples().held_out, *by_source(more())["bos"]]


HOSTILE = {
    "one row": [{"prompt": "1+1=", "completion": "2."}],
    "one row many times": [{"prompt": "1+1=", "completion": "2."}] * 40,
    "nonsense": [{"prompt": "=" * i, "completion": "+.=" * (i % 7 + 1)} for i in range(1, 40)],
    "contradictions": [{"prompt": "1+1=", "completion": f"{i % 10}."} for i in range(40)],
}


@pytest.mark.parametrize("rate", [1e-2, 1.0])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_rows_and_rates_do_not_break_the_promise(
    tmp_path: Path, name: str, rate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_task(tmp_path)
    Path(str(config.dataset)).write_text("".join(json.dumps(row) + "\n" for row in HOSTILE[name]))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    words = ["run", "--config", str(tmp_path / "config.yaml"), "--budget", "0.003"]
    assert main([*words, "--lr", str(rate), "--max-steps", "12"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Budget of 0.003 nats per token kept" in said
    run = Run(config)
    model = AutoModelForCausalLM.from_pretrained(config.model)
    loaded = PeftModel.from_pretrained(model, str(run.folder / "5-adapter"))
    found = kl_by_scale(loaded, judged_text(config, run))[1.0]
    assert found.upper <= 0.003 * 1.01
