"""ELF cores with physical addresses."""

from __future__ import annotations

import errno
import os
import re
import struct
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from tests.descriptors import open_files
from tests.effort import calls_at_most
from tests.images.writers import Load, elf_core, elf_core_of, memory, note
from xenmapcache import (
    CorruptImageError,
    FaultError,
    MapCache,
    UnsupportedOperationError,
    XenCallError,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.elfcore import ElfCoreBackend
from xenmapcache.files.image import ImageFile
from xenmapcache.formats.content import InMemory
from xenmapcache.formats.elf import Elf

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
    """Return the present ranges, in pages."""
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


def test_parts_of_pages(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A page is present if the file has a part of it: the parts are joined, the rest is zeros."""
    loads = [
        Load(P + 8, memory(1, 3)[8:]),  # begins in page 1
        Load(5 * P, memory(5, 3)[:-1]),  # ends in page 7
        Load(7 * P + P - 1, memory(7, 1)[-1:]),  # has the byte that is missing there
        Load(9 * P, memory(9, 1)[:2048]),
        Load(9 * P + 2048, memory(9, 1)[2048:-9]),  # page 9 in two parts
        Load(0xC * P - 8, b"y" * 8 + memory(0xC, 1) + b"z"),
    ]
    with opened(path, elf_core(loads)) as backend:
        assert there(backend) == [(1, 3), (5, 3), (9, 1), (0xB, 3)]
        assert data(backend, 1, 3) == bytes(8) + memory(1, 3)[8:]
        assert data(backend, 5, 3) == memory(5, 3)
        assert data(backend, 9) == memory(9, 1)[:-9] + bytes(9)
        assert data(backend, 0xB, 3) == (
            bytes(P - 8) + b"y" * 8 + memory(0xC, 1) + b"z" + bytes(P - 1)
        )
        with MapCache(backend) as cache:
            assert cache.read(9 * P + P - 10, 10) == memory(9, 1)[-10:-9] + bytes(9)
        assert backend.partial_pages == ((1, 8), (9, 9), (0xB, P - 8), (0xD, P - 1))
        listed = backend.describe()["partial_pages"]
        assert listed == [
            {"page": "0x1000", "missing_bytes": 8},
            {"page": "0x9000", "missing_bytes": 9},
            {"page": "0xb000", "missing_bytes": P - 8},
            {"page": "0xd000", "missing_bytes": P - 1},
        ]
    message = "vmcore: 4 pages are in the file only in part: 8200 of their bytes are missing, and "
    assert message in caplog.text


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
                {"name": "CORE", "type": 1, "size": 336},
                {"name": "QEMU", "type": 0, "size": 5},
                {"name": "VMCOREINFO", "type": 0, "size": len(info)},
            ],
            "vmcoreinfo": info.decode(),
        }
    with opened(path, elf_core(loads)) as backend:
        assert backend.notes == ()


def test_notes_of_many_processors(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those of thousands of processors are megabytes, and are read; beyond a limit they are not."""
    notes = note(b"CORE", 1, bytes(336)) * 8192
    with opened(path, elf_core([Load(0, memory(0, 1))], notes=notes)) as backend:
        assert len(backend.notes) == 8192
        assert backend.warnings == ()
    notes = note(b"CORE", 1, bytes(336)) + bytes((1 << 24) + 12)
    with opened(path, elf_core([Load(0, memory(0, 1))], notes=notes)) as backend:
        assert len(backend.notes) == 1
        assert data(backend, 0) == memory(0, 1)
    assert "at most 0x1000000 bytes are read" in caplog.text


DAMAGED_NOTES = {
    "a note that ends beyond its segment": (
        note(b"CORE", 1, b"r" * 16)[:-4],
        "the note at 0xb0 ends beyond segment 0, at 0xd0: it is missing, and what follows it",
        0,
    ),
    "a note after good ones": (
        note(b"CORE", 1, b"r" * 16) * 2 + struct.pack("<III", 4, 1 << 31, 1),
        "the note at 0xf8 ends beyond segment 0",
        2,
    ),
    "more notes than a file can have": (
        struct.pack("<III", 0, 0, 1) * 70_000,
        "notes are missing: at most 65536 are read",
        65_536,
    ),
}


@pytest.mark.parametrize("name", DAMAGED_NOTES)
def test_damaged_notes(path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    """They cost the notes that follow them in their segment, and no memory; a warning says it."""
    notes, message, count = DAMAGED_NOTES[name]
    with opened(path, elf_core([Load(0, memory(0, 1))], notes=notes)) as backend:
        assert len(backend.notes) == count
        assert data(backend, 0) == memory(0, 1)
        assert len(backend.warnings) == 1
    assert f"vmcore: {message}" in caplog.text


def test_notes_beyond_the_end(path: Path) -> None:
    """Of a segment of notes that the file has in part, the notes before its end are read."""
    content = bytearray(elf_core([Load(0, memory(0, 1))], notes=note(b"CORE", 1, b"r" * 16)))
    struct.pack_into("<Q", content, 64 + 32, 1 << 62)
    with opened(path, bytes(content)) as backend:
        assert [each.data for each in backend.notes[:1]] == [b"r" * 16]
        assert "notes are missing: those of segment 0 are 0xb0..0x40" in backend.warnings[0]
    struct.pack_into("<Q", content, 64 + 8, 1 << 62)  # p_offset
    with opened(path, bytes(content)) as backend:
        assert backend.notes == ()


def test_many_damaged_notes_are_one_warning(path: Path) -> None:
    """A thousand segments of notes that are all wrong do not flood the log."""
    content = bytearray(elf_core([Load(0, memory(0, 1))] * 1000))
    for number in range(1000):
        header = (4, 0, 1 << 60, 0, 0, 8, 8, 0)
        struct.pack_into("<IIQQQQQQ", content, 64 + 56 * number, *header)
    with opened(path, bytes(content)) as backend:
        assert len(backend.warnings) == 1
        assert "(and 999 more)" in backend.warnings[0]


def test_segments_without_a_physical_address(path: Path) -> None:
    """All ones, as for the vmalloc area in a live kernel's core, means that there is none."""
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
    "empty": (b"", "begins with nothing: not an ELF file"),
    "something else": (b"PK\2\3" + bytes(100), "begins with 504b0203: not an ELF file"),
    "header cut off": (GOOD[:40], "truncated ELF header"),
    "table cut off": (GOOD[:150], "table of program headers"),
    "memory cut off": (GOOD[:-1], r"segment 2 is 0x10e8\.\.0x20e8, but the file ends at 0x20e7"),
    "class": (changed(4, "B", 3), "EI_CLASS other than 32 or 64"),
    "no core": (changed(16, "H", 2), "e_type is 2; expected 4"),
    "no segments": (
        changed(56, "H", 0),
        "no segment of memory; if xl dump-core wrote it, open it with",
    ),
    "too many segments": (changed(56, "H", 0xFFFE), "table of program headers"),
    "table elsewhere": (changed(32, "Q", 1 << 63), "table of program headers"),
    "size of headers": (changed(54, "H", 57), "e_phentsize is 57; expected 56"),
    "offset": (changed(LOAD + 8, "Q", (1 << 64) - 1), "segment 1 is 0xf*"),
    "a process": (
        elf_core([Load(0, memory(0, 1)), Load(0, memory(1, 1))]),
        "no physical addresses: it is the core of a process",
    ),
    "no memory in the file": (
        elf_core([Load(P, b"", 100)]),
        "no segment has memory in the file",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_files_that_lie(path: Path, name: str) -> None:
    """The error names the file, what is wrong and where; and the file is closed again."""
    content, message = LIES[name]
    before = open_files()
    with pytest.raises(CorruptImageError, match=f"vmcore: .*{message}"):
        opened(path, content)
    assert open_files() <= before


DAMAGED = {
    "beyond 52 bits": (
        changed(LOAD + 24, "Q", 1 << 52),
        "segment 1: 0x10000000000000..0x10000000001000 is beyond 52 bits of physical address",
        [(3, 1)],
    ),
    "partly beyond 52 bits": (
        elf_core([Load(P, memory(1, 1)), Load((1 << 52) - P, memory(0, 2))]),
        "segment 2: 0xffffffffff000..0x10000000001000 is beyond 52 bits",
        [(1, 1), ((1 << 40) - 1, 1)],
    ),
    "more in the file than in memory": (
        changed(LOAD + 32, "Q", 1 << 62),
        "segment 1: p_filesz 0x4000000000000000 exceeds p_memsz 0x1000; the rest of its bytes",
        [(1, 1), (3, 1)],
    ),
    "sections": (
        changed(60, "H", 5),
        "its section headers, which hold no memory, are missing: e_shentsize is 0; expected 64",
        [(1, 1), (3, 1)],
    ),
    "sections beyond the end": (
        changed(58, "H", 64, changed(60, "H", 5, changed(40, "Q", 1 << 62))),
        "its section headers, .* are missing: .*its table of section headers is 0x4000000000000000",
        [(1, 1), (3, 1)],
    ),
    "names of sections": (
        elf_core([Load(P, memory(1, 1))], many=True).replace(
            struct.pack("<HHH", 64, 1, 0), struct.pack("<HHH", 64, 1, 9)
        ),
        "its section headers, .* are missing: .*e_shstrndx is 9, but the file has 1 sections",
        [(1, 1)],
    ),
    "uncounted segments": (
        changed(56, "H", 0xFFFF),
        "the section header that counts its segments .PN_XNUM. is missing: the 3 program headers",
        [(1, 1), (3, 1)],
    ),
    "a count that is cut off": (
        changed(40, "Q", len(GOOD), changed(58, "H", 64, changed(56, "H", 0xFFFF))),
        "the section header that counts its segments .PN_XNUM. is missing: the 3 program headers",
        [(1, 1), (3, 1)],
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_costs_only_its_part(
    path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """A part that contradicts the file is left out with a warning; the rest is readable."""
    content, message, ranges = DAMAGED[name]
    with opened(path, content) as backend:
        assert there(backend) == ranges
        assert data(backend, ranges[0][0]) == memory(ranges[0][0], 1)
        assert re.search(message, backend.warnings[0])
    assert re.search(f"vmcore: {message}", caplog.text)


@pytest.mark.parametrize("damage", [(32, "I", 5), (4, "I", 1), (44, "I", 0)])
def test_a_section_header_that_counts_nothing(path: Path, damage: tuple[int, str, int]) -> None:
    """If the first section header is of a section, or counts no segments, they are counted."""
    place, form, value = damage
    content = elf_core([Load(gfn * P, memory(gfn, 1)) for gfn in range(3)], many=True)
    table = 64 + 4 * 56
    with opened(path, changed(table + place, form, value, content)) as backend:
        assert there(backend) == [(0, 3)]
        counted = place == 32
        assert any("PN_XNUM" in each for each in backend.warnings) is not counted


def test_a_kernel_has_to_count_its_segments() -> None:
    """What is lenient for a dump is not for a file to load: segments could be missing."""
    elf = Elf(InMemory(changed(56, "H", 0xFFFF)))
    with pytest.raises(CorruptImageError, match="no section header counts the segments"):
        elf.loads()


def test_a_dump_that_was_cut_off(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused with the option that opens its intact part; the rest are holes, counted."""
    loads = [Load(P, memory(1, 2)), Load(8 * P, memory(8, 4)), Load(32 * P, memory(32, 2))]
    content = elf_core(loads)
    cut = len(content) - 2 * P - P - 5
    with pytest.raises(CorruptImageError) as refused:
        opened(path, content[:cut])
    assert "segment 2 is 0x2120..0x6120, but the file ends at 0x511b (and 1 more)" in str(
        refused.value
    )
    assert "0x3005 bytes of memory are missing; salvage=True (--salvage on the" in str(
        refused.value
    )
    assert not caplog.records
    with ElfCoreBackend(path=path, salvage=True) as backend:
        assert there(backend) == [(1, 2), (8, 2)]
        assert data(backend, 8, 2) == memory(8, 2)
    assert (
        "vmcore: is truncated: 0x4000 bytes of its memory are missing, and 4 pages are missing "
        "because of that" in caplog.text
    )
    with ElfCoreBackend(path=path, salvage=True) as backend, MapCache(backend) as cache:
        with pytest.raises(FaultError):
            cache.read(10 * P, 1)


def test_memory_that_was_cut_off_and_comes_again(path: Path) -> None:
    """What another segment has is not missing."""
    loads = [Load(0, memory(0, 3)), Load(P, memory(1, 2))]
    content = bytearray(elf_core(loads)[: -2 * P])
    struct.pack_into("<Q", content, 64 + 2 * 56 + 8, len(content) - 2 * P)
    struct.pack_into("<Q", content, 64 + 56 + 8, len(content) - P)
    with pytest.raises(CorruptImageError, match="salvage=True"):
        opened(path, bytes(content))
    with ElfCoreBackend(path=path, salvage=True) as backend:
        assert there(backend) == [(0, 3)]
        assert backend.warnings == ()


def test_salvage_of_a_complete_file(path: Path) -> None:
    """It changes nothing."""
    path.write_bytes(GOOD)
    with ElfCoreBackend(path=path, salvage=True) as backend:
        assert there(backend) == [(1, 1), (3, 1)]
        assert backend.warnings == ()


def test_headers_that_were_cut_off(path: Path) -> None:
    """Of a table of program headers that ends with the file, the complete ones are read."""
    content = bytearray(GOOD + GOOD[64 : 64 + 3 * 56][:-1])
    struct.pack_into("<Q", content, 32, len(GOOD))  # e_phoff
    with pytest.raises(CorruptImageError, match="have 3 entries, and 1 of them are missing; salv"):
        opened(path, bytes(content))
    with ElfCoreBackend(path=path, salvage=True) as backend:
        assert there(backend) == [(1, 1)]
        assert "1 of its 3 program headers are missing" in backend.warnings[0]


def test_zeros_that_were_left_out(path: Path) -> None:
    """Where p_filesz is less than p_memsz are holes, or zeros if the user asks for them."""
    loads = [Load(P, memory(1, 1), 3 * P), Load(3 * P, memory(3, 1)), Load(9 * P, b"", 2 * P)]
    with opened(path, elf_core(loads)) as backend:
        assert there(backend) == [(1, 1), (3, 1)]
        assert backend.describe()["left_out_bytes"] == 4 * P
    with ElfCoreBackend(path=path, zeros=True) as backend, MapCache(backend) as cache:
        assert there(backend) == [(1, 3), (9, 2)]  # another segment's memory comes first
        assert cache.read(P, 3 * P) == memory(1, 1) + bytes(P) + memory(3, 1)
        assert cache.read(9 * P, 2 * P) == bytes(2 * P)
        assert "left_out_bytes" not in backend.describe()
        assert backend.warnings == ()


def test_zeros_of_a_part_of_a_page(path: Path) -> None:
    """If a segment's zeros fill the rest of a page, nothing is missing there."""
    with opened(path, elf_core([Load(P, b"x" * 100, P), Load(8 * P, b"", 100)])) as backend:
        assert backend.partial_pages == ((1, P - 100),)
    with ElfCoreBackend(path=path, zeros=True) as backend:
        assert there(backend) == [(1, 1), (8, 1)]
        assert data(backend, 1) == b"x" * 100 + bytes(P - 100)
        assert backend.partial_pages == ((8, P - 100),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"KDUMP   " + bytes(100), "makedumpfile's compressed format, not ELF: open it as kdump:"),
        (b"DISKDUMP" + bytes(100), "diskdump's compressed format, not ELF: open it as kdump:"),
        (b"makedumpfile\0" + bytes(100), "a flattened dump, not ELF: open it as kdump:"),
        (changed(5, "B", 2), "big-endian ELF file"),
    ],
)
def test_relatives(path: Path, content: bytes, message: str) -> None:
    """Dumps that are right, and cannot be read, are called what they are, with what to do."""
    with pytest.raises(UnsupportedOperationError, match=f"vmcore is .*{message}"):
        opened(path, content)


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
    """Neither a large core, nor one with a wrong size, is read to be opened."""
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

    monkeypatch.setattr(ImageFile, "read", fail)
    with pytest.raises(XenCallError, match="EIO"):
        opened(path, GOOD)


def test_more_than_a_page_without_a_physical_address(tmp_path: Path) -> None:
    """All ones means no address in a core of 32 bits, too, however long the segment is."""
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
