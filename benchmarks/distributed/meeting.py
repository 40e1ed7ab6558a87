"""Where several processes of one machine meet, without a launcher."""

from __future__ import annotations

import multiprocessing
import time

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.forks import PATIENCE


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
