"""A folder with synthetic plans, results and a template of every block."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.made_results import TEMPLATE, moments, write_plans, write_results

from benchmarks.spectra import main as spectra_main
from benchmarks.world.pretrain import pretrain


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Synthetic plans, results and a template with every block."""
    write_plans(tmp_path / "plans")
    write_results(tmp_path / "results")
    moments(tmp_path / "run")
    output = tmp_path / "results" / "spectra" / "tiny.json"
    spectra_main(["--run", str(tmp_path / "run"), "--model", "tiny", "--task", "shift", "--r", "2", "--output", str(output)])  # fmt: skip
    (tmp_path / "template.md").write_text(TEMPLATE)
    return tmp_path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with a minimally pretrained model."""
    folder = tmp_path_factory.mktemp("worlds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.world.pretrain.BATCH", 2)
        pretrain(folder / "world" / "7", seed=7, steps=60)
    return folder
