"""Atomic writes, JSON with checksums, and folder locks.

A file or folder is written under a temporary name beside its target, synced, and renamed. JSON that a
later stage reads is *sealed*: it holds a format version and a checksum of its values. A lock admits one
process at a time to a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from folora.errors import ArtifactError, ConfigError, FoLoraError

logger = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT_VERSION = 3
VERSION, CHECKSUM = "format_version", "checksum"
LOCK = ".folora.lock"
LOCK_SECONDS = 3.0  # timeout
LONGEST_NAME = 255  # bytes, on common file systems
TEMPORARY = r"\.{}\.folora-[0-9a-f]{{16}}\.(tmp|old)"  # our temporary names beside a target
LARGEST_JSON = 2**28  # bytes
DEEPEST_JSON = 64  # nested brackets


class Facts(dict[str, Any]):
    """Values of a sealed file; a missing key raises ArtifactError instead of KeyError."""

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        super().__init__(values)
        self.file = file

    def __missing__(self, name: str) -> Any:
        raise ArtifactError(
            f"{self.file} has no entry {name!r}; it was not written by this version of folora"
        )


@contextlib.contextmanager
def malformed_is_damaged(what: object) -> Iterator[None]:
    """Turn errors of parsing a file's values into ArtifactError: a valid checksum proves no valid contents.

    Raises:
        ArtifactError: `what` holds unexpected names, types or shapes.
    """
    try:
        yield
    except FoLoraError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise ArtifactError(f"{what} has unexpected contents: {reason:.200}") from e


def write_atomically(
    path: Path, write: Callable[[Path], object], put: Callable[[Path, Path], None] | None = None
) -> None:
    """Call `write` with a temporary path beside `path`, sync the file or folder it wrote, and rename it.

    An existing folder is replaced only if all its files have the same names as new ones. Permissions follow
    the umask. `put` replaces the final rename; it is called with the temporary path and `path`.

    Raises:
        ArtifactError: It cannot be written, or `path` is occupied by something else.
    """
    path = Path(path)
    # Beside the target, not in a temporary folder: a process killed after the rename leaves nothing.
    temporary = path.with_name(f".{path.name}.folora-{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        temporary.unlink()
        write(temporary)
        for file in [temporary, *temporary.rglob("*")]:
            if file.is_file():  # safetensors makes files readable by the owner only
                file.chmod(mode)
        sync(temporary)
        (put or _replace)(temporary, path)
        sync_one(path.parent)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a NUL in the name
        if isinstance(error, FoLoraError):
            raise
        raise ArtifactError(f"cannot write {path}: {error}") from error
    finally:
        _remove(temporary)
        _remove(temporary.with_suffix(".old"))


def _replace(temporary: Path, path: Path) -> None:
    """Rename the temporary path. Raises ArtifactError if the target is occupied by something else."""
    folder = temporary.is_dir()
    if why := obstacle(path, folder):
        raise ArtifactError(f"cannot write {path}: it {why}; move it away")
    if folder and path.is_dir():
        others = {p.name for p in path.iterdir()} - {p.name for p in temporary.iterdir()}
        if others:
            raise ArtifactError(
                f"cannot replace {path}: it holds {min(others)!r}, which folora did not write; move "
                "that file away"
            )
        old = temporary.with_suffix(".old")
        path.rename(old)
        try:
            os.replace(temporary, path)
        except BaseException:
            old.rename(path)
            raise
    else:
        os.replace(temporary, path)


def obstacle(path: Path, folder: bool = False) -> str | None:
    """Why a file (or a folder) must not be written at a path: a link, device or wrong type is there."""
    try:
        mode = os.lstat(path).st_mode
    except (OSError, ValueError):  # nothing is there, or writing will raise
        return None
    if stat.S_ISLNK(mode):
        return "is a symbolic link"
    if folder or stat.S_ISDIR(mode):
        return None if folder and stat.S_ISDIR(mode) else f"is a {'file' if folder else 'folder'}"
    if not stat.S_ISREG(mode):
        return "is not a regular file"
    return None if mode & stat.S_IWUSR else "is read-only"


def check_place(path: Path, reason: str, folder: bool = False) -> None:
    """Raise a ConfigError that ends with a reason if a file (or a folder) must not be written at a path."""
    if why := obstacle(path, folder):
        raise ConfigError(f"{path} {why}, {reason}")


def discard(path: Path) -> None:
    """Remove a file or a folder; after an interruption `sweep` removes the rest."""
    temporary = path.with_name(f".{path.name}.folora-{secrets.token_hex(8)}.tmp")
    path.rename(temporary)
    _remove(temporary)


def sweep(folder: Path, target: str | None = None) -> None:
    """Remove temporary files that killed writers of a target (default: any) left in a folder.

    Raises:
        OSError: The folder cannot be read.
    """
    for name in os.listdir(folder):
        if is_temporary(name, target):
            _remove(folder / name)


def is_temporary(name: str, target: str | None = None) -> bool:
    """Whether a name is a temporary one of `write_atomically` for a target (default: any)."""
    pattern = TEMPORARY.format(".+" if target is None else re.escape(target))
    return re.fullmatch(pattern, name, re.DOTALL) is not None


def names_in(folder: Path) -> set[str]:
    """Relative names of all files in a folder and its subfolders; links are not followed."""
    files = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return {p.relative_to(folder).as_posix() for p in files if not is_temporary(p.name)}


def sync(path: Path) -> None:
    """Sync a file, or a folder and everything in it, to disk. Raises OSError."""
    for inside in [path, *path.rglob("*")]:
        sync_one(inside)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises ArtifactError."""
    write_atomically(path, lambda target: target.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Raises ArtifactError."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """The text of a JSON file."""
    return json.dumps(value, indent=1) + "\n"


@contextlib.contextmanager
def reading(place: object) -> Iterator[None]:
    """Turn errors of reading and parsing a file into ArtifactError, which names it."""
    try:
        yield
    except (OSError, ValueError, RecursionError, SafetensorError, KeyError) as error:
        raise ArtifactError(f"{place} cannot be read: {error}") from error


def read_text(path: Path) -> str:
    """Read a text file. Raises ArtifactError if it is missing, too large or not UTF-8."""
    check_regular_file(path)
    with reading(path):
        if not os.path.lexists(path):
            raise ArtifactError(f"{path} is missing")
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ArtifactError(f"{path} has {size} bytes, but must have at most {LARGEST_JSON}")
        return path.read_text(encoding="utf-8")


def parse_json(text: str, place: object) -> Any:
    """Parse JSON. Raises ArtifactError naming the place if the text is damaged."""
    with reading(place):
        return checked_depth(json.loads(text))


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ArtifactError naming the file if it is missing or damaged."""
    return parse_json(read_text(path), path)


def checked_depth(value: T) -> T:
    """Refuse a JSON value that is nested too deeply for recursion. Raises ValueError."""
    level: list[Any] = [value]
    for _ in range(DEEPEST_JSON):
        lists = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [inner for outer in lists for inner in outer]
    if level:
        raise ValueError(f"it is nested more than {DEEPEST_JSON} levels deep")
    return value


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Add the format version and a checksum to JSON values; see `unsealed`."""
    versioned = json.loads(json.dumps({VERSION: FORMAT_VERSION, **values}))  # as it will be read
    return {**versioned, CHECKSUM: json_fingerprint(versioned)}


def unsealed(found: Any, file: Path, owner: Path | None = None) -> Facts:
    """Verify the version and checksum of a sealed JSON object from `file` and return its values.

    `owner` is the folder that is useless without the file, if there is one, for the remedy.

    Raises:
        ArtifactError: It has another version, or the checksum differs.
    """
    version = found.get(VERSION) if isinstance(found, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format version {version if version is not None else 1}, this folora reads "
            f"{FORMAT_VERSION}; move {owner or file} away and rerun the command"
        )
    values = {name: value for name, value in found.items() if name != CHECKSUM}
    checksum = json_fingerprint(values)
    del values[VERSION]
    if checksum != found.get(CHECKSUM):
        raise ArtifactError(
            f"{file} is damaged: its checksum is {checksum[:12]}, but the recorded one is "
            f"{str(found.get(CHECKSUM))[:12]}. Delete {owner or file} and rerun the command."
        )
    return Facts(values, file)


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write a sealed JSON file atomically. Raises ArtifactError."""
    write_json(path, sealed(values))


def read_sealed(path: Path) -> Facts:
    """Read and verify a sealed JSON file. Raises ArtifactError; see `read_json` and `unsealed`."""
    return unsealed(read_json(path), path)


def json_fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises ArtifactError."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_regular_file(path: Path) -> None:
    """Refuse a named pipe or a device, on which reading would block. Raises ArtifactError.

    Missing files and folders pass; the caller reports them.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ArtifactError(f"{path} is a named pipe or a device, but must be a regular file")


def check_writable(folder: Path, what: str) -> None:
    """Refuse a folder that cannot be created or written. Raises ConfigError."""
    place = os.path.abspath(folder)
    while not os.path.lexists(place) and os.path.dirname(place) != place:
        if "\0" in place or len(os.fsencode(os.path.basename(place))) > LONGEST_NAME:
            raise ConfigError(f"{what} {str(folder)!r} is not a valid folder name")
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ConfigError(f"{what} {folder} must be a folder or a new path, but {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{what} {folder} cannot be written: no permission in {place}")


def check_lock(folder: Path) -> None:
    """Refuse a lock file that folora did not create. Raises ConfigError."""
    file = folder / LOCK
    if (why := obstacle(file)) or (file.exists() and file.stat().st_size):
        raise ConfigError(
            f"{file} {why or 'is not empty'}, so it is not a lock file of folora; move it away"
        )


@contextlib.contextmanager
def exclusive(folder: Path, seconds: float | None = None) -> Iterator[None]:
    """Hold a folder's lock while the block runs; blocks may be nested.

    The system releases it if the process is killed.

    Raises:
        ArtifactError: Another process held it for so many seconds, or the folder cannot be written.
    """
    lock = FileLock(folder / LOCK, is_singleton=True)  # one for each path, which counts
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_lock(folder)
        lock.acquire(LOCK_SECONDS if seconds is None else seconds)
    except Timeout:
        raise ArtifactError(
            f"another process of folora is using {folder}; wait for it, or choose another output folder"
        ) from None
    except NotImplementedError:  # some network file systems
        logger.warning("%s cannot be locked; make sure that no other process uses it", folder)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _remove(path: Path) -> None:
    """Remove a file or a folder if possible; a link is removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_one(path: Path) -> None:
    """Sync one file, or a folder's entries, to disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
