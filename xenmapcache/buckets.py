"""Buckets: which parts of a guest are mapped, and how they come and go.

The part of :class:`.cache.MapCache` that knows nothing of what the memory is used for.
"""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

from .address import PAGE_SHIFT, as_int, check_range, page_span, parse_size
from .backend import Backend, Capability
from .errors import CacheFullError, ClosedError, FaultError, XenCallError
from .lease import Lessor
from .mapping import FREE_THREADED, Mapping

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .mapping import Memory

Piece = TypeVar("Piece")

_PATIENCE = 100  # milliseconds for memory in other threads' hands to come free
_EMERGENCY = 64  # buckets to give back when the kernel has no room
_BUCKET_SHIFTS = range(PAGE_SHIFT, 31)


class _Pending:
    """A bucket that a thread is mapping at this moment; others wait instead of mapping it too."""

    __slots__ = ("done", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.done = threading.Lock()
        self.done.acquire()


class _Apart:
    """A mapping that is written to like a memoryview, each time through one of its own."""

    __slots__ = ("mapping",)

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping

    def __setitem__(self, part: slice, data: Buffer) -> None:
        self.mapping.bytes[part] = data


class _Claim:
    """So many bytes of ``max_resident``, taken until it dies.

    It lives with the memory that it was taken for, or dies where mapping that failed or
    was interrupted: the books are right whatever happens.
    """

    __slots__ = ("freed", "length", "mapped")

    def __init__(self, freed: deque[int]) -> None:
        self.freed = freed
        self.length = 0
        self.mapped = False

    def __del__(self) -> None:
        # Takes no lock: finalizers get here. The sign tells an unmap from a claim unused.
        if hasattr(self, "mapped"):  # or making it was interrupted
            self.freed.append(self.length if self.mapped else -self.length)


class Buckets:
    """The resident buckets of one guest: found, mapped, evicted, counted.

    Synchronization: methods whose docstring says so are called under the lock; the
    others in any thread, without it.
    """

    def __init__(
        self, backend: Backend, lessor: Lessor, bucket_shift: int, max_resident: int | str
    ) -> None:
        bucket_shift = as_int("bucket_shift", bucket_shift)
        if bucket_shift not in _BUCKET_SHIFTS:
            raise ValueError(
                f"bucket_shift {bucket_shift} is not in {_BUCKET_SHIFTS.start}.."
                f"{_BUCKET_SHIFTS.stop - 1}: a bucket is whole pages, of 4 KiB, up to 1 GiB"
            )
        self._shift = bucket_shift
        self._size = 1 << bucket_shift
        self._mask = self._size - 1
        self._max_resident = parse_size(max_resident)
        if self._max_resident < self._size:
            raise ValueError(
                f"max_resident {self._max_resident:#x} is less than one bucket of {self._size:#x}"
            )
        self._backend = backend
        self._writes = Capability.WRITE in backend.capabilities
        self._lessor = lessor
        # Reentrant: a signal handler or finalizer may use the cache while its own
        # thread is in here. Statements that change counters are atomic between calls.
        self._lock = threading.RLock()
        self._closed = False
        # What can be read (written) without a look at anything else: the buckets
        # without holes that were accessed since the last sweep came by.
        self._readable: dict[int, Memory] = {}
        self._writable: dict[int, memoryview | _Apart] = {}
        self._buckets: dict[int, Mapping] = {}
        self._pending: dict[int, _Pending] = {}
        self._touched: set[int] = set()  # accessed since the last sweep, but not by the above
        self._clock: deque[int] = deque()  # bucket indexes in the order of the sweep
        self._freed: deque[int] = deque()  # what claims left when they died, not yet counted
        self._resident = 0
        self._hits = self._misses = self._maps = self._unmaps = 0
        self._evictions = self._holes = self._stale_dma = 0
        _all.add(self)

    def _check_open(self) -> None:
        self._lessor.check_process()
        if self._closed:
            raise ClosedError("this map cache is closed")

    def _drop_all(
        self,
    ) -> tuple[dict[int, Mapping], dict[int, Memory], dict[int, memoryview | _Apart]]:
        """Return what was resident, to be cleared without the lock; called under it.

        New dictionaries take its place at once: mappings are not to die under the lock. The old
        ones are cleared, not just let go: without a GIL a dictionary dies in the thread that
        made it, and with it all that it holds, and that thread may sleep.
        """
        dropped = self._buckets, self._readable, self._writable
        self._readable, self._writable, self._buckets = {}, {}, {}
        self._touched.clear()
        self._clock.clear()
        return dropped

    def _pieces(
        self, address: int, length: int, take: Callable[[Mapping, int, int], Piece]
    ) -> Iterator[Piece]:
        """Yield ``take(mapping, start, count)`` for the part of a range in each bucket.

        No bucket is held on to while the next one is fetched, but by what ``take`` returns.
        """
        self._check_open()
        end = address + length
        position = address
        while position < end:
            start = position & self._mask
            count = min(self._size - start, end - position)
            try:
                yield take(self._fetch(position >> self._shift, start, count), start, count)
            except FaultError as fault:
                raise FaultError(fault.address, end - fault.address, fault.errno) from None
            position += count

    def _hold(self, address: int, length: int) -> list[tuple[Mapping, int, int]]:
        """Return all pieces of a range at once, so that nothing can fail between them."""
        address, length = check_range(address, length, empty=True)
        if length > self._max_resident:
            raise CacheFullError(
                f"{length:#x} bytes at {address:#x} are more than max_resident "
                f"{self._max_resident:#x}: go through them in smaller pieces"
            )
        start = address & self._mask
        if (start + length + self._mask & ~self._mask) > self._max_resident:
            # Whole buckets are too much: just its pages, for this once.
            gfn, count = page_span(address, length)
            start = address - (gfn << PAGE_SHIFT)
            mapping = self._map(gfn, count)
            if not mapping.valid(start, length):
                fault = mapping.fault(start, length)
                try:
                    raise fault
                finally:
                    del mapping, fault
            return [(mapping, start, length)]
        return list(self._pieces(address, length, lambda *piece: piece))

    def _fetch(self, index: int, start: int, length: int, *, holes: bool = False) -> Mapping:
        """Return the bucket, mapped if need be, after checking that a range of it is there.

        Args:
            index: of the bucket.
            start: first byte in the bucket.
            length: bytes.
            holes: take the bucket as it is, holes included.
        """
        nested = self._is_nested()
        mine: _Pending | None = None
        try:
            while True:
                with self._lock:
                    self._check_open()
                    mapping = self._buckets.get(index)
                    if mapping is not None and (holes or mapping.valid(start, length)):
                        self._hits += 1
                        self._admit(index, mapping)
                        return mapping
                    pending = self._pending.get(index)
                    # Nobody to wait for, or nobody who could go on while this thread waits.
                    if (
                        pending is None
                        or not pending.done.locked()
                        or pending.thread == threading.get_ident()
                        or nested
                    ):
                        mine = _Pending()
                        self._pending[index] = mine
                        sequence = self._lessor.sequence
                        break
                with pending.done:
                    pass
            mapping = None  # one with a hole may have to make room for what replaces it
            fresh = self._map(index << self._shift - PAGE_SHIFT, self._size >> PAGE_SHIFT)
            with self._lock:
                self._check_open()
                self._misses += 1
                usable = holes or fresh.valid(start, length)
                if not usable:
                    self._holes += 1
                # A bucket that was mapped before an invalidation serves this access,
                # which had begun by then, and no other.
                former = self._buckets.get(index)
                if sequence == self._lessor.sequence and (usable or former is None):
                    if former is None or former.parked:
                        self._clock.append(index)
                    self._buckets[index] = fresh
        finally:
            if mine is not None:  # pragma: no branch - without one it has returned or raised
                mine.done.release()  # from here on the note counts for nothing
                with self._lock:
                    if self._pending.get(index) is mine:
                        del self._pending[index]
        if usable:
            return fresh
        fault = fresh.fault(start, length)
        try:
            raise fault
        finally:
            del fresh, former, fault  # no traceback is to keep the memory

    def _admit(self, index: int, mapping: Mapping) -> None:
        """Let accesses find a bucket without coming here; called under the lock.

        That begins with the second access: what is touched once, by a scan, goes first.
        """
        if mapping.errors is None:
            self._readable[index] = mapping.memory
            if self._writes:
                self._writable[index] = _Apart(mapping) if FREE_THREADED else mapping.bytes
        else:
            self._touched.add(index)

    def _map(self, gfn: int, count: int, *, writable: bool | None = None) -> Mapping:
        """Map pages, with room made for them first; called without the lock."""
        length = count << PAGE_SHIFT
        writable = self._writes if writable is None else writable
        claim = self._make_room(gfn, length)
        try:
            while True:
                try:
                    mapping = self._backend.map(gfn, count, writable=writable)
                    break
                except XenCallError as error:
                    # The kernel's limits may be lower than ours. A little at a time:
                    # at its limit on mappings Python can hardly allocate either.
                    wanted = max(length, _EMERGENCY * self._size)
                    if error.errno != errno.ENOMEM or not self._evict(wanted):
                        raise
            mapping.keep(claim)
            with self._lock:
                self._maps += 1
                claim.mapped = True
            return mapping
        finally:
            del claim  # no traceback is to keep it

    def _is_nested(self) -> bool:
        """Tell whether this thread holds the lock already: a signal handler or finalizer.

        It must not wait for other threads, as they may be waiting for that lock.
        """
        nested: bool = self._lock._is_owned()  # type: ignore[attr-defined] # noqa: SLF001 - no other name tells
        return nested

    def _make_room(self, gfn: int, length: int) -> _Claim:
        """Claim room for a mapping that is about to be made, evicting what is in its way."""
        if length > self._max_resident:
            raise CacheFullError(
                f"{length:#x} bytes at {gfn << PAGE_SHIFT:#x} are more than max_resident "
                f"{self._max_resident:#x}"
            )
        claim = _Claim(self._freed)
        patience = 0 if self._is_nested() else _PATIENCE
        while True:
            with self._lock:
                self._check_open()
                self._count()
                excess = self._resident + length - self._max_resident
                if excess <= 0:
                    self._resident += length
                    claim.length = length
                    return claim
            if self._evict(excess):
                continue
            # What is not leased may be on its way: mapped by another thread just now, or
            # evicted but still being read. A view that is kept will not go away.
            if not patience or self._leased() + length > self._max_resident:
                raise CacheFullError(
                    f"no room for {length:#x} bytes at {gfn << PAGE_SHIFT:#x}: {self._resident:#x} "
                    f"of max_resident {self._max_resident:#x} bytes are leased or in views that "
                    "are kept; release leases, or raise max_resident"
                )
            patience -= 1
            time.sleep(0.001)
            if FREE_THREADED and patience % 10 == 5:
                gc.collect()  # what was made by threads that sleep dies no sooner

    def _leased(self) -> int:
        """Return how many bytes are mapped that leases hold."""
        mappings = {lease._mapping for lease in self._lessor.ledger.held()}  # noqa: SLF001 - the cache made it
        return sum(mapping.length for mapping in mappings if mapping is not None)

    def _evict(self, wanted: int) -> bool:
        """Drop buckets of so many bytes, least recently used first, nearly; False if none can go.

        A sweep of the clock: a bucket that can be hit is made unhittable and passed by
        once, so that its next access is seen here; one that was not accessed since, goes.
        A leased one is parked outside of the clock, or every sweep would meet it.
        """
        victims = []
        with self._lock:
            self._count()
            for _ in range(2 * len(self._clock)):
                if wanted <= 0 or not self._clock:
                    break
                index = self._clock.popleft()
                mapping = self._buckets.get(index)
                if mapping is None:  # a signal's handler has invalidated all, just now
                    continue
                if mapping.holders:
                    mapping.parked = True
                    if mapping.holders:
                        continue
                    mapping.parked = False  # a release that saw nothing to tell came between
                accessed = index in self._readable or index in self._touched
                self._readable.pop(index, None)
                self._writable.pop(index, None)
                self._touched.discard(index)
                if accessed:
                    self._clock.append(index)
                    continue
                self._buckets.pop(index, None)
                victims.append(mapping)
                wanted -= mapping.length
            self._evictions += len(victims)
        return bool(victims)  # which die here, and are unmapped without the lock

    def _count(self) -> None:
        """Bring the books up to date with what finalizers and releases left; under the lock."""
        freed, returned, stale = self._freed, self._lessor.returned, self._lessor.returned_stale
        while freed:
            length = freed.popleft()
            self._resident -= abs(length)
            self._unmaps += length > 0
        while returned:
            index = returned.popleft() >> self._shift - PAGE_SHIFT
            mapping = self._buckets.get(index)
            if mapping is not None and mapping.parked:
                mapping.parked = False
                self._clock.append(index)
        while stale:
            stale.popleft()
            self._stale_dma += 1

    def _forget_parent(self) -> None:
        """In a forked child: nothing here may be used or unmapped."""
        self._lessor.forked = True
        self._lock = threading.RLock()  # another thread of the parent may have held it
        self._drop_all()


_all: weakref.WeakSet[Buckets] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for buckets in list(_all):
        buckets._forget_parent()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_after_fork_in_child)
