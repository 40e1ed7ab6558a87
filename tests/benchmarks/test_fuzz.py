"""Mutated files are refused or read correctly, and the fuzzer detects parsers that do neither."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.reliability import fuzz as fuzzing
from benchmarks.reliability.fuzz import changed_files, finished_run, fuzz, fuzz_table, plain, summed
from benchmarks.reliability.mutations import mutated
from benchmarks.reliability.parsers import Files, Parser, parsers, resealed
from folora.errors import ArtifactError, ConfigError
from folora.runtime.storage import read_sealed, sealed

COUNT, SECONDS = 25, 200.0  # per parser; `make fuzz` tries more

CONTENT = json.dumps(sealed({"held_out": 16, "rejected": {"short": 3}, "layers": ["q", "k"]}))


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parser]:
    return parsers(finished_run(tmp_path_factory.mktemp("fuzz")))


def test_mutated_files_are_refused_or_read_correctly(known: dict[str, Parser]) -> None:
    """Every parser refuses some files, and none fails in another way."""
    found = {name: fuzz(parser, name, 1, COUNT, SECONDS) for name, parser in known.items()}
    counts = {name: Counter(o["is"] for o in outcomes) for name, outcomes in found.items()}
    bad = [(name, o) for name, os_ in found.items() for o in os_ if o["is"] not in fuzzing.FINE]
    assert not bad
    assert all(c.total() == COUNT and c["refused"] >= COUNT // 4 for c in counts.values())
    assert sum(c["other"] for c in counts.values()) > COUNT  # resealed files are parsed, too


def test_a_seed_reproduces_its_files(known: dict[str, Parser]) -> None:
    for name, parser in known.items():
        made = [
            changed_files(parser, name, seed, number) for seed in (0, 0, 1) for number in range(9)
        ]
        assert made[:9] == made[9:18] != made[18:]
        assert any(files != parser.files for files, _ in made)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".yaml", ".bin"])
def test_mutations_are_diverse(suffix: str) -> None:
    content = CONTENT.encode()
    made = {mutated(f"x{suffix}", content, random.Random(n)) for n in range(200)}
    assert len(made - {content}) > 130


def planted(parse: Callable[[Path], object], reseal: bool = True) -> Parser:
    """A parser of a sealed file."""
    files: Files = {"a.json": CONTENT.encode()}
    return Parser(files, ["a.json"], parse, resealed if reseal else None)


def safe(folder: Path) -> object:
    return read_sealed(folder / "a.json")


def unsure(folder: Path) -> object:
    return read_sealed(folder / "a.json")["rejected"]["short"]


def trusting(folder: Path) -> object:
    """Does not compare the checksum."""
    try:
        return json.loads((folder / "a.json").read_bytes())["held_out"]
    except (ValueError, RecursionError, TypeError, KeyError):
        raise ArtifactError("no") from None


def at_a_cut(act: Callable[[], object]) -> Callable[[Path], object]:
    """Call `act` for truncated files, and refuse all others."""

    def parse(folder: Path) -> object:
        content = (folder / "a.json").read_text(errors="replace")
        if len(content) < len(CONTENT) / 2:
            act()
        if content != CONTENT:
            raise ArtifactError("no")
        return None

    return parse


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def grow() -> None:
    bytearray(2 * fuzzing.MOST_BYTES)[::4096] = bytes([1]) * (2 * fuzzing.MOST_BYTES // 4096)


@pytest.mark.parametrize(
    ("parse", "kind", "what"),
    [
        (unsure, "raises", "Error: "),
        (trusting, "changed", "not resealed"),
        (at_a_cut(lambda: time.sleep(60)), "hangs", "over 0.5 s"),
        (at_a_cut(crash), "dies", f"exit code {-signal.SIGSEGV}"),
        (at_a_cut(grow), "grows", "MB"),
        (at_a_cut(lambda: os._exit(3)), "dies", "exit code 3"),
    ],
    ids=["raises", "changed", "hangs", "segfault", "grows", "exits"],
)
def test_a_planted_bug_is_detected(parse: Callable[[Path], object], kind: str, what: str) -> None:
    count = {"hangs": 12, "grows": 40}.get(kind, 150)
    longest = 0.5 if kind == "hangs" else 20.0
    outcomes = fuzz(planted(parse), "planted", 0, count, 120, longest)
    found = summed(outcomes, 1.0)
    assert found["tried"] == count  # it continues after a crash
    assert found["findings"]
    assert all(f["is"] == kind for f in found["findings"])
    assert any(what in f["what"] for f in found["findings"])
    # The number alone reproduces it.
    files, _ = changed_files(planted(parse), "planted", 0, found["findings"][0]["number"])
    assert files != planted(parse).files


def test_valid_files_must_be_read(capfd: pytest.CaptureFixture[str]) -> None:
    def refuse(folder: Path) -> object:
        raise ArtifactError("not even this")

    with pytest.raises(RuntimeError, match="could not read valid files"):
        fuzz(planted(refuse), "planted", 0, 5, 60)
    assert "not even this" in capfd.readouterr().err


def test_a_correct_parser_has_no_findings() -> None:
    found = summed(fuzz(planted(safe), "planted", 0, 200, 60), 1.0)
    assert (found["tried"], found["findings"]) == (200, [])
    assert min(found["refused"], found["equal"], found["other"]) > 5


def test_a_changed_value_without_a_checksum_is_not_a_finding() -> None:
    found = summed(fuzz(planted(trusting, reseal=False), "planted", 0, 200, 60), 1.0)
    assert found["findings"] == []
    assert found["other"] > 5


def test_the_time_limit_is_kept() -> None:
    began = time.monotonic()
    outcomes = fuzz(planted(lambda _: time.sleep(0.05)), "planted", 0, 10**6, 1.0)
    assert 5 <= len(outcomes) <= 30
    assert time.monotonic() - began < 10


def test_different_values_are_distinguished() -> None:
    values = [
        1, 1.0, True, "1", None, [1], [1, 1], {"a": 1}, {"a": 1.0}, -0.0, 0.0, 10**5000,
        torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(1, 2), -torch.zeros(2),
    ]  # fmt: skip
    assert len({plain(v) for v in values}) == len(values)
    assert plain({"a": 1, "b": 2}) == plain({"b": 2, "a": 1})


def test_the_table_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fuzz.json"
    given = [
        "--count",
        "5",
        "--seconds",
        "30",
        "--parsers",
        "request",
        "arm",
        "--output",
        str(file),
    ]
    assert fuzzing.main(given) == 0
    result = json.loads(file.read_text())
    table = fuzz_table(result)
    assert [row[:2] for row in table.rows] == [("request", "5"), ("arm", "5"), ("all", "10")]
    assert "Seed 0." in table.caption
    result["parsers"]["arm"]["findings"] = [{"number": 3, "is": "raises", "what": "KeyError"}]
    assert [row[5] for row in fuzz_table(result).rows] == ["0", "1", "1"]
    with pytest.raises(ConfigError, match="did you mean 'request'"):
        fuzzing.main(["--parsers", "requests"])


def test_replaying_one_input_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    parser = planted(unsure)
    found = next(o for o in fuzz(parser, "planted", 0, 40, 60) if o["is"] == "raises")
    with pytest.raises((KeyError, TypeError)):
        fuzzing.again(parser, "planted", 0, found["number"])
    assert f"planted {found['number']}, resealed:\na.json" in capsys.readouterr().out
