"""The table of all arms at the end of training, and the task loss within a KL."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from support.made_results import final, page, stated, tables

from benchmarks.report.outcomes import WITHIN, loss_within
from folora.compare.results import load_results


def rewrite(file: Path, changes: dict[str, object]) -> None:
    """Change all lines of a file of results."""
    lines = [json.dumps({**json.loads(line), **changes}) for line in file.read_text().splitlines()]
    file.write_text("".join(f"{line}\n" for line in lines))


def test_outcomes_are_those_of_the_last_step_as_trained(made: Path) -> None:
    text = page(made, "outcomes world_methods shift")
    (table,) = tables(text)
    assert list(table)[:2] == ["base", "folora, lr 0.001"]
    kept = [final("lora", seed, 1e-2) for seed in range(3)]
    row = table["LoRA, lr 0.01"]
    assert row["retained"] == stated(kept)
    assert row["KL"] == stated([(1 - k) / 10 for k in kept], 4)
    assert row["task accuracy"] == "1.000 ± 0.000"
    assert row["seeds"] == "3"
    assert "](pictures/outcomes_world_methods_shift.png)" in text


def test_arms_of_another_plan_come_first_at_the_same_seeds(made: Path) -> None:
    (table,) = tables(page(made, "outcomes world_ablation shift world_methods"))
    assert list(table).index("LoRA, lr 0.01") < list(table).index("eigen init, A frozen, lr 0.003")
    assert table["LoRA, lr 0.01"]["seeds"] == "2"  # the other plan has three


def test_readings_of_scales_count_for_the_last_column_alone(made: Path) -> None:
    file = made / "results" / "world_methods.jsonl"
    before = tables(page(made, "outcomes world_methods shift"))[0]["LoRA, lr 0.01"]
    values = json.loads(file.read_text().splitlines()[0])
    trained = values["readings"]
    scaled = [{**trained[-1], "scale": 0.5, "kl": WITHIN / 2, "task_loss": 0.25}]
    rewrite(file, {"readings": [*trained, *scaled]})
    after = tables(page(made, "outcomes world_methods shift"))[0]["LoRA, lr 0.01"]
    title = f"task loss within a KL of {WITHIN:g}"
    assert before[title] == "–" and after[title].startswith("0.250")
    changed = load_results(file)[0]
    assert loss_within(changed, 1.0) == min(r["task_loss"] for r in changed.readings)
    assert math.isnan(loss_within(changed, 0.0))


@pytest.mark.parametrize(("changes", "kl"), [({}, 0.05), ({"budget": 0.02}, 0.011)])
def test_an_arm_with_a_budget_is_shown_as_scaled(
    made: Path, changes: dict[str, float], kl: float
) -> None:
    file = made / "results" / "world_methods.jsonl"
    values = json.loads(file.read_text().splitlines()[0])
    readings = [{**values["readings"][-1], "kl": 0.05}, {**values["readings"][-1], "kl": 0.011, "scale": 0.4}]  # fmt: skip
    rewrite(file, {"readings": readings, "changes": {"training.learning_rate": 1e-2, **changes}})
    (table,) = tables(page(made, "outcomes world_methods shift"))
    name = next(n for n in table if n.startswith("LoRA"))
    assert table[name]["KL"].split(" ")[0] == f"{kl:.4f}"
    assert ("budget = 0.02" in name) == bool(changes)


def test_flipped_answers_are_a_share_of_all_questions_where_they_are_recorded(made: Path) -> None:
    file = made / "results" / "world_methods.jsonl"
    values = json.loads(file.read_text().splitlines()[0])
    flips = {"a.questions": 30, "a.lost_adjusted": 0.1, "a.gained_adjusted": 0.0,
             "b.questions": 10, "b.lost_adjusted": 0.5, "b.gained_adjusted": 0.2}  # fmt: skip
    last = {**values["readings"][-1], "flips": flips, "other": {"kl.prompts": 0.5}}
    rewrite(file, {"readings": [*values["readings"][:-1], last]})
    (table,) = tables(page(made, "outcomes world_methods shift"))
    row = table["LoRA, lr 0.01"]
    assert (row["answers lost (%)"], row["answers gained (%)"]) == (
        "20.0 ± 0.0",
        "5.0 ± 0.0",
    )
    assert row["KL on the task's prompts"] == "0.5000 ± 0.0000"
    assert table["base"]["answers lost (%)"] == "–" and "KL on WikiText" not in row


def test_compute_counts_set_up_and_is_that_of_the_same_arm_at_another_rate(made: Path) -> None:
    file = made / "results" / "world_methods.jsonl"
    counts = {
        "lora": {"task": 100, "anchor": 0, "base": 0, "setup": 0, "scale": 0},
        "folora": {"task": 100, "anchor": 10, "base": 0, "setup": 140, "scale": 40},
    }
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for values in lines:
        if values["changes"]["training.learning_rate"] == 1e-3:
            values["tokens"] = counts.get(values["method"], {})
    file.write_text("".join(f"{json.dumps(values)}\n" for values in lines))
    (table,) = tables(page(made, "outcomes world_methods shift"))
    compute = {name: row["tokens of LoRA's"] for name, row in table.items()}
    assert compute["folora, lr 0.001"] == compute["folora, lr 0.01"] == "2.00 ± 0.00"
    assert compute["LoRA, lr 0.01"] == "1.00 ± 0.00"
    uncounted = {n for n in table if not n.startswith(("folora,", "LoRA,"))}
    assert uncounted and {compute[n] for n in uncounted} == {"–"}


def test_a_counted_arm_has_its_own_compute(made: Path) -> None:
    """Under a budget the search for a scale differs between learning rates."""
    file = made / "results" / "world_methods.jsonl"
    scale = {1e-3: 0, 3e-3: 200, 1e-2: 100}
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for values in lines:
        searched = scale[values["changes"]["training.learning_rate"]]
        values["tokens"] = {"task": 100, "anchor": 0, "base": 0, "setup": 0, "scale": searched}
    file.write_text("".join(f"{json.dumps(values)}\n" for values in lines))
    (table,) = tables(page(made, "outcomes world_methods shift"))
    compute = {name: row["tokens of LoRA's"].split(" ")[0] for name, row in table.items()}
    assert [compute[f"LoRA, lr {rate:g}"] for rate in scale] == ["1.00", "2.00", "1.50"]
