"""Leases of guest memory: the handle, and the lessor who gives them out and takes them back."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from typing import Literal, Self, get_args

from .address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, page_span
from .backend import Backend, Capability
from .errors import ClosedError, FaultError, LeaseError, UnsupportedOperationError, XenMapCacheError
from .ledger import DmaDirection, LeaseInfo, LeaseKind, LeaseRecord, Ledger, call_stack
from .mapping import FREE_THREADED, Mapping

logger = logging.getLogger("xenmapcache")
_DEVICE, _DMA = LeaseKind  # CPython 3.11 takes long to find them in the class
_TO_DEVICE = DmaDirection.TO_DEVICE

OnStale = Literal["warn", "raise", "copy"]


class Lease(LeaseRecord):
    """Guest memory that stays mapped until it is released. Also a context manager.

    Take one from :meth:`MapCache.map_device` or :meth:`MapCache.map_dma`. The cache
    keeps it: one that is dropped without a release stays in ``leases()``, with its
    owner and age, and keeps its memory.

    Attributes:
        kind: DEVICE or DMA.
        address: guest-physical, in bytes; :meth:`MapCache.replace` changes it.
        length: in bytes; the range is half-open.
        owner: who took it.
        direction: of a DMA lease, or None.

    Synchronization: any thread may release it, finalizers too; exactly one release
    succeeds. The bytes themselves are shared with the guest.
    """

    __slots__ = ("_host_address", "_lessor", "_mapping", "_released_at", "_undelivered", "_view")

    def __init__(
        self,
        lessor: Lessor,
        mapping: Mapping,
        kind: LeaseKind,
        address: int,
        length: int,
        owner: str,
        direction: DmaDirection | None,
        writable: bool,
        origin: tuple[str, ...] | None,
    ) -> None:
        start = address - (mapping.gfn << PAGE_SHIFT)  # in the mapping
        view = mapping.bytes[start : start + length]  # which the cache has found valid
        LeaseRecord.__init__(self, kind, address, length, owner, direction, lessor.sequence, origin)
        self._host_address = mapping.address + start
        self._lessor = lessor
        self._mapping: Mapping | None = mapping
        self._view: memoryview | None = view if writable else view.toreadonly()
        self._released_at: int | None = None
        self._undelivered: FaultError | None = None  # kept for when the lease ends

    def __repr__(self) -> str:
        state = "released " if self.released else "stale " if self.stale else ""
        return f"<{state}{self.info(self._lessor.sequence)}>"

    @property
    def view(self) -> memoryview:
        """The bytes; read-only for TO_DEVICE and for memory that was not mapped for writing.

        It stays safe for ever, whatever becomes of lease, cache and guest. (Leave its
        ``obj`` alone: that is the whole mapping, unguarded.)

        Raises:
            LeaseError: the lease was released, or MappingLostError has said that its
                address belongs to another thread.
            ClosedError: this process was forked off the one that took it.
        """
        view = self._view
        if view is None:
            raise LeaseError(f"{self.info(self._lessor.sequence)} was released")
        self._lessor.check_process()
        if self.lost and self._mapping is not None and self._mapping.abandoned:
            raise LeaseError(f"the memory of {self.info(self._lessor.sequence)} was lost")
        mapping = self._mapping
        if not FREE_THREADED or mapping is None:
            return view[:]  # one of the caller's own, which may be released
        start = self._host_address - mapping.address
        own = mapping.bytes[start : start + self.length]
        return own.toreadonly() if view.readonly else own

    @property
    def host_address(self) -> int:
        """Where the first byte is in this process.

        Raises:
            LeaseError: the lease was released.
        """
        if self._mapping is None:
            raise LeaseError(f"{self.info(self._lessor.sequence)} was released")
        return self._host_address

    @property
    def stale(self) -> bool:
        """Whether an invalidation passed while it was held (DMA), or its memory was lost."""
        sequence = self._lessor.sequence if self._released_at is None else self._released_at
        return self.stale_at(sequence)

    @property
    def released(self) -> bool:
        """Whether it was given back."""
        return self._view is None

    def release(self) -> None:
        """Give the memory back. DMA that wrote is marked dirty first.

        A DMA lease that went stale is reported, as the cache's ``on_stale`` says:

        - ``"warn"``: a WARNING is logged;
        - ``"raise"``: LeaseError; the lease is given back all the same;
        - ``"copy"``: what the device wrote is copied to the pages that the guest sees now
          (and a WARNING is logged of a TO_DEVICE lease: what was read cannot be mended).

        Raises:
            LeaseError: it was released before, or is stale where that is refused.
            FaultError: ``"copy"`` found pages that the guest gave up and did not get
                back; the others were copied, and the lease is given back.
            XenCallError, ClosedError: Xen failed, or the backend is closed; the lease is still
                held, and can be released again.
        """
        self._lessor.take_back(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.released:
            self.release()


class Lessor:
    """Gives out leases and takes them back; knows what an invalidation means to them.

    Attributes:
        sequence: the number of invalidations so far.
        forked: set by the cache in a child process, where nothing of this may be used.
        returned: first frames of parked buckets whose last lease ended, until the cache next
            holds its lock and sweeps them again.
        returned_stale: has one more entry per DMA lease that was stale when it came back,
            until the cache counts those too.

    Synchronization: taking back takes no lock, so that any thread and any finalizer may
    release; the ledger decides who was first. ``sequence`` is changed by the cache, under its lock.
    """

    def __init__(self, backend: Backend, on_stale: OnStale, record_origin: bool) -> None:
        if on_stale not in get_args(OnStale):
            raise ValueError(f"on_stale {on_stale!r} is none of {get_args(OnStale)}")
        if on_stale == "copy" and Capability.WRITE not in backend.capabilities:
            raise UnsupportedOperationError(
                f"on_stale='copy' writes, and the backend {backend.name!r} is read-only"
            )
        self._backend = backend
        self._on_stale = on_stale
        self._record_origin = record_origin
        self._tracks_dirty = Capability.DIRTY in backend.capabilities
        self.owner_pid = os.getpid()
        self.forked = False
        self.ledger: Ledger[Lease] = Ledger()
        self.sequence = 0
        self._warning = threading.RLock()  # two invalidations at once: who warns of a lease
        self.returned: deque[int] = deque()
        self.returned_stale: deque[int] = deque()

    def check_process(self) -> None:
        """Raise ClosedError in a process that was forked off the one that made the cache."""
        if self.forked:
            raise ClosedError(
                f"this map cache belongs to process {self.owner_pid}, which forked this one: open "
                "a backend and a cache of your own after the fork"
            )

    def grant(
        self,
        mapping: Mapping,
        kind: LeaseKind,
        address: int,
        length: int,
        owner: str,
        direction: DmaDirection | None,
        writable: bool,
    ) -> Lease:
        """Make a lease of a part of a mapping and note it; called under the cache's lock."""
        origin = call_stack() if self._record_origin else None
        lease = Lease(self, mapping, kind, address, length, owner, direction, writable, origin)
        self.ledger.add(lease)
        return lease

    def infos(self) -> tuple[LeaseInfo, ...]:
        """Return what is known of every lease that is held, oldest first."""
        sequence = self.sequence
        return tuple(lease.info(sequence) for lease in self.ledger.held())

    def survivors(self, sequence: int) -> tuple[tuple[LeaseInfo, ...], tuple[LeaseInfo, ...]]:
        """Return the device and the DMA leases held over an invalidation; warn of DMA, once each.

        A DMA lease that another thread has taken since is none of them.
        """
        device, dma = [], []
        for lease in self.ledger.held():
            info = lease.info(sequence)
            if lease.kind is _DEVICE:
                device.append(info)
                continue
            if not info.stale:
                continue
            dma.append(info)
            if not lease.warned:
                with self._warning:
                    warned, lease.warned = lease.warned, True
                if not warned:
                    logger.warning("invalidation %d: still held, may be lost: %s", sequence, info)
        return tuple(device), tuple(dma)

    def take_back(self, lease: Lease) -> None:
        """End a lease; see :meth:`Lease.release`."""
        if self.forked:
            self._end(lease)  # the parent's lease, dirty pages and memory are the parent's
            return
        if not self.ledger.remove(lease):
            raise LeaseError(f"{lease.info(self.sequence)} was released before")
        try:
            report = self._settle(lease)
        except BaseException:
            self.ledger.add(lease)
            raise
        self._end(lease)
        if report is not None:
            try:
                raise report
            finally:
                del report  # its traceback holds this frame

    def drop(self, lease: Lease) -> None:
        """End a lease because the cache is closed by force: nothing is delivered or refused."""
        if not self.ledger.remove(lease):
            return
        try:
            self.mark_dirty(lease)
        except XenMapCacheError as error:
            info = lease.info(self.sequence)
            logger.warning("closed by force, dirty pages are not reported: %s: %s", info, error)
        finally:
            self._end(lease)
        logger.warning("closed by force, still held: %s", lease.info(self.sequence))

    def mark_dirty(self, lease: Lease) -> bool:
        """Report a lease's pages as written, if they could be; tell whether that was done."""
        view = lease._view  # noqa: SLF001 - the handle is ours
        if view is None or view.readonly or not self._tracks_dirty:
            return False
        self._backend.mark_dirty(*page_span(lease.address, lease.length))
        return True

    def _end(self, lease: Lease) -> None:
        mapping, lease._mapping = lease._mapping, None  # noqa: SLF001 - the handle is ours
        lease._released_at = self.sequence  # noqa: SLF001 - the handle is ours
        lease._view = lease._undelivered = None  # noqa: SLF001 - the handle is ours
        if mapping is not None and mapping.holders:
            mapping.holders.discard(lease.id)
            if not mapping.holders and mapping.parked:
                self.returned.append(mapping.gfn)

    def _settle(self, lease: Lease) -> XenMapCacheError | None:
        """Mark what was written and deliver what is stale; return what is to be raised after."""
        view = lease._view  # noqa: SLF001 - the handle is ours
        stale = lease.sequence != self.sequence and lease.kind is _DMA
        report: XenMapCacheError | None = None
        if view is not None and not view.readonly:
            if stale and self._on_stale == "copy":
                if lease.delivered != self.sequence:
                    lease._undelivered = self._deliver(lease, view)  # noqa: SLF001 - the handle is ours
                    lease.delivered = self.sequence
                report = lease._undelivered  # noqa: SLF001 - the handle is ours
            self.mark_dirty(lease)
        if not stale:
            return None
        info = lease.info(self.sequence)
        if self._on_stale == "raise":
            report = LeaseError(f"released stale: {info}: {self._loss(lease)}")
        # A copy mends what the device wrote, not what it read.
        elif self._on_stale == "warn" or lease.direction is _TO_DEVICE:
            logger.warning("released stale: %s: %s", info, self._loss(lease))
        self.returned_stale.append(lease.id)
        return report

    @staticmethod
    def _loss(lease: Lease) -> str:
        if lease.direction is _TO_DEVICE:
            return "the device may have read pages that the guest has given up"
        return "what the device wrote may be lost"

    def _deliver(self, lease: Lease, written: memoryview) -> FaultError | None:
        """Copy a stale lease to the pages that the guest sees now, where they differ.

        A page that is still the same is left alone: the guest may be writing it.
        """
        gfn, count = page_span(lease.address, lease.length)
        fresh = self._backend.map(gfn, count, writable=True)
        fault = None
        copied = 0
        position = 0
        while position < lease.length:
            address = lease.address + position
            step = min(PAGE_SIZE - (address & PAGE_MASK), lease.length - position)
            start = address - (gfn << PAGE_SHIFT)
            if fresh.valid(start, step):
                now = fresh.view(start, step)
                if now != written[position : position + step]:
                    now[:] = written[position : position + step]
                    copied += 1
            elif fault is None:
                fault = fresh.fault(start, lease.length - position)
            position += step
        logger.info(
            "stale: %s: copied %d of %d pages to the guest",
            lease.info(self.sequence),
            copied,
            count,
        )
        return fault
