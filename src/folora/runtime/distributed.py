"""One process or several: who does what, and all of them agreeing on what was found.

`torchrun` and `accelerate launch` start the processes, torch.distributed connects them; this file says
what stages need of it. With one process every function does the obvious thing and sends nothing. Files
are read and written by the first process, errors of one are raised by all, so that none waits for
another that has given up.
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
    "Start several processes by torchrun or accelerate launch, which set what is needed; for one, unset "
    "WORLD_SIZE, RANK and LOCAL_RANK."
)
TIMEOUT = timedelta(hours=2)  # the first process may solve and write while others wait
LOST = ("gloo", "nccl", "connection", "socket", "store")
"""What the messages of torch.distributed name when another process has gone."""


def join(device: str) -> None:
    """Connect to the other processes, if this one was started as one of several.

    Args:
        device: ``"auto"`` or a device's name; on the CPU they talk by gloo.

    Raises:
        ConfigError: The environment has variables of a launcher, but not all that it sets.
        ProcessError: They are not to be reached.
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
                f"process {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} cannot reach the other "
                f"ones: {str(error).splitlines()[0]}"
            ) from error


def asks_for_fsdp(given: Any) -> bool:
    """Whether FSDP is asked for, by the launcher or by the training option ``fsdp``."""
    return bool(given) or is_set("ACCELERATE_USE_FSDP")


def is_set(variable: str) -> bool:
    """Whether a launcher has set a switch in the environment."""
    return os.environ.get(variable, "").lower() in ("1", "true")


def _launched() -> int:
    """How many processes the launcher started, by its environment variables. Raises ConfigError."""
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


def leave() -> None:
    """Let go of the other processes, at the end of all work."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Its number on this machine, which is that of its accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def shard(items: Sequence[T]) -> Sequence[T]:
    """Every `count`-th item from `rank` on."""
    return items[rank() :: count()]


def all_gather(value: T) -> list[T]:
    """The values of all processes, by rank. Raises ProcessError."""
    if count() == 1:
        return [value]
    found: list[Any] = [None] * count()
    with reporting_lost_processes():
        dist.all_gather_object(found, value)
    return found


def broadcast(value: T, owner: int = 0) -> T:
    """The value that process `owner` has. Raises ProcessError."""
    if count() == 1:
        return value
    held = [value]
    with reporting_lost_processes():
        dist.broadcast_object_list(held, src=owner)
    return held[0]


def all_reduce_(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place. Raises ProcessError."""
    if count() > 1:
        with reporting_lost_processes():
            dist.all_reduce(tensor)
    return tensor


def all_reduce_max(value: int) -> int:
    """The largest value of all processes. Raises ProcessError."""
    if count() == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = torch.tensor(value, device=device)
    with reporting_lost_processes():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def raise_together(call: Callable[[], T]) -> T:
    """Call in every process; if one of them raises an error of folora's, all do.

    Raises:
        FoLoraError: The error of the first process that has one.
    """
    if count() == 1:
        return call()
    result, error = _tried(call)
    if errors := [e for e in all_gather(error) if e is not None]:
        raise errors[0]
    return result  # type: ignore[return-value]


def on_rank_zero(call: Callable[[], T]) -> T:
    """Call in the first process alone; all get its result, or raise its error.

    Raises:
        FoLoraError: As the call.
    """
    if count() == 1:
        return call()
    result, error = broadcast(_tried(call) if rank() == 0 else (None, None))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def check_same(what: str, value: Any) -> None:
    """Refuse processes that do not see the same. Raises MismatchError in all of them.

    Args:
        what: For the message.
        value: Anything that can be compared.
    """
    found = all_gather(value)
    if other := [r for r, v in enumerate(found) if v != found[0]]:
        raise MismatchError(
            f"process {other[0]} of {len(found)} sees another {what} than process 0. All need the same "
            "command, files and versions."
        )


@contextmanager
def reporting_lost_processes() -> Iterator[None]:
    """Say in folora's words that another process is gone. Raises ProcessError."""
    try:
        yield
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise ProcessError(
            f"process {rank()} of {count()} has lost another one, whose own message says why. What is "
            "finished is on disk; start all of them again to go on."
        ) from error


def _is_loss(error: RuntimeError) -> bool:
    if count() == 1:
        return False
    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in said for word in LOST)


def _tried(call: Callable[[], T]) -> tuple[T | None, FoLoraError | None]:
    try:
        return call(), None
    except FoLoraError as error:
        return None, error
