"""Files made to cost much: what counts is the sum over a file, not the size of a part.

Limits are in calls and in bytes that Python allocates, which no busy machine moves. The files
are sparse: on disk they have kilobytes.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.effort import calls_at_most
from tests.images import xl_files
from xenmapcache import CorruptImageError, MockHypervisor, open_backend
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.backends import coredump, elfcore, raw, save
from xenmapcache.backends.elfcore import ElfCoreBackend
from xenmapcache.formats.content import InMemory
from xenmapcache.formats.elf import Elf
from xenmapcache.mock import kernel

IMPORTED = coredump, elfcore, raw, save  # so that no test measures an import
EHDR, PHDR = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ")
SHDR, SYM = struct.Struct("<IIQQQQIIQQ"), struct.Struct("<IBBHQQ")
IDENT = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")


@contextlib.contextmanager
def memory_at_most(limit: int) -> Iterator[None]:
    """Fail a block at whose peak more bytes were allocated."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] <= limit
    finally:
        tracemalloc.stop()


def core_of_notes(path: Path, segments: int, body: bytes, size: int) -> None:
    """Write a core, many PT_NOTE segments of which are all the same range of the file."""
    start = 64 + 56 * (segments + 1)
    start += -start % PAGE_SIZE
    head = EHDR.pack(IDENT, 4, 62, 1, 0, 64, 0, 0, 64, 56, segments + 1, 64, 0, 0)
    load = PHDR.pack(1, 4, start, 0, 0x100000, PAGE_SIZE, PAGE_SIZE, PAGE_SIZE)
    with path.open("wb") as file:
        file.write(head + load + PHDR.pack(4, 4, start, 0, 0, size, 0, 4) * segments)
        file.seek(start)
        file.write(body)
        file.truncate(start + max(size, PAGE_SIZE))


@pytest.mark.slow
@pytest.mark.parametrize("segments", [150, 60_000])
def test_overlapping_note_segments_are_read_up_to_a_limit(tmp_path: Path, segments: int) -> None:
    """One note of 16 MiB, named by each of many segments, would take gigabytes."""
    note = struct.pack("<III", 4, (1 << 24) - 16, 1) + b"GNU\0"
    for body in (note, b""):
        core_of_notes(tmp_path / "core", segments, body, 1 << 24)
        with calls_at_most(7 * segments + 1000), memory_at_most(40 * MiB):
            with open_backend("elfcore", path=tmp_path / "core") as backend:
                assert isinstance(backend, ElfCoreBackend)
                assert len(backend.notes) == bool(body)
                assert f"read (and {segments - 2} more)" in backend.warnings[0]


@pytest.mark.slow
def test_small_overlapping_note_segments_have_a_limit_in_notes(tmp_path: Path) -> None:
    """Each segment has few notes; all segments have more than a file plausibly has."""
    core_of_notes(tmp_path / "core", 60_000, struct.pack("<III", 0, 0, 1) * 5, 60)
    os.truncate(tmp_path / "core", 1 << 24)
    with calls_at_most(24 * 65_536), memory_at_most(64 * MiB):
        with open_backend("elfcore", path=tmp_path / "core") as backend:
            assert isinstance(backend, ElfCoreBackend)
            assert len(backend.notes) == 65_536
            assert backend.warnings == ("notes are missing: at most 65536 are read",)


def test_notes_of_the_largest_size_take_little_memory(tmp_path: Path) -> None:
    """16 MiB of notes are kept once, and VMCOREINFO of that size is not decoded."""
    size = (1 << 24) - 24
    body = struct.pack("<III", 11, size - 4, 0) + b"VMCOREINFO\0\0"
    core_of_notes(tmp_path / "core", 1, body, 1 << 24)
    with memory_at_most(40 * MiB):
        with open_backend("elfcore", path=tmp_path / "core") as backend:
            assert "vmcoreinfo" not in backend.describe()
            assert backend.describe()["notes"] == [
                {"name": "VMCOREINFO", "type": 0, "size": size - 4}
            ]


def test_section_names_have_a_limit_in_sum(tmp_path: Path) -> None:
    """A thousand sections may not each be named by a suffix of the same 64 KiB."""
    names = b"n" * 65_000 + b"\0"
    count = 1000
    head = EHDR.pack(IDENT, 4, 62, 1, 0, 0, 64, 0, 64, 56, 0, 64, count, 1)
    place = 64 + 64 * count
    table = SHDR.pack(*(0,) * 10) + SHDR.pack(0, 3, 0, 0, place, len(names), 0, 0, 0, 0)
    table += b"".join(SHDR.pack(n, 1, 0, 0, 0, 0, 0, 0, 0, 0) for n in range(2, count))
    path = tmp_path / "core"
    path.write_bytes(head + table + names)
    with memory_at_most(2 * MiB), pytest.raises(CorruptImageError, match="all section names"):
        open_backend("coredump", path=path)


def kernel_file(
    path: Path, symbols: list[int], strings: bytes, *, size: int | None = None, link: int = 2
) -> None:
    """Write an ELF file whose symbols have names at some places of a string table."""
    names = b"\0"
    table = b"".join(SYM.pack(place, 0x10, 0, 1, 0x100000, 0) for place in symbols)
    offset = 2 * PAGE_SIZE
    offsets = [offset, offset + len(names), offset + len(names) + len(strings)]
    with path.open("wb") as file:
        file.write(
            EHDR.pack(IDENT, 2, 62, 1, 0x100000, 64, PAGE_SIZE + 1024, 0, 64, 56, 1, 64, 4, 1)
        )
        file.write(PHDR.pack(1, 5, 0, 0x100000, 0x100000, PAGE_SIZE, PAGE_SIZE, PAGE_SIZE))
        file.seek(PAGE_SIZE + 1024)
        file.write(SHDR.pack(*(0,) * 10))
        file.write(SHDR.pack(0, 3, 0, 0, offsets[0], len(names), 0, 0, 1, 0))
        file.write(SHDR.pack(0, 3, 0, 0, offsets[1], len(strings), 0, 0, 1, 0))
        length = len(table) if size is None else size
        file.write(SHDR.pack(0, 2, 0, 0, offsets[2], length, link, 0, 8, 24))
        file.seek(offsets[0])
        file.write(names + strings + table)
        file.truncate(max(file.tell(), offsets[2] + length))


@pytest.mark.parametrize(
    ("symbols", "strings", "message"),
    [
        (range(2000), b"a" * ((1 << 20) - 1) + b"\0", "does not end within 4096 bytes"),
        (range(5000), b"a" * 8000 + b"\0" * 10, "does not end within 4096 bytes"),
        (range(1), b"", "should have the names of the symbols"),
    ],
)
def test_symbols_that_share_a_long_name(
    tmp_path: Path, symbols: range, strings: bytes, message: str
) -> None:
    """Names that are suffixes of one string would take a MiB for each symbol."""
    path = tmp_path / "kernel"
    kernel_file(path, list(symbols), strings)
    guest = MockHypervisor().create_domain(memory="2M")
    with memory_at_most(8 * MiB), pytest.raises(CorruptImageError, match=message):
        guest.load_elf(path)


def test_symbol_names_have_a_limit_in_sum(tmp_path: Path) -> None:
    """Each name is short enough; all of them would take twice what a file may have."""
    path = tmp_path / "kernel"
    symbols = [number % 100 for number in range(9000)]
    kernel_file(path, symbols, b"a" * 4000 + b"\0")
    guest = MockHypervisor().create_domain(memory="2M")
    with memory_at_most(8 * MiB), pytest.raises(CorruptImageError, match="all symbol names"):
        guest.load_elf(path)


def test_symbols_and_strings_have_a_limit(tmp_path: Path) -> None:
    """Tables of gigabytes, holes of a sparse file, are refused before they are read."""
    path = tmp_path / "kernel"
    guest = MockHypervisor().create_domain(memory="2M")
    kernel_file(path, [0], b"a\0", size=24 << 30)
    with memory_at_most(MiB), pytest.raises(CorruptImageError, match="symbols are implausible"):
        guest.load_elf(path)
    kernel_file(path, [0], b"a\0")
    content = bytearray(path.read_bytes())
    struct.pack_into("<Q", content, PAGE_SIZE + 1024 + 2 * 64 + 32, 1 << 30)
    path.write_bytes(content)
    os.truncate(path, 2 << 30)
    with memory_at_most(MiB), pytest.raises(CorruptImageError, match="sh_size 0x40000000"):
        guest.load_elf(path)


def test_symbol_table_that_names_a_hash_section(tmp_path: Path) -> None:
    """A section of another type is not parsed, whatever numbers it has."""
    path = tmp_path / "kernel"
    kernel_file(path, [0], struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF))
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, PAGE_SIZE + 1024 + 2 * 64 + 4, 5)  # SHT_HASH
    path.write_bytes(content)
    guest = MockHypervisor().create_domain(memory="2M")
    with memory_at_most(MiB), pytest.raises(CorruptImageError, match="sh_type 5"):
        guest.load_elf(path)


def test_symbols_are_found_among_many_segments_by_bisection(tmp_path: Path) -> None:
    """10,000 symbols in 2,000 segments: the work is not their product."""
    path = tmp_path / "kernel"
    kernel_file(path, [1] * 10_000, b"\0symbol\0")
    content = bytearray(path.read_bytes())
    head = 1 << 20
    struct.pack_into("<Q", content, 32, head)
    struct.pack_into("<H", content, 56, 2000)
    content += bytes(head - len(content))
    for number in range(2000):
        address = 0x100000 + number * 16
        content += PHDR.pack(1, 5, 0, address, address, 16, 16, 16)
    path.write_bytes(content)
    with kernel.KernelFile(path) as file, calls_at_most(30 * 12_000):
        assert file.loaded() == {"symbol": 0x100000}


def test_segments_that_overlap_are_not_copied_over_each_other(tmp_path: Path) -> None:
    """60,000 segments of 2 MiB at one place would be 120 GB of writes."""
    path = tmp_path / "kernel"
    count = 60_000
    load = PHDR.pack(1, 5, 0, 0, 0, 0, 1 << 21, 16)
    head = EHDR.pack(IDENT, 2, 62, 1, 0, 64, 0, 0, 64, 56, count, 64, 0, 0)
    path.write_bytes(head + load * count)
    guest = MockHypervisor().create_domain(memory="2M")
    with calls_at_most(10 * count):
        with pytest.raises(CorruptImageError, match="segment at 0x0 overlaps another"):
            guest.load_elf(path)


# --- xl save ------------------------------------------------------------------------------


def save_file(path: Path, records: bytes) -> None:
    """Write a stream of records that an unknown one ends."""
    path.write_bytes(xl_files.libxc(records + xl_files.record(0x77777777)))


def test_tiny_records_are_refused_in_proportion_to_the_bytes(tmp_path: Path) -> None:
    """Half a million records of one page without data, in 11 MiB: few of them are looked at."""
    path = tmp_path / "save"
    save_file(path, xl_files.pages((5, xl_files.XTAB)) * 500_000)
    with calls_at_most(path.stat().st_size // 64), memory_at_most(2 * MiB):
        with pytest.raises(CorruptImageError, match="more than 3953 records of pages"):
            open_backend("save", path=path)


def test_records_of_one_page_each_are_plausible(tmp_path: Path) -> None:
    """A record with a page's data is longer than a page: any number of them is read."""
    path = tmp_path / "save"
    path.write_bytes(xl_files.save(*(xl_files.pages(gfn) for gfn in range(3000))))
    with open_backend("save", path=path) as backend:
        assert list(backend.present(0, 4000) or ()) == [(0, 3000)]


def test_pages_that_go_again_and_again_are_dropped_once(tmp_path: Path) -> None:
    """20 rounds in which pages go do not pass over all other pages 20 times."""
    path = tmp_path / "save"
    count = 200_000
    with path.open("wb") as file:
        file.write(xl_files.libxc())
        for first in range(0, count, 20_000):
            body = struct.pack("<II20000Q", 20_000, 0, *range(first, first + 20_000))
            file.write(struct.pack("<II", 1, len(body) + 20_000 * PAGE_SIZE) + body)
            file.seek(20_000 * PAGE_SIZE, 1)  # a hole of the file
        for first in range(0, 20 * 4096, 4096):
            file.write(xl_files.pages(*((first + gfn, xl_files.XTAB) for gfn in range(4096))))
        file.write(xl_files.record(xl_files.END))
    with calls_at_most(8 * 20 * 4096 + count):
        with open_backend("save", path=path) as backend:
            assert list(backend.present(0, 1 << 20) or ()) == [(20 * 4096, count - 20 * 4096)]


# --- LiME ---------------------------------------------------------------------------------


def test_lime_headers_in_a_sparse_file(tmp_path: Path) -> None:
    """One range of 8 TiB, all a hole, costs no more than its header."""
    path = tmp_path / "lime"
    path.write_bytes(struct.pack("<IIQQQ", 0x4C694D45, 1, 0, (8 << 40) - 1, 0))
    os.truncate(path, 32 + (8 << 40))
    with calls_at_most(500), memory_at_most(MiB):
        open_backend("raw", path=path).close()


def test_two_symbol_tables_are_refused(tmp_path: Path) -> None:
    """There is one in every file that linkers make."""
    path = tmp_path / "kernel"
    kernel_file(path, [1], b"\0symbol\0")
    content = bytearray(path.read_bytes())
    place = PAGE_SIZE + 1024
    content[place + 64 : place + 128] = content[place + 192 : place + 256]  # its names are one now
    struct.pack_into("<I", content, place + 64, 1)
    struct.pack_into("<H", content, 62, 2)  # the names of sections are the symbols' names
    path.write_bytes(content)
    guest = MockHypervisor().create_domain(memory="2M")
    with pytest.raises(CorruptImageError, match="has 2 symbol tables; expected one"):
        guest.load_elf(path)


def test_a_section_is_named_once(tmp_path: Path) -> None:
    """A section that is asked for twice counts once."""
    path = tmp_path / "kernel"
    kernel_file(path, [1], b"\0symbol\0")
    elf = Elf(InMemory(path.read_bytes()))
    assert elf.section(2) == elf.section(2)
    with pytest.raises(CorruptImageError, match="has no section 4; it has 4"):
        elf.section(4)


def test_empty_notes_of_a_section_are_skipped(tmp_path: Path) -> None:
    """A note that is all zeros says nothing."""
    path = tmp_path / "core"
    good = xl_files.Core([0, 1]).contents()[".note.Xen"]
    path.write_bytes(xl_files.dump_core([0, 1], notes=bytes(12) + good))
    with open_backend("coredump", path=path) as backend:
        assert list(backend.present(0, 9) or ()) == [(0, 2)]


def core_of_segments(path: Path, count: int, *, step: int = 2 * PAGE_SIZE) -> None:
    """Write a core that has all its pages, in any order, in the same page of the file."""
    head = EHDR.pack(IDENT, 4, 62, 1, 0, 128, 64, 0, 64, 56, 0xFFFF, 64, 1, 0)
    section = SHDR.pack(0, 0, 0, 0, 0, 0, 0, count, 0, 0)
    addresses = (number * 7919 % count * step for number in range(count))
    loads = (PHDR.pack(1, 4, 0, 0, address, PAGE_SIZE, PAGE_SIZE, 1) for address in addresses)
    path.write_bytes(head + section + b"".join(loads))


@pytest.mark.slow
@pytest.mark.parametrize("count", [65_843, 100_000])
def test_a_core_of_qemu_has_more_than_65536_segments(tmp_path: Path, count: int) -> None:
    """With -p there is one for each mapping of the kernel, of which espfix alone has 65,536."""
    core_of_segments(tmp_path / "core", count)
    with memory_at_most(count << 10), calls_at_most(20 * count):
        with open_backend("elfcore", path=tmp_path / "core") as backend:
            assert len(list(backend.present(0, 1 << 40) or ())) == count


@pytest.mark.slow
def test_segments_that_overlap_in_part(tmp_path: Path) -> None:
    """Each of 20,000 segments covers half of the next one's page: the work is not their square."""
    core_of_segments(tmp_path / "core", 20_000, step=PAGE_SIZE // 2)
    with memory_at_most(64 * MiB), calls_at_most(80 * 20_000):
        with open_backend("elfcore", path=tmp_path / "core") as backend:
            assert list(backend.present(0, 1 << 40) or ()) == [(0, 10_001)]


def test_the_size_of_the_file_limits_the_segments(tmp_path: Path) -> None:
    """A table of which the file has no byte is refused before it is read."""
    core_of_segments(tmp_path / "core", 1000)
    with (tmp_path / "core").open("r+b") as file:
        file.seek(64 + 44)
        file.write(struct.pack("<I", (1 << 32) - 1))
    with memory_at_most(MiB), pytest.raises(CorruptImageError, match="should have 4294967295 ent"):
        open_backend("elfcore", path=tmp_path / "core")


def test_segments_have_a_limit(tmp_path: Path) -> None:
    """A sparse file can have any number of headers without taking room on a disk."""
    core_of_segments(tmp_path / "core", 1)
    for count, message in (
        ((1 << 22) + 1, "4194305 program headers are implausible; at most 4194304"),
        ((1 << 16), ""),
    ):
        with (tmp_path / "core").open("r+b") as file:
            file.seek(64 + 44)
            file.write(struct.pack("<I", count))
            file.truncate(128 + 56 * count)
        with memory_at_most(2 * MiB), contextlib.ExitStack() as stack:
            if message:
                stack.enter_context(pytest.raises(CorruptImageError, match=message))
            open_backend("elfcore", path=tmp_path / "core").close()


def test_bytes_in_memory_have_an_end() -> None:
    """As of a file, what lies beyond the end is refused, and nothing is made up."""
    content = InMemory(b"0123456789")
    first, second = bytearray(3), bytearray(2)
    content.read_into(4, memoryview(first), memoryview(second))
    assert (bytes(first), bytes(second)) == (b"456", b"78")
    for offset, length in ((9, 2), (-1, 1), (0, -1)):
        with pytest.raises(CorruptImageError, match="outside of the file, which ends at 0xa"):
            content.read(offset, length)
