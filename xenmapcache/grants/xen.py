"""The grants of a live domain."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from functools import partial

from ..address import PAGE_SHIFT
from ..binding import libc
from ..binding.granttable import COPY, GrantTable
from ..errors import ClosedError
from ..logs import safely
from .address import Part
from .source import MAX_MAPPED, MAX_REFS, GrantSource, Held

logger = logging.getLogger("xenmapcache")


class XenGrants(GrantSource):
    """The grants of a live domain, through libxengnttab and Linux's ``/dev/xen/gntdev``.

    Args:
        domid: the guest.
        max_refs: as of :class:`GrantSource`.
        max_mapped: likewise.
        binding: ``"cffi"`` or ``"ctypes"``; None takes cffi if it is there.
        library: a SONAME or path instead of ``libxengnttab.so.1``.

    Raises:
        BackendUnavailableError: no library, no Xen, or no permission.

    If a guest's page is paged out, the library waits for it without end.
    """

    copy_call = COPY

    def __init__(
        self,
        domid: int,
        *,
        max_refs: int = MAX_REFS,
        max_mapped: int = MAX_MAPPED,
        binding: str | None = None,
        library: str | None = None,
    ) -> None:
        super().__init__(domid, max_refs=max_refs, max_mapped=max_mapped)
        self._table = GrantTable(binding=binding, library=library)

    def _map(self, refs: array[int], writable: bool, result_out: list[int]) -> int:
        prot = libc.protection(writable)
        return self._table.map(self.domid, refs, prot, result_out=result_out)

    def _index(self, address: int) -> int:
        return self._table.index(address)

    def _unmap(self, address: int, held: Held) -> None:
        try:
            self._table.unmap(address, held.count)
        except ClosedError:  # by another thread; the kernel takes the grants back with the memory
            libc.unmap(address, held.count << PAGE_SHIFT)
        self._held.pop(held, None)

    def _give_back(self, held: Held) -> None:
        done = partial(self._held.pop, held, None)
        try:
            known = self._table.give_back(held.index, held.count, held.token, done)
        except ClosedError:  # the kernel takes the grants back, as their memory has gone
            known = True
            done()
        if not known:
            text = "domain %d: %s: given back by other code"
            safely(logger.warning, text, self.domid, held)

    def _copy(self, parts: Sequence[Part], buffer: bytearray, to_guest: bool) -> list[int]:
        return self._table.copy(self.domid, parts, buffer, to_guest=to_guest)

    def _close(self) -> None:
        self._table.close()
