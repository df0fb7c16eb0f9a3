"""Every exception that this package raises on its own account.

Bad arguments stay :class:`ValueError` and :class:`TypeError`. An ``errno`` is
positive, and was taken at the call that failed and nowhere else. Each exception
keeps its facts as attributes and can be pickled.
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = [
    "BackendUnavailableError",
    "CacheFullError",
    "ClosedError",
    "CorruptImageError",
    "FaultError",
    "LeaseError",
    "MappingLostError",
    "UnsupportedOperationError",
    "XenCallError",
    "XenMapCacheError",
]


def errno_name(number: int) -> str:
    """Return an errno as people search for it: ``EINVAL (Invalid argument)``."""
    return f"{_errno.errorcode.get(number, f'errno {number}')} ({os.strerror(number)})"


class XenMapCacheError(Exception):
    """The root of this package's exceptions; never raised itself."""


class BackendUnavailableError(XenMapCacheError):
    """A library, device node or permission is missing; the message says which and what to do."""


class UnsupportedOperationError(XenMapCacheError, NotImplementedError):
    """This source of guest memory, or this build of Xen's libraries, cannot do that."""


class XenCallError(XenMapCacheError, OSError):
    """A call into Xen's libraries failed as a whole.

    Attributes:
        call: the C function's name.
        domid: the domain that it was about, or None.
        errno: positive, as the call left it.
        hint: what it means and what to do, or an empty string.
    """

    errno: int

    def __init__(self, call: str, domid: int | None, errno: int, hint: str = "") -> None:
        super().__init__(call, domid, errno, hint)
        self.call = call
        self.domid = domid
        self.errno = errno
        self.hint = hint
        self.strerror = os.strerror(errno)

    def __str__(self) -> str:
        domain = "" if self.domid is None else f" for domain {self.domid}"
        hint = f": {self.hint}" if self.hint else ""
        return f"{self.call} failed{domain} with {errno_name(self.errno)}{hint}"


class MappingLostError(XenCallError):
    """Moving a mapping failed after its old memory was gone: its views show private zeros."""


class CorruptImageError(XenMapCacheError, ValueError):
    """A saved image contradicts its format; the message names the place."""


class FaultError(XenMapCacheError):
    """There is no page at an address that was accessed.

    Attributes:
        address: the first guest-physical address that cannot be reached.
        length: how many bytes of the access lie at that address and behind it.
        errno: why, as Xen said for that page (EINVAL: no such page).
    """

    def __init__(self, address: int, length: int, errno: int) -> None:
        super().__init__(address, length, errno)
        self.address = address
        self.length = length
        self.errno = errno

    def __str__(self) -> str:
        return (
            f"no page at {self.address:#x} ({self.length:#x} bytes of the access lie there or "
            f"behind): {errno_name(self.errno)}"
        )


class LeaseError(XenMapCacheError):
    """A lease is unknown, was released before, or is stale where that is refused."""


class CacheFullError(XenMapCacheError):
    """Room under ``max_resident`` cannot be made: what is resident is leased or still viewed."""


class ClosedError(XenMapCacheError, ValueError):
    """The cache or backend was closed, or belongs to the process that forked this one."""
