"""Further held-out text, which the base generates once a budget is known to bind."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from benchmarks.tiny import make_llama, make_tokenizer, rows, tiny_config
from folora.calibration.calibration_set import CalibrationSet
from folora.config import LEAST_SEQUENCES
from folora.errors import DataError
from folora.metrics.budget import ENOUGH
from folora.pipeline.context import Context
from folora.pipeline.further_text import further_text
from folora.pipeline.stages import sample
from folora.pipeline.store import Memory


def context(**sampling: object) -> Context:
    config = tiny_config(sampling=sampling)
    return Context(config, model=make_llama(), tokenizer=make_tokenizer(), dataset=rows())


def test_the_text_is_new_and_fills_up_the_held_out_sequences() -> None:
    here = context()
    samples = sample(here, Memory())[0].load()
    more = further_text(here, samples)
    assert more is not None
    found = more()["bos"]
    assert len(found) == ENOUGH - len(samples.held_out)
    assert not {*map(tuple, found)} & {*map(tuple, [*samples.calibration, *samples.held_out])}
    assert found == more()["bos"]  # seeded


def test_enough_held_out_sequences_need_no_more() -> None:
    texts = [[1, 3, 4]] * ENOUGH
    assert further_text(context(), CalibrationSet(texts, texts)) is None
    more = further_text(context(), CalibrationSet(texts, texts[:-1]))
    assert more is not None and len(more()["bos"]) == LEAST_SEQUENCES


def test_a_file_has_no_further_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(
        "".join(f'{{"text": "the cat saw {i} dogs on the mat and ran"}}\n' for i in range(40))
    )
    here = context(sources={"bos": 0.5, f"texts:{file}": 0.5})
    more = further_text(here, CalibrationSet([[1, 3, 4]], [[1, 3, 4]] * 16))
    assert more is not None
    with caplog.at_level(logging.WARNING):
        assert more() == {}
    assert "16 sequences" in caplog.text and "raise sampling.held_out" in caplog.text


def test_an_engine_that_fails_costs_the_precision_and_not_the_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = context()
    more = further_text(here, CalibrationSet([[1, 3, 4]], [[1, 3, 4]] * 16))
    assert more is not None

    def gone(seed: int) -> None:
        raise DataError("the server does not answer")

    monkeypatch.setattr(here, "engine", gone)
    with caplog.at_level(logging.WARNING):
        assert more() == {}
    assert "the server does not answer" in caplog.text


def test_a_base_file_of_other_sources_has_no_further_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(base=str(tmp_path / "base.safetensors"))
    here = Context(config, model=make_llama(), tokenizer=make_tokenizer(), dataset=rows())
    texts = [[1, 3, 4]] * 16
    more = further_text(here, CalibrationSet(texts, texts, sources=["former"] * 32))
    assert more is not None
    with caplog.at_level(logging.WARNING):
        assert more() == {}
    assert "base.safetensors has text of former; name that in sampling.sources" in caplog.text
    own = further_text(here, CalibrationSet(texts, texts, sources=["bos"] * 32))
    assert own is not None and len(own()["bos"]) == ENOUGH - 16


def test_a_source_file_that_is_gone_costs_the_precision_and_not_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"texts:{tmp_path / 'gone.jsonl'}"
    more = further_text(context(sources={name: 1}), CalibrationSet([[1, 3]], [[1, 3]] * 16))
    assert more is not None
    with caplog.at_level(logging.WARNING):
        assert more() == {}
    assert "gone.jsonl" in caplog.text
