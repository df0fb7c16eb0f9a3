"""Ranges and sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xenmapcache.address import (
    ADDRESS_LIMIT,
    PAGE_SIZE,
    check_range,
    page_span,
    parse_size,
)


@pytest.mark.parametrize(
    ("address", "length", "message"),
    [
        (-1, 8, "address -0x1 is negative"),
        (0x1000, -8, "length -0x8 at address 0x1000 is negative"),
        (0x1000, 0, "length at address 0x1000 is 0"),
        (ADDRESS_LIMIT, 1, "ends beyond 0x10000000000000"),
        (1, 1 << 80, "ends beyond 0x10000000000000"),
    ],
)
def test_what_is_no_range_is_refused_in_hex(address: int, length: int, message: str) -> None:
    """A wrong range raises ValueError that shows the value in hex."""
    with pytest.raises(ValueError, match=message):
        check_range(address, length)


@pytest.mark.parametrize("value", ["0x1000", 1.0, None, b"1"])
def test_what_is_no_number_is_named(value: object) -> None:
    """A wrong type raises TypeError that names the argument."""
    with pytest.raises(TypeError, match="address must be an int"):
        check_range(value, 1)
    with pytest.raises(TypeError, match="length must be an int"):
        check_range(0, value)


def test_the_last_byte_is_a_range() -> None:
    """The end of the address space is half-open."""
    with pytest.raises(ValueError, match="looks like a virtual address: read --virtual"):
        check_range(0xFFFFFFFF81000000, 8)
    with pytest.raises(ValueError, match="52-bit physical address space$"):
        check_range(ADDRESS_LIMIT, 8)
    assert check_range(ADDRESS_LIMIT - 1, 1) == (ADDRESS_LIMIT - 1, 1)


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 20))
def test_page_span_is_what_bytes_touch(address: int, length: int) -> None:
    """The span holds the first and last byte, and no page more."""
    gfn, count = page_span(address, length)
    assert gfn * PAGE_SIZE <= address < (gfn + 1) * PAGE_SIZE
    assert (gfn + count - 1) * PAGE_SIZE < address + length <= (gfn + count) * PAGE_SIZE


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("0x1000", 4096),
        ("4k", 4096),
        ("4KiB", 4096),
        ("256M", 256 << 20),
        ("256 MiB", 256 << 20),
        ("1gb", 1 << 30),
        ("010", 10),
    ],
)
def test_sizes_as_people_write_them(text: int | str, size: int) -> None:
    """Numbers with units are understood."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4x", "-1", "1.5G", "k", -1])
def test_what_is_no_size_is_refused(text: int | str) -> None:
    """Anything else raises ValueError."""
    with pytest.raises(ValueError):
        parse_size(text)


def test_more_sizes_as_people_write_them() -> None:
    """Tebibytes, and hexadecimal digits in any case."""
    sizes = {"1T": 1 << 40, "2tib": 2 << 40, "0X1F000": 0x1F000, "0x1K": 1024}
    assert {text: parse_size(text) for text in sizes} == sizes
