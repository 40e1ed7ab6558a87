"""Protect users' files: only files that folora wrote, and that are unchanged, are replaced or deleted.

A folder that folora writes for the user holds ``folora.json``, a list of the files it wrote with their
checksums. A file that is not listed, or was changed since, is not replaced: the error names it. Other
files in the folder are not touched. The list is written before the files, so that a killed process
leaves no file that the next one would not recognize.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from folora.errors import ConfigError
from folora.runtime.storage import (
    LONGEST_NAME,
    check_place,
    check_writable,
    file_sha256,
    json_text,
    malformed_is_damaged,
    names_in,
    read_sealed,
    sealed,
    sync_one,
    write_atomically,
    write_sealed,
)

LIST = "folora.json"
LONGEST_TARGET = LONGEST_NAME - len("..folora-0123456789abcdef.tmp")  # bytes

Files = dict[str, list[str]]
"""By name, the checksums that a file may have: the present one and the one about to be written."""


def check_own(folder: Path, kind: str, names: Iterable[str] | None = None) -> Files:
    """Refuse to replace files that folora did not write, or that were changed since; returns the list.

    `kind` is the required kind of folder, if it has a list. `names` are the files that are about to be
    written; default is all that are listed.

    Raises:
        ConfigError: A file is not folora's, or was changed; it is named.
        ArtifactError: The list is damaged.
    """
    listed = _listed(folder, kind)
    for name in listed if names is None else names:
        file = folder / name
        if not os.path.lexists(file):
            continue
        check_place(file, "and folora would replace it; move it away")
        if name not in listed:
            raise ConfigError(
                f"{file} would be replaced, but {folder / LIST} does not say that folora wrote it; "
                "move it away, or choose another folder"
            )
        if file_sha256(file) not in listed[name]:
            raise ConfigError(
                f"{file} would be replaced, but it was changed since folora wrote it; move it away "
                "to have it written again, or choose another folder"
            )
    return listed


def is_own(path: Path) -> bool:
    """Whether folora listed a file, or wrote a folder. Raises ArtifactError if a list is damaged."""
    if path.is_symlink() or not path.exists():
        return False
    return (path / LIST).is_file() if path.is_dir() else path.name in _listed(path.parent)


def check_owned_folder(folder: Path, kind: str) -> None:
    """Refuse an export folder that is neither new, nor empty, nor written by folora.

    Raises:
        ConfigError: It holds other files, or folora's files were changed.
    """
    check_writable(folder, "the export folder")
    _check_length(folder)
    names = [] if os.path.lexists(folder / LIST) or not folder.is_dir() else os.listdir(folder)
    if names:
        raise ConfigError(
            f"{folder} holds {min(names)!r}, and no {LIST} that says that folora wrote it; choose a new "
            "or an empty folder, or move that file away"
        )
    check_own(folder, kind)


def check_target(file: Path) -> None:
    """Refuse a path that no regular file can be written to: a folder, a link, a device, a long name.

    Raises:
        ConfigError: The path is named.
    """
    check_writable(file.parent, "the folder of")
    _check_length(file)
    check_place(file, "but must be a new or a regular file")


def write_own(file: Path, kind: str, write: Callable[[Path], object]) -> None:
    """Write a file into a folder that may hold users' files, and list it.

    Nothing is written if the file has the same bytes already.

    Raises:
        ConfigError: The existing file is not folora's; see `check_own`.
        ArtifactError: It cannot be written.
    """

    def put(temporary: Path, file: Path) -> None:
        folder, name = file.parent, file.name
        listed = check_own(folder, kind, [name])
        new = {file_sha256(temporary)}
        there = {file_sha256(file)} if file.exists() else set()
        if new != there:
            files = {**listed, name: sorted(new | there)}
            write_sealed(folder / LIST, {"kind": kind, "files": dict(sorted(files.items()))})
            os.replace(temporary, file)

    write_atomically(file, write, put)


def write_owned_folder(folder: Path, kind: str, write: Callable[[Path], object]) -> None:
    """Write a folder with a list of its files; an existing folder is updated file by file.

    Users' files stay. Files that were listed before are removed first, so that no mixture of old and new
    files can be loaded. Nothing is written if all files have the same bytes already. `write` is called with
    the path of the folder to create; it may create subfolders.

    Raises:
        ConfigError: See `check_owned_folder`.
        ArtifactError: It cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    check_owned_folder(folder, kind)

    def whole(target: Path) -> None:
        write(target)
        files = {name: [checksum] for name, checksum in checksums(target).items()}
        text = json_text(sealed({"kind": kind, "files": files}))
        (target / LIST).write_text(text, encoding="utf-8")

    def put(temporary: Path, folder: Path) -> None:
        files, old = _listed(temporary, kind), check_own(folder, kind)
        there = names_in(folder)
        if files == old and set(files) <= there:
            return
        if others := sorted({*files} & there - {*old}):
            raise ConfigError(
                f"{folder / others[0]} would be replaced, but folora did not write it; move it away"
            )
        for name in sorted({*old} & there):  # names cannot point outside the folder
            (folder / name).unlink()
        for name in (LIST, *sorted(files)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, folder / name)
            sync_one((folder / name).parent)

    write_atomically(folder, whole, put if folder.is_dir() else None)


def _listed(folder: Path, kind: str | None = None) -> Files:
    """The list of a folder, of this kind (default: any); empty if there is none. Raises FoLoraError."""
    file = folder / LIST
    if not os.path.lexists(file):
        return {}
    check_place(file, "so it is not a list of folora's; move it away")
    found = read_sealed(file)
    if kind is not None and found.get("kind") != kind:
        raise ConfigError(
            f"{file} says that {folder} is of the kind {found.get('kind')!r:.80}, not {kind!r}; choose "
            "another folder"
        )
    with malformed_is_damaged(file):
        files = {str(n): [str(c) for c in checksums] for n, checksums in found["files"].items()}
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
            raise ValueError("a name points outside the folder")
        return files


def checksums(folder: Path) -> dict[str, str]:
    """By name, the checksum of every file in a folder except the list. Raises ArtifactError."""
    return {name: file_sha256(folder / name) for name in sorted(names_in(folder) - {LIST})}


def _check_length(path: Path) -> None:
    if len(os.fsencode(path.name)) > LONGEST_TARGET:
        raise ConfigError(
            f"the name of {path} is too long; it may have at most {LONGEST_TARGET} bytes"
        )
