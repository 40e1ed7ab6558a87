"""folora: fine-tune a foundation model and keep what it already knew (arXiv:2606.00132).

Names are those of ``__init__.pyi``. Each is imported when it is first asked for: PyTorch, PEFT,
TRL and Transformers take seconds, which neither ``folora --help`` nor a wrong option has to wait for.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    alias.asname or alias.name: (node.module, alias.name)  # None: the name is a module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, own_name = _HOMES[name]
    if home is None:
        return import_module(f"{__name__}.{own_name}")
    return getattr(import_module(f"{__name__}.{home}"), own_name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
