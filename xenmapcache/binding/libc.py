"""Host memory through libc: mapping, unmapping, covering what must not be touched; searching.

Python's own :mod:`mmap` cannot map at a given address, nor unmap what another
library mapped; both are needed here. Addresses are host addresses as ints.
"""

from __future__ import annotations

import ctypes
import errno as _errno
import mmap as _mmap
import os
import sys
from collections.abc import Iterator
from functools import cache

from ..errors import XenCallError
from .declarations import LIBC
from .interface import Function
from .loader import get_loader

PROT_NONE = 0
PROT_READ = _mmap.PROT_READ
PROT_WRITE = _mmap.PROT_WRITE
PROT_EXEC = _mmap.PROT_EXEC
MAP_SHARED = _mmap.MAP_SHARED
MAP_FIXED = 0x10
MAP_FIXED_NOREPLACE = 0x100000
MAP_NORESERVE = 0x4000
MAP_POPULATE = 0x8000
MADV_DONTFORK = 10
READ_WRITE = PROT_READ | PROT_WRITE
PRIVATE_ZEROS = _mmap.MAP_PRIVATE | _mmap.MAP_ANONYMOUS | MAP_NORESERVE
_FAILED = (1 << 64) - 1 if sys.maxsize > 1 << 32 else (1 << 32) - 1
_NEAR = 4096

ENOMEM_HINT = (
    "the process is out of address space (ulimit -v) or has as many mappings as the kernel "
    "allows (sysctl vm.max_map_count): lower max_resident, or raise that limit"
)


_libc = ctypes.CDLL(None)
munmap = _libc["munmap"]
"""``munmap(address, length)`` itself, a C function: for steps that must not be interrupted."""
munmap.argtypes, munmap.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int
mmap = _libc["mmap"]
"""``mmap`` itself, likewise."""
mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
mmap.restype = ctypes.c_void_p
_fallocate = ctypes.CDLL(None, use_errno=True)["fallocate"]
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2


@cache
def functions() -> dict[str, Function]:
    """Return libc's functions, bound by the default loader."""
    return get_loader().open(LIBC, "")


def protection(writable: bool) -> int:
    """Return the PROT_ flags of guest memory."""
    return READ_WRITE if writable else PROT_READ


def _map(
    address: int | None,
    length: int,
    prot: int,
    flags: int,
    fd: int,
    offset: int,
    result_out: list[int] | None = None,
) -> int:
    mmap = functions()["mmap"]
    result, errno = mmap(address, length, prot, flags, fd, offset, result_out=result_out)
    if result == _FAILED:
        if result_out is not None and address is None:
            result_out.clear()
        raise XenCallError("mmap", None, errno, ENOMEM_HINT if errno == _errno.ENOMEM else "")
    return result


def map_file(
    fd: int,
    offset: int,
    length: int,
    *,
    writable: bool,
    address: int | None = None,
    result_out: list[int] | None = None,
) -> int:
    """Map a range of a file, shared; at ``address``, in place of an earlier mapping, if given.

    Args:
        fd: descriptor of the file.
        offset: of the first byte, page-aligned.
        length: bytes.
        writable: whether the memory can be written.
        address: host address.
        result_out: a list that gets the address before a signal handler can raise. If mmap has
            failed, it is empty, or has another number if an address was given.

    Raises:
        XenCallError: mmap failed.
    """
    flags = MAP_SHARED if address is None else MAP_SHARED | MAP_FIXED
    return _map(address, length, protection(writable), flags, fd, offset, result_out)


def map_code(fd: int, length: int) -> int:
    """Map the beginning of a file so that it can be executed, and not written.

    Raises:
        XenCallError: mmap failed.
    """
    return _map(None, length, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0)


def allocate(length: int, *, at_once: bool = False, result_out: list[int] | None = None) -> int:
    """Take zeroed memory of this process's own.

    Args:
        length: bytes.
        at_once: have all of its pages there from the start, for a caller that fills them all: one
            call takes less time than a page fault for each.
        result_out: a list that gets the address before a signal handler can raise.

    Raises:
        XenCallError: mmap failed.
    """
    flags = PRIVATE_ZEROS | MAP_POPULATE if at_once else PRIVATE_ZEROS
    return _map(None, length, READ_WRITE, flags, -1, 0, result_out)


def reserve(length: int, *, address: int | None = None, result_out: list[int] | None = None) -> int:
    """Take address space that faults when it is touched; at ``address`` if one is given.

    For ``result_out`` see :func:`map_file`.

    Raises:
        XenCallError: mmap failed.
    """
    flags = PRIVATE_ZEROS if address is None else PRIVATE_ZEROS | MAP_FIXED
    return _map(address, length, PROT_NONE, flags, -1, 0, result_out)


def zeros(length: int, *, address: int | None = None, result_out: list[int] | None = None) -> int:
    """Take zeros that can only be read, and take no memory; at ``address`` if one is given.

    For ``result_out`` see :func:`map_file`.

    Raises:
        XenCallError: mmap failed.
    """
    flags = PRIVATE_ZEROS if address is None else PRIVATE_ZEROS | MAP_FIXED
    return _map(address, length, PROT_READ, flags, -1, 0, result_out)


def restore_zeros(address: int, length: int) -> bool:
    """Put such zeros back where a failed mmap with MAP_FIXED may have removed them.

    Args:
        address: host address.
        length: bytes.

    Returns:
        False if other memory may be there by now, which is left alone. Zeros that another thread
        has taken in the same way cannot be told from those that were there.
    """
    flags = PRIVATE_ZEROS | MAP_FIXED_NOREPLACE
    if mmap(address, length, PROT_READ, flags, -1, 0) == address:
        dont_fork(address, length)
        return True
    end = address + length
    for start, stop, permissions, _, inode in _mapped_areas():
        if start <= address < min(stop, end):
            if (permissions, inode) != ("r--p", "0"):
                return False
            address = stop
    return address >= end


def map_zeros_over(address: int, length: int, *, replace: bool = False) -> bool:
    """Put private zeros where a mapping has vanished, so that a kept view stays safe.

    Args:
        address: host address.
        length: bytes.
        replace: a whole mapping that is still there goes in the same step, so that
            no other thread can be given its address in between.

    Returns:
        False if something else lives there by now, which is left alone.
    """
    flags = PRIVATE_ZEROS | (MAP_FIXED if replace else MAP_FIXED_NOREPLACE)
    return bool(mmap(address, length, READ_WRITE, flags, -1, 0) == address)


def file_at(address: int) -> tuple[str, str] | None:
    """Return device and inode of the file that is mapped at an address; None if nothing is."""
    for start, end, _, device, inode in _mapped_areas():
        if start <= address < end:
            return device, inode
    return None


def _mapped_areas() -> Iterator[tuple[int, int, str, str, str]]:
    """Yield ``(start, end, permissions, device, inode)`` of what is mapped, in ascending order."""
    with open("/proc/self/maps") as maps:  # noqa: PTH123 - pathlib at import is slow
        lines = maps.readlines()
    for line in lines:
        span, permissions, _, device, inode, *_ = line.split()
        start, end = (int(number, 16) for number in span.split("-"))
        yield start, end, permissions, device, inode


def unmap(address: int, length: int) -> None:
    """Unmap exactly what was mapped: a part of a foreign mapping cannot be unmapped.

    Raises:
        XenCallError: munmap failed.
    """
    result, errno = functions()["munmap"](address, length)
    if result:
        raise XenCallError("munmap", None, errno, f"{length:#x} bytes at {address:#x}")


def allow_writes(address: int, length: int) -> None:
    """Make memory of this process's own writable, where it is. If that fails, it stays mapped.

    Raises:
        XenCallError: mprotect failed.
    """
    result, errno = functions()["mprotect"](address, length, READ_WRITE)
    if result:
        raise XenCallError("mprotect", None, errno, ENOMEM_HINT if errno == _errno.ENOMEM else "")


def dont_fork(address: int, length: int) -> None:
    """Keep a mapping out of forked children, as the kernel does with foreign memory.

    Raises:
        XenCallError: madvise failed.
    """
    result, errno = functions()["madvise"](address, length, MADV_DONTFORK)
    if result:
        raise XenCallError("madvise", None, errno)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Have a file forget a range, which reads as zeros from then on. Its size stays.

    Args:
        fd: descriptor of the file, open for writing.
        offset: of the first byte.
        length: bytes, at least one.

    Raises:
        OSError: fallocate failed; EOPNOTSUPP if the file system cannot do it.
    """
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    if _fallocate(fd, mode, offset, length):
        errno = ctypes.get_errno()
        raise OSError(errno, f"fallocate: {os.strerror(errno)}: {length:#x} bytes at {offset:#x}")


def find_all(text: bytearray, pattern: bytes, start: int, end: int) -> Iterator[int]:
    """Yield where a pattern is found between two positions of a text, without overlaps.

    ``text.find`` takes several times as long as ``memmem``, whose call takes several times as
    long as that of ``find``: so right after a match ``find`` looks first.
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
