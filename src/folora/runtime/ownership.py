"""What folora wrote in a folder where the user may have files too: a sealed list with checksums.

Beside the files that folora writes for the user lies ``folora.json``. Only what it lists, and what is
still as it was written, is replaced or deleted; everything else is refused by name, and files under
other names are left alone. The list is written before the files, so that a process that is killed
leaves nothing of its own that it would not recognize.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from folora.errors import ArtifactError, ConfigError
from folora.runtime.storage import (
    LONGEST_NAME,
    check_writable,
    file_sha256,
    malformed_is_damaged,
    obstacle,
    read_sealed,
    sealed,
    sync_one,
    write_atomically,
    write_sealed,
)

LIST = "folora.json"
LONGEST_TARGET = LONGEST_NAME - len("..folora-0123456789abcdef.tmp")  # bytes

Files = dict[str, list[str]]
"""By name, the checksums that the file may have: of what is there, and of what is about to be."""


def check_own(folder: Path, kind: str, names: Iterable[str] | None = None) -> Files:
    """Refuse to replace files that are not as folora wrote them.

    Args:
        folder: Where they are, or will be.
        kind: What the folder's list must say of it, if there is one.
        names: The files that are about to be written; default is all that are listed.

    Returns:
        What the list says; empty if there is none.

    Raises:
        ConfigError: A file is somebody else's, or was changed; it is named.
        ArtifactError: The list is damaged.
    """
    listed = _listed(folder, kind)
    for name in listed if names is None else names:
        file = folder / name
        if not os.path.lexists(file):
            continue
        if why := obstacle(file):
            raise ConfigError(f"{file} {why}, and folora would replace it; move it away")
        if name not in listed:
            raise ConfigError(
                f"{file} would be replaced, but {folder / LIST} does not say that folora wrote it; "
                "move it away, or choose another folder"
            )
        if _sha256(file) not in listed[name]:
            raise ConfigError(
                f"{file} would be replaced, but it was changed since folora wrote it; move it away "
                "to have it written again, or choose another folder"
            )
    return listed


def check_owned_folder(folder: Path, kind: str, what: str) -> None:
    """Refuse a folder for an export that is neither new, nor empty, nor one that folora wrote.

    Raises:
        ConfigError: It holds something else, or what folora wrote there was changed.
    """
    check_writable(folder, what)
    _check_length(folder)
    names = [] if os.path.lexists(folder / LIST) or not folder.is_dir() else os.listdir(folder)
    if names:
        raise ConfigError(
            f"{folder} holds {min(names)!r}, and no {LIST} that says that folora wrote it; give a new "
            "or an empty folder, or move that away"
        )
    check_own(folder, kind)


def check_target(file: Path) -> None:
    """Refuse what no file can be written to: a folder, a link, a device, or where there is no room.

    Raises:
        ConfigError: The file is named.
    """
    check_writable(file.parent, "the folder of")
    _check_length(file)
    if why := obstacle(file):
        raise ConfigError(f"{file} {why}, but must be a file to make or replace")


def write_own(file: Path, kind: str, write: Callable[[Path], object]) -> None:
    """Write a file in a folder that may hold others' files too, and list it.

    Nothing is done if the file is the same already.

    Args:
        file: The file to make or replace.
        kind: What the list says of the folder.
        write: Given the path to write to.

    Raises:
        ConfigError: The file that is there is not folora's; see `check_own`.
        ArtifactError: It cannot be written.
    """

    def put(temporary: Path, file: Path) -> None:
        folder, name = file.parent, file.name
        listed = check_own(folder, kind, [name])
        new = {_sha256(temporary)}
        there = {_sha256(file)} if file.exists() else set()
        if new != there:
            files = {**listed, name: sorted(new | there)}
            write_sealed(folder / LIST, _facts(kind, files))
            os.replace(temporary, file)

    write_atomically(file, write, put)


def write_owned_folder(folder: Path, kind: str, write: Callable[[Path], object]) -> None:
    """Write a folder with a list of its files; into one that is there, file by file.

    Files that folora did not write stay. What was listed before is removed before the new files
    come, so that no mixture of both can be loaded. Nothing is done if all files are the same already.

    Args:
        folder: The folder to make, or one that `check_owned_folder` lets pass.
        kind: What the list says of the folder.
        write: Given the path of the folder to make; it may make subfolders.

    Raises:
        ConfigError: See `check_owned_folder`.
        ArtifactError: It cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    check_owned_folder(folder, kind, "the export folder")

    def whole(target: Path) -> None:
        write(target)
        files = {name: [_sha256(target / name)] for name in _names(target)}
        text = json.dumps(sealed(_facts(kind, files)), indent=1) + "\n"
        (target / LIST).write_text(text, encoding="utf-8")

    def put(temporary: Path, folder: Path) -> None:
        files, former = _listed(temporary, kind), check_own(folder, kind)
        there = _names(folder)
        if files == former and set(files) <= there:
            return
        if others := sorted({*files} & there - {*former}):
            raise ConfigError(
                f"{folder / others[0]} would be replaced, but folora did not write it; move it away"
            )
        for name in sorted({*former} & there):  # and is not looked for outside of the folder
            (folder / name).unlink()
        for name in (LIST, *sorted(files)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, folder / name)
            sync_one((folder / name).parent)

    write_atomically(folder, whole, put if folder.is_dir() else None)


def _listed(folder: Path, kind: str) -> Files:
    """What the list of a folder says; empty if there is none. Raises FoLoraError."""
    file = folder / LIST
    if not os.path.lexists(file):
        return {}
    if why := obstacle(file):
        raise ConfigError(f"{file} {why}, so it is no list of folora's; move it away")
    found = read_sealed(file)
    if found.get("kind") != kind:
        raise ConfigError(
            f"{file} says that {folder} is of the kind {found.get('kind')!r:.80}, not {kind!r}; choose "
            "another folder"
        )
    with malformed_is_damaged(file):
        files = {str(n): [str(c) for c in checksums] for n, checksums in found["files"].items()}
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            raise ValueError("a name leads out of the folder")
        return files


def _facts(kind: str, files: Files) -> dict[str, Any]:
    return {"kind": kind, "files": dict(sorted(files.items()))}


def _names(folder: Path) -> set[str]:
    """Files in a folder and its subfolders, without the list; links are not followed."""
    files = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return {p.relative_to(folder).as_posix() for p in files if p != folder / LIST}


def _check_length(path: Path) -> None:
    if len(os.fsencode(path.name)) > LONGEST_TARGET:
        raise ConfigError(f"the name of {path} is too long; it may have {LONGEST_TARGET} bytes")


def _sha256(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error
