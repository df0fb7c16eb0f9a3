"""MapCache: long-lived mappings of a guest's memory, found by a dictionary look-up."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Self

from .address import (
    ADDRESS_LIMIT,
    PAGE_MASK,
    PAGE_SHIFT,
    GiB,
    as_int,
    check_range,
    page_span,
    parse_size,
)
from .backend import Backend, Capability
from .errors import (
    CacheFullError,
    ClosedError,
    FaultError,
    LeaseError,
    MappingLostError,
    UnsupportedOperationError,
    XenCallError,
)
from .lease import Lease, Lessor, OnStale
from .ledger import DmaDirection, LeaseInfo, LeaseKind
from .mapping import Mapping

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .mapping import Memory

_PATIENCE = 100  # milliseconds for memory in other threads' hands to come free
_EMERGENCY = 64  # buckets to give back when the kernel has no room
_BUCKET_SHIFTS = range(PAGE_SHIFT, 31)


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


class _Pending:
    """A bucket that a thread is mapping at this moment; others wait instead of mapping it too."""

    __slots__ = ("done", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.done = threading.Lock()
        self.done.acquire()


class MapCache:
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
    resident buckets take no lock. In a forked child every method raises ClosedError.
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
        if as_int("bucket_shift", bucket_shift) not in _BUCKET_SHIFTS:
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
        self._mark_dirty = backend.mark_dirty if Capability.DIRTY in backend.capabilities else None
        self._lessor = Lessor(backend, on_stale, record_origin)
        # Reentrant: a signal handler or finalizer may use the cache while its own
        # thread is in here. Statements that change counters are atomic between calls.
        self._lock = threading.RLock()
        self._replacing = threading.RLock()
        self._closed = False
        # What can be read (written) without a look at anything else: the buckets
        # without holes that were accessed since the last sweep came by.
        self._readable: dict[int, Memory] = {}
        self._writable: dict[int, memoryview] = {}
        self._buckets: dict[int, Mapping] = {}
        self._pending: dict[int, _Pending] = {}
        self._touched: set[int] = set()  # accessed since the last sweep, but not by the above
        self._clock: deque[int] = deque()  # bucket indexes in the order of the sweep
        self._freed: deque[int] = deque()  # lengths of mappings that died, not yet counted
        self._on_unmap = self._freed.append
        self._resident = 0
        self._hits = self._misses = self._maps = self._unmaps = 0
        self._evictions = self._holes = self._stale_dma = 0
        _caches.add(self)

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
        chunks = [
            mapping.memory[start : start + count]
            for mapping, start, count in self._pieces(address, length)
        ]
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def read_into(self, address: int, buffer: Buffer) -> None:
        """Fill a buffer from guest memory; on an error it is left as it was.

        Args:
            address: guest-physical, in bytes.
            buffer: writable and contiguous; its size in bytes is the length.

        Raises:
            TypeError: not a buffer, or read-only.
            ValueError: not contiguous, or no range of guest memory.
            CacheFullError: the range is larger than ``max_resident``.
            Others: as :meth:`read`.
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

        The pages are reported to a backend that tracks dirty pages.

        Args:
            address: guest-physical, in bytes.
            data: any buffer; its size in bytes is the length.

        Raises:
            UnsupportedOperationError: the source is read-only.
            TypeError: ``data`` is not a buffer.
            ValueError: that is no range of guest memory.
            CacheFullError: the range is larger than ``max_resident``.
            Others: as :meth:`read`.
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
            All: as :meth:`map_dma`.
        """
        return self._lease(LeaseKind.DEVICE, address, length, owner, None, writable)

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
        writable = direction is not DmaDirection.TO_DEVICE
        return self._lease(LeaseKind.DMA, address, length, owner, direction, writable)

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
        if kind is LeaseKind.DMA and start + length <= self._size:
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
                if kind is LeaseKind.DEVICE or sequence == self._lessor.sequence:
                    return self._lessor.grant(
                        mapping, kind, address, length, owner, direction, writable
                    )

    def _lease_of_bucket(
        self, address: int, length: int, owner: str, direction: DmaDirection | None, writable: bool
    ) -> Lease:
        index = address >> self._shift
        start = address & self._mask
        for attempt in itertools.count():
            with self._lock:
                mapping = self._buckets.get(index)
                if mapping is not None and (mapping.errors is None or mapping.valid(start, length)):
                    if self._lessor.returned:
                        self._count()
                    self._hits += not attempt
                    self._touched.add(index)
                    lease = self._lessor.grant(
                        mapping, LeaseKind.DMA, address, length, owner, direction, writable
                    )
                    mapping.pins += 1
                    return lease
            # Once fetched it may be gone again, by an invalidation: then it is fetched anew.
            self._fetch(index, start, length)
        raise AssertionError("counting has no end")

    def replace(self, old_address: int, new_address: int, length: int) -> None:
        """Let a device lease show another guest range at the same host address.

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
        """
        old_address, length = check_range(old_address, length)
        new_address, _ = check_range(new_address, length)
        if (old_address ^ new_address) & PAGE_MASK:
            raise ValueError(
                f"{old_address:#x} and {new_address:#x} lie at different offsets in their pages"
            )
        with self._replacing:
            self._check_open()
            lease = self._find_device(old_address, length)
            mapping = lease._mapping  # noqa: SLF001 - the cache made it
            if mapping is None:
                raise LeaseError(f"{lease!r} was released meanwhile")
            try:
                self._backend.remap(mapping, new_address >> PAGE_SHIFT)
            except MappingLostError:
                lease.lost = True
                raise
            with self._lock:
                mapping.gfn = new_address >> PAGE_SHIFT
                lease.address = new_address

    def _find_device(self, address: int, length: int) -> Lease:
        for lease in self._lessor.ledger.held():
            if lease.kind is LeaseKind.DEVICE and (lease.address, lease.length) == (
                address,
                length,
            ):
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
        for lease in self._lessor.ledger.held():
            mapping = lease._mapping  # noqa: SLF001 - the cache made it
            if mapping is not None:
                offset = host_address - mapping.address - lease._start  # noqa: SLF001
                if 0 <= offset < lease.length:
                    return lease.address + offset
        raise LeaseError(f"host address {host_address:#x} lies in no lease that is held")

    def leases(self) -> tuple[LeaseInfo, ...]:
        """Return what is known of each lease that is held, oldest first. Works after close too."""
        return self._lessor.infos()

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
            buckets = self._buckets
            dropped = len(buckets)
            # The size before they die; they die below, outside of the lock.
            size = dropped << self._shift
            if dropped:
                self._drop_all()
        del buckets
        if not len(lessor.ledger):
            return Invalidation(sequence, dropped, size, (), ())
        return Invalidation(sequence, dropped, size, *lessor.survivors())

    def stats(self) -> CacheStats:
        """Return the counters. Works after close too."""
        held = self._lessor.ledger.held()
        device = sum(lease.kind is LeaseKind.DEVICE for lease in held)
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
                device_leases=device,
                dma_leases=len(held) - device,
            )

    @property
    def memory_end(self) -> int | None:
        """One past the last guest address that may be there, or None if that is not known."""
        return self._backend.memory_end

    def present(self, address: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield ``(address, length)`` of the parts of a range that are there, in order.

        Holes that were found before are not tried again.

        Raises:
            All: as :meth:`read`, but for holes.
        """
        address, length = check_range(address, length, empty=True)
        end = address + length
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
            force: drop leases that are held, too, with a WARNING each.

        Raises:
            LeaseError: leases are held; nothing has changed.
        """
        if self._lessor.forked:
            return
        with self._lock:
            if self._closed:
                return
            held = self._lessor.ledger.held()
            if held and not force:
                names = "; ".join(str(info) for info in self.leases()[:10])
                more = f"; and {len(held) - 10} more" if len(held) > 10 else ""
                raise LeaseError(
                    f"{len(held)} leases are held: {names}{more}. "
                    "Release them, or close(force=True)"
                )
            self._closed = True
            buckets = self._buckets
            self._drop_all()
        del buckets
        for lease in held:
            self._lessor.drop(lease)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # An exception on its way out is worth more than a complaint about its leases.
        self.close(force=error is not None)

    # --- buckets ----------------------------------------------------------------

    def _check_open(self) -> None:
        self._lessor.check_process()
        if self._closed:
            raise ClosedError("this map cache is closed")

    def _drop_all(self) -> None:
        # New dictionaries, not emptied ones: a reader in another thread may be between
        # the look-up and the slice, and what it found must not die under the lock.
        self._readable, self._writable, self._buckets = {}, {}, {}
        self._touched.clear()
        self._clock.clear()

    def _pieces(self, address: int, length: int) -> Iterator[tuple[Mapping, int, int]]:
        """Yield ``(mapping, start, count)`` for the part of a range in each bucket."""
        self._check_open()
        end = address + length
        position = address
        while position < end:
            start = position & self._mask
            count = min(self._size - start, end - position)
            try:
                yield self._fetch(position >> self._shift, start, count), start, count
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
        return list(self._pieces(address, length))

    def _fetch(self, index: int, start: int, length: int, *, holes: bool = False) -> Mapping:
        """Return the bucket, mapped if need be, after checking that a range of it is there.

        Args:
            index: of the bucket.
            start: first byte in the bucket.
            length: bytes.
            holes: take the bucket as it is, holes included.
        """
        while True:
            with self._lock:
                self._check_open()
                mapping = self._buckets.get(index)
                if mapping is not None and (holes or mapping.valid(start, length)):
                    self._hits += 1
                    self._admit(index, mapping)
                    return mapping
                pending = self._pending.get(index)
                # A thread that interrupted its own mapping (a signal handler) maps as well.
                if pending is None or pending.thread == threading.get_ident():
                    mine = self._pending[index] = _Pending()
                    sequence = self._lessor.sequence
                    break
            with pending.done:
                pass
        try:
            fresh = self._map(index << self._shift - PAGE_SHIFT, self._size >> PAGE_SHIFT)
            with self._lock:
                self._check_open()
                self._misses += 1
                usable = holes or fresh.valid(start, length)
                if not usable:
                    self._holes += 1
                # A bucket that was mapped before an invalidation serves this access,
                # which had begun by then, and no other.
                if sequence == self._lessor.sequence and (usable or mapping is None):
                    if index not in self._buckets:
                        self._clock.append(index)
                    self._buckets[index] = fresh
        finally:
            with self._lock:
                if self._pending.get(index) is mine:
                    del self._pending[index]
            mine.done.release()
        if usable:
            return fresh
        fault = fresh.fault(start, length)
        try:
            raise fault
        finally:
            del fresh, mapping, fault  # no traceback is to keep the memory

    def _admit(self, index: int, mapping: Mapping) -> None:
        """Let accesses find a bucket without coming here; called under the lock.

        That begins with the second access: what is touched once, by a scan, goes first.
        """
        if mapping.errors is None:
            self._readable[index] = mapping.memory
            if self._writes:
                self._writable[index] = mapping.bytes
        else:
            self._touched.add(index)

    def _map(self, gfn: int, count: int, *, writable: bool | None = None) -> Mapping:
        """Map pages, with room made for them first; called without the lock."""
        length = count << PAGE_SHIFT
        writable = self._writes if writable is None else writable
        self._make_room(gfn, length)
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
        except BaseException:
            with self._lock:
                self._resident -= length
            raise
        mapping.on_unmap(self._on_unmap)
        with self._lock:
            self._maps += 1
        return mapping

    def _make_room(self, gfn: int, length: int) -> None:
        """Account for a mapping that is about to be made, after evicting what is in its way."""
        if length > self._max_resident:
            raise CacheFullError(
                f"{length:#x} bytes at {gfn << PAGE_SHIFT:#x} are more than max_resident "
                f"{self._max_resident:#x}"
            )
        patience = _PATIENCE
        while True:
            with self._lock:
                self._check_open()
                self._count()
                excess = self._resident + length - self._max_resident
                if excess <= 0:
                    self._resident += length
                    return
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

    def _leased(self) -> int:
        """Return how many bytes are mapped that leases hold."""
        mappings = {lease._mapping for lease in self._lessor.ledger.held()}  # noqa: SLF001
        return sum(mapping.length for mapping in mappings if mapping is not None)

    def _evict(self, wanted: int) -> bool:
        """Drop buckets of so many bytes, least recently used first, nearly; False if none can go.

        A sweep of the clock: a bucket that can be hit is made unhittable and passed by
        once, so that its next access is seen here; one that was not accessed since, goes.
        """
        victims = []
        with self._lock:
            self._count()
            for _ in range(2 * len(self._clock)):
                if wanted <= 0 or not self._clock:
                    break
                index = self._clock.popleft()
                mapping = self._buckets[index]
                accessed = index in self._readable or index in self._touched
                self._readable.pop(index, None)
                self._writable.pop(index, None)
                self._touched.discard(index)
                if accessed or mapping.pins:
                    self._clock.append(index)
                    continue
                del self._buckets[index]
                victims.append(mapping)
                wanted -= mapping.length
            self._evictions += len(victims)
        return bool(victims)  # which die here, and are unmapped without the lock

    def _count(self) -> None:
        """Bring the books up to date with what finalizers and releases left; under the lock."""
        freed, returned, stale = self._freed, self._lessor.returned, self._lessor.returned_stale
        while freed:
            self._resident -= freed.popleft()
            self._unmaps += 1
        while returned:
            mapping = returned.popleft()()
            if mapping is not None:
                mapping.pins -= 1
        while stale:
            stale.popleft()
            self._stale_dma += 1

    def _forget_parent(self) -> None:
        """In a forked child: nothing here may be used or unmapped."""
        self._lessor.forked = True
        self._lock = threading.RLock()  # another thread of the parent may have held it
        self._drop_all()


_caches: weakref.WeakSet[MapCache] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for cache in list(_caches):
        cache._forget_parent()  # noqa: SLF001


os.register_at_fork(after_in_child=_after_fork_in_child)


def _bytes_of(name: str, buffer: Buffer) -> memoryview:
    try:
        view = memoryview(buffer)
    except TypeError:
        raise TypeError(
            f"{name} must be bytes or another buffer, not {type(buffer).__name__}"
        ) from None
    return view.cast("B") if view.c_contiguous else view
