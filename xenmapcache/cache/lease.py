"""Lease: the handle of guest memory that stays mapped until it is released."""

from __future__ import annotations

from typing import NoReturn, Self

from ..address import as_int
from ..errors import LeaseError
from ..mapping import FREE_THREADED
from .info import DmaDirection, LeaseKind
from .record import LeaseRecord
from .registry import LeaseRegistry


class Lease:
    """Guest memory that stays mapped until it is released. Also a context manager.

    Take one from :meth:`MapCache.map_device`, :meth:`MapCache.map_dma` or
    :meth:`MapCache.window`. The cache keeps it: a lease whose handle is dropped without a
    release stays in ``leases()``, with its owner and age, and keeps its memory.

    Synchronization: any thread may release it, finalizers too; exactly one release
    succeeds. The bytes themselves are shared with the guest.
    """

    __slots__ = ("_record", "_registry")

    def __init__(self, record: LeaseRecord, registry: LeaseRegistry) -> None:
        self._record = record
        self._registry = registry

    def __repr__(self) -> str:
        state = "released " if self.released else "stale " if self.stale else ""
        return f"<{state}{self._name()}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Lease cannot be copied or pickled; take another one from the cache")

    def _name(self) -> str:
        return str(self._record.info(self._registry.table.generation.sequence))

    @property
    def id(self) -> int:
        """Unique in the process, never used again."""
        return self._record.id

    @property
    def kind(self) -> LeaseKind:
        """DEVICE, DMA or WINDOW."""
        return self._record.kind

    @property
    def address(self) -> int:
        """Guest-physical, in bytes; :meth:`MapCache.replace` changes it."""
        return self._record.address

    @property
    def length(self) -> int:
        """In bytes; the range is half-open."""
        return self._record.length

    @property
    def owner(self) -> str:
        """The name that was given when the lease was taken."""
        return self._record.owner

    @property
    def direction(self) -> DmaDirection | None:
        """Which way the data of a DMA lease goes, or None."""
        return self._record.direction

    @property
    def view(self) -> memoryview:
        """The bytes; read-only for TO_DEVICE and for memory that was not mapped for writing.

        It stays safe, whatever becomes of lease, cache and guest. (Leave its
        ``obj`` alone: that is the complete mapping, unguarded.)

        Raises:
            LeaseError: the lease was released, or MappingLostError has said that its
                address belongs to another thread.
            ClosedError: this process was forked from the one that took the lease.
        """
        record = self._record
        view = record.view
        if view is None:
            raise LeaseError(f"{self._name()} was released")
        if self._registry.table.forked:
            self._registry.table.check_open()
        mapping = record.mapping
        if record.lost and mapping is not None and mapping.abandoned:
            raise LeaseError(f"the memory of {self._name()} was lost")
        if record.views is not None and mapping is not None:
            return record.views.make(mapping, record.host_address, record.length, view.readonly)
        if not FREE_THREADED or mapping is None:
            return view[:]  # one of the caller's own, which may be released
        start = record.host_address - mapping.address
        own = mapping.bytes[start : start + record.length]
        return own.toreadonly() if view.readonly else own

    @property
    def host_address(self) -> int:
        """Where the first byte is in this process.

        Raises:
            LeaseError: the lease was released.
        """
        if self._record.mapping is None:
            raise LeaseError(f"{self._name()} was released")
        return self._record.host_address

    @property
    def stale(self) -> bool:
        """Whether an invalidation passed while it was held (not DEVICE), or its memory was lost."""
        record = self._record
        ended = record.released_at
        return record.stale_at(self._registry.table.generation.sequence if ended is None else ended)

    @property
    def released(self) -> bool:
        """Whether it was released."""
        return self._record.view is None

    def release(self, *, written: int | None = None) -> None:
        """Give the memory back. DMA that wrote is marked dirty first.

        Args:
            written: how many bytes, from the first one on, may have been written: only their
                pages are marked dirty, and copied by ``"copy"``. None if all may have been.

        A DMA lease that went stale is reported, as the cache's ``on_stale`` says:

        - ``"warn"``: a WARNING is logged;
        - ``"raise"``: LeaseError; the lease is released all the same;
        - ``"copy"``: what the device wrote is copied to the pages that the guest has now
          (and a WARNING is logged of a TO_DEVICE lease: what was read cannot be repaired).

        If a signal handler raises during a release, the lease is still held, or the release is
        complete. ``released`` shows which, and a second release completes the first.

        Raises:
            ValueError: ``written`` is negative, or more than the lease has.
            LeaseError: it was released before, or is stale where that is refused. With
                ``strict_views``: a view is in use; the lease is still held, and can be released
                when the view is gone.
            FaultError: ``"copy"`` found pages that the guest gave up and did not get
                back; the others were copied, and the lease is released. XenCallError with an
                ``address`` if such a page was refused.
            XenCallError, ClosedError: Xen failed, or the backend is closed; the lease is still
                held, and can be released again.
        """
        if written is not None:
            written = as_int("written", written)
            if not 0 <= written <= self.length:
                raise ValueError(
                    f"written must be 0 to {self.length}, the bytes of {self._name()}, "
                    f"not {written}"
                )
        self._registry.release(self._record, written=written)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if not self.released:
            # An exception on its way out has frames, which may use views rightly.
            self._registry.release(self._record, strict=error is None)
