"""LeaseRecord: what the cache knows of one lease. The handle that users hold only points to it."""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import traceback
from operator import attrgetter

from ..errors import XenMapCacheError
from ..grants import GrantMapping
from ..mapping import Mapping
from .clock import Pin
from .info import DmaDirection, LeaseInfo, LeaseKind
from .strict import Views

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep  # noqa: PTH120 - pathlib is slow
_DEVICE = LeaseKind.DEVICE  # CPython 3.11 takes long to find it in the class
NEVER_STALE = sys.maxsize
"""The sequence of a lease that no invalidation concerns."""
_next_id = itertools.count(1).__next__
_monotonic = time.monotonic
id_of = attrgetter("id")


class _Here(threading.local):
    """The current thread, found faster than by ``current_thread()``."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()


_here = _Here()


def as_owner(owner: str) -> str:
    """Return an owner's name as an exact str: methods of a subclass would be foreign code.

    Raises:
        TypeError: it is not a str.
    """
    if not isinstance(owner, str):
        raise TypeError(f"owner must be a str, not {type(owner).__name__}")
    return str.__str__(owner)


class LeaseRecord:
    """A lease as its registry keeps it.

    Attributes:
        id, kind, address, length, owner, direction, origin, since, thread: see LeaseInfo.
        sequence: of the generation that the mapping came from, or NEVER_STALE.
        mapping: what keeps the memory; None before the grant and after the end.
        view: its bytes; None after the end.
        host_address: of the first byte.
        pin: of the bucket that it shares, or None.
        copied_bytes: of a window, how much of its mapping is copied; None of other leases.
        warned: whether a WARNING has named it as held across an invalidation.
        lost: whether its memory is not the guest's any more.
        delivered: the sequence at which a copy of it was delivered.
        undelivered: what that copy could not reach.
        counted: whether the statistics have counted it as released stale.
        released_at: the sequence at which it ended, or None.
        aged: whether a WARNING has named it as held for too long.
        told: whether observers know it as held.
        copied_pages, lost_pages: what a copy of it has delivered, and what no guest sees.
        views: of a cache with strict views, those that callers were given; else None.
        written: how many bytes the last release said were written; None if it did not say.
    """

    __slots__ = (
        "address",
        "aged",
        "copied_bytes",
        "copied_pages",
        "counted",
        "delivered",
        "direction",
        "host_address",
        "id",
        "kind",
        "length",
        "lost",
        "lost_pages",
        "mapping",
        "origin",
        "owner",
        "pin",
        "released_at",
        "sequence",
        "since",
        "thread",
        "told",
        "undelivered",
        "view",
        "views",
        "warned",
        "written",
    )

    def __init__(
        self,
        kind: LeaseKind,
        address: int,
        length: int,
        owner: str,
        direction: DmaDirection | None,
        origin: tuple[str, ...] | None = None,
    ) -> None:
        self.id = _next_id()
        self.kind = kind
        self.address = address
        self.length = length
        self.owner = owner
        self.direction = direction
        self.origin = origin
        self.since = _monotonic()
        self.thread = _here.thread
        self.sequence = self.delivered = self.host_address = self.copied_pages = self.lost_pages = 0
        self.warned = self.lost = self.counted = self.aged = False
        self.told: bool | None = False
        self.mapping: Mapping | None = None
        self.view: memoryview | None = None
        self.pin: Pin | None = None
        self.copied_bytes: int | None = None
        self.released_at: int | None = None
        self.undelivered: XenMapCacheError | None = None
        self.views: Views | None = None
        self.written: int | None = None

    @property
    def written_length(self) -> int:
        """How many bytes, from the first one on, may have been written."""
        return self.length if self.written is None else self.written

    def stale_at(self, sequence: int) -> bool:
        """Tell whether the invalidation of that number has made it stale."""
        if isinstance(self.mapping, GrantMapping):
            return self.mapping.covered
        return self.lost or (self.kind is not _DEVICE and self.sequence < sequence)

    def info(self, sequence: int) -> LeaseInfo:
        """Return what is known of it, as seen after the invalidation of that number."""
        return LeaseInfo(
            self.id,
            self.kind,
            self.address,
            self.length,
            self.owner,
            self.direction,
            time.monotonic() - self.since,
            self.thread.name,
            self.stale_at(sequence),
            self.origin,
        )


def call_stack() -> tuple[str, ...]:
    """Return the stack as ``file:line in function``, up to the caller of this package."""
    frames = traceback.extract_stack()
    while frames and frames[-1].filename.startswith(_PACKAGE):
        frames.pop()
    return tuple(f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)
