"""Tasks in a row: each stage starts from the merged model, and readings are against the original base."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from support.made_results import page, stated, tables
from support.plans import TINY_PLAN_BASE
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import sequence
from benchmarks.readings import backward_transfer, exact_match, flips, mean_kl
from benchmarks.report.sequences import rise_in_loss
from benchmarks.tiny import make_llama
from folora.calibration.calibration_set import CalibrationSet
from folora.compare.results import ResultFile, load_results
from folora.config import FoLoraConfig
from folora.data.contents import IGNORE, Example
from folora.data.rows import text_examples
from folora.errors import ConfigError
from folora.metrics.evaluation import Graded

TASKS = ["difference", "instrument"]


@pytest.fixture(autouse=True)
def _few_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few probes per skill: accuracy is not tested here."""
    monkeypatch.setattr("benchmarks.world.testbed.EVERY", 40)


def run(folder: Path, models: Path, **changes: Any) -> list[Any]:
    plan = {
        "model": "world",
        "sequence": True,
        "runs": "tiny",
        "tasks": TASKS,
        "seeds": [7],
        "base": TINY_PLAN_BASE,
        "sweeps": [{"methods": ["folora"], "learning_rates": [1e-2]}],
        **changes,
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    places = {"plan": "plan.yaml", "runs": "runs", "output": "out.jsonl"}
    given = [word for name, file in places.items() for word in (f"--{name}", str(folder / file))]
    sequence.main([*given, "--models", str(models)])
    return load_results(folder / "out.jsonl")


def test_each_stage_starts_from_the_merged_model_and_an_interrupted_arm_resumes(
    tmp_path: Path,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    merge, trained = sequence.merge, []

    def interrupted(run: Any, target: Path) -> Path:
        trained.append((run.folder / "4-training/result/tensors.safetensors").stat().st_mtime_ns)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return merge(run, target)

    monkeypatch.setattr(sequence, "merge", interrupted)
    kept, former = tmp_path / "kept", [{"source": "former", "count": 3}]
    pinned = {**TINY_PLAN_BASE, "sampling.sources": {"bos": 1.0}}  # as the plans of worlds
    monkeypatch.setattr(sequence, "rmtree", lambda folder: folder.rename(kept))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, models, calibration=former, base=pinned)
    (result,) = run(tmp_path, models, calibration=former, base=pinned)
    assert trained[2:] == trained[:2]  # neither stage was trained again
    run(tmp_path, models, calibration=former, base=pinned)
    assert len(trained) == 4  # the arm has a result

    assert (result.task, result.stage, result.seed) == ("difference>instrument", "world-7", 7)
    assert result.base["kl"] == 0
    assert [r["step"] for r in result.readings] == [4, 8]
    assert all(set(r["task"]) == set(TASKS) for r in result.readings)
    assert all(r["kl"] > 0 and len(r["kept"]) == 8 for r in result.readings)
    for reading, task in zip(result.readings, TASKS, strict=True):
        assert reading["task_loss"] == reading["other"][f"{task}.loss"]
    assert "backward transfer" in capsys.readouterr().out

    first, second = (kept / f"{number}-{task}" for number, task in enumerate(TASKS, 1))
    base = FoLoraConfig.from_yaml(second / "config.yaml").model
    assert base is not None and base.endswith(f"{first.name}/merged")
    texts = [CalibrationSet.load(stage / "1-samples/set") for stage in (first, second)]
    own, answered = texts[1].calibration[:-3], texts[1].calibration[-3:]
    assert own != texts[0].calibration  # each stage samples from its own model
    before, between, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (models / "world/7", first / "merged", second / "merged")
    )
    tokenizer = AutoTokenizer.from_pretrained(first / "merged")
    for ids in answered:  # prompts of the first task, answered by the model that has learned it
        prompt, answer = ids[:13], ids[13]
        assert re.fullmatch(
            r"<bos>diff \d - \d =", "".join(tokenizer.convert_ids_to_tokens(prompt))
        )
        assert between(torch.tensor([prompt])).logits[0, -1].argmax() == answer
    moved = PeftModel.from_pretrained(between, str(second / "5-adapter")).merge_and_unload()
    weight = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(moved.state_dict()[weight], after.state_dict()[weight])
    assert not torch.equal(before.state_dict()[weight], after.state_dict()[weight])
    expected = mean_kl(before, after, text_examples(texts[0].held_out), 8)
    assert result.readings[1]["kl"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence": False}, "no sequence of tasks: run it by python -m benchmarks.compare"),
        ({"tasks": ["shift"]}, "at least two tasks"),
        ({"tasks": ["shift", "instrumnt"]}, "did you mean 'instrument'"),
        ({"base": {**TINY_PLAN_BASE, "dtype": "bfloat16"}}, "'bfloat16', but must be 'float32'"),
        ({"calibration": [{"source": "self", "count": 8}]}, "must be null or {source: former"),
        ({"replay": "pretraining"}, "replay must not be set"),
    ],
)
def test_a_plan_that_is_no_sequence_is_refused_first(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, tmp_path / "models", **changes)
    assert not (tmp_path / "models").exists()


def test_backward_transfer_is_the_mean_change_of_earlier_tasks() -> None:
    after = [
        {"a": 0.9, "b": 0.1, "c": 0.0},
        {"a": 0.5, "b": 0.8, "c": 0.2},
        {"a": 0.3, "b": 0.9, "c": 1.0},
    ]
    assert backward_transfer(after, ["a", "b", "c"]) == pytest.approx(
        ((0.3 - 0.9) + (0.9 - 0.8)) / 2
    )


def test_flips_are_counted_and_adjusted_for_guesses() -> None:
    """Ten questions of three choices, six right before and five after; and texts, which cannot be guessed."""
    before = Graded([True] * 6 + [False] * 4, guess=1 / 2)
    after = Graded([True] * 3 + [False] * 3 + [True] * 2 + [False] * 2, guess=1 / 2)
    by_chance = (4 / 10) * (5 / 10) / 2
    assert flips(before, after) == {
        "questions": 10,
        "lost": 3,
        "gained": 2,
        "lost_adjusted": pytest.approx(3 / 10 - by_chance),
        "gained_adjusted": pytest.approx(2 / 10 - by_chance),
    }
    back = flips(after, before)
    assert (back["lost"], back["gained"]) == (2, 3)
    few = Graded([False] + [True] * 5 + [False] * 4, guess=1 / 2)
    assert flips(before, few)["lost"] == 1
    assert flips(before, few)["lost_adjusted"] == 0  # guesses alone would flip as many
    cloze = [replace(graded, guess=0.0) for graded in (before, after)]
    assert flips(*cloze)["lost_adjusted"] == 3 / 10


def test_the_table_of_a_sequence(tmp_path: Path) -> None:
    """Two seeds of an arm that finished, and one that diverged in its second stage."""
    scores = {0: ((0.9, 0.1), (0.5, 0.8)), 1: ((0.8, 0.0), (0.2, 0.9))}
    for seed, readings in scores.items():
        for method, stages in (("folora", readings), ("lora", readings[:1])):
            write_sequence(tmp_path / "results" / "ab.jsonl", method, seed, stages)
    plan = {
        "model": "world", "base": {}, "tasks": ["a", "b"], "seeds": [0, 1, 2], "runs": "r", "sequence": True,
        "sweeps": [{"methods": ["folora", "lora"], "learning_rates": [1e-3]}],
    }  # fmt: skip
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "ab.yaml").write_text(yaml.safe_dump(plan))
    text = page(tmp_path, "sequence ab")
    (table,) = tables(text)
    row = table["folora, lr 0.001"]
    assert row["a learned"] == stated([0.9, 0.8])
    assert row["a at the end"] == stated([0.5, 0.2])
    assert row["b learned"] == stated([0.8, 0.9])
    assert row["backward transfer"] == stated([-0.4, -0.6])
    assert row["rise in loss"] == stated([0.4, 0.6])  # made results: 2 minus the exact match
    assert row["retained"] == stated([0.7, 0.7])
    assert row["KL"] == stated([0.2, 0.2], 4)
    assert row["facts (log-probability)"] == stated([-4.5, -4.5], 2)
    assert table["base"]["facts (log-probability)"] == stated([-4.0, -4.0], 2)
    assert row["seeds"] == "2"
    assert table["base"]["a learned"] == "–" and "text (bits per byte)" not in row
    assert table["LoRA, lr 0.001"]["backward transfer"] == "–"
    assert "2 of 6 arms" in text


def test_the_rise_in_loss_is_from_the_stage_of_each_task() -> None:
    losses = ({"a": 0.1, "b": 9.0}, {"a": 0.2, "b": 0.5}, {"a": 0.4, "b": 0.6})
    readings = [{"other": {f"{task}.loss": loss for task, loss in r.items()}} for r in losses]
    assert rise_in_loss(readings, "abc") == pytest.approx((0.3 + 0.1) / 2)
    assert math.isnan(rise_in_loss([{"other": {}}] * 3, "abc"))


def write_sequence(
    file: Path, method: str, seed: int, scores: tuple[tuple[float, float], ...]
) -> None:
    def reading(step: int, a: float, b: float) -> dict[str, Any]:
        unread = dict.fromkeys(("ce_change", "frobenius", "h_norm"))
        found = {
            "task": {"a": a, "b": b},
            "kept": {"x": 0.6, "y": 0.8},
            "other": {"a.loss": 2 - a, "b.loss": 2 - b, "known_facts.nats": -4 - step / 40},
        }
        return {"step": step, "task_loss": 1.0, "kl": step / 100, **unread, **found}

    result = {
        "format": 2, "stage": f"world-{seed}", "task": "a>b", "seed": seed, "name": method, "method": method,
        "title": method, "changes": {"training.learning_rate": 1e-3}, "command": "c", "config": {}, "versions": {},
        "seconds": 1.0, "base": reading(0, 0.0, 0.0), "diverged": len(scores) < 2,
        "readings": [reading(10 * (i + 1), *values) for i, values in enumerate(scores)],
    }  # fmt: skip
    ResultFile(file).add(result)


def test_exact_match_is_that_of_greedy_decoding() -> None:
    model: Any = make_llama()
    prompts = [[1, 5, 9], [1, 7, 3, 4]]
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=[])[0].tolist()
        labels = [IGNORE] * len(prompt) + found[len(prompt) :]
        rows.append(Example(found, labels))
        wrong = (found[-2] + 1) % 10 + 10
        rows.append(Example([*found[:-2], wrong, found[-1]], [*labels[:-2], wrong, found[-1]]))
    assert exact_match(model, rows[::2], 2) == 1.0
    assert exact_match(model, rows, 3) == 0.5


def test_kl_between_models_matches_one_by_hand_and_the_adapters() -> None:
    """Over the labelled tokens only; a PEFT model is compared with its base by switching the adapter off."""
    base, other = make_llama(seed=0), make_llama(seed=1)
    rows = [Example([1, 5, 9, 4], [IGNORE, IGNORE, 9, 4]), *text_examples([[1, 7, 3, 2, 8]])]
    total = count = 0.0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (base, other))
        for i, label in enumerate(row.labels[1:]):
            if label != IGNORE:
                total, count = total + float((p[i].exp() * (p[i] - q[i])).sum()), count + 1
    assert mean_kl(base, other, rows, 2) == pytest.approx(total / count, rel=1e-4)
    adapted = get_peft_model(
        make_llama(seed=0), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    merged = copy.deepcopy(adapted).merge_and_unload()
    assert mean_kl(adapted.get_base_model(), adapted, rows, 2) == pytest.approx(
        mean_kl(base, merged, rows, 2), rel=1e-4
    )
    assert mean_kl(base, merged, rows, 2) > 1e-3
