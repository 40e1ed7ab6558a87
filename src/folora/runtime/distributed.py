"""Collectives over the processes of a run: the few that stages need, on torch.distributed.

`torchrun` and `accelerate launch` start the processes. With one process no function communicates.
Files are read and written by rank 0. An error of one process is raised by all, so that none waits
for a process that has failed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from folora.errors import ConfigError, FoLoraError, MismatchError, ProcessError

T = TypeVar("T")

_RENDEZVOUS = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
_STALE = (
    "Start several processes with torchrun or accelerate launch, which set these variables; for one "
    "process unset WORLD_SIZE, RANK and LOCAL_RANK."
)
TIMEOUT = timedelta(hours=2)  # rank 0 may solve and write while the others wait
LOST = ("gloo", "nccl", "connection", "socket", "store")  # words in errors about an ended process


def init(device: str) -> None:
    """Initialize the process group for an option ``device``, if a launcher started several processes.

    Raises:
        ConfigError: Some of a launcher's environment variables are missing or contradict each other.
        ProcessError: The other processes cannot be reached.
    """
    if _launched() > 1 and not dist.is_initialized():
        accelerator = None if device == "cpu" else torch.accelerator.current_accelerator()
        if accelerator is not None:
            torch.accelerator.set_device_index(local_rank())
        kind = "cpu" if accelerator is None else accelerator.type
        try:
            dist.init_process_group(dist.get_default_backend_for_device(kind), timeout=TIMEOUT)
        except RuntimeError as error:
            raise ProcessError(
                f"process {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} cannot reach the "
                f"others: {str(error).splitlines()[0]}"
            ) from error


def asks_for_fsdp(given: Any) -> bool:
    """Whether the launcher or the training option ``fsdp`` enables FSDP."""
    return bool(given) or is_set("ACCELERATE_USE_FSDP")


def is_set(variable: str) -> bool:
    """Whether a boolean environment variable is set to true."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def _launched() -> int:
    """World size according to the launcher's environment variables. Raises ConfigError."""
    numbers = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if (text := os.environ.get(name, "")).strip():
            if not text.isdecimal():
                raise ConfigError(f"{name} is {text!r}, but must be a number. {_STALE}")
            numbers[name] = int(text)
    several = numbers.get("WORLD_SIZE", 1)
    missing = [name for name in _RENDEZVOUS if not os.environ.get(name)]
    if (several > 1 or "LOCAL_RANK" in numbers) and missing:  # Accelerate connects by LOCAL_RANK
        found = ", ".join(f"{name}={number}" for name, number in numbers.items())
        raise ConfigError(f"the environment has {found}, but not {', '.join(missing)}. {_STALE}")
    if numbers.get("RANK", 0) >= max(several, 1):
        raise ConfigError(f"RANK is {numbers['RANK']}, but WORLD_SIZE is {several}. {_STALE}")
    return several


def destroy() -> None:
    """Destroy the process group, at the end of all work."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Rank on this machine, which is the index of the accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def shard(items: Sequence[T]) -> Sequence[T]:
    """The items of this process: every `world_size`-th, starting at `rank`."""
    return items[rank() :: world_size()]


def all_gather(value: T) -> list[T]:
    """The values of all processes, by rank. Raises ProcessError."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with reporting_lost_processes():
        dist.all_gather_object(found, value)
    return found


def broadcast(value: T, owner: int = 0) -> T:
    """The value of rank `owner`. Raises ProcessError."""
    if world_size() == 1:
        return value
    held = [value]
    with reporting_lost_processes():
        dist.broadcast_object_list(held, src=owner)
    return held[0]


def all_reduce_(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place. Raises ProcessError."""
    if world_size() > 1:
        with reporting_lost_processes():
            dist.all_reduce(tensor)
    return tensor


def all_reduce_max(value: int) -> int:
    """The largest value of all processes. Raises ProcessError."""
    if world_size() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = torch.tensor(value, device=device)  # every step calls this: no pickling, one collective
    with reporting_lost_processes():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def raise_together(call: Callable[[], T]) -> T:
    """Call in every process; if one raises a FoLoraError, all raise that of the lowest rank."""
    if world_size() == 1:
        return call()
    result, error = _tried(call)
    if errors := [e for e in all_gather(error) if e is not None]:
        raise errors[0]
    return result  # type: ignore[return-value]


def on_rank_zero(call: Callable[[], T]) -> T:
    """Call on rank 0 only; all processes get its result or raise its FoLoraError."""
    if world_size() == 1:
        return call()
    result, error = broadcast(_tried(call) if rank() == 0 else (None, None))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def check_same(what: str, value: Any) -> None:
    """Raise a MismatchError that names `what` in all processes if they have different values."""
    found = all_gather(value)
    if other := [r for r, v in enumerate(found) if v != found[0]]:
        raise MismatchError(
            f"process {other[0]} of {len(found)} has another {what} than process 0. Start all with the "
            "same command, files and versions."
        )


@contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Turn torch.distributed's errors about an ended process into ProcessError."""
    try:
        yield
    except RuntimeError as error:
        named = any(word in str(error).lower() for word in LOST)
        if world_size() == 1 or not (isinstance(error, dist.DistError) or named):
            raise
        raise ProcessError(
            f"process {rank()} of {world_size()} lost the connection to another process, whose message says why. "
            "Finished stages are on disk; restart all processes to resume."
        ) from error


def _tried(call: Callable[[], T]) -> tuple[T | None, FoLoraError | None]:
    try:
        return call(), None
    except FoLoraError as error:
        return None, error
