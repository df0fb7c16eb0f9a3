"""Leasing: how a lease is made, also while others invalidate, close or interrupt."""

from __future__ import annotations

from ..address import ADDRESS_LIMIT, PAGE_MASK, PAGE_SHIFT, MiB, as_int, page_span
from ..backend import Backend
from ..errors import CacheFullError, UnsupportedOperationError
from ..grants import GrantMapping, GrantSource, is_granted
from ..mapping import Mapping
from . import telling
from .access import Access, check_guest_range
from .ages import AgeWatch
from .buckets import BucketTable, Generation
from .budget import Budget, Operation
from .info import DmaDirection, LeaseKind
from .lease import Lease
from .locked import locked
from .mapper import Mapper
from .record import NEVER_STALE, LeaseRecord, as_owner, call_stack
from .registry import LeaseRegistry
from .strict import Views

_DEVICE, _DMA, _ = LeaseKind  # CPython 3.11 takes long to find them in the class
_ATTEMPTS = 3
_PRECHECK_BYTES = MiB


class Leasing:
    """Makes leases.

    Args:
        backend, table, mapper, budget, registry, access: of the cache.
        max_lease: the longest lease, in bytes.
        record_origin: whether each lease notes the stack where it was taken.

    Attributes:
        max_lease: as given.
        ages: warns of DMA leases that are held for long, or None.
        strict_views: whether a release while views are in use is an error.
        grants: the pages that the guest has granted, or None.

    Synchronization: all methods are called in any thread, without the lock.
    """

    def __init__(
        self,
        backend: Backend,
        table: BucketTable,
        mapper: Mapper,
        budget: Budget,
        registry: LeaseRegistry,
        access: Access,
        max_lease: int,
        record_origin: bool,
    ) -> None:
        self._backend = backend
        self._table = table
        self._mapper = mapper
        self._budget = budget
        self._registry = registry
        self._access = access
        self.max_lease = max_lease
        self._observed = table.stream.observations
        self._record_origin = record_origin
        self.ages: AgeWatch | None = None
        self.strict_views = False
        self.grants: GrantSource | None = None

    def lease(
        self,
        kind: LeaseKind,
        address: int,
        length: int,
        owner: str,
        direction: DmaDirection | None,
        writable: bool,
    ) -> Lease:
        """Return a lease; see :meth:`MapCache.map_dma` and :meth:`MapCache.map_device`."""
        table = self._table
        if type(owner) is not str:
            owner = as_owner(owner)
        grants = None
        # What check_guest_range() would find right, in a third of the time.
        if not (
            type(address) is type(length) is int and 0 <= address < address + length < ADDRESS_LIMIT
        ):
            table.check_open()
            if kind is _DMA and self.grants is not None and is_granted(as_int("address", address)):
                grants = self.grants
                address, length = as_int("address", address), as_int("length", length)
            else:
                address, length = check_guest_range(
                    address, length, self._access.known_hole, empty=False
                )
        if writable and not table.writes:
            raise UnsupportedOperationError(
                f"the backend {self._backend.name!r} is read-only: map with "
                + ("writable=False" if direction is None else "direction=DmaDirection.TO_DEVICE")
            )
        if length > _PRECHECK_BYTES or length > self.max_lease:
            self._check_length(address, length)
        record = LeaseRecord(kind, address, length, owner, direction, self.origin())
        try:
            if self.strict_views:
                record.views = Views()
            if grants is not None:
                self._grant_granted(record, grants, writable)
            elif kind is _DMA and (address & table.mask) + length <= table.size:
                self._grant_in_bucket(record, writable)
            else:
                self._grant_own_mapping(record, writable)
            if self.ages is not None and kind is _DMA:
                self.ages.begin()
            if self._observed:
                telling.taken(table.stream, record, table.generation.sequence)
            return Lease(record, self._registry)
        except BaseException:
            self._registry.withdraw(record)
            raise

    def origin(self) -> tuple[str, ...] | None:
        """Return the stack where a lease is taken, if leases note it."""
        return call_stack() if self._record_origin else None

    def grant_window(self, record: LeaseRecord, mapping: Mapping, generation: Generation) -> None:
        """Grant a window, which is stale from the start if its generation has ended.

        Args:
            record: its caller withdraws it if anything fails from here on.
            mapping: of its pages.
            generation: the current one when their mapping began.
        """
        start = record.address - (mapping.gfn << PAGE_SHIFT)
        locked(self._budget.lock, self._try, record, mapping, start, generation, None, False, True)

    def _check_length(self, address: int, length: int) -> None:
        if not is_granted(address):
            self._access.check_ends(address, length)
        if length > self.max_lease:
            raise CacheFullError(
                f"{length:#x} bytes at {address:#x} are more than max_lease "
                f"{self.max_lease:#x}; lease a smaller range, or raise max_lease"
            )

    def _grant_in_bucket(self, record: LeaseRecord, writable: bool) -> None:
        """Grant a lease that shares the mapping of its bucket."""
        table, budget = self._table, self._budget
        index = record.address >> table.shift
        start = record.address & table.mask
        lock = budget.lock
        try:  # as locked() does, in less time
            lock.acquire()
            generation = table.generation
            mapping = generation.buckets.get(index)
            if mapping is not None and (
                mapping.errors is None or mapping.valid(start, record.length)
            ):
                if table.returned:
                    generation.clock.put_back(table.returned)
                table.slow_path_hits += 1
                generation.touched.add(index)
                self._bind(record, mapping, start, generation, index, writable)
                if table.generation is generation:
                    return
        finally:
            try:  # noqa: SIM105 - one call into C, which nothing interrupts
                lock.release()
            except RuntimeError:
                pass
        del mapping  # one with a hole may have to make room for what replaces it
        operation = Operation()
        try:
            budget.operations[operation] = None
            for attempt in range(_ATTEMPTS):
                generation, mapping = self._mapper.fetch(index, start, record.length, operation)
                last = attempt == _ATTEMPTS - 1
                if locked(
                    lock, self._try, record, mapping, start, generation, index, writable, last
                ):
                    return
                del mapping
        finally:
            budget.operations.pop(operation, None)
            budget.wake()
        self._registry.granted_stale(record)

    def _grant_own_mapping(self, record: LeaseRecord, writable: bool) -> None:
        """Grant a lease with a mapping of just its pages."""
        table, budget = self._table, self._budget
        gfn, count = page_span(record.address, record.length)
        start = record.address - (gfn << PAGE_SHIFT)
        operation = Operation()
        try:
            budget.operations[operation] = None
            for attempt in range(_ATTEMPTS):
                generation = table.generation
                table.check_open()
                mapping = self._mapper.map(gfn, count, operation, writable=writable)
                if not mapping.valid(start, record.length):
                    fault = mapping.fault(start, record.length)
                    if self._observed:
                        telling.missed(table.stream, fault, record.address)
                    try:
                        raise fault
                    finally:
                        del mapping, fault  # no traceback is to keep the memory
                last = attempt == _ATTEMPTS - 1
                if locked(
                    budget.lock,
                    self._try,
                    record,
                    mapping,
                    start,
                    generation,
                    None,
                    writable,
                    last,
                ):
                    return
                del mapping
        finally:
            budget.operations.pop(operation, None)
            budget.wake()
        self._registry.granted_stale(record)

    def _grant_granted(self, record: LeaseRecord, grants: GrantSource, writable: bool) -> None:
        """Grant a lease of pages that the guest has granted, with a mapping of just these."""
        taken: list[GrantMapping] = []
        try:
            mapping = grants.map(record.address, record.length, writable=writable, result_out=taken)
            locked(self._budget.lock, self._bind_granted, record, mapping, writable)
        except BaseException:
            for mapping in taken:
                mapping.give_back()
            raise

    def _bind_granted(self, record: LeaseRecord, mapping: GrantMapping, writable: bool) -> None:
        """Give a lease of granted pages its memory and store it; called under the lock."""
        table = self._table
        table.check_open()
        start = record.address & PAGE_MASK
        self._bind(record, mapping, start, table.generation, None, writable)
        record.sequence = NEVER_STALE  # no other thread can invalidate before that

    def _try(
        self,
        record: LeaseRecord,
        mapping: Mapping,
        start: int,
        generation: Generation,
        index: int | None,
        writable: bool,
        last: bool,
    ) -> bool:
        """Grant a lease if its generation is still the current one, or in the last attempt.

        Returns:
            Whether it is granted and not stale.
        """
        table = self._table
        table.check_open()
        device = record.kind is _DEVICE  # to which an invalidation means nothing
        if not (last or device or table.generation is generation):
            return False
        self._bind(record, mapping, start, generation, index, writable)
        return device or table.generation is generation

    def _bind(
        self,
        record: LeaseRecord,
        mapping: Mapping,
        start: int,
        generation: Generation,
        index: int | None,
        writable: bool,
    ) -> None:
        """Give a lease its memory and store it; called under the lock."""
        view = mapping.bytes[start : start + record.length]
        record.view = view if writable else view.toreadonly()
        record.mapping = mapping
        record.host_address = mapping.address + start
        pin = None
        if index is not None and generation.buckets.get(index) is mapping:
            pin = generation.clock.pin(index)
        self._registry.grant(record, generation, pin)
