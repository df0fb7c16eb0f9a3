"""Windows: flat, read-only views of ranges of a guest, holes included."""

# Theory of operation
#
# A window is a lease whose mapping is made of zeros (see flat.py), over which the backend maps or
# copies the guest's pages, a chunk at a time. Nobody has a view before all of it is there, so on
# any error the whole is dropped: one record, unmapped once.
#
# It needs room under two bounds at once, and waits for the second one while it holds the first. So
# it is made as an exclusive operation (see budget.py), like a write over several buckets.
#
# The lengths are checked before address space is taken or anything is counted, because a guest or
# a file may choose them.

from __future__ import annotations

import errno as _errno
from collections.abc import Iterator
from typing import Literal, get_args

from .. import flat
from ..address import PAGE_SHIFT, MiB, page_span
from ..backend import Backend
from ..binding.hints import PAGE_HINTS
from ..errors import CacheFullError, EmptyRangeError, XenCallError, XenMapCacheError
from ..mapping import Mapping, PageErrors
from .access import Access, check_guest_range
from .buckets import BucketTable
from .budget import Budget, Operation, Reservation
from .info import LeaseKind
from .lease import Lease
from .leasing import Leasing
from .locked import locked
from .mapper import Mapper
from .record import LeaseRecord, as_owner
from .registry import LeaseRegistry
from .strict import Views

Holes = Literal["zero", "raise"]
_WINDOW = LeaseKind.WINDOW
_CHUNK_PAGES = 64 * MiB >> PAGE_SHIFT
_ATTEMPTS = 3


class Windows:
    """Makes windows.

    Args:
        backend, table, mapper, budget, copies, registry, access, leasing: of the cache.

    Synchronization: all methods are called in any thread, without the lock.
    """

    def __init__(
        self,
        backend: Backend,
        table: BucketTable,
        mapper: Mapper,
        budget: Budget,
        copies: Budget,
        registry: LeaseRegistry,
        access: Access,
        leasing: Leasing,
    ) -> None:
        self._backend = backend
        self._table = table
        self._mapper = mapper
        self._budget = budget
        self._copies = copies
        self._registry = registry
        self._access = access
        self._leasing = leasing

    def window(self, address: int, length: int | None, holes: Holes, owner: str) -> Lease:
        """Return a window; see :meth:`MapCache.window`."""
        if type(owner) is not str:
            owner = as_owner(owner)
        if holes not in get_args(Holes):
            raise ValueError(f"holes must be one of {get_args(Holes)}, not {holes!r}")
        self._table.check_open()
        address, length = self._range(address, length)
        record = LeaseRecord(_WINDOW, address, length, owner, None, self._leasing.origin())
        if self._leasing.strict_views:
            record.views = Views()
        try:
            self._grant(record, holes)
            if self._table.stream.observations:
                self._registry.tell_taken(record)
            return Lease(record, self._registry)
        except BaseException:
            self._registry.withdraw(record)
            raise

    def _range(self, address: int, length: int | None) -> tuple[int, int]:
        """Return the range as ints, if it is not longer than a window may be."""
        if length is None:
            address, _ = check_guest_range(address, 0, self._access.known_hole)
            end = self._access.memory_end()
            if end is None:
                raise ValueError(
                    f"the backend {self._backend.name!r} does not know where its memory ends: "
                    "give a length"
                )
            if end <= address:
                raise EmptyRangeError(address, 0, _errno.EINVAL)
            length = end - address
        address, length = check_guest_range(address, length, self._access.known_hole, empty=False)
        _, count = page_span(address, length)
        for option, limit, size in (
            ("max_resident", self._budget.limit, count << PAGE_SHIFT),
            ("max_lease", self._leasing.max_lease, length),
        ):
            if size > limit:
                raise CacheFullError(
                    f"a window of {size:#x} bytes at {address:#x} is more than {option} "
                    f"{limit:#x}; take one of a smaller range, or raise {option}"
                )
        return address, length

    def _grant(self, record: LeaseRecord, holes: Holes) -> None:
        remaining = _ATTEMPTS
        while True:
            operation = Operation()
            try:
                self._budget.operations[operation] = None
                self._mapper.exclusively(operation, self._map, record, holes, operation)
            except XenMapCacheError as error:
                failure = error.with_traceback(None)  # whose frames would keep the memory
                failure.__context__ = None
            else:
                return
            finally:
                self._budget.operations.pop(operation, None)
                self._budget.wake()
            remaining -= 1
            if remaining and isinstance(failure, XenCallError) and failure.errno == _errno.EAGAIN:
                continue  # the backend has to copy more than it said
            try:
                raise failure
            finally:
                del failure

    def _map(self, record: LeaseRecord, holes: Holes, operation: Operation) -> None:
        """Map all of a window, and grant it."""
        generation = self._table.generation
        self._table.check_open()
        gfn, count = page_span(record.address, record.length)
        copied = 0
        for chunk in _chunks(gfn, count):
            copied += self._backend.copied_pages(*chunk)
        parts = (  # copies first: `keep` of the last one decides what the mapping is
            (self._copies, Reservation(copied << PAGE_SHIFT)),
            (self._budget, Reservation(count - copied << PAGE_SHIFT)),
        )
        mapping = None
        try:
            for budget, reservation in parts:
                if reservation.length:
                    self._mapper.reserve(reservation, operation, record.address, budget)
            mapping = flat.reserve(gfn, count)
            for chunk in _chunks(gfn, count):
                errors = self._map_chunk(mapping, *chunk)
                if errors is not None:
                    self._check(record, mapping, chunk[0], errors, holes)
            record.copied_bytes = copied << PAGE_SHIFT
            for budget, reservation in parts:
                if reservation.length:
                    locked(budget.lock, budget.keep, reservation, mapping)
            self._leasing.grant_window(record, mapping, generation)
        finally:
            del mapping
            for budget, reservation in parts:
                reservation.ended = True
                budget.end(reservation)

    def _map_chunk(self, mapping: Mapping, gfn: int, count: int) -> PageErrors | None:
        """Map a chunk; if there is no memory for the call or for a page, evict and try again."""
        start, length = gfn - mapping.gfn << PAGE_SHIFT, count << PAGE_SHIFT
        while True:
            errors = None
            try:
                errors = self._backend.map_into(mapping, gfn, count)
            except XenCallError as error:
                if (
                    error.errno != _errno.ENOMEM
                    or mapping.abandoned
                    or not self._table.evict(length)
                ):
                    raise
            else:
                if errors is None or _errno.ENOMEM not in errors or not self._table.evict(length):
                    return errors
            flat.clear(mapping, start, length)

    @staticmethod
    def _check(
        record: LeaseRecord, mapping: Mapping, gfn: int, errors: PageErrors, holes: Holes
    ) -> None:
        """Raise the error of the first page of a chunk that was refused, or must be there."""
        zeros = holes == "zero"
        if not any(errors) or (zeros and PAGE_HINTS.keys().isdisjoint(errors)):
            return
        before = gfn - mapping.gfn
        padded = bytes(before) + errors + bytes(mapping.count - before - len(errors))
        mapping.errors = PageErrors(padded, errors.call, errors.domid)
        start = record.address - (mapping.gfn << PAGE_SHIFT)
        raise mapping.fault(start, record.length, holes=zeros)


def _chunks(gfn: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield ``(gfn, pages)`` of the parts of a range of pages."""
    for first in range(gfn, gfn + count, _CHUNK_PAGES):
        yield first, min(_CHUNK_PAGES, gfn + count - first)
