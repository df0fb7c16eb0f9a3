"""Every exception that this package raises itself.

Wrong arguments raise :class:`ValueError` and :class:`TypeError`. An ``errno`` is
positive, and was taken at the call that failed and nowhere else. Each exception
keeps its facts as attributes and can be pickled. Its message is escaped, because
names of files and domains are in it: a traceback goes to a terminal or a log.
"""

from __future__ import annotations

import errno as _errno
import os

from .escape import printable as _printable

__all__ = [
    "BackendUnavailableError",
    "CacheFullError",
    "ClosedError",
    "CorruptImageError",
    "DeviceError",
    "EmptyRangeError",
    "FaultError",
    "GrantError",
    "LeaseError",
    "MappingLostError",
    "QueueFullError",
    "TranslationError",
    "UnsupportedOperationError",
    "WrongFormatError",
    "XenCallError",
    "XenMapCacheError",
]


def errno_name(number: int) -> str:
    """Return an errno as people search for it: ``EINVAL (Invalid argument)``."""
    return f"{_errno.errorcode.get(number, f'errno {number}')} ({os.strerror(number)})"


class XenMapCacheError(Exception):
    """The root of this package's exceptions; never raised itself."""

    def __str__(self) -> str:
        return _printable(super().__str__())


class BackendUnavailableError(XenMapCacheError):
    """A library, a device node or a permission is missing. The message says what to do."""


class UnsupportedOperationError(XenMapCacheError, NotImplementedError):
    """This source of guest memory, or this build of Xen's libraries, does not support the call."""


class XenCallError(XenMapCacheError, OSError):
    """A call into Xen's libraries failed as a whole, or was refused for a page.

    A page is refused if Xen or the kernel gives EACCES, EPERM, ENOMEM or ENOSYS for it: it may
    exist, but cannot be mapped. A page that does not exist is a :class:`FaultError`.

    Attributes:
        call: the C function's name.
        domid: the domain that the call was for, or None.
        errno: positive, as the call set it.
        hint: what the errno means and what to do, or an empty string.
        address: the first guest-physical address that was refused; None if the call failed.
    """

    errno: int

    def __init__(
        self,
        call: str,
        domid: int | None,
        errno: int,
        hint: str = "",
        *,
        address: int | None = None,
    ) -> None:
        super().__init__(call, domid, errno, hint)
        self.call = call
        self.domid = domid
        self.errno = errno
        self.hint = hint
        self.address = address
        self.strerror = os.strerror(errno)

    def __str__(self) -> str:
        domain = "" if self.domid is None else f" for domain {self.domid}"
        page = "" if self.address is None else f" at {self.address:#x}"
        hint = f": {self.hint}" if self.hint else ""
        return _printable(f"{self.call} failed{domain}{page} with {errno_name(self.errno)}{hint}")


class MappingLostError(XenCallError):
    """Moving a mapping failed after its old memory was unmapped. Its views show private zeros."""


class CorruptImageError(XenMapCacheError, ValueError):
    """A saved image contradicts its format; the message names the place."""


class WrongFormatError(CorruptImageError, UnsupportedOperationError):
    """A file is of another format than was asked for; the message says which, and what to do."""


_GRANT_BIT = 1 << 63
_GRANT_HINT = (
    ". An address with bit 63 names a granted page, which only read, read_into, write and map_dma "
    "of MapCache(grants=backend.open_grants()) take"
)


class FaultError(XenMapCacheError):
    """No page exists at an address that was accessed.

    Attributes:
        address: the first guest-physical address that cannot be reached. For a lease of more than
            1 MiB or ``max_lease``, and a read of more than 64 MiB, of a live guest with several
            holes, it may be a later one: if the range's first page is there and its last one is
            not, it is where memory ends, or else that last page.
        length: how many bytes of the access lie at that address and beyond.
        errno: the reason that Xen gave for that page (EINVAL: no such page).
    """

    def __init__(self, address: int, length: int, errno: int) -> None:
        super().__init__(address, length, errno)
        self.address = address
        self.length = length
        self.errno = errno

    def __str__(self) -> str:
        granted = "" if self.address < _GRANT_BIT else _GRANT_HINT
        return (
            f"no page at {self.address:#x}: {errno_name(self.errno)}; the last {self.length:#x} "
            f"bytes of the access start there{granted}"
        )


class EmptyRangeError(FaultError, ValueError):
    """A lease of no bytes was asked for: a bug of the caller, or a length that a guest chose."""

    def __str__(self) -> str:
        return f"length at address {self.address:#x} is 0; a lease needs at least 1 byte"


class GrantError(FaultError):
    """A guest names a page that it has not granted, or not for what is to be done with it.

    Attributes:
        address: of the first page that was refused; of a lease, of which Xen does not say that,
            the first byte.
        length: how many bytes of the access lie at that address and beyond.
        errno: what the call gave, or stands for its status.
        domid: the domain.
        call: the function that was refused.
        hint: the references, and why.
    """

    def __init__(
        self, address: int, length: int, errno: int, domid: int, call: str, hint: str
    ) -> None:
        super().__init__(address, length, errno)
        self.args = address, length, errno, domid, call, hint  # what a pickle calls this with
        self.domid, self.call, self.hint = domid, call, hint

    def __str__(self) -> str:
        return _printable(
            f"{self.call} was refused for domain {self.domid} at {self.address:#x} with "
            f"{errno_name(self.errno)}: {self.hint}"
        )


class TranslationError(XenMapCacheError):
    """A virtual address leads to no guest memory.

    Attributes:
        address: the virtual address that cannot be reached.
        reason: what is wrong, as in the message.
        level: of the page tables, where it went wrong: such as ``"PML4"``, or ``"L0"`` on arm64;
            ``"page"`` if the tables lead to a page that the source lacks; empty if the address
            cannot be looked up at all.
        entry: the value of that level's entry, or None if there is none to read.
        entry_address: guest-physical, of the entry, or of the missing page; None if unknown.
    """

    def __init__(
        self,
        address: int,
        reason: str,
        level: str = "",
        entry: int | None = None,
        entry_address: int | None = None,
    ) -> None:
        super().__init__(address, reason, level, entry, entry_address)
        self.address = address
        self.reason = reason
        self.level = level
        self.entry = entry
        self.entry_address = entry_address

    def __str__(self) -> str:
        place = f"virtual address {self.address:#x}"
        if self.level and self.entry_address is not None:
            entry = "" if self.entry is None else f" entry {self.entry:#x}"
            place += f": level {self.level},{entry} at guest-physical {self.entry_address:#x}"
        return _printable(f"{place}: {self.reason}")


class LeaseError(XenMapCacheError):
    """A lease is unknown, was released before, or is stale while ``on_stale="raise"``."""


class CacheFullError(XenMapCacheError):
    """No room under ``max_resident`` or ``max_copies``: all of it is leased or in use by a view."""


class QueueFullError(XenMapCacheError):
    """A DMA engine, or a queue of the mock's virtio driver, has no room for another transfer."""


class DeviceError(XenMapCacheError):
    """A driver of the mock's guest cannot use a device, because of what the device says or does."""


class ClosedError(XenMapCacheError, ValueError):
    """The cache or backend is closed, or belongs to the process that forked this one."""
