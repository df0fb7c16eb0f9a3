"""Addresses of granted pages: bit 63, the grant reference, and the offset in the page.

Follows Linux's ``drivers/xen/grant-dma-ops.c``.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Iterator
from typing import NamedTuple

from ..address import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, page_span
from ..errors import FaultError

GRANT_BIT = 1 << 63
_REF_LIMIT = 1 << 32


class Part(NamedTuple):
    """Bytes of one granted page: its reference, the first byte in it, and how many bytes."""

    ref: int
    offset: int
    length: int


def is_granted(address: int) -> bool:
    """Tell whether an address names granted pages."""
    return address >> 63 == 1


def grant_address(ref: int, offset: int = 0) -> int:
    """Return the address of a byte of a granted page."""
    return GRANT_BIT | ref << PAGE_SHIFT | offset


def references(address: int, length: int) -> tuple[int, int]:
    """Return ``(first, count)`` of the grant references of a range.

    Args:
        address: with bit 63.
        length: in bytes.

    Raises:
        FaultError: no reference is so large.
        ValueError: the length is negative, or the address does not name granted pages.
    """
    if length < 0:
        raise ValueError(f"length {length:#x} at address {address:#x} is negative")
    if not is_granted(address):
        raise ValueError(f"address {address:#x} names no granted page: bit 63 must be set")
    if not length:
        return (address & ~GRANT_BIT) >> PAGE_SHIFT, 0
    first, count = page_span(address & ~GRANT_BIT, length)
    if first + count > _REF_LIMIT:
        bad = max(address, grant_address(_REF_LIMIT))
        raise FaultError(bad, address + length - bad, _errno.EINVAL)
    return first, count


def parts(address: int, length: int) -> Iterator[Part]:
    """Yield the parts of a range, one for each page.

    Args:
        address: with bit 63.
        length: in bytes.
    """
    position = address & ~GRANT_BIT
    end = position + length
    while position < end:
        offset = position & PAGE_MASK
        part = Part(position >> PAGE_SHIFT, offset, min(PAGE_SIZE - offset, end - position))
        yield part
        position += part.length
