"""The anchor: KL on calibration text in the loss, its share of the tokens, and its weight under a budget."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from training.test_trainer import StopAt, flat
from trl import DPOConfig

import folora
from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config
from folora.adapters.adapter import lora_factors
from folora.errors import ArtifactError
from folora.methods import KL_WEIGHT
from folora.metrics.kl import kl, labelled_logits
from folora.runtime.contexts import without_adapter
from folora.training import budget_stop
from folora.training.anchor import Anchor, BudgetWeight
from folora.training.budget_stop import BudgetStop
from folora.training.train import train
from folora.training.trainer import FoLoraTrainer


def prepared(**changes: Any) -> folora.Prepared:
    changes = {"method": "folora-kl", "anchor": 0.5, **changes}
    return folora.prepare(make_llama(), make_tokenizer(), rows(), tiny_config(**changes))


def move(p: folora.Prepared, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in p.model.named_parameters():
            if "lora_B" in name:
                parameter += size * torch.randn(parameter.shape, generator=generator)


def test_the_loss_is_the_weighted_kl_of_its_texts_and_has_its_gradient() -> None:
    p = prepared()
    move(p)
    anchor = Anchor(p.model, p.samples.calibration, tokens=80, weight=0.5)
    assert anchor.rows == 2 and anchor.every == 1
    found = anchor.loss()
    texts = [anchor.texts[anchor._text(i)] for i in (2, 3)]
    total, count = torch.zeros(()), 0
    for text in texts:
        batch = {"input_ids": torch.tensor([text]), "labels": torch.tensor([text])}
        adapted, _ = labelled_logits(p.model, batch)
        with torch.no_grad(), without_adapter(p.model):
            base, _ = labelled_logits(p.model, batch)
        total, count = total + kl(base, adapted).sum(), count + len(base)
    wanted = 0.5 * total / count
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    weights = [w for w in p.model.parameters() if w.requires_grad]
    for one, other in zip(
        torch.autograd.grad(found, weights), torch.autograd.grad(wanted, weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tokens", [10, 40, 41, 200, 1000])
def test_texts_take_their_share_of_the_tokens(tokens: int) -> None:
    p = prepared()
    move(p)
    anchor = Anchor(p.model, p.samples.calibration, tokens=tokens, weight=1.0)
    read: list[int] = []
    p.model.register_forward_hook(
        lambda module, args, kwargs, out: read.append(int(kwargs["attention_mask"].sum())),
        with_kwargs=True,
    )
    _ = anchor.rest  # the base's forward passes come before
    read.clear()
    losses = [float(anchor.loss().detach()) for _ in range(40)]
    assert sum(read) / 40 == pytest.approx(tokens, rel=0.25)
    assert [x > 0 for x in losses] == [(i + 1) % anchor.every == 0 for i in range(40)]


def test_every_text_is_used_once_in_each_pass() -> None:
    p = prepared()
    anchor = Anchor(p.model, p.samples.calibration[:10], tokens=40, weight=1.0)
    first, second = ([anchor._text(i) for i in range(n, n + 10)] for n in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert len(Anchor(p.model, p.samples.calibration, tokens=40, weight=1.0, uses=5).texts) == 5


def test_the_anchor_keeps_a_model_closer_to_its_base(tmp_path: Path) -> None:
    found = {}
    for name, changes in {"without": {"method": "folora", "anchor": None}, "with": {}}.items():
        p = prepared(**changes, training={"max_steps": 24, "learning_rate": 3e-2})
        train(p, make_tokenizer(), tmp_path / name)
        found[name] = p.meter.read(p.model)
    assert found["with"].kl < 0.6 * found["without"].kl


def test_the_weight_rises_above_the_budget_and_is_never_below_the_least() -> None:
    weight = BudgetWeight(0.01)
    for _ in range(20):
        weight.update(torch.tensor(1e-4))
        assert float(weight()) == KL_WEIGHT
    last = 1.0
    for _ in range(40):
        weight.update(torch.tensor(0.1))
        assert float(weight()) >= last
        last = float(weight())
    assert last == pytest.approx(100 * KL_WEIGHT)
    for _ in range(80):
        weight.update(torch.tensor(1e-4))
    assert float(weight()) == KL_WEIGHT
    weight.update(torch.tensor(-1e-9))  # rounding of a KL of 0
    assert bool(torch.isfinite(weight()))


def test_a_training_with_a_budget_resumes_bit_for_bit(tmp_path: Path) -> None:
    changes = {"method": "folora", "budget": 1e-4, "anchor": 0.4}
    whole = prepared(**changes)
    trainer = train(whole, make_tokenizer(), tmp_path / "whole")
    assert trainer.anchor is not None and float(trainer.anchor.weight()) > 1.5 * KL_WEIGHT  # type: ignore[operator]
    with pytest.raises(KeyboardInterrupt):
        train(prepared(**changes), make_tokenizer(), tmp_path / "cut", callbacks=[StopAt(5)])
    again = prepared(**changes)
    resumed = train(again, make_tokenizer(), tmp_path / "cut")
    assert torch.equal(flat(again), flat(whole))
    assert resumed.anchor is not None
    assert resumed.anchor.state_dict() == trainer.anchor.state_dict()


def ends_at(slope: float, kl_slope: float = 0.0, binds: float = 1.0) -> list[int]:
    """The steps, of 1000, at which training ends while a noisy loss falls by `slope` a step, for ten seeds."""
    found = []
    for seed in range(10):
        stop, noise = BudgetStop(), torch.randn(1000, generator=torch.Generator().manual_seed(seed))
        for i in range(1000):
            loss = 2 + 0.2 * noise[i] - slope * i
            stop.update(loss, torch.tensor(4 - kl_slope * i), torch.tensor(binds))
            if stop.reason:
                found.append(i + 1)
                break
    return found


def test_training_may_end_when_the_budget_binds_and_neither_loss_nor_kl_falls() -> None:
    assert len(ends_at(0.0)) >= 7
    assert ends_at(2e-3) == []  # in a quarter of the first 160 steps less than the noise of a step
    assert ends_at(0.0, binds=0.0) == []  # the budget does not bind
    assert ends_at(0.0, kl_slope=1e-3) == []  # less and less of the adapter will be scaled away


NOISE = random.Random(0)
RANDOM_LABELS = [{"prompt": "a=", "completion": f"{NOISE.randrange(10)}."} for _ in range(800)]
IGNORED = pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
STANDS_STILL = {  # after 30 of 100 steps
    "lr_scheduler_type": "warmup_stable_decay", "max_steps": 100,
    "lr_scheduler_kwargs": {"num_stable_steps": 10, "num_decay_steps": 20},
}  # fmt: skip


def trained(
    folder: Path, data: Any, budget: float | None, training: Any, cut: int | None = None
) -> FoLoraTrainer:
    """Train, or resume; interrupted after `cut` steps first."""
    training = {"learning_rate": 1e-2, "save_steps": 4, "max_steps": 60, **training}
    changes = {"method": "folora", "anchor": 0.5 if budget else None, "budget": budget}
    config = tiny_config(**changes, training=training)
    if cut:
        p = folora.prepare(make_llama(), make_tokenizer(), data, config)
        with pytest.raises(KeyboardInterrupt):
            train(p, make_tokenizer(), folder, callbacks=[StopAt(cut)])
    p = folora.prepare(make_llama(), make_tokenizer(), data, config)
    return train(p, make_tokenizer(), folder)


@IGNORED
def test_random_labels_end_training_early_and_a_resumed_one_at_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(budget_stop, "BLOCK", 5)
    caplog.set_level(logging.INFO, "folora")
    first = trained(tmp_path / "whole", RANDOM_LABELS, 1e-2, STANDS_STILL)
    steps = first.state.global_step
    assert steps < 100 and first.ended_early
    assert first.ended_early.startswith(f"after step {steps} of 100: the budget binds")
    assert f"training ends early, {first.ended_early}" in caplog.text
    for folder, cut in (("cut", steps - 3), ("whole", None)):  # within a block; after the end
        other = trained(tmp_path / folder, RANDOM_LABELS, 1e-2, STANDS_STILL, cut)
        assert (other.state.global_step, other.ended_early) == (steps, first.ended_early)
        assert torch.equal(flat(other.prepared), flat(first.prepared))


@IGNORED
@pytest.mark.parametrize(
    ("data", "budget", "training"),
    [
        (rows() * 10, 0.02, {"learning_rate": 3e-3, "lr_scheduler_type": "constant"}),
        (RANDOM_LABELS, 50.0, STANDS_STILL),
        (RANDOM_LABELS, None, STANDS_STILL),
    ],
    ids=["a loss that falls", "a budget that does not bind", "no budget"],
)
def test_a_training_that_may_not_end_early_takes_all_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Any, budget: float | None, training: Any
) -> None:
    monkeypatch.setattr(budget_stop, "BLOCK", 5)
    trainer = trained(tmp_path, data, budget, training)
    assert trainer.state.global_step == trainer.state.max_steps and trainer.ended_early is None
    if budget and budget < 1:
        assert trainer.anchor is not None and float(trainer.anchor.weight()) > KL_WEIGHT  # type: ignore[operator]


def test_a_damaged_state_of_the_anchor_is_named(tmp_path: Path) -> None:
    p = prepared()
    anchor = Anchor(p.model, p.samples.calibration, tokens=40, weight=BudgetWeight(0.1))
    for state in ({}, {"batches": 1, "weight": None}, {"batches": 1, "weight": {"state": [1.0]}}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            anchor.load_state_dict(state)
    folder = tmp_path / "x"
    with pytest.raises(KeyboardInterrupt):
        train(p, make_tokenizer(), folder, callbacks=[StopAt(5)])
    (folder / "checkpoint-4" / "anchor.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"anchor\.json is damaged"):
        train(prepared(), make_tokenizer(), folder)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_anchor_is_divided_by_the_batches_of_a_step(tmp_path: Path, steps: int) -> None:
    """The Trainer adds up the losses of micro-batches when it gives a number of tokens."""
    p = prepared(anchor=0.5)
    move(p)
    args = folora.sft_config(p.config, tmp_path, evaluates=False, on_cpu=True)
    trainer = folora.FoLoraTrainer(p, args, make_tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    tokens = (batch["labels"] != -100).sum()
    trainer.current_gradient_accumulation_steps = steps
    p.model.train()
    assert trainer.anchor is not None and trainer.anchor.every == 1
    whole = trainer.compute_loss(p.model, dict(batch), num_items_in_batch=tokens).detach()
    divergence = trainer.anchor._step[-1]
    anchor, trainer.anchor = trainer.anchor, None
    plain = trainer.compute_loss(p.model, dict(batch), num_items_in_batch=tokens).detach()
    assert float(divergence) > 1e-3
    torch.testing.assert_close(whole - plain, KL_WEIGHT * divergence / steps, rtol=1e-3, atol=1e-6)
    p.model.eval()  # an evaluation's loss is the task's alone
    trainer.anchor = anchor
    found = trainer.compute_loss(p.model, dict(batch), num_items_in_batch=tokens).detach()
    torch.testing.assert_close(found, plain)


def test_a_short_training_that_hardly_reads_text_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    p = prepared()
    with caplog.at_level(logging.WARNING):
        Anchor(p.model, p.samples.calibration, tokens=4, weight=1.0, uses=40)
    assert "only 4 times" in caplog.text


def test_the_documented_recipe_adds_the_anchor_to_dpo(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "budget.md"
    blocks = [block.partition("```")[0] for block in page.read_text().split("```python\n")[1:]]
    (recipe,) = (block for block in blocks if "DPOTrainer" in block)
    p = prepared(method="folora", budget=1e-4, training={"per_device_train_batch_size": 4})
    pairs = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": "0."} for r in rows()[:16]
    ]
    args = DPOConfig(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to="none",
        use_cpu=True, learning_rate=1e-2, logging_steps=1,
    )  # fmt: skip
    names: dict[str, Any] = {
        "args": args, "pairs": Dataset.from_list(pairs), "prepared": p, "tokenizer": make_tokenizer(),
    }  # fmt: skip
    before = flat(p)
    exec(recipe, names)
    anchor = names["anchor"]
    assert not torch.equal(flat(p), before) and anchor.batches == 4
    assert float(anchor.weight()) > KL_WEIGHT  # the callback has followed the budget
    assert all(
        torch.isfinite(t).all() for a, b, _ in lora_factors(p.model).values() for t in (a, b)
    )
