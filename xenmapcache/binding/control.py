"""libxenctrl: its legacy foreign mapping, for hosts whose tools still use it; a guest's state.

Follows ``xenctrl.h`` and ``xenctrl_compat.h``.
"""

from __future__ import annotations

import errno as _errno
import struct
from array import array
from typing import NamedTuple

from .declarations import CONTROL
from .handle import Handle, positive_errors, unwritten_errors

MAP_BULK = "xc_map_foreign_bulk"
MAXIMUM_GPFN = "xc_domain_maximum_gpfn"
GET_INFO_LIST = "xc_domain_getinfolist"
PAUSE, UNPAUSE = "xc_domain_pause", "xc_domain_unpause"
PFN_TYPES = "xc_get_pfn_type_batch"

# The head of struct xen_domctl_getdomaininfo, which is the same in every release: domid_t
# domain, uint16_t pad1, uint32_t flags, uint64_t tot_pages. What follows differs, and is smaller
# than the buffer.
_INFO_HEAD = struct.Struct("=HHIQ")
_INFO_BYTES = 4096
_DYING, _SHUTDOWN, _PAUSED = 1 << 0, 1 << 2, 1 << 3
_FIRST_BAD_TYPE = 0xD << 28  # XEN_DOMCTL_PFINFO_BROKEN; above are XALLOC and XTAB


class DomainState(NamedTuple):
    """What Xen says of a domain.

    Attributes:
        dying: it was destroyed, and lives until its last page is unmapped.
        shut_down: it has shut down, suspended or crashed.
        paused: the toolstack has paused it.
        pages: how many it has.
    """

    dying: bool
    shut_down: bool
    paused: bool
    pages: int


class Control(Handle):
    """An ``xc_interface``; see :class:`.handle.Handle` for arguments and errors."""

    declared = CONTROL
    open_call = "xc_interface_open"
    close_call = "xc_interface_close"
    required = (MAP_BULK,)

    def _open(self, result_out: list[int]) -> tuple[int, int]:
        log = self._log.pointer
        return self._functions[self.open_call](log, log, 0, result_out=result_out)

    def map(
        self, domid: int, prot: int, gfns: array[int], *, result_out: list[int] | None = None
    ) -> tuple[int, bytes | None]:
        """Map pages of a domain; the caller unmaps them with ``munmap``.

        Args:
            domid: the domain.
            prot: PROT_ flags.
            gfns: an ``array("Q")`` of frame numbers.
            result_out: a list that gets the host address, for a caller that is interrupted.

        Returns:
            The host address, and one errno a page (0: valid) or None if all are valid.

        Raises:
            XenCallError: the call failed as a whole.
        """
        errors = unwritten_errors(len(gfns))
        # Mind the order: frames, errors, count.
        result, errno = self.call(
            MAP_BULK, domid, prot, gfns, errors, len(gfns), result_out=result_out
        )
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

    def domain_state(self, domid: int) -> DomainState:
        """Return what Xen says of a domain.

        Raises:
            XenCallError: the call failed; ESRCH: there is no such domain.
            UnsupportedOperationError: this build of the library does not have it.
        """
        info = bytearray(_INFO_BYTES)
        found = self.check(GET_INFO_LIST, domid, domid, 1, info)
        number, _, flags, pages = _INFO_HEAD.unpack_from(info)
        if not found or number != domid:  # the next higher one that exists
            raise self.fail(GET_INFO_LIST, domid, _errno.ESRCH)
        dying, shut_down, paused = (bool(flags & bit) for bit in (_DYING, _SHUTDOWN, _PAUSED))
        return DomainState(dying, shut_down, paused, pages)

    def has_pages(self, domid: int, gfns: array[int]) -> bytes:
        """Tell which frames have a page of the domain's memory.

        Xen's own pages in a domain's address space do not belong to its memory: the shared info
        page and the frames of the grant table. :attr:`DomainState.pages` does not count them.

        Args:
            domid: the domain.
            gfns: an ``array("Q")`` of at most 1024 frame numbers, in any order.

        Returns:
            A byte for each frame, 1 or 0.

        Raises:
            XenCallError: the call failed; ENOSYS or EOPNOTSUPP: this Xen cannot tell (on Arm).
            UnsupportedOperationError: this build of the library does not have it.
        """
        types = array("Q", gfns)
        self.check(PFN_TYPES, domid, domid, len(types), types)
        return bytes([kind < _FIRST_BAD_TYPE for kind in types])

    def pause(self, domid: int, *, result_out: list[int]) -> None:
        """Stop a domain's vCPUs. Xen counts pauses: each needs an :meth:`unpause`.

        Args:
            domid: the domain.
            result_out: a list that gets 0 if it was done, for a caller that is interrupted.

        Raises:
            XenCallError: the call failed.
            UnsupportedOperationError: this build of the library does not have it.
        """
        self._call_for(PAUSE, domid, result_out)

    def unpause(self, domid: int, *, result_out: list[int]) -> None:
        """Undo one pause of a domain; arguments and errors are those of :meth:`pause`."""
        self._call_for(UNPAUSE, domid, result_out)

    def _call_for(self, function: str, domid: int, result_out: list[int]) -> None:
        result, errno = self.call(function, domid, result_out=result_out)
        if result:
            raise self.fail(function, domid, errno)
