"""README's example runs, and its numbers are those of the demo and the results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import folora
from benchmarks.report.page import refresh
from benchmarks.report.source import Source
from benchmarks.tiny import tiny_config, write_qwen3, write_rows
from folora.training.sft_options import KNOWN

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (example,) = [
        b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "folora.prepare(" in b
    ]
    monkeypatch.chdir(tmp_path)
    write_qwen3(tmp_path / "Qwen" / "Qwen3-1.7B")
    write_rows(tmp_path / "rows.jsonl")
    small = tiny_config()
    monkeypatch.setattr(folora, "FoLoraConfig", lambda: small)
    exec(example, {})
    assert "kl=" in capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_the_table_matches_the_demos_output() -> None:
    source = Source.load(
        ROOT / "benchmarks/results", ROOT / "benchmarks/plans", ROOT / "docs/demo.json"
    )
    assert source.demo["table"]["caption"] in README
    assert refresh(README, source) == README, "docs/demo.json has changed: run `make results`"


def test_every_named_option_and_file_exists() -> None:
    for target in re.findall(r"\]\(((?:docs|src)/[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for flag in re.findall(r"--([a-z]+\.[a-z_]+)", README):
        assert flag in {*folora.config.option_names(), *(f"training.{name}" for name in KNOWN)}


def test_every_number_is_in_the_results() -> None:
    """README quotes docs/results.md and its appendices, which are generated from result files."""
    pages = [ROOT / "docs" / "results.md", *(ROOT / "docs" / "results").glob("*.md")]
    results = "\n".join(page.read_text() for page in pages)
    shown = README.split("## Use it")[0].replace("Python 3.11", "")
    figures = set(re.findall(r"(?<![\w.:/])-?\d*\.\d{2,4}(?![\d.])", shown))
    assert len(figures) > 10
    assert [f for f in sorted(figures) if f.lstrip("-0") not in results] == []
