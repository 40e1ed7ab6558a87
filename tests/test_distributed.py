"""Several processes do what one does, and none waits for another that has given up."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.distributed import (
    ROUNDING,
    Bench,
    breaches,
    ended,
    free_port,
    interrupted,
    killed,
    refused,
    same_as_one,
)
from folora import ranks
from folora.cli import main
from folora.errors import ConfigError, DataError, MismatchError, ProcessError
from folora.training import refuse_sharding

NOTHING: dict[str, Any] = {
    "same": {}, "killed": [], "interrupted": [], "refused": {}, "launched": {}
}  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("distributed"))


def test_two_processes_give_what_one_gives(bench: Bench) -> None:
    found = same_as_one(bench, (2,))
    assert list(found["2"]) == list(ROUNDING)
    assert breaches({**NOTHING, "same": found}) == []
    assert found["2"]["4-training/result"] > 0  # else it would be the same run


def test_a_killed_process_ends_the_other_and_the_run_goes_on(bench: Bench) -> None:
    found = [killed(bench, 2, 1, 2), killed(bench, 2, 0, 1)]
    assert breaches({**NOTHING, "killed": found}) == []
    assert all(one["checkpoint"] for one in found)
    assert all(one["seconds"] < 30 for one in found)


def test_a_signal_stops_all_after_the_same_step(bench: Bench) -> None:
    found = [interrupted(bench, 2)]
    assert breaches({**NOTHING, "interrupted": found}) == []


def test_processes_that_see_different_things_are_refused(bench: Bench) -> None:
    found = refused(bench)
    assert len(found) == 3
    assert breaches({**NOTHING, "refused": found}) == []


def test_an_error_of_one_process_ends_all(bench: Bench) -> None:
    """A file that only process 1 cannot read, and a fork that leaves at once."""
    missing = {1: ["--dataset", str(bench.place / "missing.jsonl")]}
    found = ended(bench.start("missing", 2, missing))
    assert [e.code for e in found] == [2, 2]
    assert "does not exist" in found[1].said
    assert "has lost another one" in " ".join(found[0].said.split())
    assert all("Traceback" not in e.said for e in found)


def test_comparing_is_for_one_process(bench: Bench) -> None:
    words = bench.words("compare", 2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bench, "words", lambda *args, **kwargs: ["compare", *words[1:]])
        found = ended(bench.start("compare", 2))
    assert [e.code for e in found] == [2, 2]
    # One may leave before the other has reached it.
    assert any("works in one process" in " ".join(e.said.split()) for e in found)


# The functions of ranks, each in three processes.


def in_processes(count: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns or raises in each process; the processes end with it."""
    fork = multiprocessing.get_context("fork")
    queue, port = fork.Queue(), free_port()

    def run(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        ranks.join("cpu")
        try:
            queue.put((rank, work()))
        except Exception as error:
            queue.put((rank, f"{type(error).__name__}: {error}"))
        queue.close()
        queue.join_thread()
        os._exit(0)

    processes = [fork.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    found = dict(queue.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(count)]


def test_shares_cover_everything_once() -> None:
    found = in_processes(3, lambda: (ranks.count(), ranks.rank(), list(ranks.mine(range(8)))))
    assert found == [(3, 0, [0, 3, 6]), (3, 1, [1, 4, 7]), (3, 2, [2, 5])]


def test_sums_and_largest_and_gathering() -> None:
    def work() -> Any:
        total = ranks.add_(torch.tensor([1.0, ranks.rank()])).tolist()
        return (
            total,
            ranks.largest(5 - ranks.rank()),
            ranks.gather(ranks.rank() ** 2),
            ranks.sent(ranks.rank(), 2),
        )

    assert in_processes(3, work) == [([3.0, 3.0], 5, [0, 1, 4], 2)] * 3


def raising(at: int, error: Exception) -> Callable[[], str]:
    def call() -> str:
        if ranks.rank() == at:
            raise error
        return f"from {ranks.rank()}"

    return call


def test_all_raise_the_error_of_one() -> None:
    found = in_processes(3, lambda: ranks.agree(raising(1, DataError("row 7"))))
    assert found == ["DataError: row 7"] * 3
    assert in_processes(3, lambda: ranks.agree(raising(9, DataError("")))) == [
        "from 0", "from 1", "from 2",
    ]  # fmt: skip


def test_only_the_first_process_works_and_all_know() -> None:
    assert in_processes(3, lambda: ranks.first(raising(1, DataError("")))) == ["from 0"] * 3
    found = in_processes(3, lambda: ranks.first(raising(0, ConfigError("no"))))
    assert found == ["ConfigError: no"] * 3


def test_what_differs_is_said_by_all() -> None:
    found = in_processes(3, lambda: ranks.check_same("data set", ranks.rank() == 2))
    assert found == [
        "MismatchError: process 2 of 3 sees another data set than process 0. All need the same "
        "command, files and versions."
    ] * 3  # fmt: skip
    assert in_processes(2, lambda: ranks.check_same("data set", "x")) == [None, None]


def test_who_waits_for_a_process_that_is_gone_is_told() -> None:
    def work() -> Any:
        if ranks.rank() == 1:
            return "gone"
        return ranks.gather(0)

    found = in_processes(2, work)
    assert found[1] == "gone"
    assert found[0].startswith("ProcessError: process 0 of 2 has lost another one")


def test_who_cannot_reach_the_others_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("connection reset by peer\nmore")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ProcessError, match=r"process 1 of 2 cannot reach .*reset by peer$"):
        ranks.join("cpu")


def test_one_process_sends_nothing() -> None:
    assert ranks.gather(3) == [3]
    assert (
        ranks.sent(3) == ranks.largest(3) == ranks.first(lambda: 3) == ranks.agree(lambda: 3) == 3
    )
    assert ranks.mine([1, 2]) == [1, 2]
    ranks.check_same("anything", object())
    with pytest.raises(MismatchError):
        ranks.agree(raising(0, MismatchError("x")))
    with pytest.raises(RuntimeError, match="gloo") as raised, ranks.talking():
        raise RuntimeError("gloo")  # with one process it is not a loss
    assert not isinstance(raised.value, ProcessError)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_sharded_parameters_are_refused_before_anything_starts(
    variable: str, bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_sharding()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match="accelerate launch --multi_gpu"):
        refuse_sharding()
    assert main(bench.words("sharded", 1)) == 2
    assert "accelerate launch --multi_gpu" in " ".join(capsys.readouterr().err.split())
    assert not (bench.place / "sharded").exists()
