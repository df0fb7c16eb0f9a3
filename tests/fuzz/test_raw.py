"""LiME files that a machine has spoilt; ``XENMAPCACHE_FUZZ`` says how many."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.effort import calls_at_most
from tests.fuzz.bounded import bounded, check_pages, write
from tests.images.writers import lime, lime_range
from xenmapcache import CorruptImageError, UnsupportedOperationError
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.raw import RawBackend
from xenmapcache.formats.lime import HEADER as LIME_HEADER
from xenmapcache.formats.lime import MAGIC as LIME_MAGIC

pytestmark = pytest.mark.slow

SEED = lime([(1, 2), (0x10, 1), (4, 1)])
NUMBERS = st.sampled_from([0, 1, 0xFFF, 0x1000, 0x1FFF, 2**31, 2**32, 2**52 - 1, 2**63, 2**64 - 1])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "guest.lime"


def check(path: Path, content: bytes) -> None:
    """Open it, whole and what is intact of it, and read all pages; or an error names the file."""
    write(path, content)
    for salvage in (False, True):
        with calls_at_most(10_000):
            try:
                with RawBackend(path=path, salvage=salvage) as backend:
                    check_pages(backend, content)
            except (CorruptImageError, UnsupportedOperationError) as error:
                assert str(path) in str(error)


@bounded
@given(
    ranges=st.lists(
        st.tuples(NUMBERS, NUMBERS, st.integers(0, 2 * PAGE_SIZE), st.integers(0, 2)), max_size=6
    )
)
@example(ranges=[(0, 2**64 - 1, 10, 1)])
@example(ranges=[(2**64 - 1, 0, 10, 1)])
@example(ranges=[(0x1000, 0x1FFF, PAGE_SIZE, 1), (0x1000, 0x1FFF, PAGE_SIZE, 1)])
@example(ranges=[(0, 2**52 - 1, 10, 1)])
def test_headers(file: Path, ranges: list[tuple[int, int, int, int]]) -> None:
    """Any headers, with more or fewer bytes after them than they say."""
    content = b"".join(
        LIME_HEADER.pack(LIME_MAGIC, version, first, last, 0) + bytes(size)
        for first, last, size, version in ranges
    )
    check(file, content)


@bounded
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(SEED) - 1), st.sampled_from("BIQ"), NUMBERS), max_size=4
    ),
    cut=st.integers(0, len(SEED)),
    junk=st.binary(max_size=80),
)
@example(changes=[], cut=len(SEED), junk=b"")
@example(changes=[], cut=3, junk=b"")
@example(changes=[], cut=32 + 2 * PAGE_SIZE, junk=b"EMiL")
@example(changes=[], cut=0, junk=b"AVML")
@example(changes=[], cut=0, junk=lime_range(5, b"x"))
def test_changed(file: Path, changes: list[tuple[int, str, int]], cut: int, junk: bytes) -> None:
    """A file with numbers changed anywhere, cut off, and continued with anything."""
    content = bytearray(SEED[:cut] + junk)
    for place, form, number in changes:
        size = struct.calcsize(form)
        if place + size <= len(content):
            struct.pack_into(f"<{form}", content, place, number & (1 << 8 * size) - 1)
    check(file, bytes(content))
