"""Files that are there as a whole or not at all, and that tell when they are damaged.

Everything is written under a temporary name beside its place, synced, and renamed. JSON that a later
stage relies on is sealed: it carries the checksum of what it says. One process at a time works in a
folder.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from folora.errors import ArtifactError, ConfigError, FoLoraError

logger = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT_VERSION = 3
VERSION, CHECKSUM = "format_version", "checksum"
LOCK = ".lock"
LOCK_SECONDS = 3.0  # to wait for another process
LONGEST_NAME = 255  # bytes; what common file systems take
LARGEST_JSON = 2**28  # bytes
DEEPEST_JSON = 64  # brackets in brackets


class Facts(dict[str, Any]):
    """Values of a sealed file. One that is asked for and not there is an ArtifactError."""

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        super().__init__(values)
        self.file = file

    def __missing__(self, name: str) -> Any:
        raise ArtifactError(f"{self.file} does not say {name!r}; it was not written by this folora")


@contextlib.contextmanager
def fitting(what: object) -> Iterator[None]:
    """Take apart what was read from a file of the right checksum, whoever wrote it.

    Raises:
        ArtifactError: It holds other names, types or shapes than it should; `what` is named.
    """
    try:
        yield
    except FoLoraError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        said = f"{type(e).__name__}: {e}"
        raise ArtifactError(f"{what} does not hold what it should: {said:.200}") from e


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, sync what it wrote, and rename it.

    Works for a file and for a folder; a folder that is already there is replaced. Who may read it is
    what the umask says.

    Raises:
        ArtifactError: The disk or the folder does not allow it; the message names the path.
    """
    path = Path(path)
    # Beside the target and not in a folder of its own: killed after the rename, nothing is left.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    replaced = temporary.with_name(f"{temporary.name}.replaced")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(
            f".{glob.escape(path.name)}.*"
        ):  # of a writer that was killed
            _remove(stale)
        mode = _mode_of_new(temporary)
        write(temporary)
        for file in _files(temporary):
            if stat.S_IMODE(file.stat().st_mode) != mode:  # safetensors lets only the owner read
                file.chmod(mode)
        sync(temporary)
        if path.is_dir():
            path.rename(replaced)
        os.replace(temporary, path)
        _sync_one(path.parent)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a NUL in the name
        raise ArtifactError(f"cannot write {path}: {error}") from error
    finally:
        _remove(temporary)
        _remove(replaced)


def _mode_of_new(path: Path) -> int:
    """The mode of a file that is made at a path where there is none."""
    path.touch(exist_ok=False)
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    return mode


def _files(path: Path) -> list[Path]:
    """A file, or all files in a folder."""
    inside = path.rglob("*") if path.is_dir() else [path]
    return [p for p in inside if p.is_file() and not p.is_symlink()]


def sync(path: Path) -> None:
    """Have a file, or a folder with all that is in it, reach the disk. Raises OSError."""
    if path.is_dir():
        for inside in sorted(path.rglob("*")):
            _sync_one(inside)
    _sync_one(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises ArtifactError."""

    def write(target: Path) -> None:
        target.write_text(text, encoding="utf-8")

    write_atomically(Path(path), write)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Raises ArtifactError."""
    write_text(Path(path), json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ArtifactError naming the file if it is missing or damaged."""
    path = Path(path)
    check_regular_file(path)
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ArtifactError(f"{path} has {size} bytes, but must have at most {LARGEST_JSON}")
        return checked_depth(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def checked_depth(value: T) -> T:
    """A JSON value that Python can take apart by recursion. Raises ValueError."""
    level: list[Any] = [value]
    for _ in range(DEEPEST_JSON):
        lists = [
            v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)
        ]
        level = [inner for outer in lists for inner in outer]
    if level:
        raise ValueError(f"it has more than {DEEPEST_JSON} brackets in brackets")
    return value


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Values for JSON with the version of their format and a checksum; see `unsealed`."""
    versioned = json.loads(json.dumps({VERSION: FORMAT_VERSION, **values}))  # as it will be read
    return {**versioned, CHECKSUM: json_fingerprint(versioned)}


def unsealed(found: Any, file: Path, owner: Path | None = None) -> Facts:
    """The values of a sealed JSON object.

    Args:
        found: What was parsed.
        file: Where it was read, for messages.
        owner: The folder that is worth nothing without this file, if there is one.

    Raises:
        ArtifactError: It is of another version, or not what was written.
    """
    version = found.get(VERSION) if isinstance(found, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format version {version if version is not None else 1}, this folora reads "
            f"{FORMAT_VERSION}; move {owner or file} away, so that it is made again"
        )
    values = {name: value for name, value in found.items() if name != CHECKSUM}
    checksum = json_fingerprint(values)
    del values[VERSION]
    if checksum != found.get(CHECKSUM):
        raise ArtifactError(
            f"{file} is damaged: its checksum is {checksum[:12]}, but it says "
            f"{str(found.get(CHECKSUM))[:12]}. Delete {owner or file}; it will be made again."
        )
    return Facts(values, file)


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write a sealed JSON file atomically. Raises ArtifactError."""
    write_json(path, sealed(values))


def read_sealed(path: Path) -> Facts:
    """Read a sealed JSON file. Raises ArtifactError as `read_json` and `unsealed`."""
    return unsealed(read_json(path), Path(path))


def json_fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_regular_file(path: Path) -> None:
    """Refuse what would be waited for: a named pipe or a device. Raises ArtifactError.

    A file that is missing, or a folder, is for the caller to name.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ArtifactError(f"{path} is a named pipe or a device, but must be a regular file")


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


def lock_of(folder: Path) -> FileLock:
    """The lock of a folder, for `alone`; one object may be taken again by who holds it."""
    return FileLock(folder / LOCK, timeout=LOCK_SECONDS)


@contextlib.contextmanager
def alone(lock: FileLock) -> Iterator[None]:
    """Work in a folder with no other process of folora in it; the system frees it after a kill.

    Raises:
        ArtifactError: Another process works there, or the folder cannot be written.
    """
    folder = Path(lock.lock_file).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ArtifactError(
            f"another process of folora works in {folder}; wait for it, or choose another output"
        ) from None
    except NotImplementedError:  # some network file systems
        logger.warning("%s cannot be locked; let no other process work there", folder)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error}") from error
    try:
        yield
    finally:
        lock.release()


def _remove(path: Path) -> None:
    """Remove a file or a folder if it is there and can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
