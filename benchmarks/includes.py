"""YAML files that include others, so that a plan or recipe states only what it changes."""

from __future__ import annotations

from collections.abc import Mapping
from os.path import normpath
from pathlib import Path
from typing import Any

from folora.config import read_yaml
from folora.errors import ConfigError


def read_included(path: Path) -> dict[str, Any]:
    """A YAML file merged over the files in its list ``include``, by path from its own folder.

    Mappings are merged key by key; of other values the later one wins.

    Raises:
        ConfigError: A file cannot be read, or includes itself.
    """
    return _merged(path, ())


def _merged(path: Path, outer: tuple[Path, ...]) -> dict[str, Any]:
    if path in outer:
        raise ConfigError(f"{path} includes itself")
    values = read_yaml(path)
    found: dict[str, Any] = {}
    included = values.pop("include", [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise ConfigError(f"{path}: include is {included!r:.80}, but must be a list of files")
    for name in included:
        _merge(found, _merged(Path(normpath(path.parent / name)), (*outer, path)))
    _merge(found, values)
    return found


def _merge(target: dict[str, Any], values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            _merge(target[name], value)
        else:
            target[name] = value
