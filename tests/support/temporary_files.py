"""Find temporary files that a killed process left behind."""

from __future__ import annotations

from pathlib import Path

from folora.runtime.storage import LOCK


def temporary(folder: Path) -> list[Path]:
    """Hidden files in a folder and its subfolders, except its lock, which is permanent."""
    return [p for p in folder.rglob(".*") if p.name != LOCK]
