"""What stages leave on disk: tensors in safetensors, facts about them in a sealed manifest.

An artifact is a folder with ``tensors.safetensors`` and ``manifest.json``, there as a whole or not at
all. The manifest says what the artifact belongs to (fingerprints of model, tokenizer and data) and
carries the checksum of the tensors; reading compares both before anything is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from folora.errors import ArtifactError, MismatchError
from folora.runtime.memory import check_fits_memory
from folora.runtime.storage import (
    Facts,
    file_sha256,
    read_json,
    sealed,
    unsealed,
    write_atomically,
)

TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """Tensors by name, and the manifest that came with them."""

    tensors: dict[str, Tensor]
    manifest: Facts


def software_versions() -> dict[str, str]:
    """Versions of the packages that shape a result."""
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
        kind: What it is, for example ``"statistics"``; reading asks for the same word.
        tensors: Any devices and dtypes; stored contiguous on the CPU.
        facts: JSON values for the manifest, fingerprints among them.
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
        text = json.dumps(sealed(manifest), indent=1) + "\n"
        (target / MANIFEST).write_text(text, encoding="utf-8")

    write_atomically(Path(path), write)


def read_manifest(path: Path, kind: str, expected: Mapping[str, Any] | None = None) -> Facts:
    """Read and check an artifact's manifest alone.

    Args:
        path: The artifact's folder.
        kind: What it must be.
        expected: Facts that must stand in the manifest with the same values.

    Raises:
        ArtifactError: Missing, damaged, or of another kind or format.
        MismatchError: Made from something else than `expected`.
    """
    file = Path(path) / MANIFEST
    return check_manifest(read_json(file), file, Path(path), kind, expected)


def check_manifest(
    manifest: Any,
    file: Path,
    artifact: Path,
    kind: str,
    expected: Mapping[str, Any] | None = None,
) -> Facts:
    """A manifest that was read from a file of an artifact, if it is one of this kind.

    See `read_manifest` for what is raised.
    """
    facts = unsealed(manifest, file, artifact)
    if facts.get("kind") != kind:
        raise ArtifactError(f"{file} holds {facts.get('kind')!r:.80}, but {kind!r} is needed here")
    for name, value in (expected or {}).items():
        if facts.get(name) != value:
            raise MismatchError(
                f"{artifact} belongs to another {name.replace('_', ' ')}: it was made for "
                f"{_short(facts.get(name))}, this run has {_short(value)}. Give the right model "
                "and data, or make it again in another folder."
            )
    return facts


def read_artifact(path: Path, kind: str, expected: Mapping[str, Any] | None = None) -> Artifact:
    """Read an artifact after checking manifest and checksum; see `read_manifest`."""
    manifest = read_manifest(path, kind, expected)
    check_tensors(path, manifest)
    return Artifact(read_tensors(Path(path) / TENSORS), manifest)


def check_tensors(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compare an artifact's tensors with the checksum in its manifest. Raises ArtifactError."""
    file = Path(path) / TENSORS
    try:
        check_fits_memory(file)  # before it is hashed for hours
        checksum = file_sha256(file)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error
    if checksum != manifest.get("sha256"):
        raise ArtifactError(
            f"{file} is damaged: its checksum is {checksum[:12]}, its manifest says "
            f"{str(manifest.get('sha256'))[:12]}. Delete the folder {path} and make it again."
        )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ArtifactError."""
    try:
        check_fits_memory(file)
        return load_file(file)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: a type that torch has not
        raise ArtifactError(f"{file} cannot be read: {error}") from error


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else f"{value!r:.80}"
