"""Guest-physical addresses: pages, ranges and sizes. All ranges are half-open."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from operator import index

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_MASK = PAGE_SIZE - 1

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

ADDRESS_LIMIT = 1 << 52
"""One past the highest guest-physical address: 52 bits, the most that x86 and Arm have."""
_VIRTUAL = 0xFF << 56
"""Where virtual addresses of kernels begin, with 5 levels of page tables on x86."""
_HINT = "; it looks like a virtual address: read --virtual translates it, in Python AddressSpace"

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_SIZE = re.compile(r"(?P<number>0x[0-9a-f]+|\d+)\s*(?P<unit>[kmgt]?)(?:i?b)?", re.IGNORECASE)


def as_int(name: str, value: object) -> int:
    """Return ``value`` as an int, or raise a TypeError that calls it ``name``."""
    try:
        return index(value)  # type: ignore[arg-type] # a TypeError is handled
    except TypeError:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None


def check_range(address: object, length: object, *, empty: bool = False) -> tuple[int, int]:
    """Return ``(address, length)`` as ints if they are a range of guest memory.

    Args:
        address: guest-physical, in bytes.
        length: in bytes.
        empty: whether a length of zero is a range.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: negative, empty, or not below 2**52.
    """
    first = as_int("address", address)
    count = as_int("length", length)
    if first < 0:
        raise ValueError(f"address {first:#x} is negative")
    if count < 0:
        raise ValueError(f"length {count:#x} at address {first:#x} is negative")
    if count == 0 and not empty:
        raise ValueError(f"length at address {first:#x} is 0: nothing to map")
    if first + count > ADDRESS_LIMIT:
        hint = "" if first < _VIRTUAL else _HINT
        raise ValueError(
            f"range {first:#x}..{first + count:#x} ends beyond {ADDRESS_LIMIT:#x}, "
            f"the end of a 52-bit physical address space{hint}"
        )
    return first, count


def page_span(address: int, length: int) -> tuple[int, int]:
    """Return ``(gfn, count)`` of the pages that a range of bytes touches."""
    first = address >> PAGE_SHIFT
    return first, ((address + length + PAGE_MASK) >> PAGE_SHIFT) - first


def parse_size(size: int | str) -> int:
    """Return a size in bytes, given as an int or as people write it: ``4k``, ``0x1000``, ``1GiB``.

    Units are powers of 1024 with or without ``i`` and ``B``, in any case.

    Raises:
        ValueError: it is not a size, or it is negative.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size.strip())
        if match is None:
            raise ValueError(f"{size!r} is not a size: write 4096, 0x1000, 4k, 256M or 1GiB")
        number = match["number"].lower()
        return int(number, 16 if number.startswith("0x") else 10) << _UNITS[match["unit"].lower()]
    count = as_int("size", size)
    if count < 0:
        raise ValueError(f"size {count} is negative")
    return count


def page_runs(gfn: int, flags: Iterable[bool]) -> list[tuple[int, int]]:
    """Return the runs of pages with a flag, as (gfn, count); the first flag is that of ``gfn``."""
    runs = []
    for is_set, group in groupby(flags):
        count = sum(1 for _ in group)
        if is_set:
            runs.append((gfn, count))
        gfn += count
    return runs
