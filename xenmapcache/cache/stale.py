"""What happens when a DMA lease ends that an invalidation has made stale: warn, raise or copy."""

from __future__ import annotations

import logging
from typing import get_args

from ..address import PAGE_SHIFT, PAGE_SIZE, page_span
from ..backend import Backend, Capability
from ..errors import (
    CacheFullError,
    FaultError,
    LeaseError,
    UnsupportedOperationError,
    XenMapCacheError,
)
from ..mapping import Mapping
from .budget import Budget, Operation
from .info import DmaDirection, LeaseInfo, OnStale
from .mapper import Mapper
from .record import LeaseRecord

logger = logging.getLogger("xenmapcache")
_TO_DEVICE = DmaDirection.TO_DEVICE
_CHUNK_PAGES = 256


def check_policy(on_stale: OnStale, backend: Backend) -> None:
    """Refuse a policy that is unknown, or that the source cannot carry out."""
    if on_stale not in get_args(OnStale):
        raise ValueError(f"on_stale must be one of {get_args(OnStale)}, not {on_stale!r}")
    if on_stale == "copy" and Capability.WRITE not in backend.capabilities:
        raise UnsupportedOperationError(
            f"on_stale='copy' writes, and the backend {backend.name!r} is read-only"
        )


class StalePolicy:
    """Carries out ``on_stale``.

    Args:
        on_stale: as of the cache.
        backend: where the current pages are.
        mapper, budget: of the cache.
    """

    def __init__(self, on_stale: OnStale, backend: Backend, mapper: Mapper, budget: Budget) -> None:
        check_policy(on_stale, backend)
        self.on_stale = on_stale
        self._backend = backend
        self._mapper = mapper
        self._budget = budget

    def deliver(self, record: LeaseRecord, sequence: int) -> None:
        """With ``"copy"``, copy what a stale lease wrote to the pages that the guest has now.

        It is done once for each invalidation, however often the release is repeated.
        """
        view = record.view
        if self.on_stale != "copy" or view is None or view.readonly:
            return
        if record.delivered != sequence:
            record.lost_pages = 0
            record.undelivered = self._copy(record, view, sequence)
            record.delivered = sequence

    def lost(self, record: LeaseRecord, sequence: int) -> int:
        """Return how many pages of a stale lease a device may have written that no guest sees.

        Without :meth:`deliver` before, at the same sequence, that is all of them.
        """
        if record.view is None or record.view.readonly:
            return 0
        if self.on_stale == "copy" and record.delivered == sequence:
            return record.lost_pages
        return _written_pages(record)[1]

    def verdict(self, record: LeaseRecord, info: LeaseInfo) -> XenMapCacheError | None:
        """Return what a release of a stale lease raises when the lease has ended."""
        if self.on_stale == "raise":
            return LeaseError(f"released stale: {info}: {_loss(record)}")
        return record.undelivered

    def warn(self, record: LeaseRecord, info: LeaseInfo) -> None:
        """Log that a stale lease was released, if its data may be lost."""
        # A copy repairs what the device wrote, not what it read.
        if self.on_stale == "warn" or (self.on_stale == "copy" and record.direction is _TO_DEVICE):
            logger.warning("released stale: %s: %s", info, _loss(record))

    def granted(self, record: LeaseRecord, sequence: int, *, warn: bool) -> None:
        """Refuse a lease that is stale from the start, or warn of it if nobody has yet.

        Raises:
            LeaseError: with ``"raise"``.
        """
        info = record.info(sequence)
        if self.on_stale == "raise":
            raise LeaseError(
                f"invalidations came faster than pages could be mapped: {info}; "
                "stop DMA while the guest gives up pages, and try again"
            )
        if warn:
            logger.warning("invalidation %d: stale from the start, may be lost: %s", sequence, info)

    def _copy(
        self, record: LeaseRecord, written: memoryview, sequence: int
    ) -> XenMapCacheError | None:
        """Copy the pages that differ; return the error for the first one that is not to be had.

        A page that is still the same is left alone: the guest may be writing it.
        """
        first, count = _written_pages(record)
        fault: XenMapCacheError | None = None
        copied = done = 0
        operation = Operation()
        try:
            self._budget.operations[operation] = None
            while done < count:
                mapping = self._map(first + done, min(_CHUNK_PAGES, count - done), operation)
                changed, missed, missing = _copy_pages(record, written, mapping)
                copied, done = copied + changed, done + mapping.count
                fault = fault or missing
                record.copied_pages += changed
                record.lost_pages += missed
                del mapping  # to make room for the next one
        finally:
            self._budget.operations.pop(operation, None)
        logger.info(
            "stale: %s: copied %d of %d pages to the guest", record.info(sequence), copied, count
        )
        return fault

    def _map(self, gfn: int, pages: int, operation: Operation) -> Mapping:
        """Map as many pages as there is room for, at least one.

        If leases fill all of ``max_resident``, one page is mapped without room, because the
        lease could never end otherwise: one at a time for each thread that releases such a lease.
        """
        for count in (pages, 1):
            try:
                return self._mapper.map(gfn, count, operation, writable=True)
            except CacheFullError:
                continue
        return self._backend.map(gfn, 1, writable=True)


def _copy_pages(
    record: LeaseRecord, written: memoryview, mapping: Mapping
) -> tuple[int, int, XenMapCacheError | None]:
    """Copy what differs; return how many pages, how many are missing, and the first one's error."""
    fault: XenMapCacheError | None = None
    copied = missed = 0
    end = record.address + record.written_length
    for page in range(mapping.count):
        base = mapping.gfn + page << PAGE_SHIFT
        first, stop = max(base, record.address), min(base + PAGE_SIZE, end)
        start = first - (mapping.gfn << PAGE_SHIFT)
        if mapping.valid(start, stop - first):
            now = mapping.view(start, stop - first)
            part = written[first - record.address : stop - record.address]
            if now != part:
                now[:] = part
                copied += 1
            continue
        missed += 1
        if fault is None:
            fault = mapping.fault(start, stop - first)
            if isinstance(fault, FaultError):
                fault = FaultError(first, end - first, fault.errno)
    return copied, missed, fault


def _written_pages(record: LeaseRecord) -> tuple[int, int]:
    """Return ``(gfn, count)`` of the pages that a device may have written."""
    length = record.written_length
    return page_span(record.address, length) if length else (0, 0)


def _loss(record: LeaseRecord) -> str:
    if record.direction is _TO_DEVICE:
        return "the device may have read pages that the guest has given up"
    return "what the device wrote may be lost"
