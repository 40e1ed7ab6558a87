"""Imports go in one direction, the optimizer needs torch only, and every import is declared."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import folora
from folora.adapters.export import truncate

SOURCE = Path(__file__).parents[2] / "src" / "folora"

MODULES = sorted(
    ".".join(p.relative_to(SOURCE).with_suffix("").parts)
    for p in SOURCE.rglob("*.py")
    if p.stem not in ("__init__", "__main__")
)
# Modules that cannot be imported without an extra.
OPTIONAL = {
    "calibration.vllm_client": "vllm", "training.train": "trl", "training.trainer": "trl", "training.sealed": "trl", "training.trainer_check": "trl", "training.arguments": "trl",
    "metrics.evaluation": "eval", "compare.frontier": "compare", "compare.results": "compare",
    "compare.arms": "compare", "compare.comparison": "compare", "compare.plots": "compare", "compare.tables": "compare",
}  # fmt: skip


IMPORT_NAMES = {"pyyaml": "yaml", "pillow": "PIL", "lm-eval": "lm_eval", "pytest-xdist": "xdist"}


def imports(path: Path) -> set[str]:
    return imports_of(ast.parse(path.read_text()))


def imports_of(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "folora":
            found |= {f"folora.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def file_of(name: str) -> Path:
    return SOURCE.joinpath(*name.split(".")).with_suffix(".py")


def test_packages_import_in_one_direction() -> None:
    """The contracts in pyproject.toml, which `make lint` checks too."""
    found = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=SOURCE.parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout


def test_every_package_has_a_docstring() -> None:
    for package in (p for p in SOURCE.iterdir() if p.is_dir() and p.name != "__pycache__"):
        assert ast.get_docstring(ast.parse((package / "__init__.py").read_text())), package


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_demo_or_benchmarks(name: str) -> None:
    assert not {i.split(".")[0] for i in imports(file_of(name))} & {"demo", "benchmarks"}


def test_options_are_parsed_before_slow_imports() -> None:
    code = "import sys, folora.cli.main; folora.cli.main.parse(['run', '--model', 'm']); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert not {"torch", "peft", "trl", "datasets", "transformers", "matplotlib"} & set(loaded)


def test_every_public_name_is_importable() -> None:
    assert set(folora.__all__) <= set(dir(folora))
    assert all(getattr(folora, name) is not None for name in folora.__all__)
    stub = ast.parse((SOURCE / "__init__.pyi").read_text())
    (listed,) = (n.value for n in stub.body if isinstance(n, ast.Assign))
    assert sorted(ast.literal_eval(listed)) == sorted(folora.__all__)


def test_the_optimizer_needs_torch_only() -> None:
    """And folora's helpers for tensors, which need torch only as well."""
    files = [*(SOURCE / "optim").glob("*.py"), SOURCE / "runtime" / "tensors.py"]
    found = set().union(*map(imports, files))
    outside = {i for i in found if i.split(".")[0] not in sys.stdlib_module_names}
    assert {i.split(".")[0] for i in outside} - {"folora"} == {"torch"}
    own = {i for i in outside if i.startswith("folora") and not i.startswith("folora.optim.")}
    assert own <= {"folora.runtime.tensors"}


def hidden_imports(path: Path) -> set[str]:
    """Imports inside functions, or for types only."""
    tree = ast.parse(path.read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.If)]
    return {name for block in blocks for name in imports_of(block)}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.stem)
def test_only_what_needs_an_extra_is_imported_in_a_function(path: Path) -> None:
    allowed = {f"folora.{n}" for n in OPTIONAL} | (
        {"jaxtyping"} if path.stem == "shapes" else set()
    )
    # The command line reads its options before it imports torch.
    allowed |= {"folora.cli", "folora.cli.commands"} if path.stem == "main" else set()
    assert hidden_imports(path) <= allowed


def declared(extra: str) -> tuple[set[str], set[str]]:
    """Packages of an extra, or of the base install, by import name; and the extras it includes."""
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]
    packages, extras = set(), {extra}
    for line in project["optional-dependencies"][extra] if extra else project["dependencies"]:
        name = re.match(r"[\w-]+", line)[0]
        if name != "folora":
            packages.add(IMPORT_NAMES.get(name, name))
            continue
        for included in re.search(r"\[(.*?)\]", line)[1].split(","):
            more, deeper = declared(included)
            packages, extras = packages | more, extras | deeper
    return packages, extras


@pytest.mark.parametrize("name", MODULES)
def test_every_import_is_declared(name: str) -> None:
    """A package of an extra is imported only in modules that require the extra."""
    path = file_of(name)
    top = imports(path) - hidden_imports(path)
    packages, extras = declared(OPTIONAL[name]) if name in OPTIONAL else (set(), set())
    outside = {i.split(".")[0] for i in top} - set(sys.stdlib_module_names) - {"folora"}
    assert outside <= packages | declared("")[0]
    assert {OPTIONAL[n] for i in top if (n := i.removeprefix("folora.")) in OPTIONAL} <= extras


def test_without_extras_other_modules_import_and_missing_extras_are_named() -> None:
    """Packages of the extras are hidden, except those that the base install requires."""
    needed_anyway = {"accelerate", "numpy", "httpx2", "anyio"}
    extras = ("trl", "compare", "eval", "quantized", "demo")
    # setuptools is a build backend: PyTorch needs it for parts that an environment of users lacks.
    hidden = {
        "jaxtyping",
        "setuptools",
        *(p for e in extras for p in declared(e)[0]),
    } - needed_anyway
    code = f"""
import importlib, json, sys
sys.modules |= dict.fromkeys({sorted(hidden)})
found = {{}}
for name in {MODULES}:
    try:
        importlib.import_module("folora." + name)
        found[name] = ""
    except Exception as error:
        found[name] = type(error).__name__ + ": " + str(error)
import folora
folora.prepare
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    missing = {n: extra for n, extra in OPTIONAL.items() if declared(extra)[0] - needed_anyway}
    assert {name for name, error in found.items() if error} == set(missing)
    for name, extra in missing.items():
        wanted = rf"ConfigError: .* needs \w+: pip install 'folora\[{extra}\]'"
        assert re.fullmatch(wanted, found[name])


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.stem)
def test_no_pickle(path: Path) -> None:
    assert "pickle" not in imports(path)
    assert "torch.load(" not in path.read_text()


def test_shapes_are_checked_while_tests_run() -> None:
    """By conftest's import hook, which does not affect modules that were imported before."""
    with pytest.raises(TypeCheckError, match="truncate"):
        truncate(torch.ones(2, 5), torch.ones(4, 3), 1)
