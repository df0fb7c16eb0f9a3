"""The backend of a live domain through libxenforeignmemory."""

from __future__ import annotations

import errno as _errno
from array import array
from typing import ClassVar

from ..backend import Capability
from ..binding import libc
from ..binding.foreignmemory import MAP2, ForeignMemory
from ..errors import MappingLostError, UnsupportedOperationError, XenCallError
from ..mapping import Mapping
from .domain import DomainBackend, check_domid


class XenBackend(DomainBackend):
    """The backend ``"xen"``; for root in Dom0.

    Args:
        domid: the domain's number (``xl domid NAME``).
        binding: ``"cffi"`` or ``"ctypes"``; None takes cffi if it is there.
        library: a SONAME or path instead of ``libxenforeignmemory.so.1``.

    Raises:
        BackendUnavailableError: no library, no Xen, or no permission.
        XenCallError: there is no such domain.
        ValueError, TypeError: that is no domain's number.
    """

    name: ClassVar[str] = "xen"
    map_call = MAP2

    def __init__(
        self, *, domid: int, binding: str | None = None, library: str | None = None
    ) -> None:
        domid = check_domid(domid)
        self._memory = ForeignMemory(binding=binding, library=library)
        if self._memory.supports(MAP2):
            self.capabilities = Capability.WRITE | Capability.REMAP
        super().__init__(self._memory, domid)

    def _map_pages(self, prot: int, gfns: array[int], left: list[int]) -> tuple[int, bytes | None]:
        return self._memory.map(self.domid, prot, gfns, left=left)

    def remap(self, mapping: Mapping, gfn: int) -> None:
        """Let a mapping show other pages; see :meth:`Backend.remap`.

        Follows ``xenforeignmemory_map2`` with MAP_FIXED, which must cover the whole
        mapping, and which may lose the old one when it fails. So the new pages are
        mapped elsewhere first.
        """
        if Capability.REMAP not in self.capabilities:
            raise UnsupportedOperationError(
                f"{self.library} has no {MAP2}: Xen 4.10 and newer can move a mapping"
            )
        self.map(gfn, mapping.count, writable=mapping.writable).view(0, mapping.length)
        prot = libc.protection(mapping.writable)
        gfns = array("Q", range(gfn, gfn + mapping.count))
        file = libc.file_at(mapping.address)
        fixed = libc.MAP_FIXED
        left: list[int] = []
        try:
            address, errors = self._memory.map(
                self.domid, prot, gfns, address=mapping.address, flags=fixed, left=left
            )
        except XenCallError as error:
            if libc.cover(mapping.address, mapping.length):
                raise MappingLostError(MAP2, self.domid, error.errno, error.hint) from error
            if libc.file_at(mapping.address) != file:
                mapping.abandon()
                hint = f"{error.hint}; another thread has its address now: use no view of it"
                raise MappingLostError(MAP2, self.domid, error.errno, hint) from error
            raise
        except BaseException:
            # Interrupted when Xen had mapped, so nobody has looked at the pages' errnos.
            if left == [mapping.address]:
                libc.cover(mapping.address, mapping.length, replace=True)
            raise
        if address != mapping.address:
            libc.unmap(address, mapping.length)
            hint = f"it ignored the address {mapping.address:#x}"
            raise XenCallError(MAP2, self.domid, _errno.EIO, hint)
        if errors is not None:
            # The guest gave a page up just now. A view must never meet it.
            libc.cover(mapping.address, mapping.length, replace=True)
            raise MappingLostError(MAP2, self.domid, max(errors), "a page vanished meanwhile")
