"""Run a function in several processes connected by gloo."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.distributed.meeting import MeetingPoint
from folora.runtime import distributed

PATIENCE = 60  # seconds


def in_processes(count: int, work: Callable[[], Any]) -> list[Any]:
    """Run `work` in each process and return its result or error, by rank.

    Tensors do not outlive the process that made them; return arrays.
    """
    fork = multiprocessing.get_context("fork")
    queue, point = fork.Queue(), MeetingPoint()

    def run(rank: int) -> None:
        torch.set_num_threads(1)  # a fork inherits no threads
        gc.freeze()  # collecting the parent's objects would wait for threads that the fork lacks
        try:
            os.environ |= point.place_among(rank, count)
            distributed.init("cpu")
            queue.put((rank, work()))
        except BaseException as error:
            queue.put((rank, f"{type(error).__name__}: {error}"))
        queue.close()
        queue.join_thread()
        os._exit(0)

    processes = [fork.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    point.open()
    found = dict(queue.get(timeout=PATIENCE) for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(count)]
