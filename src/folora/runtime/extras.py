"""Optional packages: errors name the missing package and the command that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from folora.errors import ConfigError


@contextmanager
def needed_by(what: str, extra: str) -> Iterator[None]:
    """Turn a failed import of an optional package in the block into a ConfigError.

    Args:
        what: The feature that needs the package, for the message.
        extra: The extra of folora that installs it, such as ``"trl"``.

    Raises:
        ConfigError: A package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ConfigError(f"{what} needs {package}: pip install 'folora[{extra}]'") from error
