"""Mapping: guest memory in this process, which lives as long as somebody can see it.

The memory is a ctypes array placed over the foreign mapping. Every memoryview,
slice, numpy array or ctypes structure over it keeps that array alive, and when
the array dies the mapping is unmapped: whole, once, by the process that made it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from .address import PAGE_MASK, PAGE_SHIFT
from .binding import libc
from .errors import FaultError

if TYPE_CHECKING:

    class Memory(ctypes.Array[ctypes.c_char]):
        """Such an array; typeshed does not know that its slices are bytes."""

        def __getitem__(self, part: slice) -> bytes:  # type: ignore[override] # only slices are taken
            ...


FREE_THREADED = not getattr(sys, "_is_gil_enabled", lambda: True)()
Unmap = Callable[[int, int], None]
"""Unmaps ``(host address, length)``. Runs in whatever thread drops the last reference."""


class _Finalizer(weakref.ref["Memory"]):
    """Unmaps when the memory dies. ``weakref.finalize`` would need three times the memory."""

    __slots__ = ("address", "keeps", "length", "pid", "unmap")

    address: int
    length: int
    pid: int
    unmap: Unmap
    keeps: object


# Keeps the finalizers, by host address. At exit it is emptied: nothing is called
# in an interpreter that falls apart, and the kernel unmaps.
_live: dict[int, _Finalizer] = {}
atexit.register(_live.clear)
_pids: dict[int, int] = {}  # so that all finalizers of a process have one number, not one each


def _finalize(finalizer: _Finalizer) -> None:
    if not hasattr(finalizer, "keeps"):
        return  # making it was interrupted, and who mapped unmaps
    # Before the unmap: after it another thread may be given the same address.
    _live.pop(finalizer.address, None)
    if finalizer.pid == os.getpid():
        finalizer.unmap(finalizer.address, finalizer.length)


def _after_fork_in_child() -> None:
    # The kernel keeps foreign mappings out of a child, where a kept view would
    # crash. Private zeros take their place: the child neither sees nor changes the guest.
    for finalizer in list(_live.values()):
        libc.cover(finalizer.address, finalizer.length)
    _live.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def live_mappings() -> int:
    """Return how many mappings this process holds."""
    return len(_live)


class Mapping:
    """Consecutive guest pages, mapped in one piece.

    A backend makes it right after it has mapped the memory, and hands over the duty
    to unmap. Everyone else looks: nothing here can be closed.

    Args:
        address: host address, page-aligned.
        gfn: the first guest frame number.
        count: pages.
        writable: whether the memory was mapped for writing.
        errors: one positive errno a page, 0 for a valid one; None if all are valid.
        unmap: how to unmap it.
        left: emptied at the moment at which the duty to unmap is taken over.

    Attributes:
        memory: the exporter, a ctypes array of ``length`` bytes.
        address, gfn, count, writable, errors: as given.
        length: bytes.
        abandoned: its memory is lost, and something else may be at its address.
        holders: of a bucket, the ids of the leases given out of it; None before the first.
        parked: whether the cache has set the bucket aside from eviction while it is leased.

    Synchronization: immutable but for ``gfn`` and ``parked``, which the cache changes under its
    lock, and ``holders``, to which it adds under its lock, and from which releases take without.
    """

    __slots__ = (
        "__weakref__",
        "_bytes",
        "abandoned",
        "address",
        "count",
        "errors",
        "gfn",
        "holders",
        "length",
        "memory",
        "parked",
        "writable",
    )

    def __init__(
        self,
        address: int,
        gfn: int,
        count: int,
        *,
        writable: bool,
        errors: bytes | None,
        unmap: Unmap,
        left: list[int] | None = None,
    ) -> None:
        length = count << PAGE_SHIFT
        left = [] if left is None else left
        try:
            # SAFETY: the backend has mapped [address, address + length), and nobody
            # unmaps it before the finalizer does.
            memory = self.memory = cast("Memory", (ctypes.c_char * length).from_address(address))
            finalizer = _Finalizer(memory, _finalize)
        except MemoryError:
            if not left:  # or the caller does it
                unmap(address, length)
            raise
        finalizer.address, finalizer.length = address, length
        pid = os.getpid()
        finalizer.unmap, finalizer.pid = unmap, _pids.setdefault(pid, pid)
        finalizer.keeps = None
        # No call, and so no signal handler, comes between these two.
        _live[address] = finalizer
        del left[:]
        view = memoryview(memory).cast("B")
        self._bytes = view if writable else view.toreadonly()
        self.address = address
        self.gfn = gfn
        self.count = count
        self.length = length
        self.writable = writable
        self.errors = errors
        self.holders: set[int] | None = None
        self.parked = False
        self.abandoned = False

    def __repr__(self) -> str:
        start = self.gfn << PAGE_SHIFT
        holes = f", {self.holes} holes" if self.errors else ""
        return f"<Mapping of {start:#x}..{start + self.length:#x} at {self.address:#x}{holes}>"

    @property
    def bytes(self) -> memoryview:
        """A memoryview of it, read-only if it was mapped so.

        Touching it, or ``memory``, where a page is not valid crashes; :meth:`view` does not
        let you.
        """
        if FREE_THREADED:
            # One that others slice as well loses count of its slices (python/cpython#155606).
            view = memoryview(self.memory).cast("B")
            return view if self.writable else view.toreadonly()
        return self._bytes

    @property
    def holes(self) -> int:
        """How many of its pages are not there."""
        return self.count - self.errors.count(0) if self.errors else 0

    def valid(self, offset: int, length: int) -> bool:
        """Tell whether all pages of a range are there; offset and length in bytes."""
        if self.errors is None:
            return True
        first = offset >> PAGE_SHIFT
        end = (offset + length + PAGE_MASK) >> PAGE_SHIFT
        return self.errors.count(0, first, end) == end - first

    def fault(self, offset: int, length: int) -> FaultError:
        """Return the error for a range that is not valid; it names the first bad guest address.

        Returned, not raised: a traceback that somebody keeps would keep the mapping.
        """
        assert self.errors is not None  # noqa: S101 - or it were valid
        page = offset >> PAGE_SHIFT
        while not self.errors[page]:
            page += 1
        bad = max(offset, page << PAGE_SHIFT)
        return FaultError((self.gfn << PAGE_SHIFT) + bad, offset + length - bad, self.errors[page])

    def view(self, offset: int, length: int) -> memoryview:
        """Return bytes of it, read-only if it was mapped so, that stay safe for ever.

        Args:
            offset: bytes into the mapping.
            length: bytes; the range is half-open and inside the mapping.

        Raises:
            FaultError: a page of the range is not there.
            ValueError: the range does not lie in the mapping.
        """
        if offset < 0 or length < 0 or offset + length > self.length:
            raise ValueError(f"offset {offset:#x}, length {length:#x} is not inside {self!r}")
        if self.errors is not None and not self.valid(offset, length):
            raise self.fault(offset, length)
        return self.bytes[offset : offset + length]

    def keep(self, companion: object) -> None:
        """Keep an object alive for as long as the memory is mapped. One at most."""
        _live[self.address].keeps = companion

    def abandon(self) -> None:
        """Never unmap: something else lives at its address by now. Views must not be used."""
        _live.pop(self.address, None)
        self.abandoned = True
