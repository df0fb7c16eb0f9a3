"""The half of MapCache that lends memory: leases and windows, and what becomes of them."""

from __future__ import annotations

from .info import DmaDirection, LeaseInfo, LeaseKind, as_direction
from .lease import Lease
from .parts import Parts
from .window import Holes

_DEVICE, _DMA, _ = LeaseKind  # CPython 3.11 takes long to find them in the class
_TO_DEVICE = DmaDirection.TO_DEVICE


class LendingCache:
    """The methods of :class:`MapCache` that take, list and move leases.

    Args:
        parts: of the cache. It is all that the two halves share.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def map_device(self, address: int, length: int, *, owner: str, writable: bool = True) -> Lease:
        """Map device memory (option ROM, video memory) for a long time.

        The lease gets a mapping of just its pages, which an invalidation leaves alone.

        Args:
            address: guest-physical, in bytes; need not be page-aligned.
            length: in bytes, at least 1.
            owner: the holder's name, for reports.
            writable: map for writing too.

        Raises:
            XenMapCacheError: as :meth:`map_dma`.
        """
        return self._parts.leasing.lease(_DEVICE, address, length, owner, None, writable)

    def map_dma(
        self,
        address: int,
        length: int,
        *,
        owner: str,
        direction: DmaDirection | str = DmaDirection.BIDIRECTIONAL,
    ) -> Lease:
        """Map guest memory for a transfer. Release it as soon as the transfer is done.

        A range inside one bucket shares the bucket's mapping; one that crosses a
        bucket's edge gets a mapping of its own. So do pages that the guest has granted, whose
        addresses have bit 63 set, if the cache was given ``grants``. Such a lease is released
        before the guest is told that the transfer is done. An invalidation does not concern it,
        and after the release a view of it shows zeros.

        If invalidations come faster than pages can be mapped, the lease is stale from the start
        after three attempts. Then a WARNING is logged; ``on_stale="raise"`` raises LeaseError.

        Args:
            address: guest-physical, in bytes; need not be page-aligned.
            length: in bytes, at least 1.
            owner: the holder's name, for reports.
            direction: which way the data goes: a DmaDirection or its text, as ``"to-device"``.
                TO_DEVICE gives a read-only view.

        Raises:
            FaultError: a page of the range is missing; EmptyRangeError for a length of 0;
                GrantError if the guest has not granted a page, or not for that direction.
            TypeError, ValueError: an argument has the wrong type, or is negative.
            UnsupportedOperationError: to be written, but the source is read-only.
            XenCallError: mapping failed as a whole.
            CacheFullError: longer than ``max_lease``, or no room under ``max_resident``, or under
                the bounds of the grants.
            LeaseError: stale from the start, with ``on_stale="raise"``.
            ClosedError: the cache or backend is closed.
        """
        way = direction if type(direction) is DmaDirection else as_direction(direction)
        return self._parts.leasing.lease(_DMA, address, length, owner, way, way is not _TO_DEVICE)

    def window(
        self,
        address: int = 0,
        length: int | None = None,
        *,
        holes: Holes = "zero",
        owner: str = "MapCache.window",
    ) -> Lease:
        """Lease one flat, read-only view of a range, holes included: for whatever takes a buffer.

            with cache.window() as window:
                digest = hashlib.sha256(window.view).hexdigest()

        Pages are mapped one by one into one piece of address space, where the source can do that;
        others are copied. :meth:`Backend.copied_pages` tells how many. What is mapped, holes
        included, counts under ``max_resident`` until the release and until the last view of it is
        gone; copies count under ``max_copies``.

        The window shows the pages that the guest had when it was taken. After an invalidation it is
        stale: for what the guest has given up or got since, it shows the old pages, or zeros.
        Nothing of it can be lost, so no WARNING is logged; release it and take another one. On live
        Xen, pages that a window shows are not given back to Xen.

        Args:
            address: guest-physical, in bytes; need not be page-aligned.
            length: in bytes, at least 1; by default up to the end of memory.
            holes: what becomes of pages that are not there: with ``"zero"`` they read as zeros,
                with ``"raise"`` there must be none.
            owner: the holder's name, for reports.

        Raises:
            FaultError: a page is missing, with ``holes="raise"``; the range ends beyond 52 bits;
                EmptyRangeError if it is empty.
            TypeError, ValueError: an argument is wrong, or the source does not know its end and no
                length is given.
            XenCallError: mapping failed as a whole, or was refused for a page.
            CorruptImageError: the file has changed since it was opened.
            CacheFullError: longer than ``max_resident`` or ``max_lease``, or no room under
                ``max_resident`` or ``max_copies``.
            ClosedError: the cache or backend is closed.
        """
        return self._parts.windows.window(address, length, holes, owner)

    def replace(self, old_address: int, new_address: int, length: int) -> None:
        """Let a device lease show another guest range at the same host address.

        The pages of the old range, if they could be written, are reported as dirty. If only
        that fails (XenCallError), the lease has moved; its ``address`` shows it.

        Args:
            old_address: where the lease is now; with ``length`` it names the lease.
            new_address: guest-physical, at the same offset in its page.
            length: of the lease, in bytes.

        Raises:
            LeaseError: there is no such device lease.
            ValueError: the offsets in the page differ, or an argument is negative.
            FaultError: a page of the new range is missing; nothing has changed.
            UnsupportedOperationError: the source cannot do it.
            CacheFullError: no room under ``max_resident`` for a second mapping of the range, which
                Xen's libraries need in between; nothing has changed.
            XenCallError: it failed and nothing has changed; MappingLostError if the old
                memory is gone too: the lease is then stale and its view shows zeros.
            KeyboardInterrupt: the lease is stale, as it is unknown how far the move came.
        """
        self._parts.mover.replace(old_address, new_address, length)

    def resolve(self, host_address: int) -> int:
        """Return the guest address of a host address that lies in a held lease.

        Args:
            host_address: anywhere in the lease. Looks through all leases.

        Raises:
            LeaseError: no held lease covers it.
        """
        return self._parts.registry.resolve(host_address)

    def leases(self) -> tuple[LeaseInfo, ...]:
        """Return what is known of each held lease, oldest first. Works after close too."""
        return self._parts.registry.infos()

    def mark_leases_dirty(self) -> int:
        """Report the pages of all leases that can be written as written, and return how many.

        A release reports them too, but until then a device may write, and no migration
        sees it. Call it each time the toolstack is about to collect dirty pages.

        Returns:
            How many leases were reported: 0 if the backend does not track dirty pages.

        Raises:
            XenCallError: the report failed; call it again.
            ClosedError: the cache or backend is closed.
        """
        parts = self._parts
        parts.table.check_open()
        parts.dirty.settle()
        reported = sum(map(parts.registry.mark_dirty, parts.registry.held()))
        parts.table.stream.deliver()
        return reported
