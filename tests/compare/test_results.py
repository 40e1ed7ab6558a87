"""Files of results: what is written comes back, damage is named, processes share them."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path
from typing import Any

import pytest
from support.arms import ARMS, load, reading, write

from folora.compare.results import scores_of
from folora.errors import ArtifactError


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path, "lora", 3, [(0.2, 0.9, 0.1), (0.4, 0.8, 0.2)])
    write(tmp_path, "folora", 20, [(0.3, 0.9, 0.1)])
    first, second = load(tmp_path)
    assert (first.method, first.seed, first.task, first.stage) == (
        "lora",
        3,
        "shift",
        "world-3/shift",
    )
    assert first.place == f"{tmp_path / ARMS}, line 1"
    assert (first.title, first.seconds, first.diverged) == ("LORA", 8.1, False)
    assert first.changes == {"training.learning_rate": 1e-3}
    assert [r["step"] for r in first.readings] == [25, 50]
    assert first.base["kept"] == pytest.approx({"city": 0.9, "copy": 1.0})
    points = first.points(scores_of([first, second]))
    assert [(p.step, p.task, p.kl, p.frobenius, p.h_norm) for p in points] == [
        (0, 0.1, 0.0, 0.0, 0.0),
        (25, 0.2, 0.1, 2.5, 0.25),
        (50, 0.4, 0.2, 5.0, 0.5),
    ]
    assert [p.kept for p in points] == pytest.approx([0.95, 0.9, 0.8])


def test_lines_do_not_depend_on_the_order_in_which_arms_end(tmp_path: Path) -> None:
    arms = [("lora", 10), ("folora", 2), ("folora", 10), ("lora", 2)]
    for folder, order in ((tmp_path / "a", arms), (tmp_path / "b", arms[::-1])):
        for method, seed in order:
            write(folder, method, seed, [(0.3, 0.9, 0.1)])
    assert [(r.seed, r.method) for r in load(tmp_path / "a")] == [
        (2, "folora"),
        (2, "lora"),
        (10, "folora"),
        (10, "lora"),
    ]
    assert (tmp_path / "a" / ARMS).read_bytes() == (tmp_path / "b" / ARMS).read_bytes()


def test_a_later_result_of_an_arm_replaces_the_former(tmp_path: Path) -> None:
    write(tmp_path, "lora", 3, [(0.2, 0.9, 0.1)])
    write(tmp_path, "folora", 3, [(0.2, 0.9, 0.1)])
    write(tmp_path, "lora", 3, [(0.6, 0.9, 0.1)])
    assert [r.readings[0]["task"]["accuracy"] for r in load(tmp_path)] == [0.2, 0.6]


def _add_in_a_process(folder: Path, seed: int) -> None:
    for number in range(10):
        write(folder, "lora", seed, [(0.2, 0.9, 0.1)], name=f"-{number}")


def test_two_processes_do_not_lose_each_others_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=_add_in_a_process, args=(tmp_path, seed)) for seed in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert len(load(tmp_path)) == 20


def test_a_line_that_is_cut_off_is_named_and_nothing_is_added_to_it(tmp_path: Path) -> None:
    write(tmp_path, "folora", 0, [(0.2, 0.9, 0.1)])
    path = write(tmp_path, "lora", 0, [(0.2, 0.9, 0.1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # an editor's file without a newline at its end is whole
    assert len(load(tmp_path)) == 2
    path.write_bytes(whole[:-40])
    for act in (lambda: load(tmp_path), lambda: write(tmp_path, "lora", 1, [(0.2, 0.9, 0.1)])):
        with pytest.raises(
            ArtifactError, match=r"arms\.jsonl, line 2 cannot be read.*delete this line"
        ):
            act()
    assert path.read_bytes() == whole[:-40]


def test_two_lines_of_one_arm_are_refused(tmp_path: Path) -> None:
    """As a merge of two branches leaves them."""
    path = write(tmp_path, "lora", 0, [(0.2, 0.9, 0.1)])
    path.write_text(2 * path.read_text())
    with pytest.raises(ArtifactError, match=r"line 2 has the same arm as .*line 1; delete"):
        load(tmp_path)


def test_readings_are_put_in_order_of_step(tmp_path: Path) -> None:
    late_first = [reading(50, 0.4, 0.8, 0.2), reading(25, 0.2, 0.9, 0.1)]
    write(tmp_path, "lora", 0, [], readings=late_first)
    assert [r["step"] for r in load(tmp_path)[0].readings] == [25, 50]


def test_fields_of_later_versions_do_no_harm(tmp_path: Path) -> None:
    write(tmp_path, "lora", 0, [], name="a", calibration={"on": "wiki"}, unknown=1)
    write(tmp_path, "lora", 0, [], name="b")
    assert [r.calibration for r in load(tmp_path)] == [{"on": "wiki"}, {}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": 2, "task": ', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"format": 2, "task": ' + b"[" * 5000 + b"]" * 5000 + b"}", "cannot be read"),
        (b'{"format": 2}', "line 2: stage: Field required; delete"),
        (b'{"format": 1}', "line 2 is not a result of format 2"),
        (b"[1, 2]", "line 2 is not a result of format 2"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, "lora", 0, [(0.2, 0.9, 0.1)])
    path.write_bytes(path.read_bytes() + content + b"\n")
    with pytest.raises(ArtifactError, match=message) as caught:
        load(tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": 3},
        {"readings": {}},
        {"readings": [{"step": 25}]},
        {"readings": [7]},
        {"readings": [{**reading(25, 0.1, 0.1, 0.1), "kl": "small"}]},
        {"readings": [{**reading(25, 0.1, 0.1, 0.1), "kl": 10**400}]},
        {"readings": [{**reading(25, 0.1, 0.1, 0.1), "step": float("inf")}]},
        {"readings": [{**reading(25, 0.1, 0.1, 0.1), "task": 0.5}]},
    ],
)
def test_a_wrong_field_is_named_with_its_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write(tmp_path, "lora", 0, [], **changes)
    name = next(iter(changes))
    with pytest.raises(ArtifactError, match=re.escape(f"{path}, line 1: {name}")):
        load(tmp_path)


def test_a_missing_file_is_an_error_and_an_empty_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no file of results .*arms\.jsonl"):
        load(tmp_path)
    (tmp_path / ARMS).touch()
    assert load(tmp_path) == []
