"""`prepare` gives every process the same model, spectrum and optimizer as a single process."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from support.closeness import assert_near
from support.processes import in_processes
from torch import from_numpy

import folora
from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config
from folora.spectral.layers import Spectrum

Array = np.ndarray


@pytest.mark.parametrize("tolerance", [None, 0.5], ids=["all sequences", "early stopping"])
def test_two_processes_match_one(tolerance: float | None) -> None:
    sampling = {"num_sequences": 500 if tolerance else 48, "tolerance": tolerance}
    config = tiny_config(sampling=sampling)

    def work() -> list[Array]:
        found = folora.prepare(make_llama(), make_tokenizer(), rows(), config)
        return [gamma.numpy() for gamma in (basis.gamma for basis in found.bases)]

    alone = work()
    for several in in_processes(2, work):
        assert isinstance(several, list), several
        for one, other in zip(alone, several, strict=True):
            assert_near(from_numpy(one), from_numpy(other), roundings=1e4)


@pytest.mark.parametrize(
    ("method", "warns"), [("folora", True), ("lora-null-v2", False), ("lora", False)]
)
def test_a_task_without_directions_of_its_own_is_reported(
    method: str, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where eigenvectors are the start, once it is known how much of the task's energy they hold."""
    for concentration in (0.4, 2.5):
        monkeypatch.setattr(Spectrum, "concentration", lambda *_: concentration)  # noqa: B023
        caplog.clear()
        with caplog.at_level(logging.INFO):
            folora.prepare(make_llama(), make_tokenizer(), rows(), tiny_config(method=method))
        assert ("2.50 times as much" in caplog.text) == (warns and concentration == 2.5)
        assert ("no directions of its own" in caplog.text) == (warns and concentration == 0.4)


def test_what_is_prepared_is_shown_in_a_line() -> None:
    """In a notebook: sizes, not thousands of tokens and matrices."""
    found = folora.prepare(make_llama(), make_tokenizer(), rows(), tiny_config())
    samples, task = found.samples, found.task
    assert repr(found).startswith(f"Prepared(LlamaForCausalLM, TaskData({len(task.train)} rows")
    assert f"{len(samples.calibration)} sequences and {len(samples.held_out)} held out" in repr(
        found
    )
    assert "sources: bos 1" in repr(samples)
    layers = sum(len(basis.group.layers) for basis in found.bases)
    assert repr(found.bases) == f"Spectrum({len(found.bases)} inputs of {layers} layers)"
    first = found.bases[0]
    assert f"{first.group.name}: {len(first.gamma)} of {first.group.d_in} directions" in repr(first)
    assert "mean over 7 tokens" in repr(folora.Moments({}, tokens=7))
    assert max(len(repr(o)) for o in (found, samples, task, found.bases, first)) < 250
