"""MockImage: a guest's memory as ``xl save`` sends it, page after page."""

from __future__ import annotations

import errno as _errno
from collections.abc import Iterable, Iterator
from typing import Any

from ..address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, as_int, check_range, page_span
from ..errors import FaultError
from .p2m import P2m

_ZEROS = bytes(PAGE_SIZE)


class MockImage:
    """The image of a suspended guest. Made by :meth:`.MockDomain.suspend`.

    Xen's toolstack copies a page at the moment at which the page is sent. A device model that still
    writes then makes an image whose pages are of different moments, as on Xen.

    Attributes:
        kind: the guest's type, machine and number of vCPUs, as ``create_domain`` takes them.
        end: one past the highest gfn that can be there.
        pages: what was sent: each page's content, by gfn.
    """

    def __init__(self, p2m: P2m, dirty_gfns: set[int], kind: dict[str, Any]) -> None:
        self.kind = kind
        self.end = p2m.end
        self.pages: dict[int, bytes] = {}
        self._p2m = p2m
        self._dirty_gfns = dirty_gfns
        self._remaining = self._present()
        self._complete = False

    def _present(self) -> Iterator[int]:
        for gfn, _, count in self._p2m.runs(0, self.end):
            yield from range(gfn, gfn + count)

    @property
    def complete(self) -> bool:
        """Whether every page has been sent."""
        return self._complete

    def send(self, pages: int | None = None) -> int:
        """Copy the next pages, as they are at this moment.

        Args:
            pages: how many; None for all that remain.

        Returns:
            How many pages were copied.
        """
        limit = -1 if pages is None else as_int("pages", pages)
        copied = 0
        while copied != limit:
            gfn = next(self._remaining, None)
            if gfn is None:
                self._complete = True
                break
            copied += self._copy([gfn])
        return copied

    def send_dirty(self) -> int:
        """Copy again each page that was sent, and has been reported as written since.

        This is a round of log-dirty mode, which Xen uses for live migration. ``xl save`` has no
        such round: it sends each page once.

        Returns:
            How many pages were copied.
        """
        dirty = sorted(self._dirty_gfns & self.pages.keys())
        self._dirty_gfns.difference_update(dirty)
        return self._copy(dirty)

    def _copy(self, gfns: Iterable[int]) -> int:
        copied = 0
        for gfn in gfns:
            content = self._p2m.read(gfn << PAGE_SHIFT, PAGE_SIZE)
            self.pages[gfn] = _ZEROS if content == _ZEROS else content
            copied += 1
        return copied

    def read(self, address: int, length: int) -> bytes:
        """Return what the image holds.

        Raises:
            FaultError: a page was not sent.
        """
        address, length = check_range(address, length, empty=True)
        gfn, count = page_span(address, length)
        for page in range(gfn, gfn + count):
            if page not in self.pages:
                start = max(address, page << PAGE_SHIFT)
                raise FaultError(start, address + length - start, _errno.EINVAL)
        content = b"".join(self.pages[page] for page in range(gfn, gfn + count))
        return content[address & PAGE_MASK :][:length]
