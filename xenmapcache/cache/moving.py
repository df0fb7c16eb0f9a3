"""Moving: a device lease shows other guest pages at the host address that it has."""

from __future__ import annotations

import threading

from ..address import PAGE_MASK, PAGE_SHIFT, check_range, page_span
from ..backend import Backend
from ..errors import LeaseError, MappingLostError, XenMapCacheError
from ..mapping import Mapping
from . import telling
from .access import Access, check_guest_range
from .buckets import BucketTable
from .budget import Budget, Operation, Reservation
from .dirty import DirtyPages
from .info import LeaseKind
from .locked import locked
from .mapper import Mapper
from .record import LeaseRecord
from .registry import LeaseRegistry


class Mover:
    """Moves device leases, one at a time.

    Args:
        backend, table, mapper, budget, dirty, registry, access: of the cache.
    """

    def __init__(
        self,
        backend: Backend,
        table: BucketTable,
        mapper: Mapper,
        budget: Budget,
        dirty: DirtyPages,
        registry: LeaseRegistry,
        access: Access,
    ) -> None:
        self._backend = backend
        self._table = table
        self._mapper = mapper
        self._budget = budget
        self._dirty = dirty
        self._registry = registry
        self._access = access
        self._one_at_a_time = threading.RLock()

    def replace(self, old_address: int, new_address: int, length: int) -> None:
        """Move a lease; see :meth:`MapCache.replace`."""
        old_address, length = check_range(old_address, length)
        new_address, _ = check_guest_range(new_address, length, self._access.known_hole)
        if (old_address ^ new_address) & PAGE_MASK:
            raise ValueError(
                f"{old_address:#x} and {new_address:#x} lie at different offsets in their pages"
            )
        self._table.check_open()  # before a lock that a parent's thread may have held at the fork
        try:
            locked(self._one_at_a_time, self._replace, old_address, new_address, length)
        finally:
            self._table.stream.deliver()

    def _replace(self, old_address: int, new_address: int, length: int) -> None:
        self._table.check_open()
        record = self._find(old_address, length)
        mapping = record.mapping
        if mapping is None:
            raise LeaseError(f"{record.info(0)} was released by another thread")
        if mapping.abandoned:  # and other memory at its address is not to be mapped over
            raise LeaseError(f"the memory of {record.info(0)} was lost")
        self._move(record, mapping, new_address)

    def _find(self, address: int, length: int) -> LeaseRecord:
        for record in self._registry.held(LeaseKind.DEVICE):
            if (record.address, record.length) == (address, length):
                return record
        raise LeaseError(f"no device lease covers exactly {address:#x}..{address + length:#x}")

    def _move(self, record: LeaseRecord, mapping: Mapping, new_address: int) -> None:
        old = page_span(record.address, record.length)
        operation, reservation = Operation(), Reservation(mapping.length)
        begun = False
        try:
            self._budget.operations[operation] = None
            # Because Xen's libraries need a second mapping of the range in between.
            self._mapper.reserve(reservation, operation, new_address)
            begun = True
            self._backend.remap(mapping, new_address >> PAGE_SHIFT)
            record.lost = False
            mapping.gfn = new_address >> PAGE_SHIFT
            old_address, record.address = record.address, new_address
            if self._table.stream.observations:
                telling.moved(self._table.stream, old_address, new_address)
            # Now, when nothing writes to the old pages through the lease any more.
            if self._dirty.mark is not None and mapping.writable:
                self._dirty.mark(*old)
        except BaseException as error:
            if isinstance(error, XenMapCacheError):
                record.lost |= isinstance(error, MappingLostError)
            elif begun:  # interrupted: it may show the new pages, or private zeros
                record.lost = True
                if mapping.writable:
                    self._dirty.owed.append(old)
                    self._dirty.settle_quietly()
            raise
        finally:
            reservation.ended = True
            self._budget.end(reservation)
            self._budget.operations.pop(operation, None)
