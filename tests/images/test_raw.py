"""Flat images, images of ranges, and LiME files."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.descriptors import open_files
from tests.effort import calls_at_most
from tests.images.writers import lime, lime_range, memory, memory_at, packed
from xenmapcache import (
    Backend,
    CorruptImageError,
    FaultError,
    MapCache,
    UnsupportedOperationError,
    open_backend,
    write_coredump,
)
from xenmapcache.address import PAGE_SIZE

P = PAGE_SIZE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "guest.img"


def opened(path: Path, content: bytes, **options: object) -> Backend:
    path.write_bytes(content)
    os.utime(path, (1, 1))
    return open_backend("raw", path=path, **options)


def there(backend: Backend) -> list[tuple[int, int]]:
    """Return the present ranges, after a comparison of all pages with what should be."""
    found = list(MapCache(backend).present(0, 1 << 52))
    for address, length in found:
        assert address % P == length % P == 0
        data = backend.map(address // P, length // P, writable=False).view(0, length)
        assert data == memory(address // P, length // P)
    assert backend.memory_end == sum(found[-1])
    return [(address // P, length // P) for address, length in found]


def test_flat(path: Path) -> None:
    """A flat image begins at address 0."""
    with opened(path, memory(0, 20)) as backend:
        assert there(backend) == [(0, 20)]
        assert backend.name == "raw"


def test_flat_elsewhere(path: Path) -> None:
    """Or where it is told to begin; below that there is nothing."""
    with opened(path, memory(0x100, 20), address=0x100000) as backend, MapCache(backend) as cache:
        assert there(backend) == [(0x100, 20)]
        with pytest.raises(FaultError):
            cache.read(0xFFFFF, 1)
        with pytest.raises(FaultError):
            cache.read(0x113FFF, 2)


def test_a_part_of_a_page(path: Path) -> None:
    """If a flat image ends inside a page, the rest of the page reads as zeros."""
    with opened(path, memory(0, 3)[:-5]) as backend, MapCache(backend) as cache:
        assert cache.memory_end == 3 * P
        assert cache.read(0, 3 * P) == memory(0, 3)[:-5] + bytes(5)
        single = backend.map(2, 1, writable=False).view(0, P)
        assert single == memory(2, 1)[:-5] + bytes(5)
    with opened(path, b"x") as backend, MapCache(backend) as cache:
        assert cache.read(0, 3) == b"x\0\0"


def test_ranges(path: Path) -> None:
    """Ranges lie in the file one after the other; those that touch are one."""
    ranges = [(0, 2), (2, 3), (9, 1), (0x1000, 4)]
    options = [(gfn * P, pages * P) for gfn, pages in ranges]
    with opened(path, packed(ranges), ranges=iter(options)) as backend:
        assert there(backend) == [(0, 5), (9, 1), (0x1000, 4)]
        assert len(list(backend.runs(0, 1 << 40))) == 3  # type: ignore[attr-defined] # a RawBackend


def test_more_than_the_ranges(path: Path) -> None:
    """Data after the last range is ignored."""
    with opened(path, memory(4, 3) + b"trailer", ranges=[(4 * P, 3 * P)]) as backend:
        assert there(backend) == [(4, 3)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"address": 5}, ValueError, "address 0x5 must be a multiple of 0x1000"),
        ({"address": -P}, ValueError, "address -0x1000 must be .* not negative"),
        ({"address": 1 << 52}, ValueError, "end beyond"),
        ({"address": "0x1000"}, TypeError, "address must be an int, not str"),
        ({"address": 0, "ranges": [(0, P)]}, TypeError, "either address= or ranges="),
        ({"ranges": []}, ValueError, "ranges= is empty"),
        ({"ranges": [(0, P), (5, P)]}, ValueError, "both must be multiples"),
        ({"ranges": [(0, P), (P, 5)]}, ValueError, "both must be multiples"),
        ({"ranges": [(P, P), (0, P)]}, ValueError, "0x0 must not begin before 0x2000"),
        ({"ranges": [(0, 2 * P), (P, P)]}, ValueError, "0x1000 must not begin before 0x2000"),
        ({"ranges": [(0, 0)]}, ValueError, "nothing to map"),
        ({"ranges": [0]}, TypeError, r"\(address, length\) pairs, not 0"),
        ({"ranges": [(1 << 51, 1 << 52)]}, ValueError, "ends beyond"),
        ({"size": 5}, TypeError, "size"),
    ],
)
def test_wrong_arguments(
    path: Path, options: dict[str, object], error: type[Exception], message: str
) -> None:
    """Each is refused by name, and the file is closed again."""
    before = open_files()
    with pytest.raises(error, match=message):
        opened(path, memory(0, 4), **options)
    assert open_files() <= before


def test_a_file_that_is_shorter_than_its_ranges(path: Path) -> None:
    """The error names the range, its place, and how much is missing."""
    message = r"guest.img: range 0x5000\.\.0x7000, at offset 0x1000, lacks 0x7 bytes: .* 0x2ff9"
    with pytest.raises(CorruptImageError, match=message):
        opened(path, memory(0, 3)[:-7], ranges=[(0, P), (5 * P, 2 * P), (9 * P, P)])


@pytest.mark.parametrize("options", [{}, {"address": 0}, {"ranges": [(0, P)]}])
def test_an_empty_file(path: Path, options: dict[str, object]) -> None:
    """An empty file is not a guest's memory."""
    with pytest.raises(CorruptImageError, match="guest.img is empty"):
        opened(path, b"", **options)


def test_lime(path: Path) -> None:
    """A LiME file is recognised, and brings its ranges, in whatever order."""
    with opened(path, lime([(1, 9), (0x1000, 4), (0x20, 3)])) as backend:
        assert there(backend) == [(1, 9), (0x20, 3), (0x1000, 4)]


def test_lime_taken_as_it_is(path: Path) -> None:
    """With an address or ranges it is a file as any other."""
    content = lime([(1, 3)])
    for options in ({"address": 0}, {"ranges": [(0, P)]}):
        with opened(path, content, **options) as backend, MapCache(backend) as cache:
            assert cache.read(0, P) == content[:P]


def test_parts_of_pages_in_lime(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A page of which a range has a part is present; the bytes that are missing are zeros."""
    three = memory(1, 3)
    content = lime_range(P + 8, three[8:-1]) + lime_range(0x10 * P + 1, b"x" * 100)
    with opened(path, content) as backend, MapCache(backend) as cache:
        assert list(cache.present(0, 1 << 52)) == [(P, 3 * P), (0x10 * P, P)]
        assert cache.memory_end == 0x11 * P
        assert cache.read(P, 3 * P) == bytes(8) + three[8:-1] + bytes(1)
        assert cache.read(0x10 * P, P) == b"\0" + b"x" * 100 + bytes(P - 101)
        pages = [("0x1000", 8), ("0x3000", 1), ("0x10000", P - 100)]
        assert backend.describe() == {
            "partial_pages": [{"page": page, "missing_bytes": size} for page, size in pages]
        }
    assert "guest.img: 3 pages are in the file only in part: 4005 of their bytes are" in caplog.text


def test_ranges_of_avml(path: Path) -> None:
    """Each lacks its last byte, and they adjoin inside pages: only these bytes are missing."""
    edges = [0, 2 * P, 5 * P + 0x18, 7 * P + 0xC58, 9 * P]
    content = b"".join(
        lime_range(first, memory_at(first, end - first - 1)) for first, end in pairwise(edges)
    )
    with opened(path, content) as backend, MapCache(backend, bucket_shift=14) as cache:
        expected = bytearray(memory(0, 9))
        for end in edges[1:]:
            expected[end - 1] = 0
        assert cache.read(0, 9 * P) == expected
        assert [int(page["page"], 16) for page in listed(backend)] == [P, 5 * P, 7 * P, 8 * P]
        for address in range(0, 9 * P, 0x801):
            assert cache.read(address, 3) == expected[address : address + 3]


def listed(backend: Backend) -> list[dict[str, str]]:
    """Return what `info` lists of the pages that a file has in part."""
    return backend.describe()["partial_pages"]  # type: ignore[return-value] # of this shape


def test_partial_pages_are_dumped_as_they_read(path: Path, tmp_path: Path) -> None:
    """A dump of a source with pages in parts has these pages, with zeros."""
    three = memory(1, 3)
    with opened(path, lime_range(P + 8, three[8:-1])) as backend:
        write_coredump(backend, tmp_path / "core")
        with open_backend("coredump", path=tmp_path / "core") as dump, MapCache(dump) as cache:
            assert list(cache.present(0, 8 * P)) == [(P, 3 * P)]
            assert cache.read(P, 3 * P) == bytes(8) + three[8:-1] + bytes(1)


def test_more_parts_than_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pages in parts have a limit in number; those beyond it are holes, and counted."""
    monkeypatch.setattr("xenmapcache.files.runs.MAX_FRAGMENTS", 4)
    with opened(path, b"".join(lime_range(gfn * P, b"x") for gfn in range(5))) as backend:
        assert list(backend.present(0, 99) or ()) == [(0, 2)]
    assert "3 pages are missing, although the file has parts of them" in caplog.text


def test_pages_that_two_ranges_complete(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is missing of a page whose parts are in two ranges."""
    two = memory(1, 2)
    content = lime_range(P + 100, two[100:]) + lime_range(P, two[:100])
    with opened(path, content) as backend:
        assert there(backend) == [(1, 2)]
        assert backend.describe() == {}
    assert not caplog.records


@pytest.mark.parametrize("zeros", [1, 5, 31, 32, 512, 1 << 20, (1 << 20) + 1])
def test_zeros_after_the_last_range(path: Path, zeros: int) -> None:
    """Direct I/O leaves them; they hold no memory."""
    with opened(path, GOOD + bytes(zeros)) as backend:
        assert there(backend) == [(1, 1)]


def test_a_lot_of_zeros(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a sparse end of 1 TiB some MiB are looked at, and a warning says so."""
    path.write_bytes(GOOD)
    os.truncate(path, 1 << 40)
    with calls_at_most(1000), open_backend("raw", path=path) as backend:
        assert there(backend) == [(1, 1)]
    assert "0x1000000 of 0xffffffefe0 bytes were looked at" in caplog.text


@pytest.mark.parametrize(("first", "last"), [(8, 7), (0, (1 << 64) - 1), (1 << 60, (1 << 60) - 1)])
def test_empty_ranges(path: Path, first: int, last: int) -> None:
    """A range whose last address comes before its first one is empty."""
    empty = struct.pack("<IIQQQ", 0x4C694D45, 1, first, last, 0)
    with opened(path, empty + GOOD + empty) as backend:
        assert there(backend) == [(1, 1)]
    with pytest.raises(CorruptImageError, match="guest.img: no range has memory in the file"):
        opened(path, empty)


@pytest.mark.slow
def test_very_many_empty_ranges(path: Path) -> None:
    """A file of nothing but empty ranges is given up at a limit."""
    path.write_bytes(struct.pack("<IIQQQ", 0x4C694D45, 1, 8, 7, 0) * 140_000)
    with calls_at_most(1 << 21), pytest.raises(CorruptImageError, match="header 131072 at"):
        open_backend("raw", path=path)


def test_lime_that_was_cut_off(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused with the option that opens its intact part; the rest are holes, counted."""
    content = lime([(1, 2), (0x10, 5)])[: -2 * P - 7]
    with pytest.raises(CorruptImageError, match="0x2007 bytes are missing; salvage=True .--salva"):
        opened(path, content)
    assert not caplog.records
    with opened(path, content, salvage=True) as backend:
        assert there(backend) == [(1, 2), (0x10, 2)]
    assert "is truncated: 0x3000 bytes of its memory are missing, and 3 pages are" in caplog.text


def test_lime_that_is_damaged_in_the_middle(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The ranges before the damage can be opened."""
    content = lime([(1, 2)]) + b"x" * 100 + lime([(9, 1)])
    with pytest.raises(CorruptImageError, match="header 1 at 0x2020 has magic .*; salvage=True"):
        opened(path, content)
    with opened(path, content, salvage=True) as backend:
        assert there(backend) == [(1, 2)]
    assert "what follows there is missing, and how much that is is unknown" in caplog.text
    with pytest.raises(CorruptImageError, match="header 0 at 0x0 is truncated: the file ends at"):
        opened(path, GOOD[:20], salvage=True)


def test_ranges_that_were_cut_off(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of an image that is shorter than its ranges, what the file has can be opened."""
    ranges = [(0, P), (5 * P, 2 * P), (9 * P, P)]
    content = packed([(0, 1), (5, 2)])[:-7]
    with pytest.raises(CorruptImageError, match="lacks 0x7 bytes: .*; salvage=True"):
        opened(path, content, ranges=ranges)
    with opened(path, content, ranges=ranges, salvage=True) as backend:
        assert there(backend) == [(0, 1), (5, 1)]
    assert "0x2000 bytes of its memory are missing, and 2 pages are missing" in caplog.text


HEADER = struct.calcsize("<IIQQQ")
GOOD = lime([(1, 1)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:20], "LiME header 0 at 0x0 is truncated: the file ends at 0x14"),
        (
            GOOD[:-1],
            "0 at 0x0: its range has 0x1000 bytes, .* at 0x101f; 0x1 bytes are missing",
        ),
        (GOOD + b"xyz", "LiME header 1 at 0x1020 is truncated"),
        (GOOD + bytes(40) + b"x", "header 1 at 0x1020 has magic 0x0 and version 0"),
        (lime_range(0, bytes(P), version=2), "header 0 at 0x0 has magic .* and version 2"),
        (struct.pack("<IIQQQ", 0x4C694D45, 1, 8, 6, 0), r"range 0x8\.\.0x6 must ascend"),
        (struct.pack("<IIQQQ", 0x4C694D45, 1, 0, 1 << 52, 0), r"must ascend and lie below 2\*\*52"),
        (struct.pack("<IIQQQ", 0x4C694D45, 1, 0, (1 << 52) - 1, 0), "bytes are missing"),
        (lime([(1, 4), (4, 1)]), r"LiME range 0x4000\.\.0x5000 at 0x4040 overlaps"),
        (lime([(1, 1), (1, 1)]), "overlaps another range, which ends at 0x2000"),
    ],
)
def test_lime_that_lies(path: Path, content: bytes, message: str) -> None:
    """The error names the file, which header, and where."""
    before = open_files()
    with pytest.raises(CorruptImageError, match=f"guest.img.*{message}"):
        opened(path, content)
    assert open_files() <= before


def test_too_many_ranges(path: Path) -> None:
    """A file of nothing but headers is given up at the limit, each header looked at once."""
    content = b"".join(lime_range(2 * number, b"x") for number in range(70_000))
    path.write_bytes(content)
    with calls_at_most(80 * 65_536):
        with pytest.raises(CorruptImageError, match="at most 65536 ranges are read"):
            open_backend("raw", path=path)


def test_avml(path: Path) -> None:
    """Compressed files of AVML are named, with what to do."""
    with pytest.raises(UnsupportedOperationError, match="is compressed by AVML: .* avml-convert"):
        opened(path, b"AVML" + bytes(100))


@pytest.mark.slow
def test_a_large_image_costs_nothing_to_open(path: Path) -> None:
    """A sparse image of 1 TiB opens and reads in a process that may have little memory."""
    path.touch()
    os.truncate(path, 1 << 40)
    code = (
        "import resource, sys\nfrom xenmapcache import MapCache, open_backend\n"
        "with open_backend('raw', path=sys.argv[1]) as backend, MapCache(backend) as cache:\n"
        "    cache.read(0, 8)\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "    for address in range(0, 1 << 40, 1 << 34):\n"
        "        assert cache.read(address, 8) == bytes(8)\n"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)


def test_lime_ranges_that_touch(tmp_path: Path) -> None:
    """Ranges may begin at 0, and where the one before them ends."""
    path = tmp_path / "guest.lime"
    path.write_bytes(lime([(0, 2), (2, 3), (9, 1)]))
    with open_backend("raw", path=path) as backend:
        assert list(backend.present(0, 100) or ()) == [(0, 5), (9, 1)]
        assert backend.map(2, 3, writable=False).view(0, 3 * PAGE_SIZE) == memory(2, 3)


def test_flat_up_to_the_last_address(tmp_path: Path) -> None:
    """An image may end where the address space does, and no page is beyond it."""
    path = tmp_path / "guest.img"
    path.write_bytes(memory(0, 2))
    with open_backend("raw", path=path, address=(1 << 52) - 2 * PAGE_SIZE) as backend:
        assert backend.memory_end == 1 << 52
    with pytest.raises(ValueError, match="end beyond"):
        open_backend("raw", path=path, address=(1 << 52) - PAGE_SIZE)
