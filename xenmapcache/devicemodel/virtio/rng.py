"""VirtioRng: a virtio source of random numbers."""

from __future__ import annotations

import os

from ...guest.scatter import Segments
from ..server import IoreqServer
from .buffer import BrokenDriverError, GuestBuffer
from .device import VirtioDevice
from .job import Job
from .queue import Request

_MAX_BYTES = 4096
"""Most random bytes for one request; the driver asks again if it needs more."""


class VirtioRng(VirtioDevice):
    """A source of random numbers, from this machine's kernel.

    Args:
        server: whose guest has the driver.
        name: for reports.
        record: path of a file with what the next process needs; see :class:`VirtioDevice`.
    """

    device_id = 4
    queue_sizes = (64,)

    def __init__(
        self,
        server: IoreqServer,
        *,
        name: str = "rng0",
        record: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(server, name=name, record=record)

    def prepare(self, request: Request) -> Job:
        """Fill the request's writable part."""
        if not len(request.writable):
            raise BrokenDriverError(f"{request!r} has no place for a random byte")
        return Job(request.writable[:_MAX_BYTES], _fill, lambda moved: moved or 0, _fill_quickly)


def _fill(memory: Segments) -> int:
    data = os.getrandom(len(memory))
    memory[: len(data)] = data
    return len(data)


def _fill_quickly(buffer: GuestBuffer) -> int:
    return buffer.write(os.getrandom(len(buffer)))
