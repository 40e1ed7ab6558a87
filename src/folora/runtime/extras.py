"""Optional packages: what is missing is named, with the command that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from folora.errors import ConfigError


@contextmanager
def needed_by(what: str, extra: str) -> Iterator[None]:
    """Import the packages of an extra inside; a missing one is a ConfigError.

    Args:
        what: What needs them, as the message calls it.
        extra: Of folora, such as ``"trl"``.

    Raises:
        ConfigError: A package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ConfigError(f"{what} needs {package}: pip install 'folora[{extra}]'") from error
