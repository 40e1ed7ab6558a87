"""Config files: YAML without aliases, duplicate names or numbers that nobody needs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from folora.errors import ConfigError

LARGEST_FILE = 2**20  # bytes of a config file; a data set given by mistake is not read for minutes
LARGEST_NUMBER = 64  # bits of an integer in a file


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping. Raises ConfigError if the file is missing or holds something else."""
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise ConfigError("it is a named pipe or a device, but must be a regular file")
        with open(path, "rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ConfigError(f"it has more than {LARGEST_FILE} bytes; is it a data set?")
        values = parse_yaml(content.decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"config file {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} must hold names and values, not {type(values)}")
    return values


def parse_yaml(text: str) -> Any:
    """A YAML value, without what a config has no use for. Raises ConfigError.

    A name that is given twice would silently lose its first value, and aliases can grow a short text
    beyond all memory.
    """
    try:
        return yaml.load(text, _PlainYaml)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date with a month 13
        raise ConfigError(str(error)) from error
    except (AttributeError, LookupError, OverflowError, TypeError) as error:  # as of !!bool maybe
        raise ConfigError(f"a value is not what its tag says ({error!r})") from error
    except RecursionError:
        raise ConfigError("brackets are nested too deeply") from None


class _PlainYaml(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (name := (key.tag, str(key.value))) in seen:
                problem = f"{key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> int:
        """An integer; those that Python does not print are not needed either."""
        number = self.construct_yaml_int(node)
        if number.bit_length() > LARGEST_NUMBER:
            problem = f"an integer of {number.bit_length()} bits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return number


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that `_PlainYaml` would read as a number."""


_PlainYaml.add_constructor("tag:yaml.org,2002:int", _PlainYaml.construct_number)
for part in (_PlainYaml, _Dumper):  # PyYAML takes 1e-3 for text, unlike YAML 1.2
    part.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def to_yaml(values: dict[str, Any]) -> str:
    """The text that `parse_yaml` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
