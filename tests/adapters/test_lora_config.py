"""Every field of a LoraConfig has its meaning in PEFT, or is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from support.adapted import IDS, bases_for, in_peft, saved_bytes
from support.closeness import assert_near
from torch import Tensor, nn
from transformers import (
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedModel,
)

from benchmarks.tiny import MAKERS, make_gpt2, make_llama
from folora.adapters.adapter import attach, lora_factors
from folora.adapters.export import export_adapter, export_merged
from folora.adapters.lora_config import DECIDED, HEADS, PASSED
from folora.adapters.low_rank import narrow_inputs
from folora.errors import ConfigError
from folora.optim.sadam import SAdam
from folora.spectral.groups import InputGroup
from folora.spectral.layers import GroupBasis, solve
from folora.spectral.moments import Moments
from folora.training.optimizer import param_groups

INITS = ["eigen", "null_space"]
HEADED = {
    "SEQ_CLS": LlamaForSequenceClassification,
    "TOKEN_CLS": LlamaForTokenClassification,
    "QUESTION_ANS": LlamaForQuestionAnswering,
}
BLOCKS = r".*layers.*_proj"


def adapted_by(
    config: LoraConfig | None, init: str = "eigen", model: PreTrainedModel | None = None
) -> PeftModel:
    model = model or make_llama()
    return attach(model, bases_for(model, targets=BLOCKS), config, init=init)


def make_headed(task: str) -> PreTrainedModel:
    torch.manual_seed(3)
    config = make_llama().config
    config.num_labels, config.pad_token_id = 3, 0
    made: PreTrainedModel = HEADED[task](config).eval()
    return made


def step(model: PeftModel, bases: Sequence[GroupBasis], loss: Tensor) -> None:
    optimizer = SAdam(param_groups(model, bases, lr=0.05))
    loss.backward()
    optimizer.step()


def kappas(model: PeftModel) -> list[float]:
    return sorted({kappa for *_, kappa in lora_factors(model).values()})


def refused(config: LoraConfig, *says: str) -> None:
    model = make_llama()
    bases, names = bases_for(model), [n for n, _ in model.named_modules()]
    with pytest.raises(ConfigError) as error:
        attach(model, bases, config)
    assert all(word in str(error.value) for word in says), error.value
    assert [n for n, _ in model.named_modules()] == names


@pytest.mark.parametrize("field", [field.name for field in fields(LoraConfig)])
def test_every_field_is_supported_or_refused_by_name(field: str) -> None:
    """Including fields that later versions of PEFT add, which are in neither list."""
    if field in PASSED | DECIDED:
        return  # tested below
    config = LoraConfig()
    setattr(config, field, "another value")
    refused(config, f"LoraConfig: {field} is 'another value', which is not supported: ")


def test_an_unknown_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = fields(LoraConfig)[0]
    monkeypatch.setattr(unknown, "name", "use_future_lora")
    config = LoraConfig()
    config.use_future_lora = True  # type: ignore[attr-defined]
    refused(config, "use_future_lora is True")


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        ({"use_dora": True}, "ordinary LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "the same r"),
        ({"init_lora_weights": False}, "attach's argument `init`"),
        ({"init_lora_weights": "pissa"}, "attach's argument `init`"),
        ({"exclude_modules": ["q_proj"]}, "spectrum"),
        ({"bias": "all"}, "biases are frozen"),
        ({"trainable_token_indices": [1]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "not Conv1D"),
        ({"lora_dropout": 1.5}, "[0, 1)"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"modules_to_save": ["scores"]}, "'scores' is not a module of LlamaForCausalLM"),
        ({"modules_to_save": ["mlp"]}, "is adapted"),
        ({"target_modules": ["q_proj", "v_proj"]}, "does not select"),
        ({"target_modules": ".*"}, "selects"),
    ],
)
def test_a_refusal_names_the_remedy(values: dict[str, Any], remedy: str) -> None:
    (name, *_) = values
    field = "" if name == "modules_to_save" else name
    refused(LoraConfig(**values), f"LoraConfig: {field}", remedy)


def test_another_kind_of_config_is_refused() -> None:
    refused(AdaLoraConfig(total_step=10), "peft_type")
    refused({"r": 4}, "must be a peft.LoraConfig")  # type: ignore[arg-type]


def test_a_spectrum_of_another_model_is_refused() -> None:
    model = make_llama()
    bases = bases_for(model)
    with pytest.raises(ConfigError, match=r"has no linear layer of that name"):
        attach(make_gpt2(), bases)
    with pytest.raises(ConfigError, match=r"has one with d_in = 64 of that name"):
        attach(make_llama(hidden_size=64), bases)


def test_without_a_config_rank_and_alpha_are_16() -> None:
    config: Any = adapted_by(None).peft_config["default"]
    assert (config.r, config.lora_alpha) == (16, 16)


@pytest.mark.parametrize("kind", sorted(MAKERS))
@pytest.mark.parametrize("target", [None, "all-linear", "names"])
def test_target_modules_may_name_the_layers(kind: str, target: Any) -> None:
    model = MAKERS[kind]()
    bases = bases_for(model)
    if target == "names":
        target = sorted({name.rsplit(".", 1)[-1] for b in bases for name in b.group.layers})
    first = attach(model, bases, LoraConfig(r=2, target_modules=target))
    second = attach(first, bases, LoraConfig(r=2, target_modules=target), adapter_name="second")
    assert len(lora_factors(second, "second")) == len(lora_factors(first))


def test_the_users_config_is_not_changed() -> None:
    config = LoraConfig(r=4, modules_to_save=["score"], task_type="SEQ_CLS")
    before = {field.name: getattr(config, field.name) for field in fields(config)}
    adapted_by(config, "null_space", make_headed("SEQ_CLS"))
    assert before == {field.name: getattr(config, field.name) for field in fields(config)}


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("rslora", [False, True])
def test_kappa_matches_peft_in_memory_and_in_every_output(
    init: str, rslora: bool, tmp_path: Path
) -> None:
    model = adapted_by(LoraConfig(r=4, lora_alpha=6, use_rslora=rslora), init)
    kappa = 6 / math.sqrt(4) if rslora else 6 / 4
    assert kappas(model) == [pytest.approx(kappa, rel=1e-12)]
    assert model.peft_config["default"].use_rslora is rslora  # type: ignore[attr-defined]
    for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
        parameter.data += 0.02
    expected = model(IDS).logits
    model.save_pretrained(str(tmp_path / "saved"))
    export_adapter(model, tmp_path / "exported")
    export_adapter(model, tmp_path / "cut", rank=3)
    for name in ("saved", "exported", "cut"):
        loaded = PeftModel.from_pretrained(make_llama(), str(tmp_path / name))
        assert kappas(loaded) == [pytest.approx(kappa, rel=1e-12)]
        if name != "cut":
            assert_near(loaded(IDS).logits, expected)
    written = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert written["lora_alpha"] == pytest.approx(kappa * written["r"])
    assert written["use_rslora"] is False  # for programs that do not support rsLoRA


def pair(init: str, dropout: float) -> tuple[PeftModel, PeftModel]:
    """An adapter with dropout by `attach`, and the same factors in an adapter of PEFT."""
    own = adapted_by(LoraConfig(r=4, lora_alpha=4, lora_dropout=dropout), init)
    return own, in_peft(own, make_llama())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("narrow", [False, True])
def test_dropout_matches_peft_in_values_and_gradients(init: str, narrow: bool) -> None:
    own, theirs = pair(init, 0.5)
    found = []
    for model in (own, theirs):
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            parameter.data[:, :4] += 0.02
        torch.manual_seed(5)
        with narrow_inputs(model) if narrow else nullcontext():
            loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
        found.append((loss.detach(), grads))
    (loss, grads), (expected, others) = found
    assert_near(loss, expected)
    for name, grad in grads.items():
        other, rows = others[name], slice(0, 4)
        part = (rows,) if "lora_A" in name else (slice(None), rows)
        torch.testing.assert_close(grad[part], other[part], rtol=1e-4, atol=1e-6)
    assert not torch.equal(own(IDS).logits, own.eval()(IDS).logits)


@pytest.mark.parametrize("init", INITS)
def test_dropout_does_not_change_the_output_before_the_first_step(init: str) -> None:
    model = make_llama()
    before, state = model(IDS).logits, torch.get_rng_state()
    adapted = attach(model, bases_for(model), LoraConfig(r=4, lora_dropout=0.5), init=init).train()
    assert torch.equal(adapted(IDS).logits, before)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("init", INITS)
def test_dropout_saves_fewer_activations_than_peft(init: str) -> None:
    own, theirs = (model.to(torch.bfloat16).train() for model in pair(init, 0.5))
    for model in (own, theirs):
        for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
            parameter.data = parameter.data.float()
    with narrow_inputs(own):
        narrow, *_ = saved_bytes(own)
    wide, *_ = saved_bytes(theirs)
    assert narrow < wide


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("task", sorted(HEADED))
def test_a_head_is_trained_saved_exported_and_merged(task: str, init: str, tmp_path: Path) -> None:
    model = make_headed(task)
    before, bases = model(IDS), bases_for(model, targets=BLOCKS)
    adapted = attach(model, bases, LoraConfig(r=4, lora_alpha=4, task_type=task), init=init)
    saved = adapted.peft_config["default"].modules_to_save  # type: ignore[attr-defined]
    assert tuple(saved) == HEADS[task]
    field = "start_logits" if task == "QUESTION_ANS" else "logits"
    assert torch.equal(adapted(input_ids=IDS)[field], before[field])

    heads = [m for m in adapted.modules() if isinstance(m, ModulesToSaveWrapper)]
    assert len(heads) == 1
    old = heads[0].modules_to_save["default"].weight.clone()
    assert heads[0].modules_to_save["default"].weight.requires_grad
    step(adapted, bases, adapted.train()(input_ids=IDS)[field].square().sum())
    heads[0].modules_to_save["default"].weight.data += 0.1
    expected = adapted.eval()(input_ids=IDS)[field]
    assert not torch.equal(expected, before[field])
    with adapted.disable_adapter():
        assert torch.equal(adapted(input_ids=IDS)[field], before[field])

    adapted.save_pretrained(str(tmp_path / "saved"))
    export_adapter(adapted, tmp_path / "exported")
    export_merged(adapted, tmp_path / "merged")
    for name in ("saved", "exported"):
        written = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert written["task_type"] == task
        assert written["modules_to_save"] == list(HEADS[task])
        loaded = PeftModel.from_pretrained(make_headed(task), str(tmp_path / name)).eval()
        assert_near(loaded(input_ids=IDS)[field], expected)
        assert_near(loaded.merge_and_unload()(input_ids=IDS)[field], expected)
    merged = HEADED[task].from_pretrained(tmp_path / "merged").eval()
    assert_near(merged(input_ids=IDS)[field], expected)
    assert torch.equal(heads[0].original_module.weight, old)


def test_a_head_in_the_spectrum_is_refused() -> None:
    model = make_headed("SEQ_CLS")
    with pytest.raises(ConfigError, match=r"score is adapted, but .* task_type SEQ_CLS"):
        attach(model, bases_for(model), LoraConfig(task_type="SEQ_CLS"))


@pytest.mark.parametrize("init", INITS)
def test_a_trained_embedding_is_not_merged_if_tied(init: str, tmp_path: Path) -> None:
    tied, free = make_llama(), make_llama(tie_word_embeddings=False)
    for model in (tied, free):
        before = model(IDS).logits
        config = LoraConfig(r=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
        adapted = adapted_by(config, init, model)
        assert torch.equal(adapted(IDS).logits, before)
        head: Any = model.lm_head  # type: ignore[attr-defined]
        head.modules_to_save["default"].weight.data += 0.1
        expected = adapted(IDS).logits
        assert not torch.equal(expected, before)
        folder = tmp_path / str(model is tied)
        export_adapter(adapted, folder / "adapter")
        fresh = make_llama(tie_word_embeddings=model is tied)
        loaded = PeftModel.from_pretrained(fresh, str(folder / "adapter"))
        assert_near(loaded(IDS).logits, expected)
        if model is tied:
            with pytest.raises(ConfigError, match=r"lm_head.weight is trained .* ties it to"):
                export_merged(adapted, folder / "merged")
        else:
            export_merged(adapted, folder / "merged")
            merged = type(model).from_pretrained(folder / "merged")
            assert_near(merged(IDS).logits, expected)


def test_a_non_finite_trained_module_is_not_exported(tmp_path: Path) -> None:
    model = make_headed("SEQ_CLS")
    adapted = adapted_by(LoraConfig(r=4, task_type="SEQ_CLS"), "eigen", model)
    model.score.modules_to_save["default"].weight.data[0, 0] = torch.nan  # type: ignore[union-attr,operator]
    with pytest.raises(Exception, match=r"score.weight holds NaN"):
        export_adapter(adapted, tmp_path / "a")


def test_base_model_and_revision_are_written(tmp_path: Path) -> None:
    config = LoraConfig(r=4, revision="abc", base_model_name_or_path="someone/some-model")
    model = adapted_by(config)
    export_adapter(model, tmp_path / "a")
    for found in (model.peft_config["default"], LoraConfig.from_pretrained(str(tmp_path / "a"))):
        assert (found.revision, found.base_model_name_or_path) == ("abc", "someone/some-model")
        assert found.task_type is None
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


@pytest.mark.parametrize("init", INITS)
def test_inference_mode_freezes_as_in_peft(init: str) -> None:
    values: dict[str, Any] = {"r": 4, "inference_mode": True, "modules_to_save": ["lm_head"]}
    own = adapted_by(LoraConfig(**values), init)
    theirs = get_peft_model(make_llama(), LoraConfig(**values, target_modules=BLOCKS))
    found, expected = (
        {n for n, p in model.named_parameters() if p.requires_grad} for model in (own, theirs)
    )
    assert found == expected
    assert not any("lora_" in name for name in found)


def test_attach_to_a_plain_module(tmp_path: Path) -> None:
    """No PreTrainedModel, no forward pass over tokens."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Linear(5, 2))

    model = make()
    groups = (InputGroup(("0",), 6), InputGroup(("2",), 8))
    rows = {g.name: torch.randn(40, g.d_in, dtype=torch.float64) for g in groups}
    pre, task = (
        Moments({name: x[:n].T @ x[:n] / n for name, x in rows.items()}, n, groups) for n in (40, 9)
    )
    bases = solve(pre, task, tau=1e-3, null_rank=2)
    x = torch.randn(3, 6)
    before = model(x)
    adapted = attach(model, bases, LoraConfig(r=2, modules_to_save=["3"]), init="null_space")
    assert torch.equal(adapted(x), before)
    step(adapted, bases, adapted(x).square().sum())
    expected = adapted(x)
    assert not torch.equal(expected, before)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), before)
    export_adapter(adapted, tmp_path / "a")
    assert_near(PeftModel.from_pretrained(make(), str(tmp_path / "a"))(x), expected)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="save_pretrained"):
        export_merged(adapted, tmp_path / "merged")
