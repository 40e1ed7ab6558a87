"""One process against several, on gloo: ``python -m benchmarks.distributed``, or ``make distributed``.

The same tiny run by 1, 2 and 4 processes must give the same samples to the bit, and statistics, bases and
weights within rounding, also by FSDP2, and with a base that is shared out. A process that is killed ends
the others at once, and the run goes on, with as many processes or another number. Processes that see
different things are refused before the first step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from transformers import Trainer

from benchmarks.forks import PATIENCE, Ended, Fork
from benchmarks.tiny import make_llama, rows, tiny_config, write_model
from folora.pipeline.run import PRE, RESULT, SET, SPECTRUM, TASK, TRAINING
from folora.runtime.artifacts import TENSORS, software_versions
from folora.runtime.checkpoints import latest_checkpoint
from folora.runtime.storage import write_json

ROWS_A_STEP = 12  # by 1, 2, 3, 4 or 6 processes
STEPS = 6
NODES = {"folora-a": "192.168.77.1", "folora-b": "192.168.77.2"}
ROUNDING = {SET: 0.0, PRE: 1e-5, TASK: 1e-5, SPECTRUM: 1e-3, RESULT: 1e-3}
"""Largest difference that is allowed, over the largest value of a tensor."""


def as_it_is(rank: int) -> None:
    """Nothing is to be prepared in a process."""


class Bench:
    """A tiny model and rows, and runs of them by several processes.

    Args:
        place: An empty folder.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.points: list[MeetingPoint] = []  # which end with their objects
        self.model = write_model(place / "model")
        self.rows = place / "rows.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows()))

    def words(self, name: str, count: int, **changes: Any) -> list[str]:
        """The command line of a run by so many processes."""
        training = {"batch_size": ROWS_A_STEP // count, "max_steps": STEPS, "save_steps": 2}
        config = tiny_config(
            model=str(self.model), dataset=str(self.rows), output=str(self.place / name),
            training=training,
        ).changed(changes)  # fmt: skip
        file = self.place / f"{name}-{count}.yaml"
        file.write_text(config.to_yaml())
        return ["run", "--config", str(file)]

    def start(
        self,
        name: str,
        count: int,
        more: Mapping[int, Sequence[str]] | None = None,
        prepare: Callable[[int], None] = as_it_is,
        **changes: Any,
    ) -> list[Fork]:
        """Start the processes of a run.

        Args:
            name: Of its folder.
            count: How many.
            more: Words that some of them get besides.
            prepare: Called in each with its rank.
            changes: Of the config.
        """
        point = MeetingPoint()
        self.points.append(point)

        def begin(rank: int) -> Callable[[], None]:
            def set_up() -> None:
                if count > 1:
                    os.environ |= point.place_among(rank, count)
                prepare(rank)

            return set_up

        words = self.words(name, count, **changes)
        forks = [
            Fork([*words, *(more or {}).get(r, ())], self.place, f"{name}-{r}", begin(r))
            for r in range(count)
        ]
        point.open()
        return forks

    def tensors(self, name: str, part: str) -> dict[str, Tensor]:
        """What a part of a run holds."""
        return load_file(self.place / name / part / TENSORS)

    def difference(self, one: str, other: str, part: str) -> float:
        """Largest difference of two runs in a part, over the largest value of its tensor."""
        a, b = self.tensors(one, part), self.tensors(other, part)
        if a.keys() != b.keys():
            return float("inf")
        return max(_difference(a[name], b[name]) for name in a)

    def compared(self, name: str, count: int, exact: bool, way: str = "DDP") -> dict[str, float]:
        """How far the weights are from those of a run that was not disturbed.

        Args:
            name: The run.
            count: How many processes it ended with.
            exact: Whether it always had so many: then not a bit may differ.
            way: One of `WAYS`.
        """
        other = self.undisturbed(count, way) if exact else self.undisturbed(1)
        allowed = 0.0 if exact else ROUNDING[RESULT]
        return {"difference": self.difference(other, name, RESULT), "allowed": allowed}

    def undisturbed(self, count: int, way: str = "DDP") -> str:
        """The run of so many processes that nothing disturbs, made when it is first asked for."""
        name = f"{way}-{count}"
        if not (self.place / name / RESULT).exists():
            prepare, changes = WAYS[way]
            forks = self.start(name, count, prepare=prepare, **changes)
            if any(codes := [e.code for e in ended(forks)]):
                raise RuntimeError(f"{count} processes ended with {codes}")
        return name


class MeetingPoint:
    """Where processes of this machine meet: a store as torchrun's agent keeps one, on a port of the system's choice.

    It listens as long as this object lives, so that nobody else can take the port. It has a thread, and who is forked
    while that holds a lock of the C library waits for it for ever; so it opens when all have been forked.
    """

    def __init__(self) -> None:
        self._port = multiprocessing.RawValue("i", 0)  # shared with forks
        self._store: TCPStore | None = None

    def open(self) -> None:
        """Begin to listen, after the last fork."""
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._port.value = self._store.port

    def place_among(self, rank: int, count: int) -> dict[str, str]:
        """In a fork: the environment of one of several processes that meet here, as a launcher sets it."""
        began = time.monotonic()
        while not self._port.value:
            if time.monotonic() - began > PATIENCE:
                raise TimeoutError("whoever forked this process has not opened the meeting point")
            time.sleep(0.001)
        return {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._port.value), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip


def ended(forks: Sequence[Fork]) -> list[Ended]:
    """All of them, by rank."""
    return [fork.ended() for fork in forks]


def after_checkpoint(
    bench: Bench, name: str, forks: Sequence[Fork], act: Callable[[], None]
) -> float:
    """Do something as soon as there is a checkpoint, and return the seconds until all have ended."""
    while latest(bench, name) is None and all(fork.lives() for fork in forks):
        if time.monotonic() - forks[0].began > PATIENCE:
            break
        time.sleep(0.002)
    act()
    began = time.monotonic()
    while any(fork.lives() for fork in forks) and time.monotonic() - began < PATIENCE:
        time.sleep(0.002)
    return time.monotonic() - began


def latest(bench: Bench, name: str) -> int | None:
    """The number of the latest checkpoint of a run."""
    found = latest_checkpoint(bench.place / name / TRAINING)
    return None if found is None else int(found.name.rpartition("-")[2])


def same_as_one(bench: Bench, counts: Sequence[int]) -> dict[str, dict[str, float]]:
    """Largest differences from the run of one process, by number of processes and part."""
    one = bench.undisturbed(1)
    return {
        str(n): {part: bench.difference(one, bench.undisturbed(n), part) for part in ROUNDING}
        for n in counts
    }


def other_ways(bench: Bench, counts: Sequence[int]) -> dict[str, dict[str, float]]:
    """Largest differences of the weights from those of as many processes by DDP, by way and their number."""
    return {
        way: {
            str(n): bench.difference(bench.undisturbed(n), bench.undisturbed(n, way), RESULT)
            for n in counts
        }
        for way in ("FSDP2", "--shard")
    }


def by_fsdp2(rank: int) -> None:
    """Have a process train by FSDP2, with the settings of ``accelerate launch --use_fsdp``.

    Accelerate takes FSDP on accelerators alone, although torch has it for the CPU; here it is told to.
    """
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }  # fmt: skip
    if "RANK" not in os.environ:  # FSDP wants to be one of several also alone
        alone = HashStore()
        torch.distributed.init_process_group("gloo", store=alone, rank=0, world_size=1)
    trainers: Any = Trainer
    create = trainers.create_accelerator_and_postprocess

    def on_the_cpu(trainer: Any) -> None:
        create(trainer)
        state = trainer.accelerator.state
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        trainer.is_fsdp_enabled = True

    trainers.create_accelerator_and_postprocess = on_the_cpu


WAYS: dict[str, tuple[Callable[[int], None], dict[str, Any]]] = {
    "DDP": (as_it_is, {}),
    "FSDP2": (by_fsdp2, {}),
    "--shard": (as_it_is, {"shard": True}),
}
"""How processes train together: what is prepared in each, and what is changed in the config."""


def killed(
    bench: Bench, count: int, victim: int, then: int, way: str = "DDP", then_by: str | None = None
) -> dict[str, Any]:
    """One process is killed in training; the run goes on with `then` processes, if asked another way."""
    name = f"killed-{way}-{count}-{victim}-{then}-{then_by}"
    (wrapped, changes), (wrapped_then, changes_then) = WAYS[way], WAYS[then_by or way]

    def prepare(rank: int) -> None:
        wrapped(rank)
        slowly(rank)

    forks = bench.start(name, count, prepare=prepare, **changes)
    seconds = after_checkpoint(bench, name, forks, lambda: forks[victim].send(signal.SIGKILL))
    found = ended(forks)
    reached = latest(bench, name)
    again = ended(bench.start(name, then, prepare=wrapped_then, **changes_then))
    return {
        "processes": count,
        "way": way,
        "then_by": then_by or way,
        "victim": victim,
        "codes": [e.code for e in found],
        "seconds": round(seconds, 2),
        "says": [
            r for r, e in enumerate(found) if "has lost another one" in " ".join(e.said.split())
        ],
        "checkpoint": reached,
        "then": then,
        "codes_then": [e.code for e in again],
        **bench.compared(name, then, then == count, then_by or way),
        "kept_old": (bench.place / name / "old").exists(),
    }


def slowly(rank: int) -> None:
    """Make every step take a twentieth of a second, so that a moment in it can be met."""
    loss = torch.nn.functional.cross_entropy

    def slow_loss(*args: Any, **kwargs: Any) -> Tensor:
        time.sleep(0.05)
        return loss(*args, **kwargs)

    torch.nn.functional.cross_entropy = slow_loss


def refused(bench: Bench) -> dict[str, str]:
    """What is said when process 1 sees something else, by what that is; nothing may be trained.

    Data and model have the same names in both processes, but lie in other folders.
    """
    homes = [bench.place / f"home{rank}" for rank in range(2)]
    for seed, home in enumerate(homes):
        write_model(home / "same")
        write_model(home / "model")
        make_llama(seed=seed).save_pretrained(home / "model")
        for name, sign in (("same", "="), ("rows", "=:"[seed])):
            lines = (json.dumps({"prompt": f"{n}{sign}", "completion": f"{n}."}) for n in range(40))
            (home / f"{name}.jsonl").write_text("\n".join(lines))
    said = {}
    for what, model, data, more in (
        ("data set", "same", "rows", ()),
        ("model", "model", "same", ()),
        ("set of options", "same", "same", ("--lr", "0.5")),
    ):
        changes = {"model": model, "dataset": f"{data}.jsonl"}
        name = f"other {what}"
        forks = bench.start(name, 2, {1: more}, lambda rank: os.chdir(homes[rank]), **changes)
        found = ended(forks)
        message = " ".join(found[0].said.split())
        codes, begun = [e.code for e in found], (bench.place / name).exists()
        said[what] = message if codes == [2, 2] and not begun else f"codes {codes}: {message}"
    return said


def interrupted(bench: Bench, count: int) -> dict[str, Any]:
    """SIGTERM to all processes in training, at slightly different times, as a scheduler sends it."""
    name = f"interrupted{count}"
    forks = bench.start(name, count, prepare=slowly)

    def act() -> None:
        for fork in forks:
            fork.send(signal.SIGTERM)
            time.sleep(0.03)

    seconds = after_checkpoint(bench, name, forks, act)
    found = ended(forks)
    again = ended(bench.start(name, count))
    return {
        "codes": [e.code for e in found],
        "seconds": round(seconds, 2),
        "codes_then": [e.code for e in again],
        **bench.compared(name, count, exact=True),
    }


def launched(bench: Bench) -> dict[str, dict[str, Any]]:
    """The launchers as they are typed; two machines are two network namespaces, if they can be made."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
    accelerate = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    ]  # fmt: skip
    found = {}
    for name, launcher in (
        ("torchrun", [*torchrun, "2", "--standalone"]),
        ("accelerate launch", [*accelerate, "--main_process_port", "0"]),
    ):
        words = [*launcher, "-m", "folora", *bench.words(name, 2)]
        done = subprocess.run(words, capture_output=True)
        found[name] = _launched(bench, name, [done.returncode])
    with namespaces() as nodes:
        if nodes:
            found["torchrun on two machines"] = _on_two(bench, nodes, torchrun)
    return found


def _launched(bench: Bench, name: str, codes: list[int]) -> dict[str, Any]:
    return {"codes": codes, **({} if any(codes) else bench.compared(name, 2, exact=True))}


def _on_two(bench: Bench, nodes: Mapping[str, str], torchrun: Sequence[str]) -> dict[str, Any]:
    words = ["-m", "folora", *bench.words("nodes", 2)]
    main = next(iter(nodes.values()))
    began = [
        subprocess.Popen(
            ["ip", "netns", "exec", node, *torchrun, "1", "--nnodes", "2", "--node-rank", str(n),
             "--master-addr", main, "--master-port", "29500", *words],
            env=os.environ | {"GLOO_SOCKET_IFNAME": f"{node}-eth"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for n, node in enumerate(nodes)
    ]  # fmt: skip
    return _launched(bench, "nodes", [process.wait() for process in began])


@contextmanager
def namespaces() -> Iterator[dict[str, str]]:
    """Two network namespaces with a cable between them, and their addresses; empty if it is forbidden."""
    a, b = NODES
    commands = [
        f"netns add {a}", f"netns add {b}",
        f"link add {a}-eth netns {a} type veth peer name {b}-eth netns {b}",
        *(
            f"-n {node} {what}"
            for node, address in NODES.items()
            for what in (f"addr add {address}/24 dev {node}-eth", f"link set {node}-eth up", "link set lo up")
        ),
    ]  # fmt: skip
    try:
        made = shutil.which("ip") is not None and all(_ip(c) for c in commands)
        yield NODES if made else {}
    finally:
        if shutil.which("ip"):
            for node in NODES:
                _ip(f"netns del {node}")


def _ip(words: str) -> bool:
    return subprocess.run(["ip", *words.split()], capture_output=True).returncode == 0


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    scale = a.double().abs().max().clamp(min=1e-30)
    return float((a.double() - b.double()).abs().max() / scale)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if something is not as promised."""
    known = argparse.ArgumentParser(prog="benchmarks.distributed", description=__doc__)
    known.add_argument("--output", type=Path, help="JSON file")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = known.parse_args(given)
    torch.set_num_threads(1)  # a fork inherits no threads
    make_llama()
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place))
        found = {
            "same": same_as_one(bench, (2, 3, 4)),
            "ways": other_ways(bench, (1, 2, 3, 4)),
            "killed": [
                killed(bench, 2, 1, 2), killed(bench, 2, 0, 1), killed(bench, 3, 1, 2),
                killed(bench, 2, 1, 3), killed(bench, 4, 2, 4),
                *(killed(bench, 2, 1, then, "FSDP2") for then in (2, 1, 3)),
                *(killed(bench, 2, 1, then, "--shard") for then in (2, 1, 3)),
                killed(bench, 2, 1, 2, "--shard", "DDP"),
            ],
            "interrupted": [interrupted(bench, 2), interrupted(bench, 4)],
            "refused": refused(bench),
            "launched": launched(bench),
        }  # fmt: skip
    said = breaches(found)
    print(json.dumps(found, indent=1))
    print("\n".join(said) or "as promised")
    if options.output:
        command = " ".join(["python -m benchmarks.distributed", *given])
        write_json(options.output, {"command": command, **found, "versions": software_versions()})
    return int(bool(said))


def breaches(found: Mapping[str, Any]) -> list[str]:
    """What is not as promised, in words."""
    said = [
        f"{part} of {n} processes differs by {d:g}"
        for n, parts in found["same"].items()
        for part, d in parts.items()
        if d > ROUNDING[part]
    ]
    said += [
        f"weights of {n} processes by {way} differ by {d:g}"
        for way, counts in found["ways"].items()
        for n, d in counts.items()
        if d > ROUNDING[RESULT]
    ]
    for one in [*found["killed"], *found["interrupted"]]:
        if any(one["codes_then"]) or one["difference"] > one["allowed"]:
            said.append(f"did not go on as it should: {one}")
    for one in found["killed"]:
        others = [code for r, code in enumerate(one["codes"]) if r != one["victim"]]
        if set(others) != {2} or len(one["says"]) != len(others) or one["kept_old"]:
            said.append(f"others did not end with a word: {one}")
    said += [
        f"{name}: {one}"
        for name, one in found["launched"].items()
        if any(one["codes"]) or one["difference"] > one["allowed"]
    ]
    said += [f"SIGTERM: {one}" for one in found["interrupted"] if set(one["codes"]) != {143}]
    said += [
        f"{what}: {message}"
        for what, message in found["refused"].items()
        if f"process 1 of 2 sees another {what} than process 0" not in message
    ]
    return said


if __name__ == "__main__":
    sys.exit(main())
