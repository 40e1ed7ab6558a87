"""Put a user's files into a folder, and compare its contents before and after."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Put = Callable[[Path], None]
"""Puts something into a folder."""


def file(name: str, content: str = "mine") -> Put:
    """A text file and its parent folders."""

    def put(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(content)

    return put


def weights(name: str) -> Put:
    """A safetensors file that is not folora's."""

    def put(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.ones(3)}, here / name, metadata={"format": "pt"})

    return put


def link(name: str, target: str) -> Put:
    """A symbolic link to a place in HERE."""

    def put(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).symlink_to(here / target)

    return put


def fifo(name: str) -> Put:
    """A named pipe, on which opening blocks."""

    def put(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(here / name)

    return put


def socket_at(name: str) -> Put:
    """Neither a file nor a folder, like a device; HERE is the working directory."""

    def put(_: Path) -> None:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(name)

    return put


def appended(name: str, text: str) -> Put:
    """Append to a file that folora wrote, as a user."""

    def put(here: Path) -> None:
        (here / name).write_text((here / name).read_text() + text)

    return put


def read_only(name: str) -> Put:
    """Make a file read-only."""
    return lambda here: (here / name).chmod(0o444)


def both(*puts: Put) -> Put:
    """Several changes in sequence."""

    def put(here: Path) -> None:
        for one in puts:
            one(here)

    return put


def folder_of(files: Mapping[str, str]) -> Put:
    """A function that writes text files, given by name."""

    def write(target: Path) -> None:
        for name, content in files.items():
            file(name, content)(target)

    return write


def snapshot(folder: Path) -> dict[str, Any]:
    """Type and content of everything in a folder; links are not followed."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content: Any = os.readlink(path) if stat.S_ISLNK(mode) else None
        content = path.read_bytes() if stat.S_ISREG(mode) else content
        found[path.relative_to(folder).as_posix()] = (stat.S_IFMT(mode), content)
    return found
