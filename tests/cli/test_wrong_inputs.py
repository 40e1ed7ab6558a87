"""Every wrong input of the corpus gives its message, before expensive work, and changes no file."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from support.temporary_files import temporary
from support.wrong_inputs import KINDS, Found, Wrong

import folora.adapters.coverage
import folora.calibration.sampling
import folora.compare.comparison
import folora.pipeline.context
import folora.pipeline.planning
import folora.pipeline.run
import folora.pipeline.stages
import folora.training.train
from benchmarks.tiny import tiny_config
from folora.calibration.engine import HuggingFaceEngine
from folora.cli.main import main

CASES = {f"{kind}: {case.name}": case for kind, cases in KINDS.items() for case in cases}
ORDER = get_args(Found)
PATIENCE = 30  # seconds, on a busy machine

# Functions that read something, and what has been read when they are called.
DOORS: list[tuple[Any, str, Found]] = [
    (folora.pipeline.context, "load_config", "files"),
    (folora.pipeline.context, "load_tokenizer", "files"),
    (folora.pipeline.context, "load_rows", "files"),
    (folora.pipeline.planning, "load_config", "files"),
    (folora.adapters.coverage, "load_skeleton", "files"),
    (folora.pipeline.context, "load_model", "model"),
    (folora.pipeline.run, "load_model", "model"),
    (folora.calibration.sampling, "write_sealed", "work"),
    (HuggingFaceEngine, "__call__", "work"),
    (folora.pipeline.stages, "measure", "work"),
    (folora.pipeline.stages, "solve", "work"),
    (folora.training.train, "train", "work"),
]


@pytest.fixture(scope="module")
def base(
    model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """A command line that works, without the output."""
    config = tiny_config(model=str(model_folder), dataset=str(rows_file))
    file = tmp_path_factory.mktemp("base") / "config.yaml"
    file.write_text(config.to_yaml())
    return ["--config", str(file)]


@pytest.fixture(scope="module")
def finished(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["run", *base, "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def kept() -> dict[Any, Any]:
    """Cache of the valid model and data, which are loaded once for all cases."""
    return {}


@pytest.fixture
def entered(
    monkeypatch: pytest.MonkeyPatch, kept: dict[Any, Any], model_folder: Path, rows_file: Path
) -> Iterator[list[Found]]:
    """What commands have read, in order."""
    found: list[Found] = ["options"]

    def watched(function: Callable[..., Any], level: Found) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(level)
            key = (function, *map(str, args))
            if level == "work" or not {str(model_folder), str(rows_file)} & set(map(str, args)):
                return function(*args, **kwargs)
            if key not in kept:
                kept[key] = function(*args, **kwargs)
            return kept[key]

        return call

    for owner, name, level in DOORS:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name), level))
    yield found


def contents(folder: Path) -> dict[str, bytes | None]:
    """Names and bytes of everything in a folder; None for folders."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_wrong_input(
    case: Wrong, base: list[str], finished: Path, model_folder: Path, tmp_path: Path,
    entered: list[Found], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    here = tmp_path / "here"
    here.mkdir()
    for name, content in case.files.items():
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if case.pipe:
        os.mkfifo(here / "pipe")
    flags = [] if case.alone else list(base)
    outputs = [tmp_path / "new", finished]
    if case.model:
        shutil.copytree(model_folder, here / "model")
        case.model(here / "model")
        flags += ["--model", str(here / "model")]
    if case.run:
        shutil.copytree(finished, here / "run")
        config = here / "run" / "config.yaml"
        config.write_text(config.read_text().replace(str(finished), str(here / "run")))
        case.run(here / "run")
        outputs = [here / "run"]
    elif case.command == "export":
        outputs = [finished]
    given = case.arguments.replace("HERE", str(here)).replace("GOOD", str(model_folder))
    before = contents(here), contents(finished)
    for output in outputs[:1] if case.alone or case.found == "work" else outputs:
        where = [] if case.alone else ["--output", str(output)]
        words = [case.command, *flags, *where, *shlex.split(given)]
        del entered[1:]
        capsys.readouterr()
        began = time.monotonic()
        code = main([word for word in words if word] if not case.command else words)
        assert time.monotonic() - began < PATIENCE
        said = capsys.readouterr()
        message = " ".join(said.err[said.err.rindex("folora:") :].split())
        assert code == 2
        assert "Traceback" not in said.err
        assert len(message) < 1200
        assert re.search(case.message.replace("HERE", re.escape(str(here))), message), message
        assert max(entered, key=ORDER.index) == case.found
        if case.found == "work":
            assert not temporary(output)
            assert not (output / "5-adapter").exists()
            assert not (output / "report.json").exists()
        else:
            assert not (tmp_path / "new").exists()
    assert (contents(here), contents(finished)) == before


def test_the_corpus_is_large() -> None:
    assert len(CASES) == sum(map(len, KINDS.values())) >= 200
    distinct = {(c.arguments, str(c.files), c.command, c.name) for c in CASES.values()}
    assert len(distinct) == len(CASES)


@pytest.mark.parametrize("arguments", ["--spectrum.tau 0", "--spectrum.lam 0", "--dataset ROW"])
def test_unusual_but_valid_inputs_work(arguments: str, base: list[str], tmp_path: Path) -> None:
    """No ridge (raised if C_pre requires it), a gate of ones, a single row."""
    (tmp_path / "row.jsonl").write_text('{"prompt": "1+1=", "completion": "2."}\n')
    words = shlex.split(arguments.replace("ROW", str(tmp_path / "row.jsonl")))
    assert main(["run", *base, *words, "--output", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["adapted"]["kl"] > 0
    assert math.isfinite(report["total_norm"]["frobenius"])
    # A single row is not held out, so there is no task loss.
    assert (report["adapted"]["task_loss"] is None) == ("ROW" in arguments)
