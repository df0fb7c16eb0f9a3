"""Job: how a device carries out a request, from the ring to the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ...guest.scatter import Segments
from .buffer import GuestBuffer
from .queue import Request


class Job(NamedTuple):
    """How a device carries out a request.

    Attributes:
        buffer: the part of the request that is leased while ``work`` runs.
        work: called with the leased buffer, in a worker. It returns how many bytes it moved. If it
            raises, the request has failed.
        end: called when the lease is released, with that number, or with None if the work has
            failed. It writes the answer, and returns how many bytes of ``request.writable`` were
            written.
        quick: called before ``work`` with the buffer, which is not leased, in the thread that
            serves; it must not wait. It reads or writes copies, which costs less than a lease of a
            few pages. If it returns None, or raises OSError or XenMapCacheError, a worker calls
            ``work``. After any other exception the driver has to reset the device. None: only
            ``work`` is called.
    """

    buffer: GuestBuffer
    work: Callable[[Segments], int]
    end: Callable[[int | None], int]
    quick: Callable[[GuestBuffer], int | None] | None = None


class Done(NamedTuple):
    """A request that was carried out: what to call for its answer, and with which number."""

    request: Request
    end: Callable[[int | None], int]
    moved: int | None


class Taken(NamedTuple):
    """Requests that were popped, and why there were no further ones.

    Attributes:
        jobs: the requests.
        kept: whether the device has kept others, which have no job yet.
        is_empty: the ring has no other, and the driver notifies of the next one.
        error: what went wrong with the next one.
    """

    jobs: list[tuple[Request, Job]]
    kept: bool = False
    is_empty: bool = False
    error: Exception | None = None
