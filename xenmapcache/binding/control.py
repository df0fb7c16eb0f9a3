"""libxenctrl: its legacy foreign mapping, for hosts whose tools still use it, and a guest's size.

Follows ``xenctrl.h`` and ``xenctrl_compat.h``.
"""

from __future__ import annotations

from array import array

from .declarations import CONTROL
from .handle import Handle, positive_errors, unwritten_errors

MAP_BULK = "xc_map_foreign_bulk"
MAXIMUM_GPFN = "xc_domain_maximum_gpfn"


class Control(Handle):
    """An ``xc_interface``; see :class:`.handle.Handle` for arguments and errors."""

    declared = CONTROL
    open_call = "xc_interface_open"
    close_call = "xc_interface_close"
    required = (MAP_BULK,)

    def _open(self) -> tuple[int, int]:
        return self._functions[self.open_call](self._log.pointer, self._log.pointer, 0)

    def map(
        self, domid: int, prot: int, gfns: array[int], *, left: list[int] | None = None
    ) -> tuple[int, bytes | None]:
        """Map pages of a domain; the caller unmaps them with ``munmap``.

        Args:
            domid: the domain.
            prot: PROT_ flags.
            gfns: an ``array("Q")`` of frame numbers.
            left: where the host address is left, for a caller who is interrupted.

        Returns:
            The host address, and one errno a page (0: valid) or None if all are valid.

        Raises:
            XenCallError: the call failed as a whole.
        """
        errors = unwritten_errors(len(gfns))
        # Mind the order: frames, errors, count.
        result, errno = self.call(MAP_BULK, domid, prot, gfns, errors, len(gfns), left=left)
        if not result:
            raise self.fail(MAP_BULK, domid, errno)
        return result, positive_errors(errors)

    def maximum_gfn(self, domid: int) -> int:
        """Return the highest guest frame number that a domain has had.

        Raises:
            XenCallError: the call failed.
            UnsupportedOperationError: this build of the library does not have it.
        """
        gfn = array("Q", [0])
        self.check(MAXIMUM_GPFN, domid, domid, gfn)
        return gfn[0]
