"""The Trainer's checkpoints: which are whole, and whether they still say what was written.

The Trainer writes a checkpoint file by file. Before, folora marks the folder as its own by an empty list
of files; after, it syncs the files and fills the list with their checksums. A folder with an empty list
was not written to the end; one without a list is not ours, and is neither used nor written to.
"""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from folora.errors import ArtifactError, ConfigError
from folora.runtime.ownership import LIST
from folora.runtime.storage import (
    discard,
    file_sha256,
    is_temporary,
    malformed_is_damaged,
    obstacle,
    read_sealed,
    sync,
    write_sealed,
)

logger = logging.getLogger(__name__)

SEAL = LIST


def check_checkpoints(folder: Path, request: str) -> None:
    """Refuse a training folder with checkpoints that folora did not write.

    Args:
        folder: Of the training; may be missing.
        request: Name of the file in it that says what is trained.

    Raises:
        ConfigError: A checkpoint is somebody else's, or a link; it is named.
    """
    for step, path in _numbered(folder):
        if why := obstacle(path, folder=True):
            raise ConfigError(
                f"{path} {why}, but training writes its checkpoint there; move it away"
            )
        ours = (folder / request).exists() and (path / SEAL).exists()
        if not ours and any(not is_temporary(p.name) for p in path.iterdir()):
            raise ConfigError(
                f"{path} was not written by this training (it has no {SEAL}, or {folder} no {request}); "
                f"move it away, so that it is not taken for the checkpoint of step {step}"
            )


def begin_checkpoint(folder: Path) -> None:
    """Mark a checkpoint's folder as ours before anything is in it. Raises ArtifactError."""
    if not (folder / SEAL).exists():
        write_sealed(folder / SEAL, {"files": {}})


def prune(folder: Path, keep: int, best: str | None = None) -> None:
    """Delete all but the latest checkpoints; one that is not as it was written is kept.

    Args:
        folder: Of the training.
        keep: How many are left, `best` among them.
        best: One that is never deleted.
    """
    complete = []
    for _, path in sorted(_numbered(folder)):
        with contextlib.suppress(ArtifactError):  # a damaged one is kept
            complete += [path] if _is_complete(path) else []
    kept = {complete[-1], *([Path(best)] if best else [])} if complete else set()
    for path in reversed(complete):
        kept |= {path} if len(kept) < keep else set()
    for path in [path for path in complete if path not in kept]:
        try:
            check_checkpoint(path)
            discard(path)
        except (ArtifactError, OSError) as error:
            logger.warning("the former checkpoint %s is kept: %s", path, error)


def seal_checkpoint(folder: Path) -> None:
    """Add the checksums of all files, after these have reached the disk. Raises ArtifactError."""
    try:
        sync(folder)
        files = {p.relative_to(folder).as_posix(): file_sha256(p) for p in _files(folder)}
    except OSError as error:
        raise ArtifactError(f"cannot write the checkpoint {folder}: {error}") from error
    write_sealed(folder / SEAL, {"files": files})


def latest_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint of a training that was written to the end; None if there is none.

    Raises:
        ArtifactError: It is damaged; the file is named.
    """
    for _, path in sorted(_numbered(folder), reverse=True):
        if _is_complete(path):
            check_checkpoint(path)
            return path
        logger.info("%s was not written to the end and is skipped", path)
    return None


def check_checkpoint(folder: Path) -> None:
    """Compare every file with its checksum. Raises ArtifactError naming the one that differs."""
    listed = read_sealed(folder / SEAL)["files"]
    with malformed_is_damaged(folder / SEAL):
        listed = {str(name): str(checksum) for name, checksum in listed.items()}
    there = {p.relative_to(folder).as_posix() for p in _files(folder)}
    for name, checksum in listed.items():
        file = folder / name
        if name not in there:  # and is not looked for outside of the folder
            raise ArtifactError(f"{file} is missing. {remedy(folder)}")
        try:
            found = file_sha256(file)
        except OSError as error:
            raise ArtifactError(f"{file} cannot be read: {error}. {remedy(folder)}") from error
        if found != checksum:
            raise ArtifactError(
                f"{file} is damaged: its checksum is {found[:12]}, but {checksum[:12]} was written. "
                f"{remedy(folder)}"
            )
    if strange := sorted(there - {*listed}):
        raise ArtifactError(
            f"{folder / strange[0]} was not written by this training. {remedy(folder)}"
        )


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints with their steps, by the Trainer's names; a user's copy has another one."""
    names = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)")
    found = [(names.fullmatch(p.name), p) for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return [(int(match[1]), path) for match, path in found if match]


def _is_complete(checkpoint: Path) -> bool:
    seal = checkpoint / SEAL
    return seal.exists() and read_sealed(seal).get("files") != {}


def _files(folder: Path) -> list[Path]:
    files = (p for p in folder.rglob("*") if p.is_file() and p != folder / SEAL)
    return sorted(p for p in files if not is_temporary(p.name))


def remedy(folder: Path) -> str:
    """What to do about a checkpoint that cannot be used, for a message."""
    return (
        f"Delete {folder}; training then goes on from the checkpoint before it, or from the start."
    )
