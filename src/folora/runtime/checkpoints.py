"""Integrity of the Trainer's checkpoints: incomplete and damaged ones are detected.

The Trainer writes a checkpoint file by file. folora first writes an empty list of files to the folder;
afterwards it syncs the files and stores their checksums in the list. A folder with an empty list is
incomplete. A folder without a list was not written by folora and is neither read nor modified.
"""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from folora.errors import ArtifactError, ConfigError
from folora.runtime.ownership import LIST, checksums
from folora.runtime.storage import (
    check_place,
    discard,
    file_sha256,
    malformed_is_damaged,
    names_in,
    read_sealed,
    sync,
    write_sealed,
)

logger = logging.getLogger(__name__)

SEAL = LIST


def check_checkpoints(folder: Path, request: str) -> None:
    """Refuse a training folder with checkpoints that folora did not write.

    `request` is the name of the file in it that describes the training.

    Raises:
        ConfigError: A checkpoint was not written by folora, or is a link; it is named.
    """
    for step, path in _numbered(folder):
        check_place(path, "but training writes its checkpoint there; move it away", folder=True)
        ours = (folder / request).exists() and (path / SEAL).exists()
        if not ours and names_in(path):
            raise ConfigError(
                f"{path} was not written by this training (it has no {SEAL}, or {folder} no {request}); "
                f"move it away, so that it is not mistaken for the checkpoint of step {step}"
            )


def begin_checkpoint(folder: Path) -> None:
    """Mark a checkpoint's folder as written by folora before files are added. Raises ArtifactError."""
    if not (folder / SEAL).exists():
        write_sealed(folder / SEAL, {"files": {}})


def prune(folder: Path, keep: int, best: str | None = None) -> None:
    """Delete all but the latest `keep` checkpoints, `best` included; modified or damaged ones stay."""
    complete = []
    for _, path in sorted(_numbered(folder)):
        with contextlib.suppress(ArtifactError):  # damaged ones are not deleted
            complete += [path] if _is_complete(path) else []
    kept = {complete[-1], *([Path(best)] if best else [])} if complete else set()
    for path in reversed(complete):
        kept |= {path} if len(kept) < keep else set()
    for path in [path for path in complete if path not in kept]:
        try:
            check_checkpoint(path)
            discard(path)
        except (ArtifactError, OSError) as error:
            logger.warning("the old checkpoint %s is not deleted: %s", path, error)


def seal_checkpoint(folder: Path) -> None:
    """Sync all files and store their checksums. Raises ArtifactError."""
    try:
        sync(folder)
    except OSError as error:
        raise ArtifactError(f"cannot write the checkpoint {folder}: {error}") from error
    write_sealed(folder / SEAL, {"files": checksums(folder)})


def latest_checkpoint(folder: Path) -> Path | None:
    """The latest complete checkpoint of a training folder; None if there is none.

    Raises:
        ArtifactError: It is damaged; the file is named.
    """
    for _, path in sorted(_numbered(folder), reverse=True):
        if _is_complete(path):
            check_checkpoint(path)
            return path
        logger.info("%s is incomplete and is skipped", path)
    return None


def check_checkpoint(folder: Path) -> None:
    """Verify the checksum of every file. Raises ArtifactError naming the first that differs."""
    listed = read_sealed(folder / SEAL)["files"]
    with malformed_is_damaged(folder / SEAL):
        listed = {str(name): str(checksum) for name, checksum in listed.items()}
    there = names_in(folder) - {SEAL}
    for name, checksum in listed.items():
        file = folder / name
        if name not in there:  # names cannot point outside the folder
            raise ArtifactError(f"{file} is missing. {remedy(folder)}")
        if (found := file_sha256(file)) != checksum:
            raise ArtifactError(
                f"{file} is damaged: its checksum is {found[:12]}, but {checksum[:12]} was written. "
                f"{remedy(folder)}"
            )
    if strange := sorted(there - {*listed}):
        raise ArtifactError(
            f"{folder / strange[0]} was not written by this training. {remedy(folder)}"
        )


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Steps and paths of the folders that are named as the Trainer names checkpoints."""
    names = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)")
    found = [(names.fullmatch(p.name), p) for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return [(int(match[1]), path) for match, path in found if match]


def _is_complete(checkpoint: Path) -> bool:
    seal = checkpoint / SEAL
    return seal.exists() and read_sealed(seal).get("files") != {}


def remedy(folder: Path) -> str:
    """The remedy for a checkpoint that cannot be used, for a message."""
    return (
        f"Delete {folder} and rerun: training resumes from the checkpoint before it, or restarts."
    )
