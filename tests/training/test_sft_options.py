"""Every option of SFTConfig is supported, set by folora, or refused by name; none is ignored."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import folora
from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config
from folora.config import FoLoraConfig, TrainingConfig, option_names
from folora.errors import ConfigError
from folora.optim.sadam import SAdam
from folora.pipeline.run import Run
from folora.training.prepared import Prepared
from folora.training.sft_options import (
    HONOURED,
    KNOWN,
    REFUSED,
    SET_BY,
    WITHOUT_EFFECT,
    effective,
    refusal,
)

SFTConfig = pytest.importorskip("trl").SFTConfig


def prepare(**changes: Any) -> Prepared:
    config = tiny_config().changed(changes)
    return folora.prepare(make_llama(), make_tokenizer(), rows(), config)


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    """Not trained; hyperparameters may be changed."""
    return prepare()


def test_every_option_of_the_installed_trl_is_in_the_table() -> None:
    found = {field.name for field in dataclasses.fields(SFTConfig)}
    assert not found - KNOWN


def test_every_option_is_in_one_part_of_the_table() -> None:
    parts = [set(SET_BY), set(REFUSED), HONOURED, WITHOUT_EFFECT]
    assert len(KNOWN) == sum(map(len, parts))
    assert set(SET_BY.values()) <= set(option_names())


def test_options_with_a_folora_default_are_supported_options_of_trl() -> None:
    fields = set(TrainingConfig.model_fields)
    assert fields <= {field.name for field in dataclasses.fields(SFTConfig)}
    assert fields <= HONOURED | WITHOUT_EFFECT


def test_an_option_of_a_newer_trl_is_passed_on_and_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert refusal("of_the_future", 1) is None
    assert "does not know TRL's training.of_the_future" in caplog.text


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"logging_steps": 99, "save_steps": 7, "eval_steps": 5}, True),
        ({"gradient_checkpointing": True}, True),
        ({"report_to": "none", "dataloader_num_workers": 2}, True),
        ({"eval_on_start": True}, True),
        ({"eval_on_start": True, "lr_scheduler_type": "reduce_lr_on_plateau"}, False),
        ({"eval_steps": 5, "lr_scheduler_type": "reduce_lr_on_plateau"}, False),
        ({"neftune_noise_alpha": 5.0}, False),
        ({"of_the_future": 5.0}, False),
        ({"learning_rate": 1e-3}, False),
        ({"seed": 3}, False),
    ],
)
def test_options_that_change_the_result_are_known(changes: dict[str, Any], same: bool) -> None:
    schedule = {k: v for k, v in changes.items() if k == "lr_scheduler_type"}
    before = effective(FoLoraConfig(training=schedule))
    assert (effective(FoLoraConfig(training=changes)) == before) is same


def test_training_uses_its_own_seed_or_the_global_seed(tmp_path: Path) -> None:
    for values, wanted in (({}, 0), ({"seed": 3}, 3), ({"seed": 3, "training": {"seed": 5}}, 5)):
        config = FoLoraConfig.from_dict(values)
        assert config.training_seed == effective(config)["seed"] == wanted
        args = folora.sft_config(config, tmp_path, evaluates=False, on_cpu=True)
        assert args.seed == wanted


def test_changed_intervals_do_not_rerun_training(finished: FoLoraConfig, tmp_path: Path) -> None:
    shutil.copytree(str(finished.output), tmp_path / "run")
    changes = {
        "output": str(tmp_path / "run"),
        "training.logging_steps": 1,
        "training.save_steps": 3,
    }
    Run(finished.changed(changes)).train()
    assert not (tmp_path / "run" / "old").exists()


def test_a_resumed_training_uses_the_new_intervals(finished: FoLoraConfig, tmp_path: Path) -> None:
    """It resumes after step 4 of 6 and then saves after each step."""
    folder = tmp_path / "run"
    shutil.copytree(str(finished.output), folder)
    training = folder / "4-training"
    for name in ("result", "checkpoint-6"):
        shutil.rmtree(training / name)
    Run(finished.changed({"output": str(folder), "training.save_steps": 1})).train()
    assert (training / "checkpoint-5").exists()
    assert not (folder / "old").exists()


def test_betas_and_epsilon_reach_the_optimizer() -> None:
    given = {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    groups = prepare(**{f"training.{k}": v for k, v in given.items()}).optimizer.param_groups
    assert {(g["betas"], g["eps"]) for g in groups} == {((0.5, 0.9), 1e-6)}


def trained(prepared: Prepared, folder: Path, **changes: Any) -> folora.FoLoraTrainer:
    args = SFTConfig(
        output_dir=str(folder), max_steps=1, use_cpu=True, report_to="none", save_strategy="no",
        max_length=None, lr_scheduler_type="constant", disable_tqdm=True, **changes,
    )  # fmt: skip
    trainer = folora.FoLoraTrainer(prepared, args, make_tokenizer())
    trainer.train()
    return trainer


def test_the_hyperparameters_of_the_trainer_are_used(
    prepared: Prepared, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with a second Trainer on the same model."""
    for rate in (3e-3, 5e-4):
        given = {"learning_rate": rate, "weight_decay": 0.01, "adam_beta2": 0.95}
        trained(prepared, tmp_path, **given)
        *a, b = prepared.optimizer.param_groups
        assert {g["lr"] for g in (*a, b)} == {rate}
        assert {g["weight_decay"] for g in (*a, b)} == {0.01}
        assert {g["betas"] for g in (*a, b)} == {(0.9, 0.95)}
    assert "learning_rate: the Trainer's 0.003 replaces the prepared 0.01" in caplog.text


@pytest.mark.parametrize("given", [{"optim": "adafactor"}, {"optim_args": "a=1"}])
def test_a_trainer_with_another_optimizer_is_refused(
    prepared: Prepared, tmp_path: Path, given: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="uses the prepared optimizer"):
        trained(prepared, tmp_path, **given)


def by_trainer(prepared: Prepared, folder: Path, optimizer: Any) -> None:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=2, use_cpu=True, report_to="none", save_strategy="no",
        learning_rate=1e-2, per_device_train_batch_size=1, disable_tqdm=True,
    )  # fmt: skip
    Trainer(prepared.model, args, train_dataset=prepared.train_dataset(),
            optimizers=(optimizer, None)).train()  # fmt: skip


FORGOTTEN = "the prepared optimizer has not taken a step"
CASES: list[tuple[str, dict[str, Any], Callable[[Prepared], Any], bool]] = [
    ("forgotten", {}, lambda _: None, True),
    ("whole bases", {"spectrum.directions": "all"}, lambda _: None, True),
    ("non-zero start", {"method": "folora-null"}, lambda _: None, True),
    ("given", {}, lambda p: p.optimizer, False),
    ("another SAdam", {}, lambda p: SAdam(p.param_groups(lr=1e-3)), False),
    ("plain LoRA", {"method": "eigen-adamw"}, lambda _: None, False),
]


@pytest.mark.parametrize(("changes", "optimizer", "warned"), [c[1:] for c in CASES],
                         ids=[c[0] for c in CASES])  # fmt: skip
def test_a_forgotten_optimizer_is_reported(
    changes: dict[str, Any], optimizer: Callable[[Prepared], Any], warned: bool,
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    prepared = prepare(**changes)
    prepared.export(tmp_path / "untrained")
    assert FORGOTTEN not in caplog.text
    by_trainer(prepared, tmp_path, optimizer(prepared))
    prepared.export(tmp_path / "adapter")
    assert (FORGOTTEN in caplog.text) is warned
    caplog.clear()
    prepared.meter.read(prepared.model)
    assert (FORGOTTEN in caplog.text) is warned


def test_checking_options_does_not_change_the_process(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    paths = {"model": str(model_folder), "dataset": str(rows_file), "output": str(tmp_path / "run")}
    extra = {"full_determinism": True, "logging_first_step": True}
    Run(tiny_config(**paths, training=extra)).check(needs_data=True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not (tmp_path / "run").exists()
