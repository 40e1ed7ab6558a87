"""docs/compatibility.md is generated from its JSON files, and pyproject.toml allows the versions that passed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from benchmarks import compatibility
from benchmarks.compatibility import PAGE, page, read_section

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STACKS: dict[str, Any] = yaml.safe_load((ROOT / "benchmarks/matrix/stacks.yaml").read_text())
ROWS: list[dict[str, Any]] = read_section("versions")["rows"]
PASSED = [row for row in ROWS if row["outcome"] == "passed"]
RANGED = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run: python -m benchmarks.compatibility"


def test_a_file_without_a_section_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "FOLDER", tmp_path)
    (tmp_path / "more.json").write_text("{}")
    with pytest.raises(ValueError, match="'more'"):
        page()


def test_every_stack_was_run_with_its_pins() -> None:
    assert [row["stack"] for row in ROWS] == list(STACKS), "run: make matrix"
    for row in ROWS:
        for package in RANGED:
            pinned = STACKS[row["stack"]]["pins"][package]
            assert Version(row[package]).public == pinned, (row["stack"], package)


def test_the_lock_file_is_a_tested_stack() -> None:
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    locked = dict(line.split(" ")[0].split("==") for line in lines if "==" in line.split(" ")[0])
    assert STACKS["lock"]["pins"] == {package: locked[package] for package in RANGED}


def bounds(package: str) -> dict[str, Version]:
    """Operators and versions of the bounds in pyproject.toml."""
    extras = PROJECT["optional-dependencies"].values()
    listed = [*PROJECT["dependencies"], *(line for lines in extras for line in lines)]
    (found,) = {str(r.specifier) for r in map(Requirement, listed) if r.name == package}
    return {s.operator: Version(s.version) for s in Requirement(f"p{found}").specifier}


@pytest.mark.parametrize("package", RANGED)
def test_version_ranges_are_those_that_passed(package: str) -> None:
    """The lowest tested version is the lower bound, the highest is in the last series below the upper bound."""
    versions = sorted(Version(Version(row[package]).public) for row in PASSED)
    asked = bounds(package)
    assert asked[">="] == versions[0]
    if "<" in asked:
        first = asked["<"].release
        assert versions[-1].release[: len(first)] == (*first[:-1], first[-1] - 1)


def test_every_python_of_the_classifiers_has_passed() -> None:
    head = "Programming Language :: Python :: 3."
    listed = {f"3.{c.removeprefix(head)}" for c in PROJECT["classifiers"] if c.startswith(head)}
    ran = {row["python"].rsplit(".", 1)[0] for row in PASSED}
    assert listed == ran
    assert PROJECT["requires-python"] == f">={min(ran, key=Version)}"
