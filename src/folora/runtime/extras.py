"""Optional packages: errors name the missing package and the command that installs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from folora.errors import ConfigError


@contextmanager
def needed_by(what: str, extra: str) -> Iterator[None]:
    """Raise a ConfigError if the block imports a package that is not installed.

    Its message says that `what` needs the package, and that `extra` of folora installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise ConfigError(f"{what} needs {package}: pip install 'folora[{extra}]'") from error
