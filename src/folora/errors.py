"""What failed, where, and what to do: every error that folora raises on purpose.

All of them derive from `FoLoraError`; the command line prints them without a traceback and ends
with exit code 2. The subclasses also derive from the built-in error that a library user would
expect, so `except ValueError` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FoLoraError(Exception):
    """Base of all errors raised on purpose; the message says what, where and what to do."""


class ConfigError(FoLoraError, ValueError):
    """An option is unknown or outside of its allowed interval."""


class DataError(FoLoraError, ValueError):
    """A data set, a row or a tokenizer cannot be used as it is."""


class ArtifactError(FoLoraError, RuntimeError):
    """A file written by an earlier stage is missing, damaged, or belongs to something else."""


class MismatchError(ArtifactError):
    """A file is sound, but was made from another model, data set or option."""


class NumericsError(FoLoraError, ArithmeticError):
    """A matrix or an activation is not usable (NaN, asymmetry, ...)."""


class ProcessError(FoLoraError, RuntimeError):
    """Another process of the run has ended."""


class ServerError(FoLoraError, RuntimeError):
    """A server that generates text cannot be reached, or does not do what was requested."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to `word`, or ``""``."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
