"""Training with TRL: loss on responses, KL in the logs, exact resume, and options passed through."""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.closeness import assert_near
from transformers import BertConfig, BertLMHeadModel, TrainerCallback

import folora
import folora.runtime.progress as progress
from benchmarks.tiny import make_gpt2, make_llama, make_tokenizer, rows, tiny_config
from folora.adapters.adapter import lora_factors
from folora.adapters.coverage import check_causal
from folora.errors import ArtifactError, ConfigError, NumericsError
from folora.runtime.checkpoints import SEAL, latest_checkpoint
from folora.training.arguments import sft_config
from folora.training.train import train


def prepared(**changes: Any) -> folora.Prepared:
    return folora.prepare(make_llama(), make_tokenizer(), rows(), tiny_config(**changes))


def flat(p: folora.Prepared) -> torch.Tensor:
    return torch.cat([t.flatten() for a, b, _ in lora_factors(p.model).values() for t in (a, b)])


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("init", ["eigen", "null_space"])
def test_resumed_training_is_bitwise_equal_to_uninterrupted(tmp_path: Path, init: str) -> None:
    whole = prepared(method={"name": "folora", "init": init})
    train(whole, make_tokenizer(), tmp_path / "whole")
    cut = prepared(method={"name": "folora", "init": init})
    with pytest.raises(KeyboardInterrupt):
        train(cut, make_tokenizer(), tmp_path / "cut", callbacks=[StopAt(5)])
    # An incompletely written checkpoint is skipped.
    shutil.copytree(tmp_path / "cut" / "checkpoint-4", tmp_path / "cut" / "checkpoint-5")
    (tmp_path / "cut" / "checkpoint-5" / SEAL).unlink()
    assert latest_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-4"
    again = prepared(method={"name": "folora", "init": init})
    trainer = train(again, make_tokenizer(), tmp_path / "cut")
    assert torch.equal(flat(again), flat(whole))
    a, b = whole.optimizer.state_dict(), again.optimizer.state_dict()
    for key, state in a["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["state"][key][name])
    assert trainer.state.global_step == 6


def test_the_first_loss_is_the_base_models_on_responses(tmp_path: Path) -> None:
    start = prepared(training={"max_steps": 1, "learning_rate": 1e-9, "logging_steps": 1})
    trainer = train(start, make_tokenizer(), tmp_path)
    logged = trainer.state.log_history[0]["loss"]
    batch = next(iter(trainer.get_train_dataloader()))
    assert 0 < (batch["labels"] != -100).sum() < batch["attention_mask"].sum()
    base = make_llama()
    with torch.no_grad():
        expected = base(
            **{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}
        )
    assert logged == pytest.approx(float(expected.loss), rel=1e-4)


def test_training_lowers_the_loss_and_logs_the_kl(tmp_path: Path) -> None:
    one = prepared(
        training={"max_steps": 30, "eval_steps": 10, "learning_rate": 3e-2, "save_steps": 30}
    )
    before = one.meter.read(one.model)
    trainer = train(one, make_tokenizer(), tmp_path)
    after = one.meter.read(one.model)
    assert before.kl == 0
    assert after.kl > 0
    assert after.task_loss < before.task_loss - 0.3
    evaluations = [line for line in trainer.state.log_history if "eval_kl" in line]
    assert [line["step"] for line in evaluations] == [10, 20, 30]
    assert {"eval_loss", "eval_ce_change", "eval_frobenius", "eval_h_norm"} <= set(evaluations[0])
    assert evaluations[-1]["eval_kl"] == pytest.approx(after.kl)


def test_training_logs_steps_losses_and_time_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "folora")
    monkeypatch.setattr(progress, "LOG_SECONDS", (-1.0, -1.0))
    one = prepared(training={"max_steps": 3, "logging_steps": 1, "eval_steps": 2})
    trainer = train(one, make_tokenizer(), tmp_path)
    said = [r.getMessage() for r in caplog.records]
    assert any(re.match(r"training \(steps\): 1 of 3, \d+ s left", line) for line in said)
    assert any(re.match(r"step 1 of 3: training loss \d", line) for line in said)
    assert any(re.match(r"step 2 of 3: task loss \d.*, KL to the base 0", line) for line in said)
    assert "{'loss'" not in capfd.readouterr().out
    callbacks = trainer.callback_handler.callbacks
    assert not any("_TrainingProgress" in type(c).__name__ for c in callbacks)


def test_a_trainer_with_its_own_progress_bar_logs_nothing_extra(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "folora")
    train(
        prepared(training={"max_steps": 1, "logging_steps": 1, "disable_tqdm": False}),
        make_tokenizer(),
        tmp_path,
    )
    assert not any(r.getMessage().startswith("step 1 of 1") for r in caplog.records)


def test_other_options_pass_through(tmp_path: Path) -> None:
    config = tiny_config(
        training={
            "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
            "lr_scheduler_type": "linear", "adam_beta2": 0.95, "label_smoothing_factor": 0.1,
        }
    )  # fmt: skip
    with warnings.catch_warnings(action="error"):  # no deprecated API
        args = sft_config(config, tmp_path, evaluates=True, on_cpu=True)
    assert args.gradient_checkpointing
    assert args.lr_scheduler_type == "linear"
    assert args.adam_beta2 == 0.95
    assert args.label_smoothing_factor == 0.1
    with pytest.raises(ConfigError, match="did you mean 'packing'"):
        sft_config(tiny_config(training={"pakcing": True}), tmp_path, evaluates=True, on_cpu=True)
    with pytest.raises(ConfigError, match="training"):
        sft_config(
            tiny_config(training={"lr_scheduler_type": "wavy"}),
            tmp_path,
            evaluates=True,
            on_cpu=True,
        )


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"weight_decay": 0.1},
        {"save_total_limit": None},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 48},
    ],
)
def test_common_training_options_work(tmp_path: Path, options: dict[str, Any]) -> None:
    one = prepared(training={"max_steps": 2, **options})
    before = flat(one).clone()
    train(one, make_tokenizer(), tmp_path)
    assert torch.isfinite(flat(one)).all()
    assert not torch.equal(flat(one), before)


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    a = prepared(training={"max_steps": 3, "per_device_train_batch_size": 8})
    b = prepared(
        training={
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
        }
    )
    train(a, make_tokenizer(), tmp_path / "a")
    train(b, make_tokenizer(), tmp_path / "b")
    assert_near(flat(a), flat(b), roundings=1e4)


def test_prepare_works_with_a_custom_training_loop(tmp_path: Path) -> None:
    one = folora.prepare(make_gpt2(), make_tokenizer(), rows(), tiny_config())
    batch = torch.utils.data.default_collate(
        [{"input_ids": torch.tensor(one.task.train[0].input_ids)}]
    )
    ids = batch["input_ids"]
    first = None
    for _ in range(10):
        loss = one.model(ids, labels=ids).loss
        first = float(loss.detach()) if first is None else first
        one.optimizer.zero_grad()
        loss.backward()
        one.optimizer.step()
    assert float(loss.detach()) < first - 0.1
    assert one.export(tmp_path / "adapter").rank == 4
    assert one.train_dataset().column_names == ["input_ids", "labels"]
    assert one.param_groups(lr=0.5)[0]["lr"] == 0.5


def test_optimizer_state_of_another_basis_is_refused_on_resume(tmp_path: Path) -> None:
    first = prepared()
    with pytest.raises(KeyboardInterrupt):
        train(first, make_tokenizer(), tmp_path, callbacks=[StopAt(3)])
    with pytest.raises(ArtifactError, match=r"checkpoint-2: .*another basis.*Delete"):
        train(prepared(spectrum={"tau": 0.5}), make_tokenizer(), tmp_path)


def test_weights_with_nan_are_refused_before_sampling() -> None:
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="up_proj"):
        folora.prepare(model, make_tokenizer(), rows(), tiny_config())


def test_non_causal_models_are_refused_before_sampling() -> None:
    config = BertConfig(
        vocab_size=51, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"BertLMHeadModel .* tokens that come after"):
        folora.prepare(BertLMHeadModel(config).eval(), make_tokenizer(), rows(), tiny_config())


def test_dropout_is_not_mistaken_for_non_causal_attention() -> None:
    model = make_gpt2().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    check_causal(model, start_id=1)
    assert all(m.training for m in model.modules())


def test_rank_larger_than_a_width_is_refused_before_sampling() -> None:
    with pytest.raises(ConfigError, match="r is 33"):
        prepared(adapter={"r": 33})


def test_configs_are_frozen() -> None:
    config = tiny_config()
    assert config.replace(model="x").model == "x"
    with pytest.raises(ValueError, match="frozen"):
        config.model = "y"  # type: ignore[misc]
