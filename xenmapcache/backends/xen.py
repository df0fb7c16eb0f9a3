"""The backend of a live domain through libxenforeignmemory."""

from __future__ import annotations

import errno as _errno
from array import array
from functools import partial
from itertools import groupby
from typing import ClassVar

from .. import flat
from ..address import PAGE_SHIFT
from ..backend import Capability
from ..binding import libc
from ..binding.foreignmemory import MAP2, ForeignMemory
from ..errors import MappingLostError, UnsupportedOperationError, XenCallError
from ..mapping import Mapping, PageErrors
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
        ValueError, TypeError: the number is not a domain's.
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

    def _map_pages(
        self, prot: int, gfns: array[int], result_out: list[int]
    ) -> tuple[int, bytes | None]:
        return self._memory.map(self.domid, prot, gfns, result_out=result_out)

    def copied_pages(self, gfn: int, count: int) -> int:
        """Return how many pages a window copies; see :meth:`Backend.copied_pages`."""
        return 0 if self._memory.supports(MAP2) else super().copied_pages(gfn, count)

    def map_into(self, mapping: Mapping, gfn: int, count: int) -> PageErrors | None:
        """Map guest pages over a part of a window; see :meth:`Backend.map_into`.

        Follows ``xenforeignmemory_map2`` with MAP_FIXED. No single page of a foreign mapping can
        be replaced. So where pages are not there, the runs of the others are mapped one by one.
        """
        if not self._memory.supports(MAP2):
            return super().map_into(mapping, gfn, count)
        found = bytearray(count)
        remaining = [(0, count)]
        while remaining:
            first, pages = remaining.pop()
            errors = self._map_at(mapping, gfn + first, pages)
            if errors is None:
                continue
            found[first : first + pages] = errors
            flat.clear(mapping, gfn + first - mapping.gfn << PAGE_SHIFT, pages << PAGE_SHIFT)
            for bad, group in groupby(errors, bool):
                pages = len(list(group))
                if not bad:
                    remaining.append((first, pages))
                first += pages
        if found.count(_errno.ESRCH) == count:
            raise self._no_domain()
        return PageErrors(bytes(found), MAP2, self.domid) if any(found) else None

    def _map_at(self, mapping: Mapping, gfn: int, count: int) -> bytes | None:
        """Map pages over a part of a window; return their errnos, or None if all are there."""
        gfns = array("Q", range(gfn, gfn + count))
        errors: list[bytes | None] = []
        call = partial(self._call_map2, gfns, errors)
        flat.place(mapping, gfn - mapping.gfn << PAGE_SHIFT, count << PAGE_SHIFT, call)
        return errors[0]

    def _call_map2(
        self,
        gfns: array[int],
        errors_out: list[bytes | None],
        address: int,
        result_out: list[int],
    ) -> None:
        flags = libc.MAP_FIXED
        mapped, errors = self._memory.map(
            self.domid, libc.PROT_READ, gfns, address=address, flags=flags, result_out=result_out
        )
        if mapped != address:
            libc.munmap(mapped, len(gfns) << PAGE_SHIFT)
            hint = f"it ignored the address {address:#x}"
            raise XenCallError(MAP2, self.domid, _errno.EIO, hint)
        errors_out.append(errors)

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
        result_out: list[int] = []
        safe = False  # whether all pages at the mapping's address may be touched
        try:
            address, errors = self._memory.map(
                self.domid, prot, gfns, address=mapping.address, flags=fixed, result_out=result_out
            )
            safe = errors is None or address != mapping.address
        except XenCallError as error:
            if libc.map_zeros_over(mapping.address, mapping.length):
                raise MappingLostError(MAP2, self.domid, error.errno, error.hint) from error
            if libc.file_at(mapping.address) != file:
                mapping.abandon()
                hint = f"{error.hint}; another thread has its address now: use no view of it"
                raise MappingLostError(MAP2, self.domid, error.errno, hint) from error
            raise
        finally:
            if not safe and result_out:
                # The guest gave a page up just now, or an interrupt came before the pages' errnos
                # were looked at, or before a lost mapping was replaced. Views must meet zeros.
                # One call of a C function: no signal handler comes first.
                shown = result_out[-1] == mapping.address
                flags = libc.PRIVATE_ZEROS | (fixed if shown else libc.MAP_FIXED_NOREPLACE)
                libc.mmap(mapping.address, mapping.length, libc.READ_WRITE, flags, -1, 0)
        if address != mapping.address:
            libc.unmap(address, mapping.length)
            hint = f"it ignored the address {mapping.address:#x}"
            raise XenCallError(MAP2, self.domid, _errno.EIO, hint)
        if errors is not None:
            raise MappingLostError(MAP2, self.domid, max(errors), "a page vanished during the move")
