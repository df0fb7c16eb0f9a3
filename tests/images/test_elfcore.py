"""ELF cores with physical addresses."""

from __future__ import annotations

import builtins
import errno
import os
import random
import struct
import subprocess
import sys
from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from tests.descriptors import open_files
from tests.effort import calls_at_most
from tests.images.writers import Load, elf_core, elf_core_of, memory, note
from xenmapcache import (
    BackendUnavailableError,
    CorruptImageError,
    MapCache,
    UnsupportedOperationError,
    XenCallError,
    elf,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.elfcore import ElfCoreBackend, first_wins
from xenmapcache.backends.image import Run

P = PAGE_SIZE
BITS = pytest.mark.parametrize("bits", [64, 32])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vmcore"


def opened(path: Path, content: bytes) -> ElfCoreBackend:
    path.write_bytes(content)
    os.utime(path, (1, 1))
    return ElfCoreBackend(path=path)


def there(backend: ElfCoreBackend) -> list[tuple[int, int]]:
    """Return what is there, in pages."""
    found = list(backend.present(0, 1 << 40))
    assert backend.memory_end == sum(found[-1]) * P
    return found


def data(backend: ElfCoreBackend, gfn: int, pages: int = 1) -> bytes:
    return bytes(backend.map(gfn, pages, writable=False).view(0, pages * P))


@BITS
@pytest.mark.parametrize("align", [1, 8, P])
def test_cores(path: Path, bits: int, align: int) -> None:
    """Of both classes, wherever the segments lie in the file, each page is at its address."""
    ranges = [(1, 9), (0x100, 20), (0xFFFFE, 2)]
    content = elf_core_of(ranges, bits=bits, align=align)
    assert ELFFile(BytesIO(content)).num_segments() == 4  # what we write is an ELF file
    with opened(path, content) as backend:
        assert there(backend) == ranges
        assert backend.bits == bits
        for gfn, pages in ranges:
            assert data(backend, gfn, pages) == memory(gfn, pages)
        mapping = backend.map(0x80, 0x100, writable=False)
        assert mapping.holes == 0x100 - 20


def test_more_than_32_bits(path: Path) -> None:
    """A core of 64 bits has memory anywhere in 52 bits."""
    gfn = (1 << 40) - 2
    with opened(path, elf_core([Load(0, memory(0, 1)), Load(gfn * P, memory(gfn, 2))])) as backend:
        assert there(backend) == [(0, 1), (gfn, 2)]
        assert data(backend, gfn, 2) == memory(gfn, 2)


def test_segments_in_any_order(path: Path) -> None:
    """The segments of a file need not ascend."""
    with opened(path, elf_core_of([(9, 2), (0, 3), (5, 1)])) as backend:
        assert there(backend) == [(0, 3), (5, 1), (9, 2)]
        assert data(backend, 9, 2) == memory(9, 2)


def test_memory_that_the_file_has_not(path: Path) -> None:
    """Where p_filesz is less than p_memsz, the rest is a hole, and no zeros are made up."""
    loads = [Load(4 * P, memory(4, 2), 5 * P), Load(16 * P, b"", 3 * P), Load(0, memory(0, 1))]
    with opened(path, elf_core(loads)) as backend:
        assert there(backend) == [(0, 1), (4, 2)]
        assert MapCache(backend).memory_end == 6 * P


def test_parts_of_pages(path: Path) -> None:
    """A page is there if one segment has all of it."""
    loads = [
        Load(P + 8, memory(1, 3)[8:]),  # begins in page 1
        Load(5 * P, memory(5, 3)[:-1]),  # ends in page 7
        Load(7 * P + 100, b"x" * 10),  # has a part of page 7 only
        Load(9 * P, memory(9, 1)[:2048]),
        Load(9 * P + 2048, memory(9, 1)[2048:]),  # page 9 in two parts
        Load(0xB * P - 8, b"y" * 8 + memory(0xB, 1) + b"z"),
    ]
    with opened(path, elf_core(loads)) as backend:
        assert there(backend) == [(2, 2), (5, 2), (0xB, 1)]
        for gfn, pages in there(backend):
            assert data(backend, gfn, pages) == memory(gfn, pages)


def test_the_kernel_twice(path: Path) -> None:
    """As in /proc/vmcore, where the kernel's text has a segment of its own: the first counts."""
    loads = [Load(4 * P, b"k" * (2 * P)), Load(0, memory(0, 8)), Load(3 * P, b"n" * (2 * P))]
    with opened(path, elf_core(loads)) as backend:
        assert there(backend) == [(0, 8)]
        expected = memory(0, 4) + b"k" * (2 * P) + memory(6, 2)
        assert data(backend, 0, 8) == expected
        assert [data(backend, gfn) for gfn in range(8)] == [
            expected[gfn * P :][:P] for gfn in range(8)
        ]


def brute_force(runs: Sequence[Run]) -> dict[int, int]:
    places: dict[int, int] = {}
    for run in runs:
        for page in range(run.pages):
            places.setdefault(run.gfn + page, run.offset + page * P)
    return places


def test_the_first_counts_however_they_overlap() -> None:
    """Many overlapping runs give, page for page, what the first of each gives; in few runs."""
    rng = random.Random(1)
    for _ in range(300):
        runs = [
            Run(rng.randrange(30), rng.randrange(1, 12), rng.randrange(1 << 30))
            for _ in range(rng.randrange(1, 9))
        ]
        if rng.random() < 0.5:  # some that go on where others end, in the file too
            runs += [Run(run.gfn + run.pages, 3, run.offset + run.pages * P) for run in runs]
            rng.shuffle(runs)
        found = first_wins(runs)
        assert brute_force(found) == brute_force(runs)
        for before, after in pairwise(found):
            end = before.gfn + before.pages
            assert end <= after.gfn
            goes_on = before.offset + before.pages * P == after.offset
            assert not (end == after.gfn and goes_on)


def test_neighbours_are_one_run(path: Path) -> None:
    """Segments that go on in each other, in memory and in the file, are mapped in one piece."""
    with opened(path, elf_core_of([(0, 3), (3, 4)], align=P)) as backend:
        assert [run[:2] for run in backend.runs(0, 100)] == [(0, 7)]


@BITS
def test_more_segments_than_the_header_can_count(path: Path, bits: int) -> None:
    """With PN_XNUM their number is in the first section header, as the kernel and QEMU do it."""
    loads = [Load(gfn * P, memory(gfn, 1)) for gfn in range(5)]
    with opened(path, elf_core(loads, bits=bits, many=True)) as backend:
        assert there(backend) == [(0, 5)]
        assert data(backend, 4) == memory(4, 1)


def test_notes(path: Path) -> None:
    """They are kept as they are, in order, with what is known of them for people."""
    info = b"OSRELEASE=6.1.0\nPAGESIZE=4096\n"
    notes = note(b"CORE", 1, b"r" * 336) + note(b"QEMU", 0, b"q" * 5) + note(b"VMCOREINFO", 0, info)
    loads = [Load(0, memory(0, 1))]
    with opened(path, elf_core(loads, notes=notes + bytes(64))) as backend:
        assert [tuple(each) for each in backend.notes] == [
            ("CORE", 1, b"r" * 336),
            ("QEMU", 0, b"q" * 5),
            ("VMCOREINFO", 0, info),
        ]
        assert backend.describe() == {
            "bits": 64,
            "machine": "x86-64",
            "notes": [
                {"name": "CORE", "kind": 1, "size": 336},
                {"name": "QEMU", "kind": 0, "size": 5},
                {"name": "VMCOREINFO", "kind": 0, "size": len(info)},
            ],
            "vmcoreinfo": info.decode(),
        }
    with opened(path, elf_core(loads)) as backend:
        assert backend.notes == ()


def test_notes_of_many_processors(path: Path) -> None:
    """Of thousands of processors there are megabytes, which are read; more than that is a lie."""
    notes = note(b"CORE", 1, bytes(336)) * 8192
    with opened(path, elf_core([Load(0, memory(0, 1))], notes=notes)) as backend:
        assert len(backend.notes) == 8192
    with pytest.raises(CorruptImageError, match="bytes of notes in segment 0: absurd"):
        opened(path, elf_core([Load(0, memory(0, 1))], notes=bytes((1 << 24) + 12)))


def test_segments_without_a_physical_address(path: Path) -> None:
    """All ones, as for the vmalloc area in a live kernel's core, is no address."""
    for bits in (64, 32):
        loads = [Load((1 << bits) - 1, b"v" * P), Load(P, memory(1, 1))]
        with opened(path, elf_core(loads, bits=bits)) as backend:
            assert there(backend) == [(1, 1)]


GOOD = elf_core([Load(P, memory(1, 1)), Load(3 * P, memory(3, 1))])


def changed(place: int, form: str, value: int, content: bytes = GOOD) -> bytes:
    altered = bytearray(content)
    struct.pack_into(f"<{form}", altered, place, value)
    return bytes(altered)


LOAD = 64 + 56  # the first PT_LOAD's header

LIES = {
    "empty": (b"", "begins with nothing: that is no ELF file"),
    "something else": (b"PK\3\4" + bytes(100), "begins with 504b0304: that is no ELF file"),
    "header cut off": (GOOD[:40], "ELF header that is cut off"),
    "table cut off": (GOOD[:150], "table of program headers"),
    "memory cut off": (GOOD[:-1], r"segment 2 is 0x10e8\.\.0x20e8, and the file ends at 0x20e7"),
    "class": (changed(4, "B", 3), "of no class that there is"),
    "no core": (changed(16, "H", 2), "ELF file of type 2, and no core"),
    "no segments": (changed(56, "H", 0), "no segment of memory: open a file of xl dump-core"),
    "too many segments": (changed(56, "H", 0xFFFE), "table of program headers"),
    "uncounted segments": (changed(56, "H", 0xFFFF), "no section header, which should count"),
    "table elsewhere": (changed(32, "Q", 1 << 63), "table of program headers"),
    "size of headers": (changed(54, "H", 57), "headers of 57 bytes"),
    "offset": (changed(LOAD + 8, "Q", (1 << 64) - 1), "segment 1 is 0xf*"),
    "size in the file": (changed(LOAD + 32, "Q", 1 << 62), "segment 1 is "),
    "size in memory": (changed(LOAD + 40, "Q", 8), "more bytes than memory in segment 1"),
    "address": (changed(LOAD + 24, "Q", 1 << 52), "beyond the 52 bits of physical addresses"),
    "notes": (changed(64 + 32, "Q", 1 << 62), "segment 0 is "),
    "a process": (
        elf_core([Load(0, memory(0, 1)), Load(0, memory(1, 1))]),
        "no physical addresses: it is the core of a process",
    ),
    "no whole page": (elf_core([Load(8, b"x" * 100)]), "no segment with a whole page"),
    "a note": (
        elf_core([Load(0, memory(0, 1))], notes=struct.pack("<III", 4, 1 << 31, 1)),
        "note at 0xb0 that ends beyond segment 0",
    ),
    "many notes": (
        elf_core([Load(0, memory(0, 1))], notes=struct.pack("<III", 0, 0, 1) * 70_000),
        "more than 65536 notes in segment 0",
    ),
    "sections": (changed(60, "H", 5), "has section headers of 0 bytes"),
}


@pytest.mark.parametrize("name", LIES)
def test_files_that_lie(path: Path, name: str) -> None:
    """The error names the file, what is wrong and where; and the file is closed again."""
    content, message = LIES[name]
    before = open_files()
    with pytest.raises(CorruptImageError, match=f"vmcore .*{message}"):
        opened(path, content)
    assert open_files() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"KDUMP   " + bytes(100), "makedumpfile's compressed format, and not ELF: .* -E"),
        (b"DISKDUMP" + bytes(100), "makedumpfile's compressed format"),
        (b"makedumpfile\0" + bytes(100), "flattened by makedumpfile -F: makedumpfile -R"),
        (changed(5, "B", 2), "big-endian ELF file"),
    ],
)
def test_relatives(path: Path, content: bytes, message: str) -> None:
    """Dumps that are right, and cannot be read, are called what they are, with what to do."""
    with pytest.raises(UnsupportedOperationError, match=f"vmcore is .*{message}"):
        opened(path, content)


def test_without_pyelftools(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed, the error says how to install it."""
    original = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("elftools"):
            raise ImportError(f"No module named {name!r}")
        return original(name, *rest)  # type: ignore[arg-type] # whatever __import__ takes

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendUnavailableError, match=r"pip install xenmapcache\[elf\]"):
        opened(path, GOOD)


def test_many_segments_are_little_work(path: Path) -> None:
    """A core of tens of thousands of segments, each overlapping others: each is looked at once."""
    loads = [Load(gfn % 5000 * P, b"", 0) for gfn in range(60_000)]
    content = bytearray(elf_core(loads, many=True))
    for number in range(1, 60_001):
        struct.pack_into("<QQ", content, 64 + 56 * number + 32, P, P)
        struct.pack_into("<Q", content, 64 + 56 * number + 8, 0)
    path.write_bytes(content)
    with calls_at_most(20 * 60_000):
        with ElfCoreBackend(path=path) as backend:
            assert there(backend) == [(0, 5000)]


def test_a_large_dump_takes_no_memory(path: Path) -> None:
    """Neither a large core, nor one that lies about its size, is read to be opened."""
    path.write_bytes(GOOD[: 64 + 3 * 56])
    with path.open("r+b") as file:
        file.seek(LOAD + 32)
        file.write(struct.pack("<QQ", 1 << 40, 1 << 40))
        file.seek(LOAD + 56 + 24)
        file.write(struct.pack("<QQQ", 1 << 45, P, P))
        file.truncate(2 << 40)
    code = (
        "import resource, sys, tracemalloc\nfrom xenmapcache import open_backend\n"
        "open_backend('elfcore', path=sys.argv[1]).close()\n"
        "tracemalloc.start()\n"
        "with open_backend('elfcore', path=sys.argv[1]) as backend:\n"
        "    assert next(backend.present(0, 1 << 40)) == (1, 1 << 28)\n"
        "    assert tracemalloc.get_traced_memory()[1] < 1 << 20\n"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)


def test_a_disk_that_fails_among_the_headers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told as that, and not as a file that is wrong."""

    def fail(*_: object) -> None:
        raise XenCallError("pread", None, errno.EIO)

    monkeypatch.setattr(elf._Stream, "readinto", fail)
    with pytest.raises(XenCallError, match="EIO"):
        opened(path, GOOD)


def test_more_than_a_page_without_a_physical_address(tmp_path: Path) -> None:
    """All ones is no address in a core of 32 bits either, however long the segment is."""
    path = tmp_path / "vmcore"
    for bits in (64, 32):
        loads = [Load((1 << bits) - 1, b"v" * 3 * PAGE_SIZE), Load(PAGE_SIZE, memory(1, 1))]
        path.write_bytes(elf_core(loads, bits=bits))
        with ElfCoreBackend(path=path) as backend:
            assert list(backend.present(0, 1 << 40)) == [(1, 1)]


@pytest.mark.parametrize(("bits", "place"), [(64, 64 + 0x28), (32, 52 + 0x14)])
def test_notes_that_take_no_memory(tmp_path: Path, bits: int, place: int) -> None:
    """Notes are as long as they are in the file, though their segment's p_memsz is 0."""
    content = bytearray(elf_core([Load(0, memory(0, 1))], notes=note(b"CORE", 1, b"r"), bits=bits))
    content[place : place + 4] = bytes(4)
    path = tmp_path / "vmcore"
    path.write_bytes(content)
    with ElfCoreBackend(path=path) as backend:
        assert [tuple(each) for each in backend.notes] == [("CORE", 1, b"r")]


def test_a_note_that_ends_beyond_its_segment(tmp_path: Path) -> None:
    """A note that is cut off is no shorter note."""
    path = tmp_path / "vmcore"
    notes = note(b"CORE", 1, b"r" * 16)[:-4]
    path.write_bytes(elf_core([Load(0, memory(0, 1))], notes=notes))
    with pytest.raises(CorruptImageError, match="ends beyond segment 0"):
        ElfCoreBackend(path=path)
