"""The mapper: map calls, one thread per bucket, within the budget."""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from ..address import PAGE_SHIFT, page_span
from ..backend import Backend
from ..errors import CacheFullError, FaultError, XenCallError
from ..mapping import Mapping
from ..stream import now
from . import telling
from .buckets import BucketTable, Generation, Note
from .budget import Budget, Operation, Reservation
from .locked import locked

Result = TypeVar("Result")
Part = TypeVar("Part")
Piece = tuple[Mapping, int, int]
"""A mapping, the first byte in it, and how many bytes."""

_ENOMEM_BUCKETS = 64  # to evict at a time when the kernel has no room
_WAIT_S = 0.05  # before a look at a note whose thread was interrupted


class Mapper:
    """Maps buckets and other ranges of one guest.

    Args:
        backend: the source.
        table: where buckets are found.
        budget: how much may be mapped.
        copies: how much of it may be copies of a file's pages.
        leased: returns how many bytes the leases hold, of copies or others.

    Synchronization: all methods are called in any thread, without the lock.
    """

    def __init__(
        self,
        backend: Backend,
        table: BucketTable,
        budget: Budget,
        copies: Budget,
        leased: Callable[[bool], int],
    ) -> None:
        self._backend = backend
        self._table = table
        self._budget = budget
        self._copies = copies
        self._leased = leased
        self._exclusive = threading.RLock()

    # --- single calls -----------------------------------------------------------

    def map(
        self, gfn: int, count: int, operation: Operation, *, writable: bool | None = None
    ) -> Mapping:
        """Map pages, with room made for them first.

        Args:
            gfn: the first guest frame number.
            count: pages.
            operation: of the caller.
            writable: map for writing too; by default if the source can be written.
        """
        budget = self._budget_of(gfn, count)
        reservation = Reservation(count << PAGE_SHIFT)
        if writable is None:
            writable = self._table.writes
        try:
            self.reserve(reservation, operation, gfn << PAGE_SHIFT, budget)
            mapping = self._call(gfn, count, writable)
            locked(budget.lock, budget.keep, reservation, mapping)
            return mapping
        finally:
            reservation.ended = True
            budget.end(reservation)

    def _budget_of(self, gfn: int, count: int) -> Budget:
        """Return the budget that a mapping of some pages counts under.

        A backend that changes its mind between this and the map call, because a file lease
        breaks, has one mapping counted under the other limit.
        """
        return self._copies if self._backend.copies(gfn, count) else self._budget

    def _call(self, gfn: int, count: int, writable: bool) -> Mapping:
        """Map pages; if there is no memory for the call or for a page, evict and try again."""
        # The limits of Xen and the kernel may be lower than ours. A little at a time: at its
        # limit on mappings Python can hardly allocate either.
        wanted = max(count << PAGE_SHIFT, _ENOMEM_BUCKETS * self._table.size)
        while True:
            try:
                mapping = self._backend.map(gfn, count, writable=writable)
            except XenCallError as error:
                if error.errno != errno.ENOMEM or not self._table.evict(wanted):
                    raise
                continue
            if mapping.errors is None or errno.ENOMEM not in mapping.errors:
                return mapping
            if not self._table.evict(wanted):
                return mapping
            del mapping

    def reserve(
        self,
        reservation: Reservation,
        operation: Operation,
        address: int,
        budget: Budget | None = None,
    ) -> None:
        """Take room for a mapping, by default not of a copy; see :meth:`Budget.reserve`."""
        budget = self._budget if budget is None else budget
        budget.reserve(reservation, operation, self._table.evict, self._leased, address)

    def fetch(
        self, index: int, start: int, length: int, operation: Operation, *, holes: bool = False
    ) -> tuple[Generation, Mapping]:
        """Return a bucket of which a range is valid, mapped if need be, and its generation.

        Args:
            index: of the bucket.
            start: first byte in the bucket.
            length: bytes.
            operation: of the caller.
            holes: take the bucket as it is, holes included, unless a page was refused.
        """
        lock = self._budget.lock
        nested = self._budget.is_nested(operation)
        own = Note(operation.thread)
        generation = self._table.generation
        try:
            while True:
                generation, found, note = locked(
                    lock, self._find, index, start, length, operation, holes, nested, own
                )
                if found is not None:
                    return generation, found
                if note is own:
                    break
                self._wait(note, operation)
            shift = self._table.shift - PAGE_SHIFT
            began = now() if self._table.stream.observations else None
            mapping = self.map(index << shift, 1 << shift, operation)
            usable = mapping.usable(start, length, holes=holes)
            locked(lock, self._store, generation, index, mapping, usable, began)
            if usable:
                return generation, mapping
            fault = mapping.fault(start, length, holes=holes)
            if began is not None:
                telling.missed(self._table.stream, fault, (index << self._table.shift) + start)
            try:
                raise fault
            finally:
                del mapping, fault  # no traceback is to keep the memory
        finally:
            if own.stored:
                own.finished = True  # from here on the note counts for nothing
                own.gate.put(None)
                locked(lock, self._forget, generation, index, own)

    def _find(
        self,
        index: int,
        start: int,
        length: int,
        operation: Operation,
        holes: bool,
        nested: bool,
        own: Note,
    ) -> tuple[Generation, Mapping | None, Note]:
        """Return the generation, and a bucket of it or the note of the thread that maps it."""
        table = self._table
        table.check_open()
        generation = table.generation
        found = table.find(generation, index, start, length, holes=holes)
        if found is not None:
            return generation, found, own
        note = generation.notes.get(index)
        # No thread to wait for, or none that could continue while this one waits.
        if (
            note is None
            or nested
            or operation.exclusive
            or note.thread == operation.thread
            or note.finished
        ):
            own.stored = True
            generation.notes[index] = note = own
        return generation, None, note

    def _store(
        self,
        generation: Generation,
        index: int,
        mapping: Mapping,
        usable: bool,
        began: int | None,
    ) -> None:
        """Keep a bucket for the other accesses of its generation; called under the lock."""
        table = self._table
        table.check_open()
        table.misses += 1
        table.hole_faults += not usable
        former = index in generation.buckets
        if usable or not former:
            try:
                table.store(generation, index, mapping)
                if table.stream.observations and table.generation is generation:
                    telling.mapped(table, index, mapping, began, former)
            except BaseException:
                if table.stream.observations:
                    telling.reconcile(table)
                raise

    @staticmethod
    def _forget(generation: Generation, index: int, own: Note) -> None:
        if generation.notes.get(index) is own:
            del generation.notes[index]

    @staticmethod
    def _wait(note: Note, operation: Operation) -> None:
        """Wait until another thread has mapped the bucket, or has failed."""
        try:
            operation.idle = True
            while not note.finished:
                with contextlib.suppress(queue.Empty):
                    note.gate.get(timeout=_WAIT_S)
                    note.gate.put(None)  # for the next one who waits
        finally:
            operation.idle = False

    def clear_retired(self) -> None:
        """Drop what retired generations had mapped; here it is unmapped, without the lock."""
        operation = Operation()
        try:
            self._budget.operations[operation] = None
            self._table.clear_retired()
        finally:
            self._budget.operations.pop(operation, None)
            self._budget.wake()

    # --- ranges over several buckets ----------------------------------------------

    def pieces(
        self, address: int, length: int, take: Callable[[Mapping, int, int], Part]
    ) -> Iterator[Part]:
        """Yield ``take(mapping, start, count)`` for the part of a range in each bucket.

        No bucket is held while the next one is fetched, unless ``take`` returns it.
        """
        self._table.check_open()
        end = address + length
        while address < end:
            yield self._piece(address, end, Operation(), take)
            address = (address | self._table.mask) + 1

    def _piece(
        self,
        address: int,
        end: int,
        operation: Operation,
        take: Callable[[Mapping, int, int], Part],
    ) -> Part:
        table, budget = self._table, self._budget
        start = address & table.mask
        count = min(table.size - start, end - address)
        try:
            budget.operations[operation] = None
            # Without a name for the mapping: no frame is to hold it when the operation has ended.
            return take(
                self.fetch(address >> table.shift, start, count, operation)[1], start, count
            )
        except FaultError as fault:
            raise FaultError(fault.address, end - fault.address, fault.errno) from None
        finally:
            budget.operations.pop(operation, None)
            budget.wake()

    def hold(self, address: int, length: int, operation: Operation) -> list[Piece]:
        """Return all pieces of a range at once, so that nothing can fail between them.

        Called inside of the caller's operation.

        Raises:
            CacheFullError: the range is larger than ``max_resident``.
        """
        table = self._table
        table.check_open()
        end = address + length
        start = address & table.mask
        if start + length <= table.size:
            if not length:
                return []
            _, mapping = self.fetch(address >> table.shift, start, length, operation)
            return [(mapping, start, length)]
        gfn, count = page_span(address, length)
        budget = self._budget_of(gfn, count)
        limit = budget.limit
        if length > limit:
            # Of a range that would be a copy as a whole, the single buckets may be mapped.
            if budget.copied and length <= self._budget.limit:
                return self._hold_buckets(address, end, operation)
            raise CacheFullError(
                f"{length:#x} bytes at {address:#x} are more than {budget.option} {limit:#x}; "
                "access them in smaller ranges"
            )
        if (start + length + table.mask & ~table.mask) > limit:
            # Complete buckets are too much. So only the pages of the range are mapped.
            mapping = self.map(gfn, count, operation)
            start = address - (gfn << PAGE_SHIFT)
            if mapping.valid(start, length):
                return [(mapping, start, length)]
            fault = mapping.fault(start, length)
            try:
                raise fault
            finally:
                del mapping, fault  # no traceback is to keep the memory
        return self._hold_buckets(address, end, operation)

    def _hold_buckets(self, address: int, end: int, operation: Operation) -> list[Piece]:
        pieces = self.exclusively(operation, self._collect, address, end, operation)
        self._table.check_open()
        return pieces

    def exclusively(
        self,
        operation: Operation,
        function: Callable[..., Result],
        *arguments: object,
    ) -> Result:
        """Call a function that may hold memory while it waits for room, one at a time.

        An operation of a signal handler or finalizer does not wait for its turn.
        """
        budget = self._budget
        if budget.is_nested(operation):
            return function(*arguments)
        budget.operations.pop(operation, None)  # while it waits here, nobody waits for it
        return locked(self._exclusive, self._call_exclusively, operation, function, *arguments)

    # Not a function inside of the other: CPython 3.11 loses references if it cannot make one.
    def _call_exclusively(
        self,
        operation: Operation,
        function: Callable[..., Result],
        *arguments: object,
    ) -> Result:
        try:
            operation.exclusive = True
            self._budget.operations[operation] = None
            return function(*arguments)
        finally:
            operation.exclusive = False

    def _collect(self, address: int, end: int, operation: Operation) -> list[Piece]:
        table = self._table
        pieces: list[Piece] = []
        try:
            while address < end:
                start = address & table.mask
                count = min(table.size - start, end - address)
                index = address >> table.shift
                pieces.append((self.fetch(index, start, count, operation)[1], start, count))
                address += count
        except FaultError as fault:
            pieces.clear()
            raise FaultError(fault.address, end - fault.address, fault.errno) from None
        except BaseException:
            pieces.clear()
            raise
        return pieces
