"""Mapping: guest memory in this process, which lives as long as it can be seen.

The memory is a ctypes array placed over the foreign mapping. Every memoryview, slice, numpy
array or ctypes structure over it keeps that array alive. When the array is freed, the mapping
is unmapped: completely, once, by the process that made it.
"""

# Theory of operation
#
# Reference counts alone decide when memory is unmapped. CPython's collector handles the weak
# references of a garbage cycle before it runs `__del__`, a generator's `finally` or a coroutine's
# cleanup. If the collector knew the array, it would report the array's end while code of the same
# cycle can still use the memory. Therefore each array is taken out of the collector's hands
# (PyObject_GC_UnTrack). The array refers to no object, so it is never the cause of a leak. The
# collector clears the views of a cycle after all finalizers; only then does the array's count drop.
#
# A record (LiveMapping) is in one of these states:
#
#   live      in _live; its memory has users
#   dead      in _live; its memory has no users, and its token is in place
#   claimed   in _live; exactly one party has taken the token, and unmaps
#   unmapped  not in _live
#
#   live --last reference dropped--> dead --token taken--> claimed --munmap--> unmapped
#                                      ^--- munmap failed ---'
#
# Rules
#   1. The address range belongs to those who hold a reference to the memory (the files' thread
#      takes one to put a copy in place), and afterwards to the party that has taken the token.
#      list.pop decides, in one step of C. To give the token back needs no memory.
#   2. _unmap takes the token, unmaps and forgets the record in one call into C. No signal handler,
#      RecursionError or other thread's exception can come between these steps.
#   3. The table _live is the truth. A weak reference's callback is a hint that may get lost (near
#      the recursion limit, without memory, or if a signal handler raises in it). sweep() finds what
#      a lost hint has left. It runs when accounts are added up, and after each full collection.
#   4. Records are looked up by identity, never by address: as soon as memory is unmapped, another
#      thread may be given the same address.
#   5. Nothing is unmapped at exit or in a forked child: the table is emptied there.

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from operator import call
from typing import TYPE_CHECKING, NoReturn, Self, cast

from .address import PAGE_MASK, PAGE_SHIFT
from .binding import libc
from .binding.collector import sweep_after_collections, untrack
from .binding.ctypes_loader import cause_of
from .binding.hints import PAGE_HINTS
from .errors import FaultError, XenCallError

if TYPE_CHECKING:

    class Memory(ctypes.Array[ctypes.c_char]):
        """Such an array; typeshed does not know that its slices are bytes."""

        def __getitem__(self, part: slice) -> bytes:  # type: ignore[override] # only slices are taken
            ...


FREE_THREADED = not getattr(sys, "_is_gil_enabled", lambda: True)()
Unmap = Callable[[int, int], object]
"""Unmaps ``(host address, length)`` and returns a false value, or else has not unmapped it.

It must be a C function: Python code could be interrupted between its steps.
"""

_call: Callable[[Callable[[], object]], object] = call


class LiveMapping(weakref.ref["Memory"]):
    """The record of a mapping: a weak reference to its memory, in the table of live mappings.

    Attributes:
        address: host address of the memory.
        length: in bytes.
        keeps: an object that the memory needs, such as a file's descriptor; it is released after
            the memory is unmapped.
        hints: where the record is appended when the memory has been unmapped.
        token: a list with one element, which the party that unmaps takes out.
    """

    __slots__ = ("address", "hints", "keeps", "length", "token", "unmap")

    address: int
    length: int
    unmap: Unmap
    keeps: object
    hints: tuple[deque[LiveMapping], ...]
    token: list[None]

    # Two records are never the same, whatever their memory is: a weak reference to an array that
    # has died could not be looked up.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def mapped(self) -> bool:
        """Whether the memory still has to be unmapped."""
        return self in _live


# A dictionary and not a set: a store is one step, but after a call an interrupt may come.
_live: dict[LiveMapping, None] = {}
_pid = os.getpid()


def _unmap(record: LiveMapping) -> None:
    """Unmap memory that has no users, unless another party has taken the token."""
    if record not in _live or os.getpid() != _pid:
        return  # its making was interrupted; or C code has forked, and has told nobody
    waiting = [0]  # emptied together with the taking of the token
    steps: list[Callable[[], object]] = [
        record.token.pop,
        waiting.pop,
        partial(record.unmap, record.address, record.length),
        partial(_live.pop, record, None),
    ]
    steps += [partial(hints.append, record) for hints in record.hints]
    try:
        any(map(_call, steps))  # ends with the first step that returns something true, or raises
    except IndexError:
        pass  # another party has the token, or has unmapped
    except ctypes.ArgumentError as error:
        raise cause_of(error) from error
    finally:
        if record not in _live:
            record.keeps = None
        elif not waiting:
            record.token.append(None)  # munmap failed: the next sweep tries again


atexit.register(_live.clear)


def _after_fork_in_child() -> None:
    # The kernel keeps foreign mappings out of a child, where a kept view would
    # crash. Private zeros take their place: the child neither sees nor changes the guest.
    # libc's functions are ready since the import, so no library is loaded into a gap.
    global _pid
    for record in list(_live):
        libc.map_zeros_over(record.address, record.length)
    _live.clear()
    _pid = os.getpid()


os.register_at_fork(after_in_child=_after_fork_in_child)


def sweep() -> int:
    """Unmap memory whose hint got lost, and return how many mappings that were."""
    dead = [record for record in list(_live) if record() is None]
    for record in dead:
        _unmap(record)
    return sum(not record.mapped for record in dead)


sweep_after_collections(sweep)


def live_records() -> list[LiveMapping]:
    """Return the records of all live mappings."""
    return list(_live)


def live_mappings() -> int:
    """Return how many mappings this process holds."""
    sweep()
    return len(_live)


class PageErrors(bytes):
    """One errno for each page of a mapping, 0 for a valid one. Most mappings have none.

    Attributes:
        call: the function that mapped the pages.
        domid: the domain, or None.
    """

    call: str
    domid: int | None

    def __new__(cls, errors: bytes, call: str, domid: int | None) -> Self:
        """Return the errors of a call for a domain."""
        self = super().__new__(cls, errors)
        self.call = call
        self.domid = domid
        return self


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
        unmap: how to unmap it; by default ``munmap``.
        result_out: a list that is emptied at the moment at which the mapping takes over the duty to
            unmap. If making it fails or is interrupted before, the caller unmaps. Without a
            list the mapping itself unmaps then.
        keeps: an object that is kept alive until the memory is unmapped.
        call: the function that mapped it, for the error of a page that was refused.
        domid: the domain, for the same.

    Attributes:
        memory: the exporter, a ctypes array of ``length`` bytes.
        record: its entry in the table of live mappings.
        address, gfn, count, writable: as given.
        errors: as given, and by which call for which domain; see :class:`PageErrors`.
        length: bytes.
        abandoned: its memory is lost, and something else may be at its address.
        copied: whether a cache counts it as a copy, under ``max_copies``.

    Synchronization: immutable, except for ``gfn`` and ``copied``, which the cache changes under its
    lock, and ``abandoned``.
    """

    __slots__ = (
        "__weakref__",
        "_bytes",
        "abandoned",
        "address",
        "copied",
        "count",
        "errors",
        "gfn",
        "length",
        "memory",
        "record",
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
        unmap: Unmap = libc.munmap,
        result_out: list[int] | None = None,
        keeps: object = None,
        call: str = "map",
        domid: int | None = None,
    ) -> None:
        length = count << PAGE_SHIFT
        own: list[int] = []
        if result_out is None:
            result_out = own = [address]
        try:
            # SAFETY: the backend has mapped [address, address + length), and only the
            # party that takes the record's token unmaps it.
            memory = self.memory = cast("Memory", (ctypes.c_char * length).from_address(address))
            untrack(memory)
            record = self.record = LiveMapping(memory, _unmap)
            record.address, record.length, record.unmap = address, length, unmap
            record.keeps = keeps
            record.hints = ()
            record.token = [None]
            # No call, and so no signal handler, comes between these two.
            _live[record] = None
            del result_out[:]
        except BaseException:
            if own:
                unmap(address, length)
            raise
        self._bytes: memoryview | None = None
        self.address = address
        self.gfn = gfn
        self.count = count
        self.length = length
        self.writable = writable
        self.errors = None if errors is None else PageErrors(errors, call, domid)
        self.copied = False
        self.abandoned = False

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse ``copy`` and ``pickle``: the memory has one record, and one account.

        Raises:
            TypeError: always.
        """
        del protocol
        raise TypeError("a Mapping cannot be copied or pickled: keep a view of it instead")

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
        view = self._bytes
        if view is None:
            # Not in __init__: a bucket that is only read needs none, and a view takes 312 bytes.
            view = memoryview(self.memory).cast("B")
            if not self.writable:
                view = view.toreadonly()
            # Without a GIL, a shared view loses count of its slices (python/cpython#155606).
            if not FREE_THREADED:
                self._bytes = view
        return view

    @property
    def holes(self) -> int:
        """How many of its pages cannot be touched: they are not there, or were refused."""
        return self.count - self.errors.count(0) if self.errors else 0

    def valid(self, offset: int, length: int) -> bool:
        """Tell whether all pages of a range are there; offset and length in bytes."""
        if self.errors is None:
            return True
        first = offset >> PAGE_SHIFT
        end = (offset + length + PAGE_MASK) >> PAGE_SHIFT
        return self.errors.count(0, first, end) == end - first

    def usable(self, offset: int, length: int, *, holes: bool) -> bool:
        """Tell whether a range is valid; with `holes`, whether no page of it was refused."""
        if not holes:
            return self.valid(offset, length)
        end = offset + length + PAGE_MASK >> PAGE_SHIFT
        errors = b"" if self.errors is None else self.errors[offset >> PAGE_SHIFT : end]
        return PAGE_HINTS.keys().isdisjoint(errors)

    def fault(self, offset: int, length: int, *, holes: bool = False) -> FaultError | XenCallError:
        """Return the error for a range that is not usable; it names the first bad guest address.

        Returned, not raised: a traceback that is kept would keep the mapping.

        Args:
            offset: bytes into the mapping.
            length: bytes.
            holes: name the first page that was refused, whatever is not there.

        Returns:
            FaultError if that page is not there, XenCallError if it was refused.
        """
        assert self.errors is not None  # noqa: S101 - or it were valid
        page = offset >> PAGE_SHIFT
        while not self.errors[page] or (holes and self.errors[page] not in PAGE_HINTS):
            page += 1
        bad = max(offset, page << PAGE_SHIFT)
        address, errno = (self.gfn << PAGE_SHIFT) + bad, self.errors[page]
        if errno in PAGE_HINTS:
            call, domid = self.errors.call, self.errors.domid
            return XenCallError(call, domid, errno, PAGE_HINTS[errno], address=address)
        return FaultError(address, offset + length - bad, errno)

    def refusal(self) -> XenCallError | None:
        """Return the error for the first page that was refused; None if none was.

        A refused page may be one of the guest's, so no caller may treat it as a hole.
        """
        if self.usable(0, self.length, holes=True):
            return None
        error = self.fault(0, self.length, holes=True)
        assert isinstance(error, XenCallError)  # noqa: S101 - with holes=True
        return error

    def view(self, offset: int, length: int) -> memoryview:
        """Return bytes of it, read-only if it was mapped so, that stay safe for ever.

        Args:
            offset: bytes into the mapping.
            length: bytes; the range is half-open and inside the mapping.

        Raises:
            FaultError: a page of the range is not there.
            XenCallError: a page of the range was refused.
            ValueError: the range does not lie in the mapping.
        """
        if offset < 0 or length < 0 or offset + length > self.length:
            raise ValueError(f"offset {offset:#x}, length {length:#x} is not inside {self!r}")
        if self.errors is not None and not self.valid(offset, length):
            raise self.fault(offset, length)
        return self.bytes[offset : offset + length]

    def notify(self, hints: tuple[deque[LiveMapping], ...]) -> None:
        """Have the record appended to deques when the memory is unmapped; that may get lost.

        Args:
            hints: a tuple that many mappings share, so that each of them needs less memory.
        """
        record = self.record
        record.hints = record.hints + hints if record.hints else hints

    def abandon(self) -> None:
        """Never unmap: something else lives at its address by now. Views must not be used."""
        _live.pop(self.record, None)
        self.abandoned = True
