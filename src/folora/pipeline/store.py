"""Where stages leave their results: in memory, or in a folder that is taken up again.

A `Stage` says what its result depends on and how it is computed, saved and loaded. A store makes it: the
folder's takes a result that was made from the same inputs, resumes one that was interrupted, and computes
all else.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from folora.errors import ArtifactError
from folora.pipeline.context import Context
from folora.runtime import distributed
from folora.runtime.artifacts import check_tensors, read_manifest
from folora.runtime.storage import read_sealed, write_sealed

logger = logging.getLogger(__name__)

REQUEST, OLD = "request.json", "old"

T = TypeVar("T")


class Stage(ABC, Generic[T]):
    """One step of the pipeline.

    Attributes:
        path: Where its result lies in a run's folder.
        kind: What the manifest there calls it.
        command: The subcommand of ``folora`` that makes it.
    """

    path: ClassVar[str]
    kind: ClassVar[str]
    command: ClassVar[str]

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Fingerprints of all that the result depends on; they stand in its manifest."""

    def request(self) -> dict[str, Any] | None:
        """What unfinished work depends on; None if there is none to resume."""
        return None

    def check_folder(self, folder: Path, request: str) -> None:
        """Refuse unfinished work that folora did not write.

        Args:
            folder: Where it lies.
            request: Name of the file there that says what it depends on.
        """

    @abstractmethod
    def compute(self, folder: Path | None) -> T:
        """The result, made by all processes together.

        Args:
            folder: For unfinished work, which is resumed from there; None to keep nothing.
        """

    @abstractmethod
    def save(self, value: T, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the result."""

    @classmethod
    @abstractmethod
    def load(cls, context: Context, path: Path, expected: Mapping[str, Any]) -> T:
        """Read the result and check that it fits. Raises ArtifactError, MismatchError."""


@dataclass(frozen=True)
class Made(Generic[T]):
    """The result of a stage.

    Attributes:
        load: Gives it; what lies on disk is read at each call.
        manifest: What its manifest says, its fingerprint among it; empty in memory.
    """

    load: Callable[[], T]
    manifest: Mapping[str, Any] = field(default_factory=dict)


class Memory:
    """Computes every stage and keeps the result in memory."""

    def make(self, stage: Stage[T]) -> Made[T]:
        """Compute a stage."""
        value = stage.compute(None)
        return Made(lambda: value)


class Folder:
    """Results of stages in a folder.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, stage: Stage[T]) -> Made[T]:
        """Take the result of a stage if it was made from the same inputs; otherwise make it.

        What was made from other inputs is kept under ``old/``.

        Raises:
            ArtifactError: What is there is damaged.
        """
        facts = stage.facts()
        path = self.folder / stage.path
        if not distributed.on_rank_zero(lambda: self._is_done(stage, facts)):
            value = stage.compute(None if stage.request() is None else path.parent)
            distributed.on_rank_zero(lambda: stage.save(value, path, facts))
            return self._made(type(stage), stage.context, facts)
        return self.read(type(stage), stage.context, facts)

    def read(
        self, stage: type[Stage[T]], context: Context, expected: Mapping[str, Any] | None = None
    ) -> Made[T]:
        """The result of a stage that was made before.

        Args:
            stage: Which.
            context: Of the run.
            expected: Facts that its manifest must hold; by default those of the model.

        Raises:
            ArtifactError: It is missing, or damaged; its checksum is compared.
            MismatchError: It is of another model.
        """
        found = self._made(stage, context, context.facts if expected is None else expected)
        distributed.on_rank_zero(lambda: check_tensors(self.folder / stage.path, found.manifest))
        return found

    def _made(
        self, stage: type[Stage[T]], context: Context, expected: Mapping[str, Any]
    ) -> Made[T]:
        path, manifest = self.folder / stage.path, self.manifest(stage, expected)
        return Made(lambda: stage.load(context, path, expected), manifest)

    def manifest(
        self, stage: type[Stage[Any]], expected: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """The manifest of a result. Raises ArtifactError, MismatchError."""
        path = self.folder / stage.path
        if not path.exists():
            raise ArtifactError(f"{path} is missing; make it first: folora {stage.command}")
        return read_manifest(path, stage.kind, expected)

    def check(self, stage: type[Stage[Any]]) -> None:
        """Refuse something else, or something damaged, in the place of a result. Raises ArtifactError."""
        path = self.folder / stage.path
        if (request := path.parent / REQUEST).exists():
            read_sealed(request)
        if path.exists() or path.is_symlink():
            self.manifest(stage)

    def _is_done(self, stage: Stage[Any], facts: Mapping[str, Any]) -> bool:
        """Whether the result is there; if not, its place is made ready."""
        path, request = self.folder / stage.path, stage.request()
        if request is not None:
            stage.check_folder(path.parent, REQUEST)
            file = path.parent / REQUEST
            if file.exists() and read_sealed(file) != request:
                self._set_aside(path.parent)
            if not file.exists():
                write_sealed(file, request)
        if not path.exists():
            return False
        manifest = read_manifest(path, stage.kind)
        if all(manifest.get(name) == value for name, value in facts.items()):
            logger.info("%s: done already", stage.path)
            return True
        if request is None:
            self._set_aside(path)
        else:  # finished parts still serve
            logger.info("%s: resumed with other settings", stage.path)
        return False

    def _set_aside(self, path: Path) -> None:
        """Keep a result whose inputs have changed under ``old/``."""
        stem = str(path.relative_to(self.folder)).replace("/", "-")
        taken = {p.name for p in (self.folder / OLD).glob(f"{stem}-*")}
        number = next(n for n in range(1, 10**6) if f"{stem}-{n}" not in taken)
        target = self.folder / OLD / f"{stem}-{number}"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        logger.warning("%s was made from other inputs; it is kept as %s", path, target)
