"""Bases that lie on the host, on their way to a GPU: behind the backward pass, or while others are used.

What a step needs is known before it begins, so it can be sent while the GPU still computes gradients:
each basis when its parameter's gradient is there, into memory that the pass has let go of by then. The
rest comes through two buffers. This file needs nothing but torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor


class Transit:
    """Bases on their way from the host to a device, before or while they are used.

    What was not sent before (see `SAdam.ahead`) fills two buffers in turn, one by a stream of its own while
    the other is used.
    """

    def __init__(self) -> None:
        self._sent: dict[int, tuple[Tensor, Any]] = {}
        self._streams: dict[torch.device, Any] = {}

    @contextmanager
    def behind(self, awaited: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Send each basis when the gradient of its parameter is there, as far as there is room."""
        self.let_go()
        rooms: dict[torch.device, Room] = {}
        handles = [
            p.register_post_accumulate_grad_hook(
                partial(self._send, basis, rooms.setdefault(p.device, Room()))
            )
            for basis, p in awaited
            if p.is_cuda and p.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def sent(self) -> dict[int, int]:
        """By id, at which place each basis was sent that is on its way."""
        return {key: place for place, key in enumerate(self._sent)}

    def bring(self, due: list[tuple[Tensor, torch.device]]) -> Iterator[Tensor]:
        """Each basis in turn, on its device."""
        used: list[Any] = [None, None]  # when a buffer was last read
        buffers: dict[tuple[torch.device, int], Tensor] = {}
        largest = max((_nbytes(b) for b, _ in due if id(b) not in self._sent), default=0)

        def coming(index: int) -> tuple[Tensor, Any]:
            basis, device = due[index]
            if id(basis) in self._sent:
                return self._sent.pop(id(basis))
            if device.type != "cuda":
                return basis.to(device), None
            turn = (device, index % 2)
            stream = self._stream(device)
            if turn not in buffers:
                buffers[turn] = torch.empty(largest, dtype=torch.uint8, device=device)
                # It may be a block that earlier work on the usual stream still reads.
                stream.wait_stream(torch.cuda.current_stream(device))
            if used[index % 2] is not None:
                stream.wait_event(used[index % 2])
            target = buffers[turn][: _nbytes(basis)].view(basis.dtype).view(basis.shape)
            return target, _copied(basis, target, stream)

        following = coming(0) if due else None
        for index in range(len(due)):
            assert following is not None
            (basis, arrived), following = following, None
            if index + 1 < len(due):
                following = coming(index + 1)
            if arrived is None:
                yield basis
                continue
            stream = torch.cuda.current_stream(basis.device)
            stream.wait_event(arrived)
            yield basis
            used[index % 2] = stream.record_event()
            del basis

    def _send(self, basis: Tensor, room: Room, p: Tensor) -> None:
        """The hook: send a basis to where p lies, unless the device would hold more than ever."""
        held, peak = _held_and_peak(p.device)
        if id(basis) in self._sent or not room.takes(_nbytes(basis), held, peak):
            return
        target = torch.empty_like(basis, device=p.device)
        stream = self._stream(p.device)
        stream.wait_stream(torch.cuda.current_stream(p.device))
        self._sent[id(basis)] = target, _copied(basis, target, stream)

    def let_go(self) -> None:
        """Of what was sent and no step has used."""
        for target, arrived in self._sent.values():
            torch.cuda.current_stream(target.device).wait_event(arrived)
        self._sent.clear()

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class Room:
    """What a backward pass has let go of and does not come back for."""

    def __init__(self) -> None:
        self.before: int | None = None
        self.rise = 0

    def takes(self, size: int, held: int, peak: int) -> bool:
        """Whether so many bytes fit under the peak.

        What the memory rose by from one question to the next, in a pass that computes layers anew, it may
        rise by again.

        Args:
            size: Bytes asked for, which are taken if the answer is yes.
            held: Bytes that the device holds.
            peak: The most that it has held.
        """
        if self.before is not None:
            self.rise = max(self.rise, held - self.before)
        fits = held + self.rise + size <= peak
        self.before = held + size * fits
        return fits


def _held_and_peak(device: torch.device) -> tuple[int, int]:
    """Bytes that torch's tensors take on a GPU, and the most that they have taken.

    As torch.cuda.memory_allocated and max_memory_allocated, which sort all statistics at every call.
    """
    found = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]
    return found["current"], found["peak"]


def _copied(source: Tensor, target: Tensor, stream: Any) -> Any:
    """Copy on a stream; the event that it is done."""
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        return stream.record_event()


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
