"""What stages leave on disk: tensors in safetensors, facts about them in a JSON manifest.

An artifact is a folder with ``tensors.safetensors`` and ``manifest.json``. It is written under a
temporary name, synced, and renamed, so it is there as a whole or not at all. The manifest says what
the artifact belongs to (fingerprints of model, tokenizer and data) and carries a checksum; reading
compares both before anything is trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from folora.errors import ArtifactError, ConfigError, MismatchError

FORMAT_VERSION = 1
TENSORS, MANIFEST = "tensors.safetensors", "manifest.json"
FINGERPRINT_VALUES = 1024
LONGEST_NAME = 255  # bytes; what common file systems take


@dataclass(frozen=True)
class Artifact:
    """Tensors by name, and the manifest that came with them."""

    tensors: dict[str, Tensor]
    manifest: dict[str, Any]


def software_versions() -> dict[str, str]:
    """Versions of the packages that shape a result."""
    found = {}
    for package in ("folora", "torch", "transformers", "peft", "trl", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, sync what it wrote, and rename it.

    Works for a file and for a folder; a folder that is already there is replaced.

    Raises:
        ArtifactError: The disk or the folder does not allow it; the message names the path.
    """
    path = Path(path)
    # Beside the target and not in a folder of its own: killed after the rename, nothing is left.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    replaced = temporary.with_name(f"{temporary.name}.replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.*"):  # of a writer that was killed
            _remove(stale)
        write(temporary)
        for file in [temporary] if temporary.is_file() else sorted(temporary.rglob("*")):
            if file.is_file():
                _sync(file)
        if path.is_dir():
            path.rename(replaced)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ArtifactError(f"cannot write {path}: {error}") from error
    finally:
        _remove(temporary)
        _remove(replaced)


def check_writable(folder: Path, what: str) -> None:
    """Refuse, before any work is done for it, a folder that cannot be. Raises ConfigError."""
    place = os.path.abspath(folder)
    while not os.path.lexists(place) and os.path.dirname(place) != place:
        if "\0" in place or len(os.fsencode(os.path.basename(place))) > LONGEST_NAME:
            raise ConfigError(f"{what} {str(folder)!r} is no name that a folder can have")
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ConfigError(f"{what} {folder} must be a folder, or become one, but {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{what} {folder} cannot be written: no permission in {place}")


def check_replaceable(folder: Path, own: Collection[str]) -> None:
    """Refuse to replace a folder that holds something else than `own` files. Raises ConfigError."""
    if folder.is_dir() and (others := sorted({p.name for p in folder.iterdir()} - set(own))):
        raise ConfigError(
            f"{folder} holds {others[0]!r}, which would be lost; give a new or an empty folder"
        )


def _remove(path: Path) -> None:
    """Remove a file or a folder if it is there and can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""

    def write(target: Path) -> None:
        target.write_text(text, encoding="utf-8")

    write_atomically(Path(path), write)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(Path(path), json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ArtifactError naming the file if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def write_artifact(
    path: Path, kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]
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
            "format_version": FORMAT_VERSION,
            "sha256": file_sha256(target / TENSORS),
            "versions": software_versions(),
            **facts,
        }
        (target / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    write_atomically(Path(path), write)


def read_manifest(path: Path, kind: str, expected: dict[str, Any] | None = None) -> dict[str, Any]:
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
) -> dict[str, Any]:
    """A manifest that was read from a file of an artifact, if it is one of this kind.

    See `read_manifest` for what is raised.
    """
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else None
        raise ArtifactError(f"{file} holds {found!r}, but {kind!r} is needed here")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format version {manifest.get('format_version')}, this folora reads "
            f"{FORMAT_VERSION}; make it again"
        )
    for name, value in (expected or {}).items():
        if manifest.get(name) != value:
            raise MismatchError(
                f"{artifact} belongs to another {name.replace('_', ' ')}: it was made for "
                f"{_short(manifest.get(name))}, this run has {_short(value)}. Give the right model "
                "and data, or make it again in another folder."
            )
    return manifest


def read_artifact(path: Path, kind: str, expected: dict[str, Any] | None = None) -> Artifact:
    """Read an artifact after checking manifest and checksum; see `read_manifest`."""
    manifest = read_manifest(path, kind, expected)
    file = Path(path) / TENSORS
    try:
        checksum = file_sha256(file)
        if checksum != manifest.get("sha256"):
            raise ArtifactError(
                f"{file} is damaged: its checksum is {checksum[:12]}, its manifest says "
                f"{str(manifest.get('sha256'))[:12]}. Delete the folder {path} and make it again."
            )
        return Artifact(load_file(file), manifest)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def tokens_fingerprint(rows: Iterable[Iterable[int]]) -> str:
    """SHA-256 of token rows."""
    result = hashlib.sha256()
    for row in rows:
        result.update((",".join(map(str, row)) + "\n").encode())
    return result.hexdigest()


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and up to 1024 evenly spaced values of every parameter.

    Values are rounded to bf16 first, so the same weights loaded in bf16 or widened to fp32 agree;
    another model, revision or quantization does not.
    """
    result = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        result.update(f"{name}{tuple(p.shape)}".encode())
        if p.is_meta:
            continue
        flat = p.detach().reshape(-1)
        stride = max(1, flat.numel() // FINGERPRINT_VALUES)
        values = flat[::stride]
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.int16)
        result.update(values.cpu().numpy().tobytes())
    return result.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary: equal for tokenizers that give every token the same id."""
    return json_fingerprint(sorted(tokenizer.get_vocab().items()))


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else repr(value)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
