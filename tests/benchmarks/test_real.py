"""The comparison on pretrained models: a plan from rows to results, with a tiny model and synthetic data."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats
from support.plans import TINY_PLAN_BASE

from benchmarks import compare, sequence
from benchmarks.real import testbed
from benchmarks.real.targets import TARGETS, data_folder, target_rows
from benchmarks.report.forgetting import FAR, forgetting_table
from folora.compare.results import ResultFile, load_results
from folora.data.files import load_rows
from folora.errors import ConfigError, DataError

ROWS = {
    "mawps/train.jsonl.gz": [
        {"question": f"{n} and {n} ?", "equation": f"x={n}+{n}", "answer": 2.0 * n}
        for n in range(30)
    ],
    "mbpp/train.jsonl.gz": [
        {"text": f"add {n}", "code": f"def f(x):\r\n  return x+{n}", "test_list": [f"f(0)={n}"]}
        for n in range(30)
    ],
    "wikitext2/validation.jsonl.gz": [
        {"title": letter, "text": letter * 100} for letter in "abcdefghij"
    ],
    "known_facts/test.jsonl.gz": [
        {"prompt": f"{n} is after", "attribute": str(n - 1)} for n in range(1, 9)
    ],
    "wikitext2/test.jsonl.gz": [{"text": "some plain text " * 70}],
    "piqa/validation.jsonl.gz": [
        {"goal": f"count to {n}", "choices": [str(n), "no"], "gold": n % 2} for n in range(9)
    ],
}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    for name, rows in ROWS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(folder / name, "wt") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "PROVENANCE.md").write_text("made up")
    monkeypatch.setenv("FOLORA_DATA_DIR", str(folder))
    return folder


def plan_file(folder: Path, **changes: Any) -> Path:
    plan = {
        "model": "smollm2",
        "tasks": ["mawps", "mbpp"],
        "seeds": [3],
        "runs": "tiny",
        "read_at": [0.5, 1.0],
        "base": {**TINY_PLAN_BASE, "data.max_length": 64},
        "evaluation": {
            "folder": str(Path(compare.__file__).parent / "tasks"),
            "documents": {"known_facts": 4, "piqa": 3},
            "kept": {"known_facts": "probability", "piqa": "probability"},
            "other": {"known_facts": "nats"},
            "kl": {"prompts": 2, "wikitext": 1},
        },
        "sweeps": [{"methods": ["folora", "null-frozen"], "learning_rates": [1e-2]}],
        **changes,
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


def run(
    folder: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    *more: str,
    program: Callable[[list[str]], None] = compare.main,
) -> list[Any]:
    monkeypatch.setattr(testbed, "MODELS", {"smollm2": lambda _: model})
    places = ["--runs", str(folder / "runs"), "--output", str(folder / "out.jsonl")]
    program(["--plan", str(folder / "plan.yaml"), *places, *more])
    return load_results(folder / "out.jsonl")


def test_a_plan_from_rows_to_results(
    tmp_path: Path, data: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_file(tmp_path)
    results = run(tmp_path, model_folder, monkeypatch)
    assert {(r.task, r.method, r.seed, r.stage) for r in results} == {
        (task, method, 3, "smollm2")
        for task in ("mawps", "mbpp")
        for method in ("folora", "null-frozen")
    }
    for result in results:
        assert result.config["seed"] == 3
        assert "training.seed" not in result.config
        assert [r["step"] for r in result.readings] == [2, 4]
        for reading in (result.base, *result.readings):
            assert set(reading["kept"]) == {"known_facts", "piqa"}
            assert all(0 < value < 1 for value in reading["kept"].values())
            metrics = {"known_facts.nats", "known_facts.acc", "piqa.acc"}
            assert set(reading["other"]) == {*metrics, "kl.prompts", "kl.wikitext"}
            assert reading["other"]["known_facts.nats"] < 0
            asked = {"known_facts": 4, "piqa": 3}
            for name, count in asked.items():
                change = reading["other"][f"{name}.acc"] - result.base["other"][f"{name}.acc"]
                flipped = {w: reading["flips"][f"{name}.{w}"] for w in ("lost", "gained")}
                assert flipped["gained"] - flipped["lost"] == pytest.approx(change * count)
                assert reading["flips"][f"{name}.questions"] == count
        texts = {
            name: result.readings[-1]["other"][f"kl.{name}"] for name in ("prompts", "wikitext")
        }
        assert all(value > 0 for value in texts.values())
        assert texts["prompts"] != texts["wikitext"]
        assert result.base["other"]["kl.prompts"] == pytest.approx(0, abs=1e-6)
        assert result.base["flips"]["piqa.lost"] == 0
        assert result.readings[-1]["kept"] != result.base["kept"]
    pre = [
        tmp_path / "runs/real/tiny/3" / task / "2-statistics/pre/tensors.safetensors"
        for task in ("mawps", "mbpp")
    ]
    assert pre[0].read_bytes() == pre[1].read_bytes()
    assert pre[0].stat().st_mtime_ns == pre[1].stat().st_mtime_ns  # copied, not recomputed

    stamp = (tmp_path / "out.jsonl").stat().st_mtime_ns
    run(tmp_path, model_folder, monkeypatch)
    assert stamp == (tmp_path / "out.jsonl").stat().st_mtime_ns
    instead = ["--seeds", "4", "--tasks", "mawps", "--dtype", "bfloat16"]
    other = run(tmp_path, model_folder, monkeypatch, *instead)
    assert {(r.seed, r.config.get("dtype")) for r in other} == {(3, "float32"), (4, "bfloat16")}
    bases = {r.seed: r.base["task_loss"] for r in other if r.task == "mawps"}
    assert bases[3] != bases[4]  # other rows are held out


def test_a_sequence_is_read_against_the_first_base(
    tmp_path: Path, data: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged models have no adapter to switch off: KL and flips are those to the model of the plan."""
    sweeps = [{"methods": ["lora"], "learning_rates": [1e-2]}]
    plan_file(tmp_path, sequence=True, sweeps=sweeps)
    (result,) = run(tmp_path, model_folder, monkeypatch, program=sequence.main)
    assert result.task == "mawps>mbpp"
    assert result.base["other"]["kl.wikitext"] == 0
    for reading in result.readings:
        assert set(reading["task"]) == {"mawps", "mbpp"}
        assert reading["other"]["kl.wikitext"] > 0 and reading["kl"] > 0
        lost, gained = (reading["flips"][f"piqa.{name}"] for name in ("lost", "gained"))
        change = reading["other"]["piqa.acc"] - result.base["other"]["piqa.acc"]
        assert gained - lost == pytest.approx(3 * change)


def test_the_number_of_measured_texts_can_be_reduced(
    tmp_path: Path, data: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another C_pre gives another basis and other weights, with the same held-out rows and texts."""
    calibration = [None, {"source": "self", "count": 8}]
    changes = {"tasks": ["mawps"], "calibration": calibration}
    plan_file(tmp_path, **changes)
    found = [r for r in run(tmp_path, model_folder, monkeypatch) if r.method == "folora"]
    assert sorted(r.calibration.get("count", 0) for r in found) == [0, 8]
    whole, few = (r.readings[-1] for r in sorted(found, key=lambda r: len(r.calibration)))
    assert whole["kl"] != few["kl"]
    assert found[0].base["task_loss"] == found[1].base["task_loss"]


def test_replayed_text_is_whole_pieces_of_articles_ordered_by_the_seed(
    tmp_path: Path, data: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = {"methods": ["lora-replay-5"], "learning_rates": [1e-2]}
    path = plan_file(tmp_path, tasks=["mawps"], replay="wikitext2", sweeps=[sweep])
    (result,) = run(tmp_path, model_folder, monkeypatch)
    assert math.isfinite(result.readings[-1]["kl"])
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert line["made_from"]["replayed_text"][0] == "wikitext2"

    plan = compare.Plan.load(path)
    base = compare.FoLoraConfig().changed(plan.base)
    texts = []
    for seed in (3, 3, 4):
        bed = testbed.RealTestbed(plan, seed, tmp_path)
        made = compare.task_run(base, bed, tmp_path / "runs/real/tiny/3/mawps", "mawps", None)
        texts.append(bed.texts(made, "wikitext2", 25))
    assert texts[0] == texts[1] != texts[2]
    assert {len(text) for text in texts[0]} == {1 + 32}
    assert {text[0] for text in texts[0]} == {made.context.start_id}
    assert all(len({*text[1:]}) == 1 for text in texts[0])  # of one article
    assert bed.texts(made, "wikitext2", 99)[:25] == texts[2]


def test_replayed_articles_share_no_line_with_those_that_are_scored() -> None:
    if not os.environ.get("FOLORA_DATA_DIR"):
        pytest.skip("FOLORA_DATA_DIR is not set")
    scored, replayed = (
        {
            line.strip()
            for row in load_rows(str(data_folder() / "wikitext2" / f"{part}.jsonl.gz"))
            for line in row["text"].splitlines()
            if len(line) > 40
        }
        for part in ("test", "validation")
    )
    assert len(replayed) > 1000 < len(scored)
    assert not replayed & scored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replay": "pretraining"}, "known: wikitext2"),
        ({"tasks": ["maws"]}, "did you mean 'mawps'"),
        ({"model": "smollm"}, "did you mean 'smollm2'"),
        ({"evaluation": {"documents": {}, "kept": {"piqa": "acc"}}}, "documents has no 'piqa'"),
        ({"evaluation": {"documents": {}, "kept": {}, "kl": {"wikitxt": 1}}}, "mean 'wikitext'"),
        ({"calibration": [{"source": "narrow", "count": 8}]}, "source must be 'self'"),
    ],
)
def test_an_invalid_plan_is_refused_first(
    tmp_path: Path,
    data: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    plan_file(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, model_folder, monkeypatch)
    assert not (tmp_path / "runs").exists()


def test_a_missing_metric_is_named_before_training(
    tmp_path: Path, data: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = yaml.safe_load(plan_file(tmp_path).read_text())
    plan["evaluation"]["kept"]["piqa"] = "accuracy"
    plan_file(tmp_path, evaluation=plan["evaluation"])
    with pytest.raises(
        ConfigError,
        match=r"'piqa' has no metric 'accuracy' \(did you mean 'acc'\?\); it has acc, nats",
    ):
        run(tmp_path, model_folder, monkeypatch)
    assert not list(tmp_path.rglob("shard-*"))


def test_a_method_that_is_not_in_the_plan_is_refused_first(
    tmp_path: Path, data: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_file(tmp_path)
    with pytest.raises(ConfigError, match="no such arm with folra \\(did you mean 'folora'"):
        run(tmp_path, model_folder, monkeypatch, "--methods", "folra")
    assert not (tmp_path / "runs").exists()


def test_missing_data_is_named(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_file(tmp_path)
    monkeypatch.setenv("FOLORA_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"PROVENANCE\.md"):
        run(tmp_path, model_folder, monkeypatch)


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_trainable_rows(name: str) -> None:
    if not os.environ.get("FOLORA_DATA_DIR"):
        pytest.skip("FOLORA_DATA_DIR is not set")
    rows = target_rows(name)
    asked, answered = [list(row)[i] for row in rows[:1] for i in (0, -1)]
    assert len(rows) > 300
    assert all(row[asked].strip() and row[answered].strip() for row in rows)
    assert not any("<<" in row[answered] for row in rows if name == "gsm8k")


# The table at matched loss against numbers computed independently.


def arm(
    folder: Path,
    method: str,
    seed: int,
    readings: list[tuple[float, float, float]],
    shift: float = 0.0,
) -> None:
    def reading(step: int, loss: float, kl: float, kept: float) -> dict[str, Any]:
        numbers = {"ce_change": 0.0, "frobenius": 1.0, "h_norm": 1.0}
        found = {
            "kept": {"a": kept, "b": kept + 0.1},
            "other": {"a.nats": 10 * kept, "b.bits_per_byte": 2 - 2 * kept},
        }
        return {"step": step, "task_loss": loss, "kl": kl, "task": {}, **found, **numbers}

    result = {
        "format": 2, "stage": "m", "task": "t", "seed": seed, "name": method, "method": method, "title": method.upper(),
        "changes": {}, "command": "c", "config": {}, "versions": {}, "seconds": 1.0, "diverged": False,
        "base": reading(0, 3.0 + shift, 0.0, 0.5),
        "readings": [reading(i + 1, *values) for i, values in enumerate(readings)],
    }  # fmt: skip
    ResultFile(folder / "arms.jsonl").add(result)


def test_forgetting_at_matched_loss(tmp_path: Path) -> None:
    for seed, factor in enumerate((0.2, 0.1, 0.4)):
        # folora reaches 1.0 + seed and LoRA a lower loss, so this is the matched loss of each seed.
        shift = float(seed)
        lora = [(2.0, 0.01, 0.49), (1.0, 0.1, 0.40), (0.9, 0.5, 0.30)]
        arm(tmp_path, "lora", seed, [(loss + shift, kl, kept) for loss, kl, kept in lora], shift)
        folora = [(2.0, 0.001, 0.5), (1.0, 0.1 * factor, 0.48)]
        arm(
            tmp_path, "folora", seed, [(loss + shift, kl, kept) for loss, kl, kept in folora], shift
        )
    table = forgetting_table(load_results(tmp_path / "arms.jsonl"))
    lora, folora = (next(r for r in table.rows if r[0] == name) for name in ("LORA", "FOLORA"))
    logs = [math.log(f) for f in (0.2, 0.1, 0.4)]
    mean, half = sum(logs) / 3, stats.t.ppf(0.975, 2) * stats.sem(logs)
    low, high = math.exp(mean - half), math.exp(mean + half)
    assert table.header[:5] == ("method", "KL", "of LORA's", "score lost", "minus LORA's")
    assert lora[1:3] == ("0.1000 ± 0.0000", "–")
    assert folora[2] == f"{math.exp(mean):.1%} ({low:.1%} to {high:.1%})"
    assert folora[3:5] == ("0.0200 ± 0.0000", "-0.0800 ± 0.0000 *")
    assert folora[5] == "0.2000 ± 0.0000"  # nats
    assert folora[7] == "0.0400 ± 0.0000"  # bits
    assert "at most 1.000, 2.000, 3.000 nats" in table.caption
    other = forgetting_table(load_results(tmp_path / "arms.jsonl"), "folora")
    back = next(r for r in other.rows if r[0] == "LORA")
    assert other.header[2] == "of FOLORA's" and "ratio to FOLORA's is" in other.caption
    assert 1 / low > FAR  # 28 times larger
    assert back[2] == f"{math.exp(-mean):.1%} ({1 / high:.1%} to over 1000%)"
    assert back[4] == "+0.0800 ± 0.0000 *"


def test_a_method_that_never_reaches_the_loss(tmp_path: Path) -> None:
    arm(tmp_path, "lora", 0, [(1.0, 0.1, 0.4)])
    arm(tmp_path, "corda", 0, [(2.5, 0.1, 0.4)])
    table = forgetting_table(load_results(tmp_path / "arms.jsonl"))
    assert next(row for row in table.rows if row[0] == "CORDA")[1:9] == ("–",) * 8
