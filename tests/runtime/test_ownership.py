"""Writers replace and delete only files that folora wrote, and may be killed at any moment."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.users_files import (
    Put,
    appended,
    both,
    fifo,
    file,
    folder_of,
    link,
    read_only,
    snapshot,
)

from folora.errors import ArtifactError
from folora.runtime.checkpoints import prune, seal_checkpoint
from folora.runtime.ownership import LIST, check_own, write_own, write_owned_folder
from folora.runtime.storage import (
    file_sha256,
    obstacle,
    write_atomically,
    write_sealed,
    write_text,
)


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def killed_at(number: int, work: Callable[[], None]) -> None:
    """Do the work in a fork that is killed before the n-th rename or removal."""
    count = 0

    def watch(event: str, _: Any) -> None:
        nonlocal count
        if event in ("os.rename", "os.remove"):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        sys.addaudithook(watch)
        work()

    fork = multiprocessing.get_context("fork").Process(target=child)
    fork.start()
    fork.join()
    ended.append(fork.exitcode)


ended: list[int | None] = []
FORMER = {"config.json": "1", "weights": "1", "sub/a": "1", "gone": "1"}
LATER = {"config.json": "2", "weights": "2", "sub/a": "1", "more": "2"}


def test_an_export_killed_at_any_moment_ends_with_the_same_bytes_when_rerun(tmp_path: Path) -> None:
    write_owned_folder(tmp_path / "whole", "x", folder_of(LATER))
    theirs = both(*map(file, ("a/README.md", "a/sub/b", "a/.folora.json.swp")))
    (tmp_path / "whole" / "sub").mkdir(exist_ok=True)
    wanted = snapshot(tmp_path / "whole")
    theirs(tmp_path / "theirs")
    wanted |= snapshot(tmp_path / "theirs" / "a")
    ended.clear()
    number = 0
    while not ended or ended[-1] == -signal.SIGKILL:
        number += 1
        here = tmp_path / str(number)
        write_owned_folder(here / "a", "x", folder_of(FORMER))
        theirs(here)
        killed_at(number, partial(write_owned_folder, here / "a", "x", folder_of(LATER)))
        loadable = {
            (here / "a" / n).read_text()
            for n in ("config.json", "weights")
            if (here / "a" / n).exists()
        }
        assert len(loadable) <= 1  # never a mixture of both
        write_owned_folder(here / "a", "x", folder_of(LATER))
        assert snapshot(here / "a") == wanted
        assert [p.name for p in here.iterdir()] == ["a"]
    assert number > 8 and ended[-1] == 0


def test_a_write_killed_at_any_moment_leaves_a_complete_file(tmp_path: Path) -> None:
    ended.clear()
    number = 0
    while not ended or ended[-1] == -signal.SIGKILL:
        number += 1
        path = tmp_path / str(number) / "config.yaml"
        path.parent.mkdir()
        write_own(path, "run", text("former"))
        killed_at(number, partial(write_own, path, "run", text("later")))
        assert path.read_text() in ("former", "later")
        check_own(path.parent, "run")
        write_own(path, "run", text("later"))
        assert path.read_text() == "later"
        assert sorted(p.name for p in path.parent.iterdir()) == ["config.yaml", LIST]
    assert number > 3 and ended[-1] == 0


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out"])
def test_names_in_an_ownership_list_cannot_escape_the_folder(tmp_path: Path, name: str) -> None:
    name = name.replace("/out", str(tmp_path / "out")) if name == "/out" else name
    folder = tmp_path / "a"
    write_owned_folder(folder, "x", folder_of({"b": "1"}))
    file("out")(tmp_path)
    write_sealed(folder / LIST, {"kind": "x", "files": {name: [file_sha256(tmp_path / "out")]}})
    with pytest.raises(ArtifactError, match="has unexpected contents"):
        write_owned_folder(folder, "x", folder_of({"b": "2"}))
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    "name",
    [
        ".a.json.bak", ".a.json.swp", ".a.json.1a2b3c4d", ".a.json.folora-1a2b.tmp", "a.json.folora-0123456789abcdef.tmp",
        ".a.json.d/x", ".b.json.folora-0123456789abcdef.tmp", ".a.json.folora-0123456789ABCDEF.tmp",
    ],
)  # fmt: skip
def test_only_our_own_temporary_files_are_deleted(tmp_path: Path, name: str) -> None:
    file(name)(tmp_path)
    file(".a.json.folora-0123456789abcdef.tmp")(tmp_path)  # left by a killed writer
    file(".a.json.folora-0123456789abcdef.old/x")(tmp_path)
    write_text(tmp_path / "a.json", "{}")
    assert snapshot(tmp_path).keys() == {"a.json", name, *([name.split("/")[0]])}


@pytest.mark.parametrize(
    "put", [file("a/x"), link("a", "b"), fifo("a"), both(file("a"), read_only("a"))]
)
def test_a_writer_replaces_regular_files_only(tmp_path: Path, put: Put) -> None:
    """The final safeguard, after the checks before work."""
    file("b/x")(tmp_path)
    put(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ArtifactError, match=f"cannot write {tmp_path / 'a'}: it is"):
        write_text(tmp_path / "a", "ours")
    assert snapshot(tmp_path) == before


def test_a_device_file_is_not_replaced() -> None:
    """As root, a rename would replace it for all processes of the machine."""
    assert obstacle(Path("/dev/null")) == "is not a regular file"


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    both(file("a/x"), file("a/mine"))(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ArtifactError, match=r"a: it holds 'mine', which folora did not write"):
        write_atomically(tmp_path / "a", folder_of({"x": "ours"}))
    assert snapshot(tmp_path) == before


def checkpoints(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_only_our_own_checkpoints_are_deleted(tmp_path: Path) -> None:
    """Complete and unchanged ones; not copies, nor any that the user changed or added files to."""
    for step in (2, 4, 6, 8, 10, 12):
        file(f"checkpoint-{step}/weights", str(step))(tmp_path)
        seal_checkpoint(tmp_path / f"checkpoint-{step}")
    file("checkpoint-4/notes.txt")(tmp_path)
    appended("checkpoint-6/weights", "mine")(tmp_path)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-2-backup")
    file("checkpoint-1/mine")(tmp_path)
    best = str(tmp_path / "checkpoint-8")
    prune(tmp_path, 2, best)
    assert checkpoints(tmp_path) == [
        "checkpoint-1", "checkpoint-12", "checkpoint-2-backup", "checkpoint-4", "checkpoint-6",
        "checkpoint-8",
    ]  # fmt: skip
