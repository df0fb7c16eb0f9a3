"""KDUMP files that a machine has spoilt; ``XENMAPCACHE_FUZZ`` says how many."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.effort import calls_at_most
from tests.fuzz.bounded import bounded, write
from tests.images import kdump_files as files
from tests.images.writers import memory, note
from xenmapcache import BackendUnavailableError, CorruptImageError, UnsupportedOperationError
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.kdump import KdumpBackend
from xenmapcache.formats.content import InMemory
from xenmapcache.formats.pagebitmap import PageBitmap

pytestmark = pytest.mark.slow

PAGES = files.pages_of([(0, 3), (0x10, 1), (0x300, 2)])
NOTES = note(b"CORE", 1, bytes(40)) * 2
SEEDS = [
    files.kdump(PAGES, notes=NOTES, vmcoreinfo=b"A=1\n"),
    files.kdump(PAGES, compression=0, bitmaps=1, version=3),
    files.flattened(files.kdump(PAGES, notes=NOTES), 3000),
]
NUMBERS = st.sampled_from(
    [0, 1, 4, 7, 8, 0xFFF, 0x1000, 0x1FFF, 2**16 - 1, 2**31, 2**32 - 1, 2**52 - 1, 2**63, 2**64 - 1]
)
PLACES = st.one_of(
    st.integers(files.STATUS, files.MAX_MAPNR),
    st.integers(PAGE_SIZE, PAGE_SIZE + 0x68),
    st.integers(0, len(SEEDS[2])),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "vmcore"


@calls_at_most(20_000)
def check(path: Path, content: bytes, salvage: bool) -> None:
    """Open it and read the present pages: they are as long as pages, or an error names the file.

    That the package of a compression is missing, which a changed flag asks for, is an error, too.
    """
    write(path, content)
    try:
        with KdumpBackend(path=path, salvage=salvage) as backend:
            backend.describe()
            assert sum(len(note.data) for note in backend.notes) <= len(content)
            end = 0
            for gfn, count in backend.present(0, 1 << 34):
                assert end <= gfn
                end = gfn + count
                for page in range(gfn, end):
                    try:
                        mapping = backend.map(page, 1, writable=False)
                    except BackendUnavailableError:
                        pass
                    except CorruptImageError as error:
                        assert f"the page of address {page * PAGE_SIZE:#x} " in str(error)
                    else:
                        assert mapping.errors is None
            assert backend.memory_end is not None
            assert end * PAGE_SIZE <= backend.memory_end
            assert backend.lost or end * PAGE_SIZE == backend.memory_end
    except (BackendUnavailableError, CorruptImageError, UnsupportedOperationError) as error:
        assert str(path) in str(error)


@bounded
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(PLACES, st.sampled_from("BHIQ"), NUMBERS), min_size=1, max_size=4),
    salvage=st.booleans(),
)
@example(seed=SEEDS[0], changes=[(files.field("max_mapnr_64"), "Q", 2**15)], salvage=True)
@example(seed=SEEDS[0], changes=[(files.descriptors_at(SEEDS[0]), "Q", 2**63)], salvage=True)
def test_changed_numbers(
    file: Path, seed: bytes, changes: list[tuple[int, str, int]], salvage: bool
) -> None:
    """Numbers that are put anywhere, most of all into headers."""
    content = bytearray(seed)
    for place, form, number in changes:
        size = struct.calcsize(form)
        place = min(place, len(content) - size)
        struct.pack_into(f"<{form}", content, place, number & (1 << 8 * size) - 1)
    check(file, bytes(content), salvage)


@bounded
@given(
    seed=st.sampled_from(SEEDS),
    cut=st.integers(0, len(SEEDS[2])),
    junk=st.binary(max_size=80),
    salvage=st.booleans(),
)
def test_cut_off_and_continued(
    file: Path, seed: bytes, cut: int, junk: bytes, salvage: bool
) -> None:
    """A part of a file, with any bytes after it."""
    check(file, seed[:cut] + junk, salvage)


@bounded
@given(
    numbers=st.lists(
        st.tuples(
            st.one_of(NUMBERS, st.integers(0x3000, 0x9000)), NUMBERS, st.sampled_from([0, 1, 2, 9])
        ),
        min_size=6,
        max_size=6,
    ),
    data=st.binary(max_size=200),
    salvage=st.booleans(),
)
def test_made_up_descriptors(
    file: Path, numbers: list[tuple[int, int, int]], data: bytes, salvage: bool
) -> None:
    """Any descriptors, of data that unpack to anything."""
    content = SEEDS[1][: files.descriptors_at(SEEDS[1])]
    for offset, size, flags in numbers:
        content += struct.pack("<QIIQ", offset, size & 0xFFFFFFFF, flags, 0)
    check(file, content + memory(0, 2) + data, salvage)


@bounded
@given(
    runs=st.lists(st.tuples(st.integers(0, 90_000), st.integers(1, 40_000)), max_size=8),
    pages=st.integers(1, 100_000),
    start=st.integers(0, 100_000),
    count=st.integers(0, 100_000),
)
def test_bitmaps(runs: list[tuple[int, int]], pages: int, start: int, count: int) -> None:
    """What is found in a range is what is set there, and ranks count what is set before."""
    bits = 0
    for first, length in runs:
        bits |= ((1 << length) - 1) << first
    data = bits.to_bytes(1 << 14, "little")
    bitmap = PageBitmap(InMemory(data), 0, pages)
    bits &= (1 << pages) - 1
    assert len(bitmap) == bits.bit_count()
    assert bitmap.end == bits.bit_length()
    found = 0
    for gfn, length, rank in bitmap.runs(start, count):
        assert start <= gfn < gfn + length <= start + count
        assert not found >> gfn
        assert rank == (bits & (1 << gfn) - 1).bit_count()
        found |= ((1 << length) - 1) << gfn
    assert found == bits >> start << start & (1 << start + count) - 1
