"""Fixtures on tiny models; shapes annotated in the source are checked while tests run."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if "FOLORA_TEST_GPU" not in os.environ:  # tests compare with the CPU's results, and fork
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from jaxtyping import install_import_hook
from support import typechecking

SOURCE = Path(__file__).parents[1] / "src"
ANNOTATED = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in sorted(SOURCE.rglob("*.py"))
    if "shapes import" in path.read_text()
]

with install_import_hook(ANNOTATED, f"{typechecking.__name__}.check"):
    import folora

    for name in ANNOTATED:
        import_module(name)

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.tiny import MAKERS, make_tokenizer, tiny_config, write_model, write_rows
from folora.pipeline.run import Run

# The time of an example depends on the load of the machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """One thread, so that test processes side by side do not slow each other down; see `make cpus`."""
    torch.set_num_threads(int(os.environ.get("FOLORA_TEST_THREADS", "1")))


@pytest.fixture(params=sorted(MAKERS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MAKERS[request.param]()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with its tokenizer, on disk."""
    return write_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of a synthetic task."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def finished(
    model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> folora.FoLoraConfig:
    """A complete tiny run, to be read or copied, not changed."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    config = tiny_config(model=str(model_folder), dataset=str(rows_file), output=str(output))
    Run(config).run()
    return config
