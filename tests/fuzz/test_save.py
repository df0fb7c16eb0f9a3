"""Files of xl save that a machine has spoilt: they are read, or are CorruptImageErrors.

``XENMAPCACHE_FUZZ=100000`` says how many of them, else ``tests/effort.py``.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.effort import calls_at_most
from tests.fuzz.bounded import bounded
from tests.images.xl_files import XTAB, libxc, libxl, pages, record, save, xl
from xenmapcache import CorruptImageError
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.save import SaveBackend

pytestmark = pytest.mark.slow

SEEDS = [
    save(pages(0, 1, (2, XTAB)), pages(1, copy=1)),
    save(pages((7, 4), (8, 9), 3), version=2, kind=1),
    libxc(pages(5), record(0)),
]
NUMBERS = st.sampled_from(
    [0, 1, 2, 7, 0xD, 0xFF, 4096, 2**16 - 1, 2**31, 2**32 - 1, 2**52, 2**64 - 1]
)
PLACES = st.one_of(st.integers(0, 260), st.integers(-260, -1), st.integers(0, len(SEEDS[0])))


@calls_at_most(100_000)
def check(path: Path, content: bytes) -> None:
    """Open it and read all pages; then again, by the index that was kept."""
    for old in path.parent.iterdir():
        old.unlink()
    path.write_bytes(content)
    os.utime(path, (1, 1))
    try:
        with SaveBackend(path=path, keep_index=True) as backend:
            runs = list(backend.runs(0, 1 << 40))
            assert sum(run.pages for run in runs) == backend.pages
            end = 0
            for gfn, count in backend.present(0, 1 << 40):
                assert end <= gfn
                end = gfn + count
                mapping = backend.map(gfn, count, writable=False)
                assert mapping.errors is None
                assert len(bytes(mapping.view(0, mapping.length))) == count * PAGE_SIZE
            assert end * PAGE_SIZE == backend.memory_end
        with SaveBackend(path=path, keep_index=True) as again:
            assert list(again.runs(0, 1 << 40)) == runs
            assert (again.guest_type, again.xen_version) == (
                backend.guest_type,
                backend.xen_version,
            )
    except CorruptImageError as error:
        assert str(path) in str(error)
    check_salvage(path, len(content))


def check_salvage(path: Path, size: int) -> None:
    """What is intact of it can be read, or there is an error that names the file."""
    try:
        with SaveBackend(path=path, salvage=True) as backend:
            assert len(backend.warnings) <= 1
            for run in backend.runs(0, 1 << 40):
                assert run.offset + run.pages * PAGE_SIZE <= size
                backend.map(run.gfn, run.pages, writable=False)
    except CorruptImageError as error:
        assert str(path) in str(error)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "guest.save"


@bounded
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(PLACES, st.sampled_from("BHIQ"), NUMBERS), min_size=1, max_size=4),
)
@example(seed=SEEDS[2], changes=[(44, "I", 2**32 - 1)])  # the length of the pages' record
@example(seed=SEEDS[2], changes=[(48, "I", 2**31)])  # how many there are
@example(seed=SEEDS[2], changes=[(56, "Q", 2**52 - 1)])  # which
@example(seed=SEEDS[0], changes=[(44, "I", 2**32 - 1)])  # xl's configuration
def test_changed_numbers(file: Path, seed: bytes, changes: list[tuple[int, str, int]]) -> None:
    """Numbers that are put anywhere, most of all into headers and records."""
    content = bytearray(seed)
    for place, form, number in changes:
        size = struct.calcsize(form)
        place = min(place % len(content), len(content) - size)
        struct.pack_into(f"<{form}", content, place, number & (1 << 8 * size) - 1)
    check(file, bytes(content))


@bounded
@given(seed=st.sampled_from(SEEDS), cut=st.integers(0, len(SEEDS[0])), junk=st.binary(max_size=80))
def test_cut_off_and_continued(file: Path, seed: bytes, cut: int, junk: bytes) -> None:
    """A part of a file, and anything after it."""
    check(file, seed[:cut] + junk)


RECORDS = st.one_of(
    st.builds(
        pages,
        st.tuples(st.integers(0, 12), st.integers(0, 15)),
        st.tuples(st.integers(0, 12), st.integers(0, 15)),
        count=st.one_of(st.none(), st.integers(0, 5), NUMBERS.map(lambda n: n & 2**32 - 1)),
    ),
    st.builds(pages, st.integers(0, 12), st.integers(0, 12), copy=st.integers(0, 3)),
    st.builds(
        record,
        st.one_of(st.integers(0, 20), NUMBERS.map(lambda n: n & 2**32 - 1)),
        st.binary(max_size=24),
        length=st.one_of(st.none(), st.integers(0, 40)),
    ),
)


@bounded
@given(
    records=st.lists(RECORDS, max_size=8),
    version=st.integers(1, 4),
    kind=st.integers(0, 4),
    wraps=st.integers(0, 2),
)
@example(records=[pages((1, 0), (1, XTAB)), record(0)], version=3, kind=2, wraps=0)
@example(records=[pages(5), pages(3), pages((5, XTAB)), record(0)], version=2, kind=1, wraps=0)
@example(records=[pages(count=0), record(0)], version=3, kind=2, wraps=2)
def test_made_up(file: Path, records: list[bytes], version: int, kind: int, wraps: int) -> None:
    """Streams of records of the right form, in any order."""
    content = libxc(*records, record(0), version=version, kind=kind)
    if wraps:
        content = libxl(content, record(0))
    check(file, xl(content) if wraps > 1 else content)
