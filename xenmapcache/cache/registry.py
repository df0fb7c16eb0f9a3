"""The registry: who holds which guest memory, since when and what for; how a lease ends."""

from __future__ import annotations

import logging
import threading
from itertools import repeat

from ..address import as_int, page_span
from ..errors import LeaseError, XenMapCacheError
from ..grants import GrantMapping, is_granted
from . import telling
from .buckets import BucketTable, Generation
from .budget import Budget
from .clock import Pin
from .dirty import DirtyPages
from .info import CacheStats, LeaseInfo, LeaseKind
from .locked import locked
from .record import NEVER_STALE, LeaseRecord, id_of
from .stale import StalePolicy

# Theory of operation
#
# A lease is in one of these states:
#
#   granted   in the registry; `record.view` is set
#   ending    a thread's token for it is in `_releasing`; still in the registry
#   ended     not in the registry
#
#   granted --release, token first--> ending --report pages, drop memory--> ended
#        ^--------- interrupted, or the backend failed ---------'
#
# Rules
#   1. A lease leaves the registry last of all. If a signal handler raises before that, the lease
#      is still held, and `release` or `close(force=True)` starts again: each step can be repeated.
#   2. Each thread that releases stores a token of its own, and only the oldest token of a record
#      may go on. A token is stored inside of the `try` whose `finally` removes it. So a token
#      neither outlives its thread's release, nor is one removed by another thread.
#   3. Pages that may have been written are reported before the memory is dropped.
#   4. A grant stores the record, and then looks whether the cache was closed. `close` puts the
#      closed generation in place, and then ends what is in the registry. So one of them sees
#      the other.
#   5. Log lines come after the lease has ended. A handler of logging that raises changes nothing.
#   6. A lease of granted pages gives them back before it leaves the registry. No budget counts its
#      mapping, because the source of the grants has bounds of its own.
#   7. No step takes the cache's lock. So any thread and any finalizer may release.

logger = logging.getLogger("xenmapcache")
_NAMED_LEASES = 10
_DEVICE, _DMA, _WINDOW = LeaseKind  # CPython 3.11 takes long to find them in the class


class LeaseRegistry:
    """All leases of a cache that are held.

    Args:
        table: of the cache, which knows the sequence number.
        dirty: reports written pages.

    Attributes:
        table: as given.
        policy: for stale leases. The cache sets it later, because the policy needs the mapper,
            and the mapper the registry.
        uncounted: ids of stale leases that were released; :meth:`stale_released` counts them.

    Synchronization: every method may be called in any thread and from finalizers.
    """

    def __init__(self, table: BucketTable, dirty: DirtyPages) -> None:
        self.table = table
        self._dirty = dirty
        self._observed = table.stream.observations
        table.held_dma = self.held_dma
        self.policy: StalePolicy
        # Two, so that device leases and windows, which are few, are found among any number of DMA.
        self._device: dict[int, LeaseRecord] = {}
        self._dma: dict[int, LeaseRecord] = {}
        self._releasing: dict[object, LeaseRecord] = {}
        self._warning = threading.RLock()  # two threads at once: which of them warns of a lease
        self.uncounted: set[int] = set()
        self._counted = 0

    def __len__(self) -> int:
        return len(self._device) + len(self._dma)

    def count(self, kind: LeaseKind) -> int:
        """Return how many leases of a kind are held."""
        if kind is _DMA:
            return len(self._dma)
        return [record.kind for record in [*self._device.values()]].count(kind)

    def held(self, kind: LeaseKind | None = None) -> list[LeaseRecord]:
        """Return the leases that are held, or only those of a kind; oldest first."""
        found = [*(self._dma if kind is _DMA else self._device).values()]
        if kind is None:
            found += self._dma.values()
        else:
            found = [record for record in found if record.kind is kind]
        found.sort(key=id_of)  # leases are granted in any order
        return found

    def infos(self) -> tuple[LeaseInfo, ...]:
        """Return what is known of every lease that is held, oldest first."""
        sequence = self.table.generation.sequence
        # Not a comprehension: CPython 3.11 loses references if it cannot make its function.
        return tuple(map(LeaseRecord.info, self.held(), repeat(sequence)))

    def held_dma(self, sequence: int) -> tuple[int, ...]:
        """Return the ids of the DMA held across an invalidation, if observers know it."""
        found = []
        for record in self.held(_DMA):  # a loop, for the reason above
            if record.told and record.sequence < sequence:
                found.append(record.id)  # noqa: PERF401 - see above
        return tuple(found)

    def leased_bytes(self, copied: bool) -> int:
        """Return how many bytes the mappings have that leases hold: copies, or others."""
        found = {}
        for record in self.held():
            mapping, copies = record.mapping, record.copied_bytes
            if mapping is not None and not isinstance(mapping, GrantMapping):
                if copies is None:
                    copies = mapping.length * mapping.copied
                found[id(mapping)] = mapping, copies if copied else mapping.length - copies
        return sum([length for _, length in found.values()])

    def stale_held(self) -> int:
        """Return how many DMA leases are stale and still held."""
        sequence = self.table.generation.sequence
        return [record.sequence < sequence for record in [*self._dma.values()]].count(True)

    def stale_released(self) -> int:
        """Return how many DMA leases were stale when they were released; under the lock."""
        while self.uncounted:
            self._counted += 1
            self.uncounted.pop()
        return self._counted

    def describe(self, held: list[LeaseRecord]) -> str:
        """Return in words which leases are held."""
        names = "; ".join(map(self._name, held[:_NAMED_LEASES]))
        rest = len(held) - _NAMED_LEASES
        more = f"; and {rest} more" if rest > 0 else ""
        return f"leases are held ({len(held)}): {names}{more}"

    def resolve(self, host_address: int) -> int:
        """Return the guest address of a host address; see :meth:`MapCache.resolve`."""
        host_address = as_int("host_address", host_address)
        for record in self.held():
            offset = host_address - record.host_address
            if 0 <= offset < record.length and record.view is not None:
                return record.address + offset
        raise LeaseError(f"host address {host_address:#x} lies in no lease that is held")

    # --- grant --------------------------------------------------------------------

    def grant(self, record: LeaseRecord, generation: Generation, pin: Pin | None) -> None:
        """Store a lease whose mapping is set; called under the lock.

        Args:
            record: the lease; its caller withdraws it if anything fails from here on.
            generation: the one that its mapping came from.
            pin: of the bucket that it shares, or None.
        """
        record.sequence = generation.sequence
        if pin is not None:
            record.pin = pin
            pin.lease_ids.add(record.id)
        (self._dma if record.kind is _DMA else self._device)[record.id] = record
        if self.table.generation.closed:
            self.table.check_open()

    def withdraw(self, record: LeaseRecord) -> None:
        """Remove a lease that no caller has got. May be repeated."""
        try:
            self._drop(record, self.table.generation.sequence)
        finally:
            if self._observed:
                telling.ended(self.table.stream, record)

    def tell_taken(self, record: LeaseRecord) -> None:
        """Tell the observers of a lease; called without the lock, when it is granted."""
        telling.taken(self.table.stream, record, self.table.generation.sequence)

    def granted_stale(self, record: LeaseRecord) -> None:
        """Refuse, or warn of, a lease that was granted stale, unless an invalidation just has.

        Raises:
            LeaseError: with ``on_stale="raise"``.
        """
        first = locked(self._warning, _is_first_to_warn, record)
        self.policy.granted(record, self.table.generation.sequence, warn=first)

    # --- release -----------------------------------------------------------------

    def release(
        self, record: LeaseRecord, *, strict: bool = True, written: int | None = None
    ) -> None:
        """End a lease; see :meth:`Lease.release`.

        Args:
            record: the lease.
            strict: refuse it while views are in use, if the lease knows its views.
            written: how many of its bytes may have been written; None if nobody has said.
        """
        table = self.table
        if table.forked:
            self._end(record)  # the parent's lease, dirty pages and memory are the parent's
            return
        token = object()
        try:
            self._releasing[token] = record
            if len(self._releasing) > 1 and not self._is_first(token, record):
                raise LeaseError(f"{self._name(record)} is being released by another call")
            if record.id not in (self._dma if record.kind is _DMA else self._device):
                raise LeaseError(f"{self._name(record)} was released before")
            if record.views is not None and strict and record.views.in_use():
                raise LeaseError(
                    f"{self._name(record)} is released while views of it are in use "
                    f"({record.views.in_use()}): drop them, and the slices and arrays made of "
                    "them, first; the lease is still held"
                )
            if written is not None:
                record.written = written
            sequence = table.generation.sequence
            stale = record.sequence < sequence and record.kind is _DMA
            if stale:
                self.policy.deliver(record, sequence)
            self.mark_dirty(record)
            if not stale:
                self._drop(record, sequence)
                return
            info = record.info(sequence)
            error = self.policy.verdict(record, info)
            record.lost_pages = self.policy.lost(record, sequence)
            self._end(record)
        finally:
            try:
                self._releasing.pop(token, None)
                if self._observed:
                    telling.ended(self.table.stream, record)
            except BaseException:  # an interrupt, perhaps right before it
                telling.ended(self.table.stream, record)
                raise
        try:
            self.policy.warn(record, info)
            if error is not None:
                raise error
        finally:
            del error  # its traceback holds this frame

    def _is_first(self, token: object, record: LeaseRecord) -> bool:
        """Tell whether a token is the oldest one for its record."""
        tokens = [each for each, other in [*self._releasing.items()] if other is record]
        return tokens[0] is token

    def drop(self, record: LeaseRecord) -> tuple[LeaseInfo, XenMapCacheError | None] | None:
        """End a lease because the cache is closed by force: nothing is delivered or refused.

        Returns:
            The lease, and the error of the report of its pages; None if another call ends it.
        """
        token = object()
        try:
            self._releasing[token] = record
            held = self._dma if record.kind is _DMA else self._device
            if not self._is_first(token, record) or record.id not in held:
                return None
            failure: XenMapCacheError | None = None
            try:
                self.mark_dirty(record)
            except XenMapCacheError as error:
                failure = error.with_traceback(None)
            sequence = self.table.generation.sequence
            info = record.info(sequence)
            if info.stale and record.kind is _DMA:
                record.lost_pages = self.policy.lost(record, sequence)
            try:
                self._give_back(record)
            except XenMapCacheError as error:
                failure = error.with_traceback(None)
                record.mapping = None  # so that the lease ends all the same
            self._drop(record, sequence)
            return info, failure
        finally:
            try:
                self._releasing.pop(token, None)
                if self._observed:
                    telling.ended(self.table.stream, record)
            except BaseException:  # an interrupt, perhaps right before it
                telling.ended(self.table.stream, record)
                raise

    def mark_dirty(self, record: LeaseRecord) -> bool:
        """Report a lease's pages as written, if they could be; return whether that was done."""
        view = record.view
        if view is None or view.readonly or self._dirty.mark is None:
            return False
        if not (length := record.written_length) or record.sequence == NEVER_STALE:
            return False  # of granted pages Xen itself notes that they were written
        gfn, count = page_span(record.address, length)
        self._dirty.backend.mark_dirty(gfn, count)
        if self._observed:
            self._dirty.tell(gfn, count)
        return True

    def _end(self, record: LeaseRecord) -> None:
        """Drop a lease's memory, and its entry. May be repeated until the entry has gone."""
        sequence = self.table.generation.sequence
        if (
            record.kind is _DMA
            and record.sequence < sequence
            and not record.counted
            and not self.table.forked
        ):
            record.counted = True
            self.uncounted.add(record.id)
        self._drop(record, sequence)

    def _drop(self, record: LeaseRecord, sequence: int) -> None:
        held = self._dma if record.kind is _DMA else self._device
        pin = record.pin
        if pin is not None:
            pin.lease_ids.discard(record.id)
            if pin.off_clock and not pin.lease_ids:
                self.table.returned.append(pin)
        else:
            self._give_back(record)
        # No signal handler comes between these stores and the pop: none sees one without the other.
        record.released_at = sequence
        record.undelivered = record.mapping = record.view = None
        held.pop(record.id, None)

    @staticmethod
    def _give_back(record: LeaseRecord) -> None:
        """End the grants of a lease that has such. May be repeated."""
        if isinstance(record.mapping, GrantMapping):
            record.mapping.give_back()

    def _name(self, record: LeaseRecord) -> str:
        return str(record.info(self.table.generation.sequence))

    # --- invalidation ------------------------------------------------------------------

    def held_across(self, sequence: int) -> tuple[tuple[LeaseInfo, ...], ...]:
        """Return the leases held across an invalidation: device, DMA, windows. Warn of DMA, once.

        A DMA lease or a window that another thread has taken since is left out.
        """
        device, dma, windows, unwarned = [], [], [], []
        for record in self.held():
            info = record.info(sequence)
            if record.kind is _DEVICE:
                device.append(info)
            elif info.stale and record.kind is _WINDOW:
                windows.append(info)
            elif info.stale:
                dma.append(info)
                if not record.warned:
                    unwarned.append((record, info))
        for record, info in unwarned:
            if locked(self._warning, _is_first_to_warn, record):
                logger.warning("invalidation %d: still held, may be lost: %s", sequence, info)
        return tuple(device), tuple(dma), tuple(windows)


def _is_first_to_warn(record: LeaseRecord) -> bool:
    warned, record.warned = record.warned, True
    return not warned


def report_forced(ended: list[tuple[LeaseInfo, XenMapCacheError | None] | None]) -> None:
    """Log the leases that were ended because their cache was closed by force."""
    for info, failure in filter(None, ended):
        if failure is not None:
            granted = is_granted(info.address)
            what = "grants are still mapped" if granted else "dirty pages are not reported"
            logger.warning("closed by force, %s: %s: %s", what, info, failure)
        logger.warning("closed by force, still held: %s", info)


def collect_stats(
    table: BucketTable, budget: Budget, copies: Budget, registry: LeaseRegistry
) -> CacheStats:
    """Return the counters of a cache; called under the lock."""
    mapped, mappings = budget.resident()
    copied, copy_mappings = copies.resident()
    maps = budget.maps + copies.maps
    return CacheStats(
        slow_path_hits=table.slow_path_hits,
        misses=table.misses,
        maps=maps,
        unmaps=maps - mappings - copy_mappings,
        evictions=table.evictions,
        hole_faults=table.hole_faults,
        invalidations=table.generation.sequence,
        stale_dma_released=registry.stale_released(),
        stale_dma_held=registry.stale_held(),
        resident_bytes=mapped + copied,
        resident_buckets=len(table.generation.buckets),
        device_leases=registry.count(_DEVICE),
        dma_leases=registry.count(_DMA),
        copied_bytes=copied,
        windows=registry.count(_WINDOW),
    )
