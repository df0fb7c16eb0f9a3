"""Flat images, images of ranges, and LiME files."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.descriptors import open_files
from tests.effort import calls_at_most
from tests.images.writers import lime, lime_range, memory, packed
from xenmapcache import (
    Backend,
    CorruptImageError,
    FaultError,
    MapCache,
    UnsupportedOperationError,
    open_backend,
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
    """Return what is there, after a comparison of all of it with what should be."""
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
    """What the last page of a flat image lacks reads as zeros."""
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
    """What a file has behind its ranges is not looked at."""
    with opened(path, memory(4, 3) + b"trailer", ranges=[(4 * P, 3 * P)]) as backend:
        assert there(backend) == [(4, 3)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"address": 5}, ValueError, "address 0x5 is not the beginning of a page"),
        ({"address": -P}, ValueError, "address -0x1000 is not the beginning"),
        ({"address": 1 << 52}, ValueError, "ends beyond"),
        ({"address": "0x1000"}, TypeError, "address must be an int, not str"),
        ({"address": 0, "ranges": [(0, P)]}, TypeError, "either address= or ranges="),
        ({"ranges": []}, ValueError, "ranges= is empty"),
        ({"ranges": [(0, P), (5, P)]}, ValueError, "is not whole pages"),
        ({"ranges": [(0, P), (P, 5)]}, ValueError, "is not whole pages"),
        ({"ranges": [(P, P), (0, P)]}, ValueError, "0x0 begins before .* ends, 0x2000"),
        ({"ranges": [(0, 2 * P), (P, P)]}, ValueError, "0x1000 begins before .* ends, 0x2000"),
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
    assert open_files() == before


def test_a_file_that_is_shorter_than_its_ranges(path: Path) -> None:
    """The error names the range, its place, and how much is missing."""
    message = r"guest.img ends at 0x2ff9: of the range 0x5000\.\.0x7000, at 0x1000, 0x7 bytes"
    with pytest.raises(CorruptImageError, match=message):
        opened(path, memory(0, 3)[:-7], ranges=[(0, P), (5 * P, 2 * P), (9 * P, P)])


@pytest.mark.parametrize("options", [{}, {"address": 0}, {"ranges": [(0, P)]}])
def test_an_empty_file(path: Path, options: dict[str, object]) -> None:
    """It is no guest's memory."""
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


def test_parts_of_pages_in_lime(path: Path) -> None:
    """Of ranges that begin or end in a page only whole pages are there: the rest would be a lie."""
    three = memory(1, 3)
    content = lime_range(P + 8, three[8:-1]) + lime_range(0x10 * P + 1, b"x" * 100)
    with opened(path, content) as backend:
        assert there(backend) == [(2, 1)]
    with pytest.raises(CorruptImageError, match="no LiME range has a whole page"):
        opened(path, lime_range(5, b"x" * 100))


HEADER = struct.calcsize("<IIQQQ")
GOOD = lime([(1, 1)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:20], "LiME header 0 at 0x0 is cut off: the file ends at 0x14"),
        (GOOD[:-1], "header 0 at 0x0 is of 0x1000 bytes, .* ends at 0x101f: 0x1 bytes are missing"),
        (GOOD + b"xyz", "LiME header 1 at 0x1020 is cut off"),
        (GOOD + bytes(40), "header 1 at 0x1020 has magic 0x0 and version 0"),
        (lime_range(0, bytes(P), version=2), "header 0 at 0x0 has magic .* and version 2"),
        (struct.pack("<IIQQQ", 0x4C694D45, 1, 8, 7, 0), r"is of 0x8\.\.0x7, which is no range"),
        (struct.pack("<IIQQQ", 0x4C694D45, 1, 0, 1 << 52, 0), "which is no range"),
        (struct.pack("<IIQQQ", 0x4C694D45, 1, 0, (1 << 52) - 1, 0), "bytes are missing"),
        (lime([(1, 4), (4, 1)]), r"LiME range 0x4000\.\.0x5000 at 0x4040 overlaps"),
        (lime([(1, 1), (1, 1)]), "overlaps another, which ends at 0x2000"),
    ],
)
def test_lime_that_lies(path: Path, content: bytes, message: str) -> None:
    """The error names the file, which header, and where."""
    before = open_files()
    with pytest.raises(CorruptImageError, match=f"guest.img.*{message}"):
        opened(path, content)
    assert open_files() == before


def test_too_many_ranges(path: Path) -> None:
    """A file of nothing but headers is given up after so many, each looked at once."""
    content = b"".join(lime_range(2 * number, b"x") for number in range(70_000))
    path.write_bytes(content)
    with calls_at_most(80 * 65_536):
        with pytest.raises(CorruptImageError, match="no more than 65536 ranges are read"):
            open_backend("raw", path=path)


def test_avml(path: Path) -> None:
    """Compressed files of AVML are named, with what to do."""
    with pytest.raises(UnsupportedOperationError, match="guest.img is compressed by AVML: avml-"):
        opened(path, b"AVML" + bytes(100))


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
    """An image may end where the address space does, and no page behind it."""
    path = tmp_path / "guest.img"
    path.write_bytes(memory(0, 2))
    with open_backend("raw", path=path, address=(1 << 52) - 2 * PAGE_SIZE) as backend:
        assert backend.memory_end == 1 << 52
    with pytest.raises(ValueError, match="ends beyond"):
        open_backend("raw", path=path, address=(1 << 52) - PAGE_SIZE)
