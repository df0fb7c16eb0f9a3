"""Flat memory: zeros of this process, over parts of which guest pages are mapped or copied.

One mapping, and so one record in the table of live mappings: it is unmapped once, as a whole.
The record exists before anything of a guest is mapped, so nothing of a guest can get lost.
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
#   1. While the token is taken, nobody unmaps the record. It is put back into its list, which
#      needs no memory, because the list keeps the place of one that was popped.
#   2. The list `result_out` gets what the call returns in the same step of C in which it returns.
#      A signal handler changes nothing about that. While the list is empty, the part has its zeros,
#      or it was mapped and Python has no memory for the address: either way it belongs to the
#      record, which needs no address that a call returns.
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
from typing import TypeAlias

from .address import PAGE_SHIFT
from .binding import libc
from .mapping import Mapping

Place: TypeAlias = Callable[[int, list[int]], object]
"""Maps something at a host address with MAP_FIXED; see :func:`place`."""


def reserve(gfn: int, count: int) -> Mapping:
    """Return zeros for a range of guest pages, which a forked child does not have.

    Raises:
        XenCallError: there is no address space.
    """
    mapping = _zeros(gfn, count)
    try:
        libc.dont_fork(mapping.address, mapping.length)
        return mapping
    finally:
        del mapping  # no traceback is to keep the memory


def mapped(
    gfn: int,
    count: int,
    place_all: Place,
    *,
    writable: bool = False,
    errors: bytes | None = None,
    keeps: object = None,
    call: str = "map",
    domid: int | None = None,
) -> Mapping:
    """Return memory that something is mapped over as a whole.

    If Python has no memory for the address that a map call returns, nothing is lost: the record
    is made before. What may be lost are zeros, which take address space alone.

    Args:
        gfn: the first guest frame number.
        count: pages.
        place_all: maps; see :func:`place`.
        writable: of the :class:`.Mapping`, as all that follow.
        errors: see there.
        keeps: see there.
        call: see there.
        domid: see there.

    Raises:
        XenCallError: there is no address space.
        BaseException: what ``place_all`` raises.
    """
    mapping = _zeros(
        gfn, count, writable=writable, errors=errors, keeps=keeps, call=call, domid=domid
    )
    try:
        place(mapping, 0, mapping.length, place_all)
        return mapping
    finally:
        del mapping  # no traceback is to keep the memory


def allocated(gfn: int, count: int, errors: bytes | None, *, at_once: bool) -> Mapping:
    """Return zeroed memory of this process's own, for copies; see :func:`.libc.allocate`.

    Raises:
        XenCallError: there is no memory.
    """
    return mapped(gfn, count, partial(_allocate_at, count << PAGE_SHIFT, at_once), errors=errors)


def _allocate_at(length: int, at_once: bool, address: int, result_out: list[int]) -> None:
    libc.allocate(length, at_once=at_once, address=address, result_out=result_out)


def _zeros(
    gfn: int,
    count: int,
    *,
    writable: bool = False,
    errors: bytes | None = None,
    keeps: object = None,
    call: str = "map",
    domid: int | None = None,
) -> Mapping:
    length = count << PAGE_SHIFT
    reserved: list[int] = []
    try:
        address = libc.zeros(length, result_out=reserved)
        return Mapping(
            address,
            gfn,
            count,
            writable=writable,
            errors=errors,
            result_out=reserved,
            keeps=keeps,
            call=call,
            domid=domid,
        )
    finally:
        for left in reserved:  # interrupted, and no mapping has taken the zeros over
            libc.munmap(left, length)
        del keeps


def place(mapping: Mapping, offset: int, length: int, call: Place) -> None:
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
    result_out: list[int] = []
    try:
        token.pop()
        call(address, result_out)
        token.append(None)
    except BaseException:
        done = not result_out or result_out[-1] == address
        if done or libc.restore_zeros(address, length):
            if not token:  # otherwise a signal handler has raised after all was done
                token.append(None)
        else:
            mapping.abandon()
            libc.munmap(mapping.address, offset)
            libc.munmap(address + length, mapping.length - offset - length)
        raise
    finally:
        del mapping  # no traceback is to keep the memory


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
