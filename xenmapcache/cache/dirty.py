"""Reports of written pages to the backend, which an interrupt can delay but not lose."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic_ns as _monotonic_ns
from typing import cast

from ..address import PAGE_SHIFT
from ..backend import Backend, Capability
from ..errors import XenMapCacheError
from ..events import WALL_CLOCK_OFFSET_NS, PagesDirtied
from ..stream import EventStream

# As its class makes it, in a third of the time; it comes with each release.
_make_dirtied = cast(
    Callable[[tuple[object, ...]], PagesDirtied], partial(tuple.__new__, PagesDirtied)
)


class DirtyPages:
    """Reports written pages to a backend, if it wants to know.

    A caller that is interrupted between its write and its report appends to ``owed``, which is
    one call into C and runs to its end, and then calls :meth:`settle_quietly`.

    Attributes:
        backend: the source.
        mark: the backend's ``mark_dirty``, or None if the backend does not track dirty pages.
        owed: ``(gfn, count)`` of pages whose report was interrupted.

    Synchronization: any thread, without a lock. A report may come twice.
    """

    __slots__ = ("backend", "mark", "owed", "stream")

    def __init__(self, backend: Backend, stream: EventStream) -> None:
        self.stream = stream
        self.backend = backend
        self.mark = backend.mark_dirty if Capability.DIRTY in backend.capabilities else None
        self.owed: deque[tuple[int, int]] = deque()

    def report(self, gfn: int, count: int) -> None:
        """Report pages now; only if ``mark`` is not None."""
        self.backend.mark_dirty(gfn, count)
        if self.stream.observations:
            self.tell(gfn, count)

    def tell(self, gfn: int, count: int) -> None:
        """Tell the observers of pages that were reported."""
        values = _monotonic_ns() + WALL_CLOCK_OFFSET_NS, gfn << PAGE_SHIFT, count << PAGE_SHIFT
        shortcut = self.stream.shortcut
        if shortcut is None or not shortcut.dirtied(values):
            self.stream.put(_make_dirtied(values))

    def report_hot(self, gfn: int, count: int) -> None:
        """Report pages of a hot bucket, and deliver: no operation is under way that would."""
        self.report(gfn, count)
        self.stream.deliver()

    def observe(self) -> None:
        """Have reports told, from now on. Until then a report is a call of the backend alone."""
        if self.mark is not None:
            self.mark = self.report

    def settle(self) -> None:
        """Report the pages that are still owed.

        Raises:
            XenMapCacheError: as the backend; what was not reported stays owed.
        """
        for pages in tuple(self.owed):
            if self.mark is not None:
                self.report(*pages)
            with contextlib.suppress(ValueError):  # another thread has reported them too
                self.owed.remove(pages)

    def settle_quietly(self) -> None:
        """Report the pages that are still owed; if the backend fails, they stay owed."""
        with contextlib.suppress(XenMapCacheError):
            self.settle()
