"""The Trainer's checkpoints: which are whole, and whether they still say what was written.

The Trainer writes a checkpoint file by file. When it is done, folora syncs the files and adds a sealed
list of their checksums; a folder without that list was not written to the end.
"""

from __future__ import annotations

import logging
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from folora.disk import file_sha256, fitting, read_sealed, sync, write_sealed
from folora.errors import ArtifactError

logger = logging.getLogger(__name__)

SEAL = "folora.json"


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
    steps = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and (path / SEAL).exists():
            steps[int(number)] = path
        else:
            logger.info("%s was not written to the end and is passed over", path)
    if not steps:
        return None
    latest = steps[max(steps)]
    check_checkpoint(latest)
    return latest


def check_checkpoint(folder: Path) -> None:
    """Compare every file with its checksum. Raises ArtifactError naming the one that differs."""
    listed = read_sealed(folder / SEAL)["files"]
    with fitting(folder / SEAL):
        listed = {str(name): str(checksum) for name, checksum in listed.items()}
    there = {p.relative_to(folder).as_posix() for p in _files(folder)}
    for name, checksum in listed.items():
        file = folder / name
        if name not in there:  # and is not looked for outside of the folder
            raise ArtifactError(f"{file} is missing. {way_out(folder)}")
        try:
            found = file_sha256(file)
        except OSError as error:
            raise ArtifactError(f"{file} cannot be read: {error}. {way_out(folder)}") from error
        if found != checksum:
            raise ArtifactError(
                f"{file} is damaged: its checksum is {found[:12]}, but {checksum[:12]} was written. "
                f"{way_out(folder)}"
            )
    if strange := sorted(there - {*listed}):
        raise ArtifactError(
            f"{folder / strange[0]} was not written by this training. {way_out(folder)}"
        )


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / SEAL)


def way_out(folder: Path) -> str:
    """What to do about a checkpoint that cannot be used, for a message."""
    return (
        f"Delete {folder}; training then goes on from the checkpoint before it, or from the start."
    )
