"""Buckets: which parts of a guest are mapped, in which generation, and how an access finds them."""

from __future__ import annotations

import os
import queue
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..address import PAGE_SHIFT, as_int
from ..errors import ClosedError
from ..mapping import FREE_THREADED, Mapping
from ..stream import EventStream
from . import telling
from .budget import Budget
from .clock import Clock, Pin
from .locked import locked

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..mapping import Memory

# Theory of operation
#
# A bucket is in one of these states:
#
#   absent   not mapped
#   mapped   only in `buckets`; the next access takes the lock and finds it there
#   hot      in `readable` (and `writable`) as well: a read finds it without the lock
#   parked   leased when the sweep came by; off the clock until its last lease ends
#
# A bucket with holes never becomes hot; `touched` notes its accesses for the sweep.
#
#   absent --map--> mapped --access--> hot --sweep--> mapped --sweep, not accessed--> absent
#                      `--sweep, while leased--> parked --last release--> mapped
#
# All of that belongs to one *generation*, an object that also has the number of invalidations
# before it. `BucketTable.generation` is the only way to it.
#
# Rules
#   1. An invalidation puts a new, empty generation in place with one store. `close` puts a closed
#      one there. Nothing else ends a generation.
#   2. An operation fetches the generation once, and stores only into the one that it fetched. If a
#      signal handler or another thread invalidates in between, the store reaches an orphan,
#      which no access finds and which is freed with the operation.
#   3. A lease takes the sequence number of the generation that its mapping came from. So a
#      lease that was made across an invalidation is stale from the start.
#   4. The tables of a generation change only under the lock. A read of a hot bucket is a
#      look-up, a slice and a comparison of lengths; it takes no lock.
#   5. No call into Xen and no unmap happens under the lock: mappings that go are returned
#      to the caller, who drops them after the lock.
#   6. A release takes no lock. It appends to `returned`; the next holder of the lock
#      puts the bucket back on the clock.
#   7. A thread that already holds the lock (a signal handler, a finalizer) waits for no
#      other thread: it maps a second time instead.


_BUCKET_SHIFTS = range(PAGE_SHIFT, 31)


def check_bucket_shift(bucket_shift: int, limit: int, copies: int | None) -> int:
    """Return log2 of a bucket's size as an int, if such a bucket fits under the limits.

    Args:
        bucket_shift: as given by the user.
        limit: ``max_resident``, in bytes.
        copies: ``max_copies``, in bytes, if it was given.
    """
    shift = as_int("bucket_shift", bucket_shift)
    if shift not in _BUCKET_SHIFTS:
        raise ValueError(
            f"bucket_shift must be {_BUCKET_SHIFTS.start} to {_BUCKET_SHIFTS.stop - 1} "
            f"(a bucket is 4 KiB to 1 GiB), not {shift}"
        )
    for option, size in (("max_resident", limit), ("max_copies", copies)):
        if size is not None and size < 1 << shift:
            raise ValueError(
                f"{option} must be at least one bucket of {1 << shift:#x} bytes, not {size:#x}"
            )
    return shift


class UnsharedView:
    """A mapping that is written to like a memoryview, each time through a view of its own."""

    __slots__ = ("mapping",)

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping

    def __setitem__(self, part: slice, data: Buffer) -> None:
        self.mapping.bytes[part] = data


class Note:
    """Says that a thread is mapping a bucket at this moment; others wait instead of mapping it."""

    __slots__ = ("finished", "gate", "stored", "thread")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.stored = self.finished = False
        self.gate: queue.SimpleQueue[None] = queue.SimpleQueue()


class Generation:
    """All that was mapped between two invalidations.

    Attributes:
        readable, writable: the hot buckets, found without a look at anything else.
        buckets: all of them, by index.
        touched: indexes of buckets that were accessed since the last sweep, but not as hot ones.
        notes: of the buckets that a thread is mapping now.
        clock: which bucket goes next.
        sequence: how many invalidations came before.
        known: the buckets that observers know, by index.
        told: whether observers have not been told of its end.
        closed: whether it is the last one, of a closed cache.
    """

    __slots__ = (
        "buckets",
        "clock",
        "closed",
        "known",
        "notes",
        "readable",
        "sequence",
        "told",
        "touched",
        "writable",
    )

    def __init__(self) -> None:
        self.readable: dict[int, Memory] = {}
        self.writable: dict[int, memoryview | UnsharedView] = {}
        self.buckets: dict[int, Mapping] = {}
        self.touched: set[int] = set()
        self.notes: dict[int, Note] = {}
        self.clock = Clock()
        self.sequence = 0
        self.known: dict[int, telling.KnownBucket] = {}
        self.told: bool | None = True
        self.closed = False

    def cool(self, index: int) -> bool:
        """Take a bucket from the hit tables; return whether it was accessed since the last time."""
        accessed = index in self.readable or index in self.touched
        self.readable.pop(index, None)
        self.writable.pop(index, None)
        self.touched.discard(index)
        return accessed

    def clear(self) -> None:
        """Drop all mappings; called without the lock.

        Without a GIL a dictionary is freed in the thread that made it, and that thread
        may sleep. So the dictionaries are emptied here, and not only dropped.
        """
        try:
            self.readable.clear()
        finally:
            try:
                self.writable.clear()
            finally:
                self.buckets.clear()


class BucketTable:
    """The generation that accesses find now, and what may be done to it.

    Attributes:
        generation: see above. It is replaced by :meth:`retire` alone.
        shift: log2 of a bucket's size.
        size, mask: of a bucket, in bytes.
        writes: whether the source can be written.
        retired: old generations whose mappings are not dropped yet.
        untold: old generations of whose end observers are not told yet, oldest first.
        held_dma: returns the numbers of the DMA leases that are older than an invalidation, and
            that observers know. The registry sets it.
        returned: pins of buckets whose last lease has ended, for the clock.
        stream: what observers are told.
        forked: whether this is a child process, where nothing of this may be used.
        slow_path_hits, misses, evictions, hole_faults: counters.
    """

    __slots__ = (
        "__weakref__",
        "_budget",
        "evictions",
        "forked",
        "generation",
        "held_dma",
        "hole_faults",
        "mask",
        "misses",
        "owner_pid",
        "retired",
        "returned",
        "shift",
        "size",
        "slow_path_hits",
        "stream",
        "untold",
        "writes",
    )

    def __init__(self, budget: Budget, shift: int, writes: bool) -> None:
        self._budget = budget
        self.shift = shift
        self.size = 1 << shift
        self.mask = self.size - 1
        self.writes = writes
        self.stream = EventStream()
        self.generation = Generation()
        self.retired: dict[Generation, None] = {}  # oldest first
        self.untold: dict[Generation, None] = {}
        self.held_dma: Callable[[int], tuple[int, ...]]
        self.returned: deque[Pin] = deque()
        self.owner_pid = os.getpid()
        self.forked = False
        self.slow_path_hits = self.misses = self.evictions = self.hole_faults = 0
        _tables.add(self)

    def check_open(self) -> None:
        """Raise ClosedError after close, and in a forked child."""
        if self.forked:
            raise ClosedError(
                f"this map cache belongs to process {self.owner_pid}, which forked this one: open "
                "a backend and a cache of your own after the fork"
            )
        if self.generation.closed:
            raise ClosedError("this map cache is closed")

    def find(
        self, generation: Generation, index: int, start: int, length: int, *, holes: bool = False
    ) -> Mapping | None:
        """Return a bucket of a generation if a range of it is valid, and make it hot.

        Called under the lock. A bucket becomes hot with its second access, so that a scan
        evicts what it scanned and not what is in use. With `holes`, a range is found with its
        holes, but not with pages that were refused: those are tried again.
        """
        mapping = generation.buckets.get(index)
        if mapping is None:
            return None
        if mapping.errors is None:
            generation.readable[index] = mapping.memory
            if self.writes:
                generation.writable[index] = (
                    UnsharedView(mapping) if FREE_THREADED else mapping.bytes
                )
        elif mapping.usable(start, length, holes=holes):
            generation.touched.add(index)
        else:
            return None
        self.slow_path_hits += 1
        return mapping

    @staticmethod
    def store(generation: Generation, index: int, mapping: Mapping) -> None:
        """Let later accesses of a generation find a bucket; called under the lock."""
        generation.clock.admit(index, replaces=index in generation.buckets)
        generation.buckets[index] = mapping

    def evict(self, wanted: int, copied: bool | None = None) -> bool:
        """Evict about `wanted` bytes; return whether a mapping was dropped.

        With `copied`, only buckets that are copies of a file's pages, or only those that are not.

        Called without the lock. Mappings of a retired generation go first: a signal handler may
        need their room before the thread that it interrupted has dropped them.
        """
        if self.clear_retired():
            return True
        # In this line they are unmapped, without the lock.
        return len(locked(self._budget.lock, self._sweep, wanted, copied)) > 0

    def _sweep(self, wanted: int, copied: bool | None) -> list[Mapping]:
        generation = self.generation
        generation.clock.put_back(self.returned)
        try:
            victims = generation.clock.sweep(generation, wanted, copied=copied)
            count = len(victims)
            self.evictions += count
            if self.stream.observations:
                telling.dropped(self, victims)
        except BaseException:
            if self.stream.observations:
                telling.reconcile(self)
            raise
        return victims

    def invalidate(self) -> tuple[int, int]:
        """Retire the generation of an open cache; called under the lock.

        Returns:
            The number of this invalidation, and how many buckets were dropped.
        """
        self.check_open()
        previous = self.retire()
        if previous.closed:  # by a signal handler, just now
            self.check_open()
        return previous.sequence + 1, len(previous.buckets)

    def retire(self, *, closed: bool = False) -> Generation:
        """Put a new generation in place, and return the old one; called under the lock.

        The caller calls :meth:`clear_retired` after the lock. A closed one stays in place.
        """
        fresh = Generation()
        fresh.closed = closed
        # No call from here on, so no signal handler invalidates or closes in between.
        previous = self.generation
        if not previous.closed:
            fresh.sequence = previous.sequence + (not closed)
            if self.stream.observations:
                self.untold[previous] = None
            self.generation = fresh
            if previous.buckets:
                self.retired[previous] = None
        return previous

    def clear_retired(self) -> bool:
        """Drop what retired generations had mapped; return whether there was any.

        Called without the lock. If it is interrupted, the next call continues.
        """
        found = False
        for previous in list(self.retired):
            found |= len(previous.buckets) > 0
            previous.clear()
            self.retired.pop(previous, None)  # unless another thread has removed it
        return found

    def forget_parent(self) -> None:
        """In a forked child: nothing here may be used or unmapped."""
        self.forked = True
        self._budget.forget_parent()
        self.generation = Generation()
        self.retired.clear()


_tables: weakref.WeakSet[BucketTable] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for table in list(_tables):
        table.forget_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)
