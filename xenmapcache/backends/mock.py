"""The backend of a mock guest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from operator import ne
from typing import ClassVar

from ..address import PAGE_SIZE, page_runs
from ..backend import Backend, Capability
from ..errors import ClosedError
from ..grants import MAX_MAPPED, MAX_REFS
from ..mapping import Mapping, PageErrors
from ..mock import MockDomain, MockHypervisor
from ..mock.grants import MockGrants


class MockBackend(Backend):
    """The backend ``"mock"``.

    Args:
        domain: a guest of a :class:`MockHypervisor`. Give either this or ``memory``.
        memory: the size of a guest that is made for this backend.

    Attributes:
        domain: the guest.
        domid: its number.
        log_dirty: whether written pages are noted in ``domain.dirty_gfns``.

    Raises:
        TypeError: neither was given, or both.
        ValueError: no guest has such a size.
    """

    name: ClassVar[str] = "mock"
    capabilities = Capability.WRITE | Capability.REMAP | Capability.DIRTY

    def __init__(
        self, *, domain: MockDomain | None = None, memory: int | str | None = None
    ) -> None:
        if (domain is None) == (memory is None):
            raise TypeError("the backend 'mock' needs either domain= or memory=")
        if domain is None:
            assert memory is not None  # noqa: S101 - or the line above had raised
            domain = MockHypervisor().create_domain(memory=memory)
        if not isinstance(domain, MockDomain):
            raise TypeError(f"domain must be a MockDomain, not {type(domain).__name__}")
        self.domain = domain
        self.domid = domain.domid
        self.log_dirty = True
        self._pid = os.getpid()
        self._closed = False
        self._paused = False
        self._tracked: tuple[int, list[bytes | None]] = (0, [])

    def __repr__(self) -> str:
        return f"<MockBackend of {self.domain!r}>"

    @property
    def memory_end(self) -> int:  # type: ignore[override] # it grows
        """One past the highest guest address that can be there, in bytes."""
        return self.domain.memory_end

    def present(self, gfn: int, count: int) -> Iterator[tuple[int, int]] | None:
        """Return the runs of pages that exist in a range; see :meth:`Backend.present`.

        None while faults are injected, or while the domain is of a kind or in a state in which
        pages cannot be mapped, because only mapping shows it then.
        """
        self._check_open()
        return self.domain.present(gfn, count)

    def extents(self, gfn: int, count: int) -> Iterator[tuple[int, int]]:
        """Return where in a range pages may be, also while faults are injected; see `Backend`."""
        self._check_open()
        return self.domain.extents(gfn, count)

    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        """Map guest pages; see :meth:`Backend.map`."""
        self._check_open()
        return self.domain.map(gfn, count, writable)

    def copied_pages(self, gfn: int, count: int) -> int:  # noqa: ARG002 - a contract
        """Return 0: all pages of a window are mapped."""
        return 0

    def map_into(self, mapping: Mapping, gfn: int, count: int) -> PageErrors | None:
        """Map guest pages over a part of a window; see :meth:`Backend.map_into`."""
        self._check_open()
        return self.domain.map_into(mapping, gfn, count)

    def remap(self, mapping: Mapping, gfn: int) -> None:
        """Let a mapping show other pages; see :meth:`Backend.remap`."""
        self._check_open()
        self.domain.remap(mapping, gfn)

    def mark_dirty(self, gfn: int, count: int) -> None:
        """Note written pages in ``domain.dirty_gfns`` if ``log_dirty``; see :class:`Backend`."""
        if self._closed:  # as the libraries' handles refuse it
            raise ClosedError("this mock backend is closed")
        if self.log_dirty:
            self.domain.mark_dirty(gfn, count)

    def track_dirty_vram(self, gfn: int, count: int) -> list[tuple[int, int]]:
        """Return which pages have changed; see :meth:`Backend.track_dirty_vram`.

        Other than Xen, it compares what the pages hold.
        """
        self._check_open()
        mapping = self.domain.map(gfn, count, writable=False) if count else None
        pages = [
            mapping.memory[at : at + PAGE_SIZE] if mapping and mapping.valid(at, 1) else None
            for at in range(0, count * PAGE_SIZE, PAGE_SIZE)
        ]
        (first, before), self._tracked = self._tracked, (gfn, pages)
        if (first, len(before)) != (gfn, count):
            return page_runs(gfn, [True] * count)
        return page_runs(gfn, map(ne, pages, before))

    def pause(self) -> None:
        """Pause the guest unless it is paused; see :meth:`Backend.pause`."""
        self._check_open()
        if "paused" not in self.domain.gate.reasons:
            self._paused = True
            self.domain.pause()

    def unpause(self) -> None:
        """Undo :meth:`pause`; see :meth:`Backend.unpause`."""
        if self._paused:
            self.domain.unpause()
            self._paused = False

    def open_grants(self, *, max_refs: int = MAX_REFS, max_mapped: int = MAX_MAPPED) -> MockGrants:
        """Open the pages that the guest has granted; see :meth:`Backend.open_grants`."""
        self._check_open()
        return MockGrants(self.domain.grants, max_refs=max_refs, max_mapped=max_mapped)

    def has_ended(self) -> bool:
        """Tell whether the guest was destroyed; see :meth:`Backend.has_ended`."""
        return self.domain.state in ("dying", "gone")

    def close(self) -> None:
        """Refuse further map calls; see :meth:`Backend.close`."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this mock backend is closed")
        if os.getpid() != self._pid:
            raise ClosedError(
                f"this mock backend belongs to process {self._pid}, which forked this one"
            )
