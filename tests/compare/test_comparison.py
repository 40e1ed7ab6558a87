"""Arms share samples and statistics, leave the base alone, and say all that is needed to redo them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compare import shown
from benchmarks.tiny import make_llama, tiny_config, write_rows
from folora.cli.main import main
from folora.compare.arms import Arm, arms, checked_arm
from folora.compare.comparison import Comparison
from folora.compare.results import Line, ResultFile, load_results
from folora.config import FoLoraConfig
from folora.errors import ArtifactError, ConfigError, DataError, MismatchError
from folora.pipeline.run import Run
from folora.spectral.moments import Moments

ROW = '{"prompt": "say", "completion": "hello"}\n'
IDS = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(5))


def make_run(model_folder: Path, rows_file: Path, folder: Path, **changes: Any) -> Run:
    paths = {"model": str(model_folder), "dataset": str(rows_file), "output": str(folder)}
    return Run(tiny_config(**paths, **changes))


def compare(run: Run, file: Path, **options: Any) -> Comparison:
    return Comparison(run, file, stage="tiny", task="sums", command="pytest", **options)


@pytest.fixture(scope="module")
def measured(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with samples and statistics."""
    folder = tmp_path_factory.mktemp("comparison") / "run"
    run = make_run(model_folder, rows_file, folder)
    run.sample()
    run.measure()
    return folder


def test_every_combination_is_an_arm_with_a_name_of_its_own() -> None:
    found = arms(["lora", "folora"], [1e-3, 1e-2], **{"spectrum.s_min": (0.0, 0.3)})
    assert len(found) == len({arm.name for arm in found}) == 8
    assert found[1].name == "lora--learning_rate=0.001--s_min=0.3"


def test_arms_leave_the_base_alone_and_add_their_results(
    measured: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = make_run(model_folder, rows_file, measured)
    before = run.context.model(IDS).logits
    names = ["folora", "lora", "lora-null", "oplora", "lora-null-v2", "folora-kl"]
    chosen = arms(names, [1e-2])
    seen: list[str] = []

    def score(model: Any) -> dict[str, dict[str, float]]:
        seen.append(type(model).__name__)
        return {"task": {"a": 0.5}, "kept": {"b": 1.0, "c": 0.0}}

    results = list(compare(run, tmp_path / "arms.jsonl", score=score).run_all(chosen))
    assert torch.equal(run.context.model(IDS).logits, before)
    assert not any("lora" in name for name, _ in run.context.model.named_parameters())
    assert "forward" not in vars(run.context.model)  # TRL puts one there for every trainer
    assert [r["method"] for r in results] == names
    for result in results:
        assert [r["step"] for r in result["readings"]] == [2, 3, 4, 6]
        assert result["base"]["kl"] == 0.0
        assert result["readings"][-1]["kl"] > 0
        assert result["readings"][-1]["frobenius"] > 0
        assert result["readings"][-1]["task_loss"] < result["base"]["task_loss"]
        assert not result["diverged"]
        again = FoLoraConfig().changed(result["config"])
        assert again.training.learning_rate == 1e-2
        assert again.output == str(measured)
    assert len(seen) == 1 + 4 * len(names)  # the base is scored once
    found = load_results(tmp_path / "arms.jsonl")
    assert {r.method for r in found} == set(names)

    # Arms with a result are skipped: the file is not written, and nothing is scored again.
    stamp = (tmp_path / "arms.jsonl").stat().st_mtime_ns
    assert list(compare(run, tmp_path / "arms.jsonl", score=score).run_all(chosen)) == results
    assert stamp == (tmp_path / "arms.jsonl").stat().st_mtime_ns
    assert len(seen) == 1 + 4 * len(names)


def test_dear_scores_are_taken_at_chosen_readings(
    measured: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = make_run(model_folder, rows_file, measured)
    options = {
        "score": lambda _: {"task": {"a": 0.5}, "kept": {"b": 1.0}, "other": {"c.nats": -3.0}},
        "read_at": (0.5, 1.0),
        "score_at": (1.0,),
    }
    (result,) = compare(run, tmp_path / "arms.jsonl", **options).run_all(arms(["lora"], [1e-2]))
    assert [r["step"] for r in result["readings"]] == [3, 6]
    assert [r["kept"] for r in result["readings"]] == [{}, {"b": 1.0}]
    assert result["base"]["other"] == result["readings"][1]["other"] == {"c.nats": -3.0}


def test_without_the_h_norm_of_every_update_the_leading_eigenvectors_suffice(
    measured: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = make_run(model_folder, rows_file, measured)
    chosen, asked = arms(["lora", "folora"], [1e-2]), {"read_at": (1.0,)}
    whole = list(compare(run, tmp_path / "whole.jsonl", **asked).run_all(chosen))
    less = list(compare(run, tmp_path / "less.jsonl", h_norm=False, **asked).run_all(chosen))
    norms = [[result["readings"][-1]["h_norm"] for result in found] for found in (whole, less)]
    assert norms[1] == [None, pytest.approx(norms[0][1], rel=1e-3)]
    for one, other in zip(whole, less, strict=True):
        assert one["readings"][-1]["kl"] == pytest.approx(other["readings"][-1]["kl"], rel=1e-3)


def test_a_scaled_adapter_adds_readings_and_a_budget_ends_them(
    measured: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = make_run(model_folder, rows_file, measured)
    chosen = [*arms(["lora"], [5e-2]), *arms(["lora"], [5e-2], budget=[0.002])]
    comparison = compare(run, tmp_path / "arms.jsonl", read_at=(1.0,), scales=(0.5, 0.25))
    plain, kept = comparison.run_all(chosen)
    kl = {r.get("scale", 1.0): r["kl"] for r in plain["readings"]}
    assert list(kl) == [1.0, 0.5, 0.25] and kl[1.0] > kl[0.5] > kl[0.25] > 0
    assert kl[1.0] > 0.002 > kept["readings"][-1]["kl"]
    assert 0 < kept["readings"][-1]["scale"] < 1 and len(kept["readings"]) == 4
    loaded = load_results(tmp_path / "arms.jsonl")[0]
    assert [r["scale"] for r in loaded.readings] == [1.0, 0.5, 0.25]
    assert f"KL {kl[1.0]}," in shown(plain)
    assert f"KL {kept['readings'][-1]['kl']}" in shown(kept)


def test_an_arm_is_what_a_run_with_its_config_gives(
    measured: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = make_run(model_folder, rows_file, measured)
    (result,) = compare(run, tmp_path / "arms.jsonl").run_all(
        arms(["lora-null"], [5e-3], **{"training.seed": (3,)})
    )
    alone = Run(run.config.changed({**FoLoraConfig().changed(result["config"]).differences(),
                                    "output": str(tmp_path / "alone")}))  # fmt: skip
    report = alone.run()
    last = result["readings"][-1]
    assert last["task_loss"] == pytest.approx(report["adapted"]["task_loss"], rel=1e-5)
    assert last["kl"] == pytest.approx(report["adapted"]["kl"], rel=1e-4)
    assert last["frobenius"] == pytest.approx(report["total_norm"]["frobenius"], rel=1e-4)
    assert result["seed"] == 3


def test_divergence_ends_an_arm_and_is_recorded(
    measured: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = make_run(model_folder, rows_file, measured, training={"max_grad_norm": 0.0})
    file = tmp_path / "arms.jsonl"
    wild, tame = compare(run, file).run_all(arms(["lora"], [1e30, 1e-2]))
    assert wild["diverged"]
    assert wild["readings"][-1]["kl"] is None
    assert len(wild["readings"]) < 4
    assert not tame["diverged"]
    (diverged,) = [r for r in load_results(file) if r.diverged]
    assert diverged.changes["training.learning_rate"] == 1e30


def test_another_calibration_is_another_arm(
    measured: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = make_run(model_folder, rows_file, measured)
    own = compare(run, tmp_path / "arms.jsonl")
    groups = tuple(run.context.groups)
    flat = Moments({g.name: torch.eye(g.d_in) for g in groups}, 1, groups)
    other = own.calibrated({"source": "white", "count": 1}, flat)
    chosen = arms(["folora"], [1e-2])
    (a,), (b,) = own.run_all(chosen), other.run_all(chosen)
    assert b["name"] == "folora--learning_rate=0.01--source=white--count=1"
    assert b["calibration"] == {"source": "white", "count": 1}
    assert a["readings"][-1]["kl"] != b["readings"][-1]["kl"]


def test_what_cannot_be_compared_is_refused_before_the_first_arm(
    measured: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    run = make_run(model_folder, rows_file, measured)
    comparison = compare(run, tmp_path / "arms.jsonl")
    for arm, words in (
        (Arm("lorra"), "did you mean 'lora'"),
        (Arm("lora", {"training.leaning_rate": 1.0}), "did you mean .learning_rate"),
        (Arm("lora", {"adapter.r": 99}), r"must lie in \[1, 32\]"),
        (Arm("lora", {"adapter.target_modules": "q"}), "matches no layer"),
    ):
        with pytest.raises(ConfigError, match=words):
            next(comparison.run_all([Arm("folora"), arm]))
    none = make_run(model_folder, rows_file, measured, data={"eval_rows": 0})
    with pytest.raises(DataError, match="held-out rows"):
        next(compare(none, tmp_path / "arms.jsonl").run_all([Arm("folora")]))
    assert not (tmp_path / "arms.jsonl").exists()


def test_an_arm_of_other_settings_is_not_taken_for_this_one(
    measured: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    chosen = arms(["lora"], [1e-2])
    run = make_run(model_folder, rows_file, measured)
    list(compare(run, tmp_path / "arms.jsonl").run_all(chosen))
    longer = make_run(model_folder, rows_file, measured, training={"max_steps": 8})
    with pytest.raises(
        ArtifactError, match=r"arms\.jsonl, line 1 .*training\.max_steps.*delete this line"
    ):
        next(compare(longer, tmp_path / "arms.jsonl").run_all(chosen))


def changed_weight(model: Path) -> None:
    make_llama(seed=5).save_pretrained(model)


def changed_config(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))


@pytest.mark.parametrize(
    ("what", "edit"),
    [
        ("model", changed_weight),
        ("model config", changed_config),
        ("data", lambda model: (model / "rows.jsonl").write_text(ROW * 30)),
    ],
)
def test_an_arm_of_other_inputs_under_the_same_name_is_refused(
    what: str, edit: Any, model_folder: Path, tmp_path: Path
) -> None:
    """Before anything is sampled for them."""
    model = shutil.copytree(model_folder, tmp_path / "model")
    rows = write_rows(model / "rows.jsonl")
    run = make_run(model, rows, tmp_path / "run")
    chosen = arms(["lora"], [1e-2])
    list(compare(run, tmp_path / "arms.jsonl").run_all(chosen))
    edit(model)
    again = make_run(model, rows, tmp_path / "run")
    with pytest.raises(MismatchError, match=f"was made with a different {what} than"):
        next(compare(again, tmp_path / "arms.jsonl").run_all(chosen))
    assert not (tmp_path / "run" / "old").exists()


def test_a_damaged_or_foreign_file_is_not_taken_for_results(
    measured: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "arms.jsonl"
    comparison = compare(make_run(model_folder, rows_file, measured), file)
    for text in ('{"form', json.dumps({"format": 1, "changes": {}})):
        file.write_text(text)
        with pytest.raises(ArtifactError, match=r"arms\.jsonl, line 1 .*delete this line"):
            next(comparison.run_all(arms(["lora"], [1e-2])))
        assert file.read_text() == text


def test_the_command_compares_and_says_where_things_are(
    model_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(
        make_run(model_folder, rows_file, tmp_path / "run").config.to_yaml()
    )
    command = [
        "compare",
        "--config",
        str(tmp_path / "config.yaml"),
        "--learning-rates",
        "1e-3,1e-2",
    ]
    for wrong, words in (
        (["--methods", "lorra"], "did you mean 'lora'"),
        (["--learning-rates", "x"], "--learning-rates is 'x'"),
        (["--seeds", "1.5"], "--seeds is '1.5'"),
    ):
        assert main([*command, *wrong]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()

    assert main([*command, "--methods", "folora,lora", "--seeds", "0,1"]) == 0
    folder = tmp_path / "run" / "compare"
    assert len(load_results(folder / "results.jsonl")) == 8
    assert "| folora |" in (folder / "comparison.md").read_text()
    for picture in ("frontier.png", "norms.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "LoRA" in out
    assert str(folder) in out


def test_a_result_of_an_older_folora_is_refused_by_name(
    model_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a file per arm; running all arms again beside them would take hours."""
    folder = tmp_path / "run" / "compare"
    folder.mkdir(parents=True)
    (folder / "lora--learning_rate=0.001--seed=0.json").write_text('{"format": 1}')
    config = make_run(model_folder, rows_file, tmp_path / "run").config
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert main(["compare", "--config", str(tmp_path / "config.yaml")]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "seed=0.json is a result of an older folora, which cannot be read" in message


@pytest.mark.parametrize("text", ["null", "[1]", "3", '"x"', '{"config": []}', '{"format": 3}'])
def test_json_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "arms.jsonl").write_text(text)
    with pytest.raises(
        ArtifactError, match=r"arms\.jsonl, line 1 is not a result of format 2; delete"
    ):
        ResultFile(tmp_path / "arms.jsonl").read()


@pytest.mark.parametrize("config", [[], {"x": 1}, None])
def test_an_arm_whose_config_is_no_config_is_named(config: Any) -> None:
    with pytest.raises(ArtifactError, match=r"line 1 has other options.*delete"):
        checked_arm(Line("line 1", {"config": config}), FoLoraConfig().changed({"adapter.r": 2}))
