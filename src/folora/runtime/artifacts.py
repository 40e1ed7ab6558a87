"""Artifacts of stages on disk: tensors in safetensors, metadata in a manifest with checksums.

An artifact is a folder with ``tensors.safetensors`` and ``manifest.json``, written atomically. The
manifest holds the fingerprints of what the artifact was made from (model, tokenizer, data) and the
checksum of the tensors. Both are verified on reading.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors.torch import load_file, save_file
from torch import Tensor

from folora.errors import ArtifactError, MismatchError
from folora.runtime.memory import check_fits_memory
from folora.runtime.storage import (
    Facts,
    file_sha256,
    json_text,
    malformed_is_damaged,
    read_json,
    reading,
    sealed,
    unsealed,
    write_atomically,
)

TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """Tensors by name, and their manifest."""

    tensors: dict[str, Tensor]
    manifest: Facts


class Saveable(ABC):
    """An object that is saved as an artifact and loaded in any process."""

    kind: ClassVar[str]
    """Type of artifact, in its manifest."""

    @abstractmethod
    def to_artifact(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name, and JSON values for the manifest."""

    @classmethod
    @abstractmethod
    def from_artifact(cls, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> Self:
        """Inverse of `to_artifact`. Raises ValueError, or an error of a missing name or wrong type."""

    def save(self, folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write a folder that `load` reads.

        Args:
            folder: The folder to create.
            facts: JSON values for the manifest, such as fingerprints of the model.

        Raises:
            ArtifactError: It cannot be written.
        """
        tensors, values = self.to_artifact()
        write_artifact(Path(folder), self.kind, tensors, {**(facts or {}), **values})

    @classmethod
    def load(cls, folder: str | Path, expected: Mapping[str, Any] | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            folder: The folder.
            expected: Values that the manifest must hold.

        Raises:
            ArtifactError: Missing, damaged, or of another kind.
            MismatchError: A value differs from `expected`.
        """
        artifact = read_artifact(Path(folder), cls.kind, expected)
        with malformed_is_damaged(folder):
            return cls.from_artifact(artifact.tensors, artifact.manifest)


def software_versions() -> dict[str, str]:
    """Installed versions of the packages that affect results."""
    found = {}
    for package in ("folora", "torch", "transformers", "peft", "trl", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_artifact(
    path: Path, kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write an artifact folder atomically.

    Args:
        path: The folder to make.
        kind: Type of artifact, for example ``"moments"``; reading must ask for the same one.
        tensors: On any device, of any dtype; stored contiguously.
        facts: JSON values for the manifest, such as fingerprints.

    Raises:
        ArtifactError: It cannot be written.
    """

    def write(target: Path) -> None:
        target.mkdir()
        stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(stored, target / TENSORS)
        manifest = {
            "kind": kind,
            "sha256": file_sha256(target / TENSORS),
            "versions": software_versions(),
            **facts,
        }
        (target / MANIFEST).write_text(json_text(sealed(manifest)), encoding="utf-8")

    write_atomically(Path(path), write)


def read_manifest(path: Path, kind: str, expected: Mapping[str, Any] | None = None) -> Facts:
    """Read and verify an artifact's manifest without its tensors.

    Raises:
        ArtifactError: Missing, damaged, or of another kind or format.
        MismatchError: A value differs from `expected`.
    """
    file = path / MANIFEST
    return check_manifest(read_json(file), file, path, kind, expected)


def check_manifest(
    manifest: Any, file: Path, artifact: Path, kind: str, expected: Mapping[str, Any] | None = None
) -> Facts:
    """Verify a parsed manifest and return its values; see `read_manifest` for the errors."""
    facts = unsealed(manifest, file, artifact)
    if facts.get("kind") != kind:
        raise ArtifactError(f"{file} holds {facts.get('kind')!r:.80}, but {kind!r} is needed here")
    for name, value in (expected or {}).items():
        if facts.get(name) != value:
            raise MismatchError(
                f"{artifact} belongs to another {name.replace('_', ' ')}: it was made for "
                f"{_short(facts.get(name))}, this run has {_short(value)}. Use the model and data "
                "that it was made for, or choose another output folder."
            )
    return facts


def read_artifact(path: Path, kind: str, expected: Mapping[str, Any] | None = None) -> Artifact:
    """Read an artifact and verify its manifest and checksum; see `read_manifest`."""
    manifest = read_manifest(path, kind, expected)
    check_tensors(path, manifest)
    return Artifact(read_tensors(path / TENSORS), manifest)


def check_tensors(path: Path, manifest: Mapping[str, Any]) -> None:
    """Verify the checksum of an artifact's tensors. Raises ArtifactError."""
    file = path / TENSORS
    check_fits_memory(file)  # hashing a file that cannot be loaded wastes time
    if (checksum := file_sha256(file)) != manifest.get("sha256"):
        raise ArtifactError(
            f"{file} is damaged: its checksum is {checksum[:12]}, its manifest says "
            f"{str(manifest.get('sha256'))[:12]}. Delete the folder {path} and rerun the command."
        )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ArtifactError."""
    check_fits_memory(file)
    with reading(file):  # a KeyError is a dtype that torch lacks
        return load_file(file)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else f"{value!r:.80}"
