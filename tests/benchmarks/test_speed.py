"""The speed benchmark: what it counts, one command that runs it, and its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.plans import TINY_PLAN_BASE

from benchmarks.speed import __main__ as speed
from benchmarks.speed import whole
from benchmarks.speed.setup import alternated, peer_times, solve_times, statistics_times
from benchmarks.speed.shapes import SHAPES, Shape, random_groups, random_model
from benchmarks.speed.steps import MODES, Contender, peak_of, race, random_batch
from benchmarks.speed.table import (
    sampling_table,
    scale_table,
    setup_table,
    solve_table,
    step_table,
    whole_table,
)
from folora.config import FoLoraConfig
from folora.pipeline.context import Context
from folora.runtime.storage import read_json, write_json

TINY = Shape(64, 96, 4, 2, 16, 3, 1e6, 4)
CPU = torch.device("cpu")


def test_bytes_of_the_bases_of_a_shape() -> None:
    groups = random_groups(random_model(TINY, 3, torch.float32, CPU))
    assert TINY.basis_bytes(4) == sum(4 * g.d_in**2 for g in groups)
    assert TINY.basis_bytes(2, 5) == sum(2 * 5 * g.d_in for g in groups)


def test_the_peak_is_the_most_memory_alive_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            a = torch.empty(2**20, dtype=torch.uint8)
            b = torch.empty(2**21, dtype=torch.uint8)
            del a, b

    assert peak_of(work) == pytest.approx(2**20 + 2**21, rel=1e-2)


@pytest.fixture(scope="module")
def contenders() -> dict[str, Contender]:
    return {name: Contender(m, TINY, 2, torch.bfloat16, CPU) for name, m in MODES.items()}


def test_storage_modes_differ_in_the_bytes_of_their_bases(contenders: dict[str, Contender]) -> None:
    per_column = sum(g.d_in for g in random_groups(random_model(TINY, 2, torch.float32, CPU)))
    whole = TINY.basis_bytes(4) * 2 // 3
    assert {name: c.basis_bytes for name, c in contenders.items()} == {
        "lora": 0, "oplora": 0,
        "folora": 4 * 4 * per_column, "folora-anchor": 4 * 4 * per_column, "folora-4r": 16 * 4 * per_column,
        "folora-all": whole, "folora-null": whole,
    }  # fmt: skip
    ids = random_batch(64, 32, CPU)
    peaks = {name: c.peak_bytes(ids) for name, c in contenders.items()}
    assert peaks["folora-all"] - peaks["folora"] >= whole - contenders["folora"].basis_bytes
    assert peaks["folora"] < peaks["lora"]  # which saves wide copies of its layers' inputs


def test_every_round_has_a_step_of_each_and_the_first_is_not_counted(
    contenders: dict[str, Contender],
) -> None:
    for c in contenders.values():
        c.step_seconds.clear()
        c.optimizer_seconds.clear()
    race(contenders.values(), random_batch(64, 32, CPU), 2, lambda: None)
    assert {len(c.step_seconds) for c in contenders.values()} == {2}
    for c in contenders.values():
        assert all(0 < o < s for o, s in zip(c.optimizer_seconds, c.step_seconds, strict=True))


def test_the_order_of_modes_alternates() -> None:
    seen: list[str] = []
    alternated({name: lambda name=name: seen.append(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(seen) == "abccbaabc"


def test_one_command_and_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "smollm2-135m", TINY)
    monkeypatch.setattr(speed, "SAMPLED", {"cpu": (32, 32, 2)})
    monkeypatch.setattr(speed, "SAMPLED_VOCABULARY", 64)
    monkeypatch.setattr(
        "folora.runtime.loading.is_slow_here", lambda dtype: dtype == torch.bfloat16
    )
    arguments = ["--shapes", "smollm2-135m", "--device", "cpu", "--blocks", "1", "--tokens", "64"]
    arguments += ["--rounds", "2", "--output", str(tmp_path)]
    speed.main(arguments)
    path = tmp_path / "cpu-smollm2-135m.json"
    before = path.stat().st_mtime_ns
    speed.main(arguments)
    assert path.stat().st_mtime_ns == before
    assert capsys.readouterr().out.split() == [str(path)] * 2
    result: dict[str, Any] = read_json(path)
    old = {**result, "steps": {"modes": {"lora": result["steps"]["modes"]["lora"]}}}
    write_json(path, old)
    speed.main([*arguments, "--skip-setup", "--modes", "lora"])
    assert read_json(path) == old
    speed.main([*arguments, "--skip-setup", "--modes", "lora", "folora"])
    assert set(read_json(path)["steps"]["modes"]) == {"lora", "folora"}
    assert set(result["steps"]["modes"]) == set(MODES)
    assert result["steps"]["dtype"] == "float32"  # the choice of `--dtype auto` on such a CPU
    steps = step_table(result)
    assert [row[0] for row in steps.rows] == [m.about for m in MODES.values()]
    lora = steps.rows[0]
    assert lora[2:6] == ("+0.0 (+0.0 to +0.0)", "+0.00", "+0.00", "+0.0")
    assert lora[-1] == "0.0 MB"
    for table, rows in ((setup_table([result]), 1), (sampling_table([result]), 1)):
        assert len(table.rows) == rows
        assert all(len(row) == len(table.header) for row in table.rows)
    grown = scale_table([result])
    assert len(grown.rows) == len(SHAPES) + 2
    assert all(len(row) == len(grown.header) for row in grown.rows)
    assert [row[:2] for row in solve_table([result]).rows] == [("64", "4"), ("96", "4")]


def test_unmeasured_widths_are_extrapolated_by_the_cube() -> None:
    times = {"r": [2.0, 1.0, 9.0], "all": [4.0]}
    rows = scale_table([{"setup": {"solve": {"4096": times}}}]).rows
    found = next(row for row in rows if row[0] == "llama2-7b")
    seconds = 32 * 2.0 * (3 + (11008 / 4096) ** 3)
    assert found[-2:] == (f"{seconds / 60:.0f} min", f"{2 * seconds / 60:.0f} min")


def test_setup_is_timed_on_one_block() -> None:
    model = random_model(TINY, 1, torch.float32, CPU)
    assert set(statistics_times(model, 64, 1)) == {"forward pass", "statistics"}
    assert set(solve_times(48, 4, CPU, 1)) == {"r", "all"}
    assert set(solve_times(48, 4, CPU, 1, whole=False)) == {"r"}
    assert set(peer_times(TINY, torch.float32, CPU, 64)) == {"PEFT's CorDA", "PEFT's OSF"}


def test_the_setup_as_a_whole_is_read_beside_an_epoch(tmp_path: Path, model_folder: Path) -> None:
    rows = [{"prompt": f"add {n}", "completion": f" {n + 1}"} for n in range(40)]
    config = FoLoraConfig(model=str(model_folder), device="cpu").changed({**TINY_PLAN_BASE})
    found = whole.measure(Context(config, dataset=rows), 2)
    assert set(found["seconds"]) == {"TaskMoments", "Samples", "KeepMoments", "Solved"}
    assert (found["trained_steps"], found["epoch_steps"]) == (2, 18)  # 4 of 40 rows are held out
    assert 0 < found["next_share"] < found["first_share"]
    total = sum(found["seconds"].values())
    assert found["first_share"] == pytest.approx(total / found["epoch_seconds"])
    about = {"model": "tiny", "target": "sums", "dtype": "float32", "command": "pytest"}
    table = whole_table([{**found, **about, "machine": {"device": "a CPU"}}])
    ((name, *seconds, _, first, _),) = table.rows
    assert name == "tiny, sums, float32 (a CPU)" and len(table.header) == 7
    assert sum(map(float, seconds)) == pytest.approx(total, abs=2)
    assert float(first) == pytest.approx(100 * total / found["epoch_seconds"], abs=0.1)
