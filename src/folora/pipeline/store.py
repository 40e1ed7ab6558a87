"""`Stage`, and the two stores of stage results: `Memory` and `Folder`.

A `Stage` defines what its result depends on and how it is computed, saved and loaded. `Folder` reuses a
result that was made from the same inputs, resumes an interrupted one, and otherwise computes it.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from folora.errors import ArtifactError, FoLoraError, MismatchError
from folora.pipeline.context import Context
from folora.runtime import distributed
from folora.runtime.artifacts import MANIFEST, Saveable, check_tensors, read_manifest
from folora.runtime.ownership import is_own
from folora.runtime.storage import malformed_is_damaged, read_sealed, write_sealed

logger = logging.getLogger(__name__)

REQUEST, OLD = "request.json", "old"

T = TypeVar("T")


class Stage(ABC, Generic[T]):
    """One step of the pipeline.

    Attributes:
        path: Path of its result in a run's folder.
        command: The subcommand of ``folora`` that makes it.
        result: Class of the result, whose `kind` is in the manifest.
        identity: The entry of its manifest by which later results name it.
        exports: What is made from the result for users; moved to ``old/`` before work on another one begins.
    """

    path: ClassVar[str]
    command: ClassVar[str]
    result: ClassVar[type[Saveable]]
    identity: ClassVar[str] = "sha256"
    exports: ClassVar[tuple[str, ...]] = ()

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Fingerprints of all that the result depends on; stored in its manifest."""

    def request(self) -> dict[str, Any] | None:
        """Fingerprints of what unfinished work depends on; None if it cannot be resumed."""
        return None

    @classmethod
    def inputs(cls, facts: Mapping[str, Any]) -> dict[type[Stage[Any]], str]:
        """The stored results, by their `identity`, that one with these facts was made from; upstream first."""
        return {}

    def check_folder(self, folder: Path, request: str) -> None:
        """Refuse unfinished work, beside its file of fingerprints, that folora did not write."""

    @abstractmethod
    def compute(self, folder: Path | None) -> T:
        """Compute the result; all processes call it.

        Args:
            folder: Folder that stores the result, and unfinished work, from which it is resumed. Rank 0
                writes, so that the other processes need not return the result. None if it stays in memory:
                then every process returns it.
        """

    def save(self, value: Any, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the result."""
        value.save(path, facts)

    @classmethod
    def load(cls, context: Context, path: Path, expected: Mapping[str, Any]) -> T:
        """Read the result and check its fingerprints. Raises ArtifactError, MismatchError."""
        value: Any = cls.result.load(path, expected)
        cls.check_result(value, context, path)
        return value

    @classmethod
    def check_result(cls, value: T, context: Context, path: Path) -> None:
        """Refuse a result that does not fit the model or the options. Raises FoLoraError."""


@dataclass(frozen=True)
class StageResult(Generic[T]):
    """The result of a stage.

    Attributes:
        load: Returns the result; a result on disk is read at each call.
        manifest: Its manifest, with its fingerprint; empty in memory.
    """

    load: Callable[[], T]
    manifest: Mapping[str, Any] = field(default_factory=dict)


class Memory:
    """Computes every stage and holds the result in memory."""

    def make(self, stage: Stage[T]) -> StageResult[T]:
        """Compute a stage."""
        value = stage.compute(None)
        return StageResult(lambda: value)


class Folder:
    """Stores the results of stages in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, stage: Stage[T]) -> StageResult[T]:
        """Return the result of a stage, reusing one that was made from the same inputs.

        A result that was made from other inputs is moved to ``old/``, and so is what was exported from it.

        Raises:
            ArtifactError: The existing result is damaged.
        """
        facts = stage.facts()
        path = self.folder / stage.path
        if not distributed.on_rank_zero(lambda: self._is_done(stage, facts)):
            value = stage.compute(path.parent)
            distributed.on_rank_zero(lambda: stage.save(value, path, facts))
            return self._made(type(stage), stage.context, facts)
        return self.read(type(stage), stage.context, facts)

    def read(
        self, stage: type[Stage[T]], context: Context, expected: Mapping[str, Any] | None = None
    ) -> StageResult[T]:
        """The existing result of a stage, whose manifest must have these facts (default: the model's).

        Raises:
            ArtifactError: It is missing, or damaged according to its checksum.
            MismatchError: It belongs to another model, or is outdated; see `check_inputs`.
        """
        found = self._made(stage, context, context.facts if expected is None else expected)
        self.check_inputs(stage)
        distributed.on_rank_zero(lambda: check_tensors(self.folder / stage.path, found.manifest))
        return found

    def _made(
        self, stage: type[Stage[T]], context: Context, expected: Mapping[str, Any]
    ) -> StageResult[T]:
        path, manifest = self.folder / stage.path, self.manifest(stage, expected)
        return StageResult(lambda: stage.load(context, path, expected), manifest)

    def manifest(
        self, stage: type[Stage[Any]], expected: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """The manifest of a result. Raises ArtifactError, MismatchError."""
        path = self.folder / stage.path
        if not path.exists():
            raise ArtifactError(f"{path} is missing; run folora {stage.command} first")
        return read_manifest(path, stage.result.kind, expected)

    def check_inputs(self, stage: type[Stage[Any]]) -> None:
        """Refuse a result if one that it was made from, directly or not, has been replaced since.

        Results that were deleted are not compared.

        Raises:
            ArtifactError: It is missing or damaged.
            MismatchError: It is outdated; the command that makes it again is named.
        """
        with malformed_is_damaged(self.folder / stage.path):
            inputs = stage.inputs(self.manifest(stage))
        for source, made_from in inputs.items():
            path = self.folder / source.path
            if path.exists():
                self.check_inputs(source)
                outdated = self.manifest(source)[source.identity] != made_from
            else:  # work on its replacement was interrupted, or it was deleted
                outdated = made_from in self._identities_set_aside(source)
            if outdated:
                raise MismatchError(
                    f"{self.folder / stage.path} was made from another {source.path} than this folder has now; "
                    f"run folora {stage.command} and the commands after it"
                )

    def _identities_set_aside(self, stage: type[Stage[Any]]) -> set[Any]:
        """The identities of a stage's results in ``old/``."""
        found = set()
        for file in (self.folder / OLD).rglob(MANIFEST):
            with suppress(FoLoraError):  # of another kind, or a user's file
                found.add(read_manifest(file.parent, stage.result.kind).get(stage.identity))
        return found

    def check(self, stage: type[Stage[Any]]) -> None:
        """Refuse a damaged result, or another file in its place. Raises ArtifactError."""
        path = self.folder / stage.path
        if (request := path.parent / REQUEST).exists():
            read_sealed(request)
        if path.exists() or path.is_symlink():
            self.manifest(stage)

    def _is_done(self, stage: Stage[Any], facts: Mapping[str, Any]) -> bool:
        """Whether the result exists with these facts; if not, its location is prepared."""
        path, request = self.folder / stage.path, stage.request()
        if request is not None:
            stage.check_folder(path.parent, REQUEST)
            file = path.parent / REQUEST
            if file.exists() and read_sealed(file) != request:
                self._set_aside(path.parent)
            if not file.exists():
                for export in filter(is_own, (self.folder / name for name in stage.exports)):
                    self._set_aside(export)
                write_sealed(file, request)
        if not path.exists():
            return False
        manifest = read_manifest(path, stage.result.kind)
        if all(manifest.get(name) == value for name, value in facts.items()):
            logger.info("%s: already done", stage.path)
            return True
        if request is None:
            self._set_aside(path)
        else:  # finished parts are reused
            logger.info("%s: resumed with other settings", stage.path)
        return False

    def _set_aside(self, path: Path) -> None:
        """Move a result whose inputs have changed to ``old/``."""
        stem = str(path.relative_to(self.folder)).replace("/", "-")
        taken = {p.name for p in (self.folder / OLD).glob(f"{stem}-*")}
        number = next(n for n in range(1, 10**6) if f"{stem}-{n}" not in taken)
        target = self.folder / OLD / f"{stem}-{number}"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        logger.warning("%s was made from other inputs; moved to %s", path, target)
