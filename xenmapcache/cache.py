"""MapCache: long-lived mappings of a guest's memory, found by a dictionary look-up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Self

from .address import ADDRESS_LIMIT, PAGE_MASK, PAGE_SHIFT, GiB, MiB, as_int, check_range, page_span
from .backend import Backend, Capability
from .buckets import Buckets
from .errors import LeaseError, MappingLostError, UnsupportedOperationError
from .lease import Lease, Lessor, OnStale
from .ledger import DmaDirection, LeaseInfo, LeaseKind

if TYPE_CHECKING:
    from typing_extensions import Buffer


_LARGE = 64 * MiB
_DEVICE, _DMA = LeaseKind  # CPython 3.11 takes long to find them in the class
_TO_DEVICE = DmaDirection.TO_DEVICE


class Invalidation(NamedTuple):
    """What an invalidation dropped, and what survived it. Immutable.

    Attributes:
        sequence: how many invalidations this cache has had, this one included.
        dropped_buckets: how many buckets were let go.
        dropped_bytes: their size.
        device: the device leases held over it; they stay as they are.
        dma: the DMA leases held over it: each is an error of who holds it.
    """

    sequence: int
    dropped_buckets: int
    dropped_bytes: int
    device: tuple[LeaseInfo, ...]
    dma: tuple[LeaseInfo, ...]


class CacheStats(NamedTuple):
    """Counters since the cache was made, and what it holds now. Immutable.

    Attributes:
        hits: accesses that a resident bucket served, counted where that costs
            nothing: leases, and first accesses after a second-chance sweep. Plain
            reads and writes of a resident bucket are not counted.
        misses: buckets that had to be mapped.
        maps: mappings made, buckets and leases' own.
        unmaps: mappings that died.
        evictions: buckets dropped to stay under ``max_resident``.
        holes: accesses that found no page; each was a new attempt to map it.
        invalidations: how many.
        stale_dma: DMA leases that were stale when they were released.
        resident_bytes: guest memory mapped now, kept views included.
        resident_buckets: buckets that can be found now.
        device_leases: held now.
        dma_leases: held now.
    """

    hits: int
    misses: int
    maps: int
    unmaps: int
    evictions: int
    holes: int
    invalidations: int
    stale_dma: int
    resident_bytes: int
    resident_buckets: int
    device_leases: int
    dma_leases: int


class MapCache(Buckets):
    """A cache of mappings of one guest's memory. Also a context manager.

    Guest memory is mapped in buckets of ``2**bucket_shift`` bytes when it is first
    touched, and stays mapped until the bucket is evicted or :meth:`invalidate` is
    called. Whoever still looks at a bucket that was dropped keeps its memory.

    Args:
        backend: an open source of guest memory; closing it stays your duty.
        bucket_shift: log2 of a bucket's size in bytes, 12 to 30.
        max_resident: how much guest memory may be mapped at once, in bytes or as
            ``"4GiB"``; at least one bucket.
        on_stale: what happens when a DMA lease is released that an invalidation has
            made stale: ``"warn"``, ``"raise"`` or ``"copy"``; see :meth:`Lease.release`.
        record_origin: record the stack where each lease is taken, for
            :class:`LeaseInfo`. It costs tens of microseconds a lease.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
        UnsupportedOperationError: ``on_stale="copy"`` over a read-only source.

    Synchronization: all methods may be called in any threads. Reads and writes of
    resident buckets take no lock. In a forked child every access raises ClosedError.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bucket_shift: int = 20,
        max_resident: int | str = 32 * GiB,
        on_stale: OnStale = "warn",
        record_origin: bool = False,
    ) -> None:
        if not isinstance(backend, Backend):
            raise TypeError(
                f"backend must be a Backend, as open_backend() returns, not "
                f"{type(backend).__name__}"
            )
        lessor = Lessor(backend, on_stale, record_origin)
        super().__init__(backend, lessor, bucket_shift, max_resident)
        self._mark_dirty = backend.mark_dirty if Capability.DIRTY in backend.capabilities else None
        self._replacing = threading.RLock()

    # --- plain access -----------------------------------------------------------

    def read(self, address: int, length: int) -> bytes:
        """Return guest memory.

        Args:
            address: guest-physical, in bytes.
            length: in bytes; the range is half-open, 0 gives ``b""``.

        Raises:
            FaultError: a page of the range is not there.
            TypeError, ValueError: that is no range of guest memory.
            XenCallError: mapping failed as a whole.
            CacheFullError: no room under ``max_resident`` can be made.
            ClosedError: the cache or backend is closed.
        """
        try:
            start = address & self._mask
            data = self._readable[address >> self._shift][start : start + length]
            if len(data) == length:
                return data
        except (KeyError, TypeError):
            pass
        return self._read_slowly(address, length)

    def _read_slowly(self, address: int, length: int) -> bytes:
        address, length = check_range(address, length, empty=True)
        start = address & self._mask
        if 0 < length <= self._size - start:
            return self._fetch(address >> self._shift, start, length).memory[start : start + length]
        if length > _LARGE:  # and it all has to be there: look before copying so much
            for _ in self._pieces(address, length, lambda *_: None):
                pass
        chunks = list(
            self._pieces(
                address, length, lambda mapping, start, count: mapping.memory[start : start + count]
            )
        )
        return b"".join(chunks)

    def views(self, address: int, length: int) -> Iterator[memoryview]:
        """Return an iterator of read-only views of a range, one for each bucket, without a copy.

        Let go of each before the next is asked for: a bucket that is viewed is not evicted.
        Views stay safe, and go on showing what was there when an invalidation passes.

        Raises:
            XenMapCacheError: as :meth:`read`, when that bucket's turn has come.
        """
        return self._pieces(
            *check_range(address, length, empty=True),
            lambda mapping, start, count: mapping.view(start, count).toreadonly(),
        )

    def read_into(self, address: int, buffer: Buffer) -> None:
        """Fill a buffer from guest memory; on an error it is left as it was.

        Args:
            address: guest-physical, in bytes.
            buffer: writable and contiguous; its size in bytes is the length.

        Raises:
            TypeError: not a buffer, or read-only.
            ValueError: not contiguous, or no range of guest memory.
            CacheFullError: the range is larger than ``max_resident``.
            XenMapCacheError: others as :meth:`read`.
        """
        target = _bytes_of("buffer", buffer)
        if target.readonly or not target.c_contiguous:
            error, what = (TypeError, "read-only") if target.readonly else (ValueError, "scattered")
            raise error(f"buffer ({type(buffer).__name__}) is {what}: it cannot be read into")
        position = 0
        for mapping, start, count in self._hold(address, target.nbytes):
            target[position : position + count] = mapping.view(start, count)
            position += count

    def write(self, address: int, data: Buffer) -> None:
        """Change guest memory: all of the range, or on an error nothing.

        The pages are reported to a backend that tracks dirty pages. Should only that fail
        (XenCallError), the bytes are written; write them again to have them reported.

        Args:
            address: guest-physical, in bytes.
            data: any buffer; its size in bytes is the length.

        Raises:
            UnsupportedOperationError: the source is read-only.
            TypeError: ``data`` is not a buffer.
            ValueError: that is no range of guest memory.
            CacheFullError: the range is larger than ``max_resident``.
            XenMapCacheError: others as :meth:`read`.
        """
        try:
            start = address & self._mask
            length = len(data)  # type: ignore[arg-type] # a TypeError is dealt with
            # Refuses what is not just so many bytes, and what does not fit.
            self._writable[address >> self._shift][start : start + length] = data
        except (KeyError, TypeError, ValueError):
            self._write_slowly(address, data)
            return
        if self._mark_dirty is not None and length:
            self._mark_dirty(*page_span(address, length))

    def _write_slowly(self, address: int, data: Buffer) -> None:
        source = _bytes_of("data", data)
        if not source.c_contiguous:
            source = memoryview(source.tobytes())
        if not self._writes:
            raise UnsupportedOperationError(f"the backend {self._backend.name!r} is read-only")
        pieces = self._hold(address, source.nbytes)
        position = 0
        for mapping, start, count in pieces:
            mapping.view(start, count)[:] = source[position : position + count]
            position += count
        if position and self._mark_dirty is not None:
            self._mark_dirty(*page_span(address, position))

    # --- leases -----------------------------------------------------------------

    def map_device(self, address: int, length: int, *, owner: str, writable: bool = True) -> Lease:
        """Map device memory (option ROM, video memory) for long.

        It gets a mapping of its own, of just its pages, which invalidation leaves alone.

        Args:
            address: guest-physical, in bytes; need not be page-aligned.
            length: in bytes, at least 1.
            owner: who holds it, for reports.
            writable: map for writing too.

        Raises:
            XenMapCacheError: as :meth:`map_dma`.
        """
        return self._lease(_DEVICE, address, length, owner, None, writable)

    def map_dma(
        self,
        address: int,
        length: int,
        *,
        owner: str,
        direction: DmaDirection = DmaDirection.BIDIRECTIONAL,
    ) -> Lease:
        """Map guest memory for a transfer. Release it as soon as the transfer is done.

        A range inside one bucket shares the bucket's mapping; one that crosses a
        bucket's edge gets a mapping of its own.

        Args:
            address: guest-physical, in bytes; need not be page-aligned.
            length: in bytes, at least 1.
            owner: who holds it, for reports.
            direction: which way the data goes. TO_DEVICE gives a read-only view.

        Raises:
            FaultError: a page of the range is not there.
            TypeError, ValueError: an argument is wrong.
            UnsupportedOperationError: to be written, but the source is read-only.
            XenCallError: mapping failed as a whole.
            CacheFullError: no room under ``max_resident`` can be made.
            ClosedError: the cache or backend is closed.
        """
        if not isinstance(direction, DmaDirection):
            raise TypeError(f"direction must be a DmaDirection, not {direction!r}")
        writable = direction is not _TO_DEVICE
        return self._lease(_DMA, address, length, owner, direction, writable)

    def _lease(
        self,
        kind: LeaseKind,
        address: int,
        length: int,
        owner: str,
        direction: DmaDirection | None,
        writable: bool,
    ) -> Lease:
        if not isinstance(owner, str):
            raise TypeError(f"owner must be a str, not {type(owner).__name__}")
        # What check_range() would find right, in a third of the time.
        if not (
            type(address) is type(length) is int and 0 <= address < address + length < ADDRESS_LIMIT
        ):
            address, length = check_range(address, length)
        if writable and not self._writes:
            raise UnsupportedOperationError(
                f"the backend {self._backend.name!r} is read-only: map with "
                + ("writable=False" if direction is None else "direction=DmaDirection.TO_DEVICE")
            )
        start = address & self._mask
        if kind is _DMA and start + length <= self._size:
            return self._lease_of_bucket(address, length, owner, direction, writable)
        gfn, count = page_span(address, length)
        while True:
            sequence = self._lessor.sequence
            mapping = self._map(gfn, count, writable=writable)
            start = address - (gfn << PAGE_SHIFT)
            if not mapping.valid(start, length):
                fault = mapping.fault(start, length)
                try:
                    raise fault
                finally:
                    del mapping, fault  # no traceback is to keep the memory
            with self._lock:
                self._check_open()
                # Mapped before an invalidation, it would be stale without being told so.
                if kind is _DEVICE or sequence == self._lessor.sequence:
                    return self._lessor.grant(
                        mapping, kind, address, length, owner, direction, writable
                    )

    def _lease_of_bucket(
        self, address: int, length: int, owner: str, direction: DmaDirection | None, writable: bool
    ) -> Lease:
        index = address >> self._shift
        start = address & self._mask
        hit = 1
        while True:
            with self._lock:
                mapping = self._buckets.get(index)
                if mapping is not None and (mapping.errors is None or mapping.valid(start, length)):
                    if self._lessor.returned:
                        self._count()
                    self._hits += hit
                    self._touched.add(index)
                    if mapping.holders is None:
                        mapping.holders = set()
                    lease = self._lessor.grant(
                        mapping, _DMA, address, length, owner, direction, writable
                    )
                    mapping.holders.add(lease.id)
                    return lease
            del mapping  # one with a hole may have to make room for what replaces it
            # Once fetched it may be gone again, by an invalidation: then it is fetched anew.
            self._fetch(index, start, length)
            hit = 0

    def replace(self, old_address: int, new_address: int, length: int) -> None:
        """Let a device lease show another guest range at the same host address.

        The pages of the old range, if they could be written, are reported as dirty. Should
        only that fail (XenCallError), the lease has moved; its ``address`` tells.

        Args:
            old_address: where the lease is now; with ``length`` it names the lease.
            new_address: guest-physical, at the same offset in its page.
            length: of the lease, in bytes.

        Raises:
            LeaseError: there is no such device lease.
            ValueError: the offsets in the page differ, or that is no range.
            FaultError: a page of the new range is not there; nothing has changed.
            UnsupportedOperationError: the source cannot do it.
            XenCallError: it failed and nothing has changed; MappingLostError if the old
                memory is gone too: the lease is then stale and its view shows zeros.
            KeyboardInterrupt: the lease is stale, as nobody knows how far it came.
        """
        old_address, length = check_range(old_address, length)
        new_address, _ = check_range(new_address, length)
        if (old_address ^ new_address) & PAGE_MASK:
            raise ValueError(
                f"{old_address:#x} and {new_address:#x} lie at different offsets in their pages"
            )
        self._check_open()  # before a lock that a parent's thread may have held at the fork
        with self._replacing:
            self._check_open()
            lease = self._find_device(old_address, length)
            mapping = lease._mapping  # noqa: SLF001 - the cache made it
            if mapping is None:
                raise LeaseError(f"{lease!r} was released meanwhile")
            if mapping.abandoned:  # and what lives there now is not to be mapped over
                raise LeaseError(f"the memory of {lease!r} was lost")
            try:
                self._backend.remap(mapping, new_address >> PAGE_SHIFT)
                with self._lock:
                    lease.lost = False
                    mapping.gfn = new_address >> PAGE_SHIFT
                    lease.address = new_address
            except BaseException as error:
                # Interrupted, it may show the new pages, or private zeros.
                if isinstance(error, MappingLostError) or not isinstance(error, Exception):
                    lease.lost = True
                raise
            # Now, when nothing writes to them through the lease any more.
            if self._mark_dirty is not None and mapping.writable:
                self._mark_dirty(*page_span(old_address, length))

    def _find_device(self, address: int, length: int) -> Lease:
        for lease in self._lessor.ledger.held(_DEVICE):
            if (lease.address, lease.length) == (address, length):
                return lease
        raise LeaseError(f"no device lease covers just {address:#x}..{address + length:#x}")

    def resolve(self, host_address: int) -> int:
        """Return the guest address behind a host address that lies in a held lease.

        Args:
            host_address: anywhere in the lease. Looks through all leases.

        Raises:
            LeaseError: no held lease covers it.
        """
        host_address = as_int("host_address", host_address)
        for lease in self._lessor.ledger:
            offset = host_address - lease._host_address  # noqa: SLF001 - the cache made it
            if 0 <= offset < lease.length and not lease.released:
                return lease.address + offset
        raise LeaseError(f"host address {host_address:#x} lies in no lease that is held")

    def leases(self) -> tuple[LeaseInfo, ...]:
        """Return what is known of each lease that is held, oldest first. Works after close too."""
        return self._lessor.infos()

    def mark_leases_dirty(self) -> int:
        """Report the pages of all leases that can be written as written, and return how many.

        A release reports them too, but until then a device may write, and no migration
        sees it. Call it each time the toolstack is about to collect dirty pages.

        Returns:
            How many leases were reported: 0 if the backend does not track dirty pages.

        Raises:
            XenCallError: it could not be noted; call it again.
            ClosedError: the cache or backend is closed.
        """
        self._check_open()
        return sum(map(self._lessor.mark_dirty, self._lessor.ledger.held()))

    # --- life -------------------------------------------------------------------

    def invalidate(self) -> Invalidation:
        """Drop every mapping that no lease holds, as Xen's INVALIDATE request asks.

        Later accesses map anew. DMA leases that are held become stale, and are warned
        of through :mod:`logging`, once each.

        Raises:
            ClosedError: the cache is closed.
        """
        with self._lock:
            self._check_open()
            lessor = self._lessor
            lessor.sequence = sequence = lessor.sequence + 1
            dropped = len(self._buckets)
            size = dropped << self._shift
            gone = self._drop_all() if dropped else ()
        for resident in gone:
            resident.clear()  # here they die, outside of the lock
        if not len(lessor.ledger):
            return Invalidation(sequence, dropped, size, (), ())
        return Invalidation(sequence, dropped, size, *lessor.survivors(sequence))

    def stats(self) -> CacheStats:
        """Return the counters. Works after close too."""
        ledger = self._lessor.ledger
        with self._lock:
            self._count()
            return CacheStats(
                hits=self._hits,
                misses=self._misses,
                maps=self._maps,
                unmaps=self._unmaps,
                evictions=self._evictions,
                holes=self._holes,
                invalidations=self._lessor.sequence,
                stale_dma=self._stale_dma,
                resident_bytes=self._resident,
                resident_buckets=len(self._buckets),
                device_leases=ledger.count(_DEVICE),
                dma_leases=ledger.count(_DMA),
            )

    @property
    def backend(self) -> Backend:
        """The source of memory that it was made with."""
        return self._backend

    @property
    def memory_end(self) -> int | None:
        """One past the last guest address that may be there, or None if that is not known."""
        return self._backend.memory_end

    def present(self, address: int, length: int) -> Iterator[tuple[int, int]]:
        """Return an iterator of ``(address, length)`` of what is there of a range, in order.

        Holes that were found before are not tried again.

        Raises:
            XenMapCacheError: as :meth:`read`, but for holes.
        """
        return self._present(*check_range(address, length, empty=True))

    def _present(self, address: int, length: int) -> Iterator[tuple[int, int]]:
        self._check_open()
        end = address + length
        known = self._backend.present(*page_span(address, length)) if length else None
        if known is not None:
            for gfn, pages in known:
                first = max(address, gfn << PAGE_SHIFT)
                yield first, min(end, (gfn + pages) << PAGE_SHIFT) - first
            return
        run = address  # where the present part that is being extended began
        while address < end:
            index = address >> self._shift
            start = address & self._mask
            count = min(self._size - start, end - address)
            errors = self._fetch(index, start, count, holes=True).errors
            if errors is None:
                address += count
                continue
            for page in range(start >> PAGE_SHIFT, (start + count + PAGE_MASK) >> PAGE_SHIFT):
                page_address = (index << self._shift) + (page << PAGE_SHIFT)
                if errors[page]:
                    if run < page_address:
                        yield run, page_address - run
                    run = page_address + PAGE_MASK + 1
            address += count
        if run < end:
            yield run, end - run

    def close(self, *, force: bool = False) -> None:
        """Drop all mappings. Views that are kept stay safe. Idempotent.

        Args:
            force: drop leases that are held, too, with a WARNING each. What they could have
                written is reported as dirty.

        Raises:
            LeaseError: leases are held; nothing has changed.
        """
        if self._lessor.forked:
            return
        with self._lock:
            held = self._lessor.ledger.held()
            if self._closed and not force:
                return
            if held and not force:
                names = "; ".join(str(info) for info in self.leases()[:10])
                more = f"; and {len(held) - 10} more" if len(held) > 10 else ""
                raise LeaseError(
                    f"leases are held ({len(held)}): {names}{more}. "
                    "Release them, or close(force=True)"
                )
            self._closed = True
            gone = self._drop_all()
        for resident in gone:
            resident.clear()
        for lease in held:
            self._lessor.drop(lease)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # An exception on its way out is worth more than a complaint about its leases.
        self.close(force=error is not None)


def _bytes_of(name: str, buffer: Buffer) -> memoryview:
    try:
        view = memoryview(buffer)
    except TypeError:
        raise TypeError(
            f"{name} must be bytes or another buffer, not {type(buffer).__name__}"
        ) from None
    return view.cast("B") if view.c_contiguous else view
