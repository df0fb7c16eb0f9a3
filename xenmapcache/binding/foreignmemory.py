"""libxenforeignmemory, checked: failed calls raise, addresses are ints.

Follows ``xenforeignmemory.h``, VERS_1.0 to 1.4.
"""

from __future__ import annotations

from array import array

from .declarations import FOREIGN_MEMORY
from .handle import Handle, positive_errors, unwritten_errors

MAP, MAP2 = "xenforeignmemory_map", "xenforeignmemory_map2"


class ForeignMemory(Handle):
    """A ``xenforeignmemory_handle``; see :class:`.handle.Handle` for arguments and errors."""

    declared = FOREIGN_MEMORY
    open_call = "xenforeignmemory_open"
    close_call = "xenforeignmemory_close"
    required = (MAP,)

    def map(
        self,
        domid: int,
        prot: int,
        gfns: array[int],
        *,
        address: int | None = None,
        flags: int = 0,
        result_out: list[int] | None = None,
    ) -> tuple[int, bytes | None]:
        """Map pages of a domain, by ``map2``, or by ``map`` where the library is older.

        Args:
            domid: the domain.
            prot: PROT_ flags.
            gfns: an ``array("Q")`` of frame numbers.
            address: where; a hint unless MAP_FIXED is in ``flags``.
            flags: further mmap flags.
            result_out: a list that gets the host address, for a caller that is interrupted.

        Returns:
            The host address, and one errno a page (0: valid) or None if all are valid.
            A page whose errno is not 0 must never be touched.

        Raises:
            XenCallError: the call failed as a whole. With MAP_FIXED, what was at
                ``address`` may be gone.
            UnsupportedOperationError: an address was given and ``map2`` is missing.
        """
        errors = unwritten_errors(len(gfns))
        if self.supports(MAP2) or address is not None or flags:
            name = MAP2
            arguments = (domid, address, prot, flags, len(gfns), gfns, errors)
            result, errno = self.call(MAP2, *arguments, result_out=result_out)
        else:
            name = MAP
            result, errno = self.call(
                MAP, domid, prot, len(gfns), gfns, errors, result_out=result_out
            )
        if not result:
            raise self.fail(name, domid, errno)
        return result, positive_errors(errors)

    def unmap(self, address: int, pages: int) -> None:
        """Unmap a whole mapping.

        Raises:
            XenCallError: it failed, and changed nothing.
        """
        self.check("xenforeignmemory_unmap", None, address, pages)

    def restrict(self, domid: int) -> None:
        """Give up this handle's rights to any domain but one.

        Raises:
            XenCallError: it failed.
            UnsupportedOperationError: the library is older than VERS_1.1.
        """
        self.check("xenforeignmemory_restrict", domid, domid)

    def map_resource(
        self, domid: int, kind: int, identifier: int, frame: int, frames: int, prot: int
    ) -> tuple[int, int]:
        """Map a resource of a domain, such as an ioreq server's pages, which are not guest memory.

        Returns:
            The resource handle for :meth:`unmap_resource`, and the host address.

        Raises:
            XenCallError: it failed.
            UnsupportedOperationError: the library is older than VERS_1.3.
        """
        name = "xenforeignmemory_map_resource"
        address = array("Q", [0])
        handle, errno = self.call(name, domid, kind, identifier, frame, frames, address, prot, 0)
        if not handle:
            raise self.fail(name, domid, errno)
        return handle, address[0]

    def unmap_resource(self, resource: int) -> None:
        """Unmap what :meth:`map_resource` mapped.

        Raises:
            XenCallError: it failed.
        """
        self.check("xenforeignmemory_unmap_resource", None, resource)

    def resource_size(self, domid: int, kind: int, identifier: int) -> int:
        """Return the size of a resource in bytes.

        Raises:
            XenCallError: it failed.
            UnsupportedOperationError: the library is older than VERS_1.4.
        """
        size = array("Q", [0])
        self.check("xenforeignmemory_resource_size", domid, domid, kind, identifier, size)
        return size[0]
