"""A folder takes what was made from the same inputs, resumes what was begun, and keeps what is outdated."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from folora.errors import ArtifactError, MismatchError
from folora.pipeline.store import REQUEST, Folder, Memory, Stage
from folora.runtime.artifacts import read_artifact, write_artifact
from folora.spectral.moments import Moments


class Context:
    """Of which a stage reads the model's facts alone."""

    def __init__(self, model: str = "m") -> None:
        self.facts = {"model": model}


class Number(Stage[float]):
    """A number; counts how often it is computed."""

    path, command, result = "1-number", "count", Moments
    computed = 0

    def __init__(self, value: float, **facts: Any) -> None:
        super().__init__(Context())  # type: ignore[arg-type]
        self.value, self.own = value, facts

    def facts(self) -> dict[str, Any]:
        return {**self.context.facts, **self.own}

    def compute(self, folder: Path | None) -> float:
        self.computed += 1
        if folder is not None and self.request() is not None:
            (folder / "part").write_text("unfinished")
        return self.value

    def save(self, value: float, path: Path, facts: Mapping[str, Any]) -> None:
        write_artifact(path, self.result.kind, {"value": torch.tensor(value)}, facts)

    @classmethod
    def load(cls, context: Any, path: Path, expected: Mapping[str, Any]) -> float:
        return float(read_artifact(path, cls.result.kind, expected).tensors["value"])


class Resumable(Number):
    """One whose unfinished work depends on its request alone."""

    path = "1-number/result"

    def request(self) -> dict[str, Any]:
        return {"seed": self.own["seed"]}


def test_memory_computes_once_and_keeps_the_result() -> None:
    stage = Number(2.0)
    made = Memory().make(stage)
    assert (made.load(), made.load(), stage.computed) == (2.0, 2.0, 1)


def test_a_result_of_the_same_inputs_is_taken(tmp_path: Path, caplog: Any) -> None:
    store = Folder(tmp_path)
    assert store.make(Number(2.0, a=1)).load() == 2.0
    again = Number(3.0, a=1)
    with caplog.at_level(logging.INFO):
        made = store.make(again)
    assert (made.load(), again.computed) == (2.0, 0)
    assert made.manifest["a"] == 1
    assert "1-number: already done" in caplog.text


def test_a_result_of_other_inputs_is_kept_under_old(tmp_path: Path, caplog: Any) -> None:
    store = Folder(tmp_path)
    for number in (1, 2, 3):
        assert store.make(Number(float(number), a=number)).load() == number
    assert sorted(p.name for p in (tmp_path / "old").iterdir()) == ["1-number-1", "1-number-2"]
    assert "made from other inputs" in caplog.text


def test_unfinished_work_is_resumed_if_its_request_is_the_same(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    store.make(Resumable(1.0, seed=0, count=1))
    more = Resumable(2.0, seed=0, count=2)
    assert store.make(more).load() == 2.0  # in place, with the parts that are there
    assert not (tmp_path / "old").exists()
    store.make(Resumable(3.0, seed=1, count=2))
    assert {p.name for p in (tmp_path / "old" / "1-number-1").iterdir()} == {
        REQUEST, "part", "result",
    }  # fmt: skip


def test_what_is_missing_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="1-number is missing; run folora count first"):
        Folder(tmp_path).read(Number, Context())  # type: ignore[arg-type]


def test_a_result_of_another_model_is_refused(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    store.make(Number(1.0))
    with pytest.raises(MismatchError, match="another model"):
        store.read(Number, Context("n"))  # type: ignore[arg-type]


@pytest.mark.parametrize("file", ["manifest.json", "tensors.safetensors"])
def test_a_damaged_result_is_named(tmp_path: Path, file: str) -> None:
    store = Folder(tmp_path)
    store.make(Number(1.0))
    path = tmp_path / "1-number" / file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=file):
        store.make(Number(1.0))


def test_something_else_in_the_place_of_a_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1-number").write_text("mine")
    with pytest.raises(ArtifactError, match="1-number"):
        Folder(tmp_path).check(Number)
    write_artifact(tmp_path / "2" / "1-number", "letter", {}, {})
    with pytest.raises(ArtifactError, match="'moments' is needed"):
        Folder(tmp_path / "2").check(Number)
