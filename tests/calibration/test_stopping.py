"""Early stopping of sampling: the criterion, when it is checked, and that resuming does not change it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.references import moment

import folora
from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config
from folora.calibration.sampling import sample_sequences
from folora.calibration.stopping import EarlyStopping, agreement, watched
from folora.cli.main import main
from folora.config import FIRST_LOOK, FoLoraConfig, SpectrumConfig
from folora.pipeline.run import Run
from folora.pipeline.stages import Shared
from folora.runtime.storage import read_json
from folora.spectral.eigenproblem import generalized_eigenbasis, spectral_gate
from folora.spectral.groups import InputGroup
from folora.spectral.moments import Moments

CHECKS = (FIRST_LOOK, 2 * FIRST_LOOK, 4 * FIRST_LOOK)


def test_the_penalty_is_one_on_the_same_text_and_v_h_v_on_another() -> None:
    a, b, task = moment(10, seed=1), moment(10, rank=200, seed=2), moment(10, seed=3)
    same = agreement(a, a, task, directions=4)
    assert same.penalty == pytest.approx(1.0)
    assert same.gate == pytest.approx(0.0, abs=1e-9)
    there = agreement(a, b, task, directions=4)
    found = generalized_eigenbasis(a, task)
    h = b + 1e-3 * b.diagonal().mean() * torch.eye(10).double()
    penalties = torch.stack([v @ h @ v for v in found.basis[:, :4].T])
    assert there.penalty == pytest.approx(float(penalties.mean()))
    gates = spectral_gate(found.gamma[:4] / penalties) - spectral_gate(found.gamma[:4])
    assert there.gate == pytest.approx(float(gates.abs().mean()))


def gaussian(d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20000, d, generator=generator) * torch.logspace(0, -1, d)


def test_more_text_lowers_the_penalty_until_convergence() -> None:
    """Tokens are indices of vectors from a known distribution."""
    x = gaussian(24, 0)
    names = ["one", "two"]

    def moments(sequences: Sequence[list[int]]) -> Moments:
        inputs = x[torch.tensor([i for row in sequences for i in row])]
        return Moments({n: inputs.T @ inputs / len(inputs) for n in names}, len(inputs))

    def measure(sequences: Sequence[list[int]], all_groups: bool) -> Moments:
        halves = (moments(sequences[::2]), moments(sequences[1::2]))
        return replace(moments(sequences), halves=halves)

    task = {n: moment(24, seed=i).float() for i, n in enumerate(names)}
    stopping = EarlyStopping(measure, task, SpectrumConfig(), 6, 0.1)
    sequences = [list(range(20 * i, 20 * i + 20)) for i in range(1000)]
    said, costs = [], []
    for count in (8, 16, 64, 256, 1000):
        said.append(stopping(sequences[:count]))
        costs.append(stopping.agreement().penalty)
    assert costs == sorted(costs, reverse=True)
    assert (said[0], said[-1]) == (False, True)
    assert [c <= 1.1 for c in costs] == said
    at_once = EarlyStopping(measure, task, SpectrumConfig(), 6, 0.1)
    at_once(sequences)
    assert at_once.agreement().penalty == pytest.approx(costs[-1], rel=1e-3)


@pytest.mark.parametrize(("fits_in_memory", "converged_at"), [(True, 1), (True, 2), (False, 1)])
def test_moments_of_a_converged_first_check_are_reused(
    fits_in_memory: bool, converged_at: int
) -> None:
    asked: list[tuple[int, bool]] = []

    def measure(sequences: Sequence[list[int]], all_groups: bool) -> Moments:
        asked.append((len(sequences), all_groups))
        half = Moments({"one": moment(8, seed=len(asked)).float()}, 1)
        other = half if len(asked) >= converged_at else Moments({"one": 1e-6 * torch.eye(8)}, 1)
        return Moments({}, 2, (), (half, other))

    task = {"one": moment(8, seed=9).float()}
    stopping = EarlyStopping(measure, task, SpectrumConfig(), 3, 0.1, fits_in_memory)
    for check, count in enumerate((4, 10)[:converged_at], start=1):
        rows = [[n] for n in reversed(range(count))]  # the earlier ones are not first
        converged = stopping(rows)
        assert check > 1 or converged == (converged_at == 1)
        assert (stopping.moments_of(rows) is not None) == (
            fits_in_memory and check == converged_at == 1
        )
        assert stopping.moments_of([[99]] * count) is None
    assert asked == [(4, fits_in_memory), (6, False)][:converged_at]


@pytest.mark.parametrize("memory_gb", [None, 1e-5])
def test_c_pre_is_bitwise_the_same_with_and_without_early_stopping_checks(
    early: FoLoraConfig,
    tmp_path: Path,
    memory_gb: float | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also if the matrices of all inputs do not fit into memory, and if another process resumes."""
    caplog.set_level("INFO", "folora")
    config = early.replace(output=str(tmp_path / "run")).changed(
        {"sampling.tolerance": 1e6, "statistics.memory_gb": memory_gb}
    )

    def shared() -> tuple[Shared, bool]:
        """The first stages, and whether C_pre is that of the last check."""
        caplog.clear()
        return Run(config).share(), "measured by the last check" in caplog.text

    first, measured_by_check = shared()
    assert len(first.samples.load().calibration) == CHECKS[0] - 16
    assert measured_by_check == (memory_gb is None)
    shutil.rmtree(tmp_path / "run" / "2-statistics")
    again, measured_by_check = shared()
    assert not measured_by_check
    assert again.keep.manifest["sha256"] == first.keep.manifest["sha256"]
    shutil.rmtree(tmp_path / "run" / "1-samples" / "set")  # forces new early-stopping checks
    assert not shared()[1]  # C_pre is not measured again


def test_early_stopping_checks_watch_a_few_inputs_across_the_model() -> None:
    groups = [InputGroup((f"layer{i}",), 4) for i in range(100)]
    chosen = [int(g.name[5:]) for g in watched(groups)]
    assert chosen == [6, 18, 31, 43, 56, 68, 81, 93]
    assert watched(groups[:3]) == groups[:3]


class FakeEngine:
    """Forty random tokens for every number."""

    def __init__(self) -> None:
        self.written = 0

    def __call__(self, numbers: Sequence[int]) -> list[list[int]]:
        self.written += len(numbers)
        return [
            torch.randint(3, 99, (40,), generator=torch.Generator().manual_seed(n)).tolist()
            for n in numbers
        ]


@pytest.mark.parametrize("converged_at", [CHECKS[0], CHECKS[2], None])
def test_checks_run_at_doublings_and_convergence_ends_sampling(converged_at: int | None) -> None:
    config = folora.SamplingConfig(
        num_sequences=500, min_new_tokens=32, max_new_tokens=40, batch_size=50
    )
    asked: list[int] = []

    def converged(sequences: Sequence[list[int]]) -> bool:
        asked.append(len(sequences))
        return len(sequences) + 16 == converged_at

    found = sample_sequences(FakeEngine(), 1, [2], config, converged=converged)
    all_sequences = sample_sequences(FakeEngine(), 1, [2], config)
    checks = [check - 16 for check in CHECKS]
    assert asked == checks[: checks.index(converged_at - 16) + 1 if converged_at else 3]
    total, held_out = (converged_at, 16) if converged_at else (500, config.num_held_out)
    assert len(found.calibration) + len(found.held_out) == total
    assert found.calibration == all_sequences.calibration[: total - held_out]
    assert len(found.held_out) == held_out


@pytest.fixture(scope="module")
def early(
    model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> FoLoraConfig:
    """A run that stops sampling early, at a doubling."""
    config = tiny_config(
        model=str(model_folder), dataset=str(rows_file),
        output=str(tmp_path_factory.mktemp("early") / "run"),
        sampling={"num_sequences": 500, "tolerance": 0.5},
    )  # fmt: skip
    Run(config).run()
    return config


@pytest.mark.parametrize(("maximum", "asks"), [(119, False), (120, True)])
def test_early_stopping_checks_run_only_if_they_can_save_half(maximum: int, asks: bool) -> None:
    config = folora.SamplingConfig(
        num_sequences=maximum, min_new_tokens=32, max_new_tokens=40, batch_size=50
    )
    assert config.may_end_early == asks
    found = sample_sequences(FakeEngine(), 1, [2], config, converged=lambda sequences: True)
    assert len(found.calibration) + 16 == (CHECKS[0] if asks else maximum)


@pytest.mark.parametrize("too_short", [0, 4])
def test_convergence_prevents_the_next_batch(too_short: int) -> None:
    config = folora.SamplingConfig(
        num_sequences=500, min_new_tokens=32, max_new_tokens=40, batch_size=64
    )
    engine = FakeEngine()

    def write(numbers: Sequence[int]) -> list[list[int]]:
        return [row[:10] if i < too_short else row for i, row in enumerate(engine(numbers))]

    found = sample_sequences(write, 1, [2], config, converged=lambda sequences: True)
    assert engine.written == 64
    assert sum(found.rejected.values()) == too_short


def test_a_run_stops_sampling_early(early: FoLoraConfig) -> None:
    folder = Path(str(early.output))
    manifest = read_json(folder / "1-samples" / "set" / "manifest.json")
    total, held_out = manifest["sequences"]
    assert total in CHECKS
    assert held_out == 16
    before = (folder / "1-samples" / "set" / "manifest.json").stat().st_mtime_ns
    Run(early).run()  # the decision is not repeated
    assert (folder / "1-samples" / "set" / "manifest.json").stat().st_mtime_ns == before
    never = early.replace(output=str(folder.parent / "never")).changed({"sampling.tolerance": None})
    never = never.changed({"sampling.num_sequences": total})
    Run(never).sample()
    same = read_json(folder.parent / "never" / "1-samples" / "set" / "manifest.json")
    assert same["fingerprint"] == manifest["fingerprint"]


def test_task_rows_are_checked_before_the_model_is_loaded(
    early: FoLoraConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    bad = early.changed({"dataset": str(tmp_path / "none.jsonl"), "output": str(tmp_path / "run")})
    file.write_text(bad.to_yaml())
    assert main(["sample", "--config", str(file)]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_stricter_tolerance_resumes_from_existing_shards(early: FoLoraConfig) -> None:
    folder = Path(str(early.output))
    shards = {p.name: p.stat().st_mtime_ns for p in (folder / "1-samples").glob("shard-*")}
    strict = early.changed({"sampling.tolerance": 1e-6})
    found = Run(strict).sample()
    assert len(found.calibration) + len(found.held_out) == 500
    after = {p.name: p.stat().st_mtime_ns for p in (folder / "1-samples").glob("shard-*")}
    assert shards.items() < after.items()


def test_prepare_stops_sampling_early(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "folora")
    config = tiny_config(sampling={"num_sequences": 500, "tolerance": 0.5})
    prepared = folora.prepare(make_llama(), make_tokenizer(), rows(), config)
    assert len(prepared.samples.calibration) + 16 in CHECKS
    said = [record.getMessage() for record in caplog.records]
    checks = [line for line in said if line.startswith("checking (tokens): took")]
    assert checks and all(line.endswith("tokens/s") for line in checks)
