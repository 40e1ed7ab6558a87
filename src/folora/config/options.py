"""Sections of options: strict pydantic models whose errors are one sentence with name, value and remedy."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from folora.config.renamed import removal
from folora.errors import ConfigError, nearest

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 300  # a path stays whole
BOUNDS = ("ge", "gt", "le", "lt")
_OUTSIDE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}


class Options(BaseModel):
    """A section of options: keyword arguments, checked where it is built, and frozen.

    The text below a field is its help.

    Raises:
        ConfigError: An option is unknown, of a wrong type, or outside of its interval.
    """

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    section: ClassVar[str] = ""
    """What its options are called by: ``"adapter"`` for ``adapter.r``."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explained(error, type(self), self.section)) from None

    def replace(self, **changes: Any) -> Self:
        """The same options with some changed, and checked again."""
        return type(self)(**{**dict(self), **changes})


def explained(error: ValidationError, kind: type[BaseModel], section: str = "") -> str:
    """What pydantic found, as sentences that name the options of a model."""
    found = error.errors()
    return "; ".join(dict.fromkeys(_sentence(e, kind, section) for e in found))


def _sentence(error: Any, kind: type[BaseModel], section: str) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    option, given = str(error["loc"][0]), error["input"]
    name = f"{section}.{option}" if section else option
    if error["type"] == "extra_forbidden":
        return unknown(name, (f"{section}.{n}" if section else n for n in kind.model_fields))
    if error["type"] in _OUTSIDE:
        return f"{name} is {short(given)}, but must {allowed(kind.model_fields[option])}"
    if isinstance(given, bool) and error["type"] in ("int_type", "float_type"):
        return f"{name} is {given!r}, but must be a number"
    remedy = "; put it in quotes" if error["type"] == "string_type" else ""
    return f"{name} is {short(given)}: {error['msg']}{remedy}"


def unknown(name: str, known: Any) -> str:
    """The sentence for a name that is no option: what replaces it, or the nearest right one."""
    return removal(name) or f"unknown option {name!r}{nearest(name, known)}"


def allowed(field: FieldInfo) -> str:
    """The interval of an option, as in ``"lie in [0, 1)"`` or ``"be finite and >= 0"``; else ``""``."""
    finite = "be finite and " if float in kinds(field.annotation) else "be "
    found = {name: getattr(b, name) for b in _bounds(field) for name in BOUNDS if hasattr(b, name)}
    low = f"[{found['ge']}" if "ge" in found else f"({found.get('gt')}"
    if "le" in found or "lt" in found:
        return f"lie in {low}, {found['le']}]" if "le" in found else f"lie in {low}, {found['lt']})"
    if "ge" in found or "gt" in found:
        return finite + (f">= {found['ge']}" if "ge" in found else f"> {found['gt']}")
    return "be finite" if finite != "be " else ""


def _bounds(field: FieldInfo) -> Iterator[Any]:
    """What the annotation and `Field` ask of a value."""
    yield from field.metadata
    for hint in get_args(field.annotation):
        if get_origin(hint) is Annotated:
            yield from (m for part in get_args(hint)[1:] for m in getattr(part, "metadata", [part]))


def kinds(hint: Any) -> list[Any]:
    """The types that a value may have, in order; those of literals are their values."""
    origin = get_origin(hint)
    if origin is Annotated:
        return kinds(get_args(hint)[0])
    if origin is Literal:
        return [*get_args(hint)]
    if origin in (tuple, dict):
        return [origin]
    return [kind for part in get_args(hint) for kind in kinds(part)] if origin else [hint]


def check_keys(values: Mapping[Any, Any]) -> None:
    """Refuse names that are no text, which YAML knows. Raises ConfigError."""
    for name, value in values.items():
        if not isinstance(name, str):
            raise ConfigError(
                f"{short(name)} is {short(value)}: names of options should be strings"
            )
        if isinstance(value, Mapping):
            check_keys(value)


def short(value: object) -> str:
    """A value as Python writes it, cut where it would fill the screen."""
    return _REPR.repr(value)
