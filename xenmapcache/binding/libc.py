"""Host memory through libc: mapping, unmapping, covering what must not be touched; searching.

Python's own :mod:`mmap` cannot map at a given address, nor unmap what another
library mapped; both are needed here. Addresses are host addresses as ints.
"""

from __future__ import annotations

import ctypes
import errno as _errno
import mmap as _mmap
import sys
from collections.abc import Iterator
from functools import cache

from ..errors import XenCallError
from .declarations import LIBC
from .loader import Function, get_loader

PROT_NONE = 0
PROT_READ = _mmap.PROT_READ
PROT_WRITE = _mmap.PROT_WRITE
MAP_SHARED = _mmap.MAP_SHARED
MAP_FIXED = 0x10
MAP_FIXED_NOREPLACE = 0x100000
MAP_NORESERVE = 0x4000
MAP_POPULATE = 0x8000
MADV_DONTFORK = 10
_ANONYMOUS = _mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS | MAP_NORESERVE
_FAILED = (1 << 64) - 1 if sys.maxsize > 1 << 32 else (1 << 32) - 1
_NEAR = 4096

ENOMEM_HINT = (
    "the process is out of address space (ulimit -v) or has as many mappings as the kernel "
    "allows (sysctl vm.max_map_count): lower max_resident, or raise that limit"
)


@cache
def functions() -> dict[str, Function]:
    """Return libc's functions, bound by the default loader."""
    return get_loader().open(LIBC, "")


def protection(writable: bool) -> int:
    """Return the PROT_ flags of guest memory."""
    return PROT_READ | PROT_WRITE if writable else PROT_READ


def _map(address: int | None, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    result, errno = functions()["mmap"](address, length, prot, flags, fd, offset)
    if result == _FAILED:
        raise XenCallError("mmap", None, errno, ENOMEM_HINT if errno == _errno.ENOMEM else "")
    return result


def map_file(
    fd: int, offset: int, length: int, *, writable: bool, address: int | None = None
) -> int:
    """Map a piece of a file, shared; at ``address``, replacing what is there, if one is given.

    Raises:
        XenCallError: mmap failed.
    """
    flags = MAP_SHARED if address is None else MAP_SHARED | MAP_FIXED
    return _map(address, length, protection(writable), flags, fd, offset)


def allocate(length: int, *, at_once: bool = False) -> int:
    """Take zeroed memory of this process's own.

    Args:
        length: bytes.
        at_once: have all of its pages there from the start, for whoever fills them all: one
            call takes less time than a page fault for each.

    Raises:
        XenCallError: mmap failed.
    """
    flags = _ANONYMOUS | MAP_POPULATE if at_once else _ANONYMOUS
    return _map(None, length, protection(True), flags, -1, 0)


def reserve(length: int, *, address: int | None = None) -> int:
    """Take address space that faults when it is touched; at ``address`` if one is given.

    Raises:
        XenCallError: mmap failed.
    """
    flags = _ANONYMOUS if address is None else _ANONYMOUS | MAP_FIXED
    return _map(address, length, PROT_NONE, flags, -1, 0)


def cover(address: int, length: int, *, replace: bool = False) -> bool:
    """Put private zeros where a mapping has vanished, so that a kept view stays safe.

    Args:
        address: host address.
        length: bytes.
        replace: a whole mapping that is still there goes in the same step, so that
            no other thread can be given its address meanwhile.

    Returns:
        False if something else lives there by now, which is left alone.
    """
    prot, flags = protection(True), _ANONYMOUS | (MAP_FIXED if replace else MAP_FIXED_NOREPLACE)
    result, _ = functions()["mmap"](address, length, prot, flags, -1, 0)
    return result == address


def file_at(address: int) -> tuple[str, str] | None:
    """Return device and inode of the file that is mapped at an address; None if nothing is."""
    with open("/proc/self/maps") as maps:  # noqa: PTH123 - pathlib at import is slow
        lines = maps.readlines()
    for line in lines:
        span, _, _, device, inode, *_ = line.split()
        start, end = (int(number, 16) for number in span.split("-"))
        if start <= address < end:
            return device, inode
    return None


def unmap(address: int, length: int) -> None:
    """Unmap exactly what was mapped: a part of a foreign mapping cannot be unmapped.

    Raises:
        XenCallError: munmap failed.
    """
    result, errno = functions()["munmap"](address, length)
    if result:
        raise XenCallError("munmap", None, errno, f"{length:#x} bytes at {address:#x}")


def dont_fork(address: int, length: int) -> None:
    """Keep a mapping out of forked children, as the kernel does with foreign memory.

    Raises:
        XenCallError: madvise failed.
    """
    result, errno = functions()["madvise"](address, length, MADV_DONTFORK)
    if result:
        raise XenCallError("madvise", None, errno)


def positions(text: bytearray, pattern: bytes, start: int, end: int) -> Iterator[int]:
    """Yield where a pattern is found between two positions of a text, without overlaps.

    ``text.find`` takes several times as long as ``memmem``, whose call takes several times as
    long as that of ``find``: so right behind a match ``find`` looks first.
    """
    memmem = functions()["memmem"]
    size = len(pattern)
    # SAFETY: the array keeps the text from being moved for as long as this generator lives.
    array = (ctypes.c_char * len(text)).from_buffer(text)
    base = ctypes.addressof(array)
    while start + size <= end:
        found = memmem(base + start, end - start, pattern, size)[0]
        if not found:
            return
        position = found - base
        while position >= 0:
            yield position
            start = position + size
            position = text.find(pattern, start, min(start + _NEAR, end))
        start = max(start, start + _NEAR - size + 1)
