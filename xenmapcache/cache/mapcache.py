"""MapCache: long-lived mappings of a guest's memory, found by a dictionary look-up."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn, Self

from ..address import PAGE_MASK, PAGE_SHIFT, check_range
from ..backend import Backend
from ..errors import LeaseError, XenMapCacheError
from ..events import CacheOpened, Event
from ..grants import GrantSource
from ..mapping import Mapping
from ..stream import Observation, Observer, announce, new_hooks, now
from . import telling
from .access import bytes_of, check_guest_range
from .info import CacheStats, Invalidation, OnStale
from .lending import LendingCache
from .locked import locked
from .parts import Parts
from .registry import LeaseRegistry, collect_stats, report_forced

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .budget import Budget


class MapCache(LendingCache):
    """A cache of mappings of one guest's memory. Also a context manager.

    Guest memory is mapped in buckets of ``2**bucket_shift`` bytes when it is first
    touched, and stays mapped until the bucket is evicted or :meth:`invalidate` is
    called. A view of a bucket that was dropped keeps its memory.

    Args:
        backend: an open source of guest memory; closing it stays your duty, unless
            ``owns_backend`` is given.
        bucket_shift: log2 of a bucket's size in bytes, 12 to 30.
        max_resident: how much guest memory may be mapped at once, in bytes or as
            ``"4GiB"``; at least one bucket. By default :attr:`Backend.mapping_room`: 32 GiB, but a
            quarter of the available memory, without what the caches of this process may still
            map, where a mapped page may take a page of Dom0's, as on Arm. The one exception:
            with ``on_stale="copy"``, if leases fill all of it, each thread that releases a stale
            lease maps one page more at a time.
        max_copies: how much memory copies of a file's pages may take at once, apart from what is
            mapped; in bytes or as ``"256MiB"``, at least one bucket. By default 256 MiB or
            ``max_resident``, whichever is less. See :meth:`Backend.copies`.
        max_lease: how long a lease may be, in bytes or as ``"16MiB"``; by default
            ``max_resident``. Set it where a guest chooses the length.
        on_stale: what happens when a DMA lease is released that an invalidation has
            made stale: ``"warn"``, ``"raise"`` or ``"copy"``; see :meth:`Lease.release`.
        record_origin: record the stack where each lease is taken, for
            :class:`LeaseInfo`. It costs tens of microseconds a lease.
        owns_backend: close the backend when the cache is closed.
        warn_age: log a WARNING, once, for each DMA lease that is held for longer, in
            seconds, while it is held; None for never. A thread looks, while DMA leases are held.
        strict_views: for tests: releasing a lease while a view of it is in use is a LeaseError
            that names the lease; see :meth:`Lease.release`. It costs microseconds a view.
        grants: the pages that the guest has granted, as ``backend.open_grants()`` returns; closing
            it stays your duty. Then addresses with bit 63 name granted pages: :meth:`map_dma`
            leases them, and :meth:`read`, :meth:`read_into` and :meth:`write` copy them. They do
            not count under ``max_resident``. Without it they are missing pages, as for all other
            methods.

    If the cache is dropped while leases are held, a ResourceWarning names them. Their memory stays
    safe.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
        UnsupportedOperationError: ``on_stale="copy"`` over a read-only source.

    What a guest can choose: for any address and length from 0 to ``2**64 - 1``, methods that access
    memory succeed or raise a subclass of XenMapCacheError; FaultError if memory is missing.
    ValueError and TypeError say that the program is wrong: a negative number, or no number.

    Synchronization: all methods may be called in any threads. Reads and writes of
    hot buckets take no lock. In a forked child every access raises ClosedError.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bucket_shift: int = 20,
        max_resident: int | str | None = None,
        max_copies: int | str | None = None,
        max_lease: int | str | None = None,
        on_stale: OnStale = "warn",
        record_origin: bool = False,
        owns_backend: bool = False,
        warn_age: float | None = None,
        strict_views: bool = False,
        grants: GrantSource | None = None,
    ) -> None:
        parts = Parts(
            backend,
            bucket_shift=bucket_shift,
            max_resident=max_resident,
            max_copies=max_copies,
            max_lease=max_lease,
            on_stale=on_stale,
            record_origin=record_origin,
            warn_age=warn_age,
            strict_views=strict_views,
            grants=grants,
        )
        super().__init__(parts)
        self._backend = backend
        self._owns_backend = owns_backend
        # The hot paths find what they need without a detour.
        self._table = table = parts.table
        self._shift, self._mask, self._size = table.shift, table.mask, table.size
        self._dirty = parts.dirty
        self._mark = parts.dirty.mark
        self._budget, self._copies = parts.budget, parts.copies
        self._registry, self._mapper, self._access = parts.registry, parts.mapper, parts.access
        self.stream = table.stream
        if new_hooks:
            announce(self.observe)

    def __repr__(self) -> str:
        state = "closed " if self._table.generation.closed else ""
        buckets = len(self._table.generation.buckets)
        return (
            f"<{state}MapCache of {self._backend!r}: {buckets} buckets of {self._size:#x} bytes, "
            f"{len(self._registry)} leases>"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a MapCache cannot be copied or pickled; make another one over the same backend"
        )

    # --- plain access -----------------------------------------------------------

    def read(self, address: int, length: int, *, fill: int | None = None) -> bytes:
        """Return guest memory.

        Args:
            address: guest-physical, in bytes.
            length: in bytes; the range is half-open, 0 gives ``b""``.
            fill: a byte, 0 to 255, that takes the place of each byte of a missing page. All
                missing pages of one read may be ``max_resident`` bytes together.

        Raises:
            FaultError: a page of the range is missing, and there is no ``fill``.
            TypeError, ValueError: an argument is not an int, or negative.
            XenCallError: mapping failed as a whole, or was refused for a page of the range; then
                ``address`` names it.
            CacheFullError: no room under ``max_resident`` or ``max_copies`` can be made.
            ClosedError: the cache or backend is closed.
        """
        # No call in this block, so no exception of a signal handler is taken for a miss.
        try:
            start = address & self._mask
            data = self._table.generation.readable[address >> self._shift][start : start + length]
        except (KeyError, TypeError, OverflowError):  # the last one from small NumPy integers
            pass
        else:
            if len(data) == length:
                return data
        return self._access.read(address, length, fill)

    def views(self, address: int, length: int) -> Iterator[memoryview]:
        """Return an iterator of read-only views of a range, one for each bucket, without a copy.

        Drop each view before you ask for the next: a bucket that is viewed keeps its room.
        Views stay safe, and continue to show the old pages when an invalidation passes.

        Raises:
            XenMapCacheError: as :meth:`read`, when that bucket's turn has come.
        """
        return self._mapper.pieces(
            *check_guest_range(address, length, self._access.known_hole),
            lambda mapping, start, count: mapping.view(start, count).toreadonly(),
        )

    def read_into(self, address: int, buffer: Buffer, *, fill: int | None = None) -> None:
        """Fill a buffer from guest memory; on an error it is left as it was.

        The buffer may be a view of the same guest memory: the result is that of C's ``memmove``.

        Args:
            address: guest-physical, in bytes.
            buffer: writable and contiguous; its size in bytes is the length.
            fill: a byte that takes the place of each byte of a missing page, as for :meth:`read`.

        Raises:
            TypeError: not a buffer, or read-only.
            ValueError: not contiguous, or a negative address.
            CacheFullError: the range is larger than ``max_resident``.
            XenMapCacheError: others as :meth:`read`.
        """
        target = bytes_of("buffer", buffer)
        if target.readonly or not target.c_contiguous:
            error, what = (TypeError, "read-only") if target.readonly else (ValueError, "scattered")
            raise error(f"buffer ({type(buffer).__name__}) is {what}: it cannot be read into")
        self._access.read_into(address, target, fill)

    def write(self, address: int, data: Buffer) -> None:
        """Write to guest memory. On an error, no byte has changed.

        The pages are reported to a backend that tracks dirty pages. If only the report fails
        (XenCallError), the bytes are written; write them again to have them reported. If a
        signal handler raises, part of the bytes may be written; their pages are reported.

        Args:
            address: guest-physical, in bytes.
            data: any buffer; its size in bytes is the length. It may be a view of the same
                guest memory: the result is that of C's ``memmove``.

        Raises:
            UnsupportedOperationError: the source is read-only.
            TypeError: ``data`` is not a buffer.
            ValueError: a negative address.
            CacheFullError: the range is larger than ``max_resident``.
            XenMapCacheError: others as :meth:`read`.
        """
        # Exact types alone: their memory is not the guest's, and they run no code in here.
        if type(address) is int and (type(data) is bytes or type(data) is bytearray):
            start = address & self._mask
            length = len(data)
            try:
                target = self._table.generation.writable[address >> self._shift]
            except KeyError:
                pass
            else:
                if length and start + length <= self._size:
                    mark = self._mark
                    gfn = address >> PAGE_SHIFT
                    count = (address + length + PAGE_MASK >> PAGE_SHIFT) - gfn
                    try:
                        target[start : start + length] = data
                        if mark is not None:
                            mark(gfn, count)
                    except XenMapCacheError:
                        raise
                    except BaseException:
                        self._dirty.owed.append((gfn, count))
                        self._dirty.settle_quietly()
                        raise
                    return
                del target  # or this bucket could not make room for the range
        self._access.write(address, data)

    def present(self, address: int, length: int) -> Iterator[tuple[int, int]]:
        """Return an iterator of ``(address, length)`` of the present parts of a range, in order.

        Holes that were found before are not tried again. A page that was refused (see
        :class:`XenCallError`) is not a hole: the iterator raises when it comes to its bucket.

        A live guest's range of more than 64 MiB is mapped only where :meth:`.Backend.extents` says
        that pages may be, so it takes time in proportion to the guest's memory.

        Raises:
            XenMapCacheError: as :meth:`read`, but for holes.
        """
        return self._access.present(*check_range(address, length, empty=True))

    def map_pages(self, gfn: int, count: int) -> Mapping:
        """Map pages for reading, apart from the buckets, within ``max_resident``.

        The mapping shows the guest's pages of now, and is yours: it is not found by other accesses,
        and lives until you drop it. Writers of dumps use it.

        Args:
            gfn: the first guest frame number.
            count: pages, at least one.

        Returns:
            A mapping; missing pages are in its ``errors``.

        Raises:
            XenMapCacheError: as :meth:`read`, but for holes. No page may be refused.
        """
        return self._access.map_pages(gfn, count)

    # --- life -------------------------------------------------------------------

    def observe(self, observer: Observer) -> Observation:
        """Have a function called with what happens in this cache, as the values of ``events``.

            with cache.observe(print):
                cache.read(0, 64)

        First it is called with what is so already: a CacheOpened, a BucketMapped for each bucket
        and a LeaseTaken for each lease. What other threads change at that moment may be told twice.

        It is called after each step, outside of the locks, in the thread that did the step or in
        another one, and one event at a time. It may use the cache; what it causes is told after it
        has returned. If it raises an Exception, it is detached with a WARNING. At most 10,000
        events wait for it; an EventsLost counts what did not fit. A forked child has no observers.

        Args:
            observer: is called with each event; what it returns is ignored.

        Returns:
            What detaches it; also a context manager.

        Raises:
            TypeError: it cannot be called.
            ClosedError: the cache is closed.
        """
        self._table.check_open()
        self._dirty.observe()
        if self._mark is not None:
            self._mark = self._dirty.report_hot
        return self.stream.attach(observer, self._snapshot)

    def _snapshot(self) -> list[Event]:
        buckets = self._budget.limit >> self._shift
        opened = CacheOpened(now(), buckets, repr(self._backend), self._size)
        return telling.snapshot(opened, self._registry.held(), self._table)

    def invalidate(self) -> Invalidation:
        """Drop every mapping that no lease holds, as Xen's INVALIDATE request asks.

        Later accesses map again. DMA leases that are held become stale; a WARNING is
        logged for each, once.

        Raises:
            ClosedError: the cache is closed.
        """
        began = now()
        sequence, dropped = locked(self._budget.lock, self._table.invalidate)
        if self._table.retired:
            self._mapper.clear_retired()
        if self._registry.uncounted:  # otherwise their ids would pile up until a call of stats()
            locked(self._budget.lock, self._registry.stale_released)
        held = self._registry.held_across(sequence) if len(self._registry) else ((), (), ())
        report = Invalidation(sequence, dropped, dropped << self._shift, *held)
        if self.stream.observations:
            telling.invalidated(self._table, began)
        return report

    def stats(self) -> CacheStats:
        """Return the counters. Works after close too."""
        self._budget.recount()
        self._copies.recount()
        parts = self._table, self._budget, self._copies, self._registry
        stats = locked(self._budget.lock, collect_stats, *parts)
        telling.settle(self._table)
        self.stream.deliver()  # what a signal handler has put in under the lock
        return stats

    @property
    def backend(self) -> Backend:
        """The source of memory that it was made with."""
        return self._backend

    @property
    def grants(self) -> GrantSource | None:
        """The pages that the guest has granted, if it was made with any."""
        return self._access.grants

    @property
    def max_resident(self) -> int:
        """How much guest memory may be mapped at once, in bytes."""
        return self._budget.limit

    @property
    def max_copies(self) -> int:
        """How much memory copies of a file's pages may take at once, in bytes."""
        return self._copies.limit

    @property
    def memory_end(self) -> int | None:
        """One past the last guest address that may exist, or None if that is unknown."""
        return self._backend.memory_end

    def close(self, *, force: bool = False) -> None:
        """Drop all mappings. Views that are kept stay safe. Idempotent.

        If a signal handler raises during it, the cache is closed or as before, and a second call
        completes the first.

        Args:
            force: end leases that are held, too, with a WARNING each. What they could have
                written is reported as dirty.

        Raises:
            LeaseError: leases are held; nothing has changed.
        """
        if self._table.forked:
            return
        locked(self._budget.lock, self._close, force)
        self._mapper.clear_retired()
        self._dirty.settle_quietly()
        registry = self._registry
        ended = [registry.drop(record) for record in registry.held()] if force else []
        if self._owns_backend:
            self._backend.close()
        if self.stream.observations:
            telling.closed(self._table)
        report_forced(ended)

    def _close(self, force: bool) -> None:
        """Close it unless leases are held; called under the lock."""
        held = self._registry.held()
        if held and not force and not self._table.generation.closed:
            text = self._registry.describe(held)
            raise LeaseError(f"{text}. Release them, or close(force=True)")
        self._table.retire(closed=True)
        self._budget.closed = True

    def __del__(self) -> None:
        # The leases and their memory stay as they are; a handle can still release its own.
        budget: Budget | None = getattr(self, "_budget", None)  # None: it was not made
        registry: LeaseRegistry | None = getattr(self, "_registry", None)  # as above
        if budget is not None:
            budget.closed = True
        # At the very end the globals of modules are None.
        if registry is None or registry.table.forked or sys is None or sys.is_finalizing():
            return
        held = registry.held()
        if held:
            text = f"a MapCache was dropped, and {registry.describe(held)}"
            warnings.warn(text, ResourceWarning, stacklevel=1, source=self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # An exception on its way out is worth more than a complaint about its leases.
        self.close(force=error is not None)
