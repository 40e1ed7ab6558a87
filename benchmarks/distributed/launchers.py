"""The launchers' own command lines: torchrun on one machine and on two, and accelerate launch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.distributed.runs import Bench

NODES = {"folora-a": "192.168.77.1", "folora-b": "192.168.77.2"}


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
