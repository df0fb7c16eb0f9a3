"""Flat memory: zeros of this process, over parts of which guest pages are mapped or copied.

One mapping, and so one record in the table of live mappings: it is unmapped once, as a whole.
"""

# Theory of operation
#
# The zeros are private, anonymous and read-only: they take address space and no memory. Pages of a
# guest or a file are mapped over parts of them (MAP_FIXED), one part after the other. Until all
# parts are there, nobody has a view.
#
# A mmap with MAP_FIXED that fails may leave nothing at the address, and so may Xen's libraries.
# From that moment another thread can be given the address. If the record then unmapped the whole,
# it would unmap that thread's memory. Therefore `place` keeps the record's token for as long as it
# is in doubt what that part has:
#
#   whole --token taken--> in doubt --mapped, or zeros are back--> whole
#                             `--something else is there--> abandoned
#
# Rules
#   1. While the token is taken, nobody unmaps the record. It is given back by storing into its
#      list, which may be repeated, and needs no memory.
#   2. The list `result_out` gets what the call returns in the same step of C in which it returns.
#      While it is empty, nothing has changed. A signal handler changes nothing about that.
#   3. If zeros cannot be put back, the record is abandoned: what is certainly its own on both
#      sides is unmapped, and the part in doubt stays.
#   4. Copies are written into the zeros after mprotect, which never removes a mapping.
#
# A fork. Each part is kept out of children before the next one is mapped, and each caller of
# `place` looks before whether it runs in the process that it belongs to. So at any fork the child
# finds either no part of the memory, where the hook of mapping.py puts zeros over the whole, or
# one part that was just mapped; then the next look ends its work.

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .address import PAGE_SHIFT
from .binding import libc
from .mapping import Mapping


def reserve(gfn: int, count: int) -> Mapping:
    """Return zeros for a range of guest pages.

    Raises:
        XenCallError: there is no address space.
    """
    length = count << PAGE_SHIFT
    reserved: list[int] = []
    try:
        address = libc.zeros(length, result_out=reserved)
        mapping = Mapping(address, gfn, count, writable=False, errors=None, result_out=reserved)
    finally:
        for left in reserved:  # interrupted, and no mapping has taken the zeros over
            libc.munmap(left, length)
    try:
        libc.dont_fork(address, length)
        return mapping
    finally:
        del mapping  # no traceback is to keep the memory


def place(
    mapping: Mapping, offset: int, length: int, call: Callable[[int, list[int]], object]
) -> None:
    """Map something over a part of the zeros.

    Args:
        mapping: made by :func:`reserve`, of which nobody has a view yet.
        offset: of the part, in bytes.
        length: in bytes. There are still zeros.
        call: called with the host address, at which it maps with MAP_FIXED, and with a list that
            gets what the map call returns, this address or something else, before a signal
            handler can raise.

    Raises:
        BaseException: what ``call`` raises. The part has zeros then, or what was mapped, or
            the mapping is abandoned.
    """
    address = mapping.address + offset
    token = mapping.record.token
    free = token[:]
    result_out: list[int] = []
    try:
        del token[:]
        call(address, result_out)
        token[:] = free
    except BaseException:
        done = not result_out or result_out[-1] == address
        if done or libc.restore_zeros(address, length):
            token[:] = free
        else:
            mapping.abandon()
            libc.munmap(mapping.address, offset)
            libc.munmap(address + length, mapping.length - offset - length)
        raise


def clear(mapping: Mapping, offset: int, length: int) -> None:
    """Put zeros over a part again, whatever complete mappings it has.

    Raises:
        XenCallError: mmap failed.
    """
    place(mapping, offset, length, partial(_zeros_at, length))
    libc.dont_fork(mapping.address + offset, length)


def _zeros_at(length: int, address: int, result_out: list[int]) -> None:
    libc.zeros(length, address=address, result_out=result_out)


def writable(mapping: Mapping, offset: int, length: int) -> memoryview:
    """Return a part of the zeros, to be filled with a copy.

    Raises:
        XenCallError: there is no memory.
    """
    libc.allow_writes(mapping.address + offset, length)
    return memoryview(mapping.memory).cast("B")[offset : offset + length]
