"""What the backends of live Xen domains share, whichever library maps."""

from __future__ import annotations

import abc
import errno as _errno
from array import array
from pathlib import Path

from ..address import as_int
from ..backend import Backend, Capability
from ..binding import libc
from ..binding.handle import HINTS, Handle
from ..errors import XenCallError
from ..mapping import Mapping

_DOMID_FIRST_RESERVED = 0x7FF0
_CAPABILITIES = Path("/proc/xen/capabilities")


def check_domid(domid: int) -> int:
    """Return a domain's number.

    Raises:
        TypeError: not an int.
        ValueError: not in 0..0x7fef, where domains have their numbers.
    """
    number = as_int("domid", domid)
    if not 0 <= number < _DOMID_FIRST_RESERVED:
        raise ValueError(f"domid {number} is not in 0..{_DOMID_FIRST_RESERVED - 1} (see xl list)")
    return number


def _is_own(domid: int) -> bool:
    try:
        return domid == 0 and "control_d" in _CAPABILITIES.read_text()
    except OSError:
        return False


class DomainBackend(Backend):
    """A live domain. Opening it maps one page, to learn whether there is such a domain.

    Attributes:
        domid: the domain.
        binding: ``"cffi"`` or ``"ctypes"``.
        library: the file that the dynamic linker was asked for.
    """

    capabilities = Capability.WRITE
    map_call: str

    def __init__(self, handle: Handle, domid: int) -> None:
        self.domid = domid
        self._handle = handle
        self.binding = handle.binding
        self.library = handle.path
        try:
            self.map(0, 1, writable=False)
        except BaseException:
            handle.close()
            raise

    @abc.abstractmethod
    def _map_pages(self, prot: int, gfns: array[int]) -> tuple[int, bytes | None]:
        """Map pages through the library; return the host address and the pages' errnos."""

    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        """Map guest pages; see :meth:`Backend.map`."""
        gfns = array("Q", range(gfn, gfn + count))
        address, errors = self._map_pages(libc.protection(writable), gfns)
        mapping = Mapping(address, gfn, count, writable=writable, errors=errors, unmap=libc.unmap)
        # Xen does not fail the call for a domain that is not there: it fails each page.
        if errors is not None and errors.count(_errno.ESRCH) == count:
            raise self._no_domain()
        return mapping

    def _no_domain(self) -> XenCallError:
        if _is_own(self.domid):
            hint = "domain 0 is the one that this runs in; map another one (see xl list)"
        else:
            hint = HINTS[_errno.ESRCH]
        return XenCallError(self.map_call, self.domid, _errno.ESRCH, hint)

    def close(self) -> None:
        """Close the library's handle; see :meth:`Backend.close`."""
        self._handle.close()
