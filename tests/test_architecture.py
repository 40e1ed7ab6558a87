"""One direction of imports; the optimizer stands alone; the library knows no benchmark."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import folora
from folora.adapter import truncate

SOURCE = Path(__file__).parents[1] / "src" / "folora"

# From data to adapter and on; a file may import from files before it, never from later ones.
ORDER = [
    "errors", "defaults", "ranks", "transit", "sadam", "spectrum", "config", "memory", "disk", "artifacts", "filtering", "modes", "loading", "progress", "finiteness", "decoding", "draws", "special_tokens", "engine", "proxies", "sampling", "serving",
    "data", "activations", "basefile", "divergence", "solving", "convergence", "initialization", "lowrank", "frames", "adapter", "footprint", "meter",
    "preparation", "checkpoints", "signals", "interruption", "training_progress", "training", "pipeline", "evaluation", "frontier", "results", "methods", "comparison",
    "pictures", "report", "planning", "summary", "commands", "cli",
]  # fmt: skip


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "folora":
            found |= {f"folora.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_every_file_has_its_place() -> None:
    assert sorted(p.stem for p in SOURCE.glob("*.py") if p.stem != "__init__") == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name: str) -> None:
    allowed = {f"folora.{n}" for n in ORDER[: ORDER.index(name)]}
    allowed |= {"folora"} if name == "cli" else set()  # which hands it `commands` when it asks
    own = {i for i in imports(SOURCE / f"{name}.py") if i.split(".")[0] == "folora"}
    assert own <= allowed
    assert not {i.split(".")[0] for i in imports(SOURCE / f"{name}.py")} & {"demo", "benchmarks"}


def test_the_command_line_reads_its_options_before_it_imports_what_takes_seconds() -> None:
    code = "import sys, folora.cli; folora.cli.parse(['run', '--model', 'm']); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {"torch", "peft", "trl", "datasets", "transformers", "matplotlib"} & set(loaded)


def test_every_public_name_is_there() -> None:
    assert set(folora.__all__) <= set(dir(folora))
    assert all(getattr(folora, name) is not None for name in folora.__all__)
    stub = ast.parse((SOURCE / "__init__.pyi").read_text())
    (listed,) = (n.value for n in stub.body if isinstance(n, ast.Assign))
    assert sorted(ast.literal_eval(listed)) == sorted(folora.__all__)


def test_the_optimizer_needs_torch_alone() -> None:
    both = imports(SOURCE / "sadam.py") | imports(SOURCE / "transit.py")
    outside = {i for i in both if i.split(".")[0] not in sys.stdlib_module_names}
    assert {i.split(".")[0] for i in outside} - {"folora"} == {"torch"}
    assert {i for i in outside if i.startswith("folora")} == {"folora.transit"}


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda p: p.stem)
def test_no_import_hides_in_a_function(path: Path) -> None:
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    hidden = [
        n for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert not hidden


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda p: p.stem)
def test_no_pickle(path: Path) -> None:
    assert "pickle" not in imports(path)
    assert "torch.load(" not in path.read_text()


def test_shapes_are_checked_while_tests_run() -> None:
    """By the import hook of conftest, which does nothing for what was imported before."""
    with pytest.raises(TypeCheckError, match="truncate"):
        truncate(torch.ones(2, 5), torch.ones(4, 3), 1)
