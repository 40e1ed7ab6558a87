"""Tests, files and code that the documentation names exist."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from folora.config import option_names

ROOT = Path(__file__).parents[2]
HISTORY = {"log.md", "tests.md", "results.md"}  # these name tests and files of their time
PAGES = [ROOT / "SECURITY.md", ROOT / "README.md", *(ROOT / "benchmarks").rglob("README.md")] + [
    page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in HISTORY
]
PACKAGES = {p.name for p in (ROOT / "src" / "folora").iterdir() if p.is_dir()}
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.M)
}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_named_test_exists(page: Path) -> None:
    text = page.read_text()
    assert set(re.findall(r"`(test_\w+)`", text)) <= TESTS
    for name in re.findall(r"(?<![\w/.])(?:tests/)?((?:\w+/)*test_\w+\.py)", text):
        assert (ROOT / "tests" / name).is_file(), name


def test_the_paper_map_names_existing_code() -> None:
    text = (ROOT / "docs" / "paper_map.md").read_text()
    named = re.findall(r"`((?:\w+\.)+\w+)[(`]", text)
    named = [name for name in named if name.split(".")[0] in PACKAGES and not name.endswith(".py")]
    assert len(named) > 30
    for name in named:
        assert exists(name.split(".")), name


def exists(parts: list[str]) -> bool:
    """Whether this is a module of folora or an attribute of one."""
    for count in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(["folora", *parts[:count]]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_the_table_of_options_lists_every_option() -> None:
    """With defaults, help texts and reasons."""
    text = (ROOT / "docs" / "options.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    options = option_names()
    assert [row[0].strip("`") for row in rows] == sorted(
        options, key=lambda n: n.startswith("training.")
    )
    for name, default, what, why in rows:
        option = options[name.strip("`")]
        wanted = str(option.default).lower() if isinstance(option.default, bool) else option.default
        assert default == ("–" if wanted is None else f"`{wanted}`"), name
        assert what == option.help + (f"; must {option.allowed}" if option.allowed else ""), name
        assert len(why) > 10, name
