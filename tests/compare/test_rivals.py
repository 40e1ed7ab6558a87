"""Each rival of folora differs from LoRA in what its entry says, and in nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.closeness import assert_near

import folora
from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config
from folora.adapters.adapter import lora_factors
from folora.compare.arms import Arm
from folora.compare.comparison import Comparison
from folora.compare.inputs import RealText
from folora.config import FoLoraConfig
from folora.data.rows import pad_batch
from folora.errors import ConfigError, MismatchError
from folora.metrics.meter import by_source
from folora.pipeline.further_text import further_text
from folora.pipeline.run import Run
from folora.training.arguments import sft_config
from folora.training.prepared import Prepared


def trainer_of(name: str, folder: Path, **changes: Any) -> folora.FoLoraTrainer:
    """A trainer of a method on the tiny model, in float64, whose B is not zero."""
    config = tiny_config().changed({"method": name, **changes})
    prepared = folora.prepare(make_llama(), make_tokenizer(), rows(), config)
    torch.manual_seed(1)
    for _, b, _ in lora_factors(prepared.model).values():
        torch.nn.init.normal_(b, std=0.1)
    prepared.model.double().train()
    arguments = sft_config(config, folder, evaluates=False, on_cpu=True)
    return folora.FoLoraTrainer(prepared, arguments, make_tokenizer())


def test_dft_weighs_each_tokens_loss_by_its_probability(tmp_path: Path) -> None:
    """Value and gradient, against sum(-sg(p) log p) / tokens; the meter's task loss stays cross-entropy."""
    trainer = trainer_of("lora-dft", tmp_path)
    model = trainer.prepared.model
    batch = pad_batch(trainer.prepared.task.train[:4], 0)
    tokens = (batch["labels"] != -100).sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = trainer.compute_loss(model, dict(batch), num_items_in_batch=tokens)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    log_p = model(**inputs).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    log_p = log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0][labels != -100]
    expected = -(log_p.exp().detach() * log_p).sum() / tokens
    # TRL takes the logarithm in float32.
    assert_near(found, expected, dtype=torch.float32)
    slopes = zip(
        torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), strict=True
    )
    for own, slope in slopes:
        assert_near(own, slope, dtype=torch.float32, roundings=1e3)
    trainer.prepared.meter.task = trainer.prepared.task.train[:4]
    assert trainer.prepared.meter.task_loss(model) == pytest.approx(float(-log_p.mean().detach()))


def test_a_methods_option_of_trl_ends_with_the_method() -> None:
    dft = FoLoraConfig().changed({"method": "lora-dft"})
    assert dft.training.model_extra == {"loss_type": "dft"}
    assert not dft.changed({"method": "lora"}).training.model_extra
    plain = dft.changed({"training.loss_type": "nll"})
    assert FoLoraConfig().changed(plain.differences()).training.model_extra == {"loss_type": "nll"}


def test_lora_mlp_trains_the_mlp_alone_in_a_comparison_of_all_layers(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """And gives what a run of its own gives."""
    paths = {"model": str(model_folder), "dataset": str(rows_file)}
    run = Run(tiny_config(**paths, output=str(tmp_path / "run")))
    trained: list[set[str]] = []

    def score(model: Any) -> dict[str, dict[str, float]]:
        trained.append({name for name, p in model.named_parameters() if p.requires_grad})
        return {"task": {}, "kept": {}}

    comparison = Comparison(run, tmp_path / "arms.jsonl", stage="tiny", task="sums",
                            command="pytest", score=score, read_at=(1.0,))  # fmt: skip
    whole, mlp = comparison.run_all([Arm("lora"), Arm("lora-mlp")])
    assert len(trained[-1]) == 2 * 2 * 3  # A and B of three layers in two blocks
    assert trained[-1] == {name for name in trained[0] if ".mlp." in name}
    assert len(trained[0]) == 2 * 2 * 7
    assert mlp["readings"][-1]["frobenius"] < whole["readings"][-1]["frobenius"]

    alone = Run(tiny_config(**paths, output=str(tmp_path / "alone"), method="lora-mlp")).run()
    assert mlp["readings"][-1]["kl"] == pytest.approx(alone["adapted"]["kl"], rel=1e-4)
    assert mlp["readings"][-1]["task_loss"] == pytest.approx(
        alone["adapted"]["task_loss"], rel=1e-5
    )


def test_replayed_real_text_is_an_exact_share_of_the_rows_and_named_in_the_result(
    model_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(
        tiny_config(model=str(model_folder), dataset=str(rows_file), output=str(tmp_path / "run"))
    )
    file, asked = tmp_path / "arms.jsonl", []

    def comparison(first: int) -> Comparison:
        def texts(count: int) -> list[list[int]]:
            asked.append(count)
            return [[1, first, 4 + i] for i in range(count)]

        return Comparison(run, file, stage="tiny", task="sums", command="pytest", read_at=(1.0,),
                          real_text=RealText("made up", texts))  # fmt: skip

    seen: list[list[list[int]]] = []
    whole = Prepared.train_dataset

    def watched(prepared: Prepared) -> Any:
        seen.append([row["input_ids"] for row in whole(prepared)])
        return whole(prepared)

    monkeypatch.setattr(Prepared, "train_dataset", watched)
    half = Arm("lora-replay-5", {"method.replay": 0.25})
    plain, result = comparison(3).run_all([Arm("lora"), half])
    task, mixed = seen
    assert mixed[: len(task)] == task == [e.input_ids for e in run.context.task.train]
    assert mixed[len(task) :] == [[1, 3, 4 + i] for i in range(12)]
    assert len(task) == 36 and asked == [12]  # 12 of 48
    assert "replayed_text" not in plain["made_from"]
    assert result["made_from"]["replayed_text"][0] == "made up"
    with pytest.raises(MismatchError, match="different replayed text"):
        list(comparison(5).run_all([half]))


@pytest.mark.parametrize("name", ["lora-replay-1", "lora-replay-5"])
def test_replay_of_real_text_is_refused_where_there_is_none(
    model_folder: Path, rows_file: Path, tmp_path: Path, name: str
) -> None:
    paths = {"model": str(model_folder), "dataset": str(rows_file), "output": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=f"method {name} replays real text"):
        Run(tiny_config(**paths, method=name)).run()
    with pytest.raises(ConfigError, match=f"method {name} replays real text"):
        folora.prepare(make_llama(), make_tokenizer(), rows(), tiny_config(method=name))
    comparison = Comparison(
        Run(tiny_config(**paths)), tmp_path / "arms.jsonl", stage="tiny", task="s", command=""
    )
    with pytest.raises(ConfigError, match="but the comparison has none"):
        comparison.check([Arm(name)])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("limit", [30.0, 1000.0])
def test_selective_token_masking_leaves_out_exactly_the_tokens_unlikely_under_the_base(
    tmp_path: Path, limit: float
) -> None:
    """Before a step's tokens are counted; under the base, although the adapter is not zero."""
    trainer = trainer_of("lora-stm", tmp_path, **{"method.max_perplexity": limit})
    model = trainer.prepared.model
    batch = pad_batch(trainer.prepared.task.train[:8], 0)
    (found,), count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    base = make_llama().double()
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    probability = base(**inputs).logits[:, :-1].softmax(-1)
    labels = batch["labels"][:, 1:]
    probability = probability.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    learned = (labels != -100) & (1 / probability <= limit)
    assert torch.equal(found["labels"][:, 1:], labels.where(learned, -100))
    assert 0 < learned.sum() < (labels != -100).sum()
    assert int(count) == learned.sum()
    assert model.training and all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)  # fmt: skip
    (plain,), _ = trainer_of("lora", tmp_path).get_batch_samples(
        iter([batch]), 1, torch.device("cpu")
    )
    assert torch.equal(plain["labels"], batch["labels"])


def test_every_arm_counts_its_tokens(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """An epoch of a batch size that divides the rows, so that the task's tokens are known."""
    changes = {"per_device_train_batch_size": 9, "max_steps": 8, "learning_rate": 5e-2}
    run = Run(tiny_config(model=str(model_folder), dataset=str(rows_file), output=str(tmp_path / "run"),
                          training=changes))  # fmt: skip
    comparison = Comparison(
        run, tmp_path / "arms.jsonl", stage="tiny", task="s", command="", read_at=(1.0,)
    )
    names = ["lora", "lora-mlp", "milora", "lora-stm", "lora-masked-kl", "lora-kl", "corda", "eigen-adamw", "folora"]  # fmt: skip
    results = {r["method"]: r["tokens"] for r in comparison.run_all([*map(Arm, names)])}
    shared = run.share()
    samples = shared.samples.load()
    task = 2 * sum(len(e.input_ids) for e in run.context.task.train)
    texts, pre = sum(map(len, samples.calibration)), shared.keep.load().tokens
    nothing = {"task": task, "anchor": 0, "base": 0, "setup": 0, "scale": 0}
    assert results["lora"] == results["lora-mlp"] == results["milora"] == nothing
    assert results["lora-stm"] == results["lora-masked-kl"] == {**nothing, "base": task}
    assert results["corda"] == {**nothing, "setup": texts + pre}
    whole = texts + pre + shared.task.load().tokens
    assert results["folora"] == results["eigen-adamw"] == {**nothing, "setup": whole}
    kl = results["lora-kl"]
    assert kl["task"] == task and 0 < kl["anchor"] < 0.2 * task
    assert texts < kl["setup"] <= 2 * texts and kl["scale"] == kl["base"] == 0

    (kept,) = comparison.run_all([Arm("lora", {"budget": 0.001})])
    held_out = sum(map(len, samples.held_out))
    assert kept["readings"][-1]["scale"] < 1
    more = further_text(run.context, samples)
    assert more is not None
    further = sum(map(len, by_source(more())["bos"]))
    scale, each = kept["tokens"]["scale"] - further, 2 * (held_out + further)
    assert scale % each == 0 and scale > each
    assert kept["tokens"]["setup"] == kl["setup"] + held_out


def test_the_anchor_counts_the_tokens_that_the_model_reads() -> None:
    config = tiny_config().changed({"method": "lora-kl"})
    prepared = folora.prepare(make_llama(), make_tokenizer(), rows(), config)
    anchor = prepared.anchor()
    assert anchor is not None and anchor.every > 1
    anchor.rows = 1  # no padding
    for _ in range(anchor.every):
        anchor.loss()  # the last one stores the base's log-probabilities
    first, read = anchor.tokens, []
    embedding = prepared.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, given, __: read.append(given[0].numel()))
    for _ in range(5 * anchor.every):
        anchor.loss()
    hook.remove()
    assert len(read) == 5 and anchor.tokens - first == sum(read)


def test_an_arm_with_layers_that_were_not_measured_is_refused(
    model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = Run(tiny_config(model=str(model_folder), dataset=str(rows_file), output=str(tmp_path / "run"),
                          adapter={"target_modules": ["q_proj", "up_proj"]}))  # fmt: skip
    comparison = Comparison(
        run, tmp_path / "arms.jsonl", stage="tiny", task="sums", command="pytest"
    )
    with pytest.raises(ConfigError, match=r"adapts model\.layers\.0\.mlp\.down_proj, but arms"):
        comparison.check([Arm("lora-mlp")])
    comparison.check([Arm("lora", {"adapter.target_modules": ["up_proj"]})])
