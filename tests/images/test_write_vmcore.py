"""write_vmcore(): every byte comes back, headers and notes are where tools look for them."""

from __future__ import annotations

import os
import platform
import random
import struct
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from xenmapcache import (
    Backend,
    MapCache,
    Mapping,
    MockDomain,
    MockHypervisor,
    copy_pages,
    open_backend,
    write_vmcore,
)
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.backends.coredump import CoredumpBackend
from xenmapcache.backends.elfcore import ElfCoreBackend, Note
from xenmapcache.formats.elf import Section
from xenmapcache.formats.prstatus import of_xen_context
from xenmapcache.writers import vmcore

from . import linux_guest, xl_files
from .writers import Load, elf_core, memory, note

XL_CORE = Path(__file__).parent / "data/xl-dump-core-pvh.core"
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT = struct.Struct("<IIQQQQQQ")
PT_LOAD, PT_NOTE, PN_XNUM = 1, 4, 0xFFFF


@pytest.fixture
def guest() -> MockDomain:
    return linux_guest.create()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "guest.vmcore"


def header(data: bytes) -> tuple[int, ...]:
    """Return the numbers of an ELF header, from e_type on."""
    return HEADER.unpack_from(data)[1:]


def segments(data: bytes, count: int | None = None) -> list[tuple[int, ...]]:
    """Return a file's program headers."""
    count = header(data)[9] if count is None else count
    return [SEGMENT.unpack_from(data, 64 + 56 * number) for number in range(count)]


def pages_of(path: Path) -> dict[int, bytes]:
    """Return a file's pages by their frame numbers, through the backend."""
    with ElfCoreBackend(path=path) as backend, MapCache(backend) as cache:
        end = backend.memory_end or 0
        return {
            (start + at) // PAGE_SIZE: cache.read(start + at, PAGE_SIZE)
            for start, length in cache.present(0, end)
            for at in range(0, length, PAGE_SIZE)
        }


class Unindexed(Backend):
    """A live source whose pages only mapping shows, as a real guest's."""

    name = "unindexed"

    def __init__(self, source: Backend) -> None:
        self.source = source
        self.memory_end = source.memory_end

    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        return self.source.map(gfn, count, writable=writable)

    def close(self) -> None:
        self.source.close()


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_every_byte_comes_back(
    guest: MockDomain, file: Path, indexed: bool, cached: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """From a live guest to the file and back: all pages equal, all holes holes."""
    with open_backend("mock", domain=guest) as live:
        runs = list(live.present(0, 4096) or ())
        source = live if indexed else Unindexed(live)
        with MapCache(source) as cache:
            written = write_vmcore(cache if cached else source, file, machine="x86-64")
    found = pages_of(file)
    assert written == len(found) == sum(pages for _, pages in runs)
    assert all(guest.read(gfn * PAGE_SIZE, PAGE_SIZE) == page for gfn, page in found.items())
    assert not caplog.messages
    first, *loads = segments(file.read_bytes())
    assert first[0] == PT_NOTE
    assert [(load[4] // PAGE_SIZE, load[5] // PAGE_SIZE) for load in loads] == runs


def test_the_layout(guest: MockDomain, file: Path) -> None:
    """Each header is as gdb, makedumpfile and crash need it; pages can be mapped."""
    with open_backend("mock", domain=guest) as source:
        write_vmcore(source, file, machine="x86-64")
    data = file.read_bytes()
    assert header(data) == (4, 62, 1, 0, 64, 0, 0, 64, 56, 5, 0, 0, 0)
    notes, *loads = segments(data)
    last = 64 + 5 * 56
    assert (notes[0], notes[2]) == (PT_NOTE, last)
    for load in loads:
        kind, flags, offset, virtual_address, physical, in_file, in_memory, alignment = load
        assert (kind, flags, alignment) == (PT_LOAD, 4, 0)
        assert virtual_address == physical
        assert in_file == in_memory
        assert offset % PAGE_SIZE == 0
        assert offset >= last + notes[5]
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(file.parent) == [file.name]


def test_vmcoreinfo(guest: MockDomain, file: Path) -> None:
    """The guest's own text is the note, without the zeros after it."""
    with open_backend("mock", domain=guest) as source:
        write_vmcore(source, file)
    with ElfCoreBackend(path=file) as backend:
        assert backend.notes == (Note("VMCOREINFO", 0, linux_guest.info().encode()),)


def test_a_guest_without_vmcoreinfo(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A WARNING says what will not work; the file has no note."""
    guest = linux_guest.create(with_info=False)
    with open_backend("mock", domain=guest) as source:
        write_vmcore(source, file)
    (message,) = caplog.messages
    assert "no VMCOREINFO was found in the guest's memory" in message
    with ElfCoreBackend(path=file) as backend:
        assert backend.notes == ()


def test_the_text_of_a_kernel_that_is_gone(guest: MockDomain, file: Path) -> None:
    """After a reboot the page of the kernel before may come first; it describes nothing."""
    stale = linux_guest.info("5.10.0-old", uts=0x600000).encode().ljust(PAGE_SIZE, b"\0")
    guest.write(0x1000, stale)
    with open_backend("mock", domain=guest) as source:
        write_vmcore(source, file)
    with ElfCoreBackend(path=file) as backend:
        assert [each.data for each in backend.notes] == [linux_guest.info().encode()]


def test_a_guest_that_is_full_of_texts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hostile guest's texts are kept up to a limit."""
    monkeypatch.setattr(vmcore, "_MAX_CANDIDATES", 3)
    guest = MockHypervisor().create_domain(memory="4M")
    for number in range(8):
        text = linux_guest.info(f"6.{number}", uts=0x380000)
        guest.write(number * PAGE_SIZE, text.encode().ljust(PAGE_SIZE, b"\0"))
    guest.write(0x380000, linux_guest.uts_namespace("6.5"))
    with open_backend("mock", domain=guest) as source:
        write_vmcore(source, file)
    with ElfCoreBackend(path=file) as backend:
        assert backend.notes[0].data.startswith(b"OSRELEASE=6.0\n")


def test_notes_of_an_elf_core(tmp_path: Path, file: Path) -> None:
    """Registers and the rest are copied; VMCOREINFO among them is not looked for again."""
    notes = note(b"CORE", 1, bytes(336)) + note(b"QEMU", 0, b"odd") + note(b"VMCOREINFO", 0, b"A=")
    page = linux_guest.info().encode().ljust(PAGE_SIZE, b"\0")
    origin = tmp_path / "origin"
    origin.write_bytes(elf_core([Load(0x1000, page), Load(0x9000, page)], notes=notes))
    with ElfCoreBackend(path=origin) as source:
        assert write_vmcore(source, file) == 2
        with ElfCoreBackend(path=file) as backend:
            assert backend.notes == source.notes
            assert backend.machine == source.machine == "x86-64"


def test_notes_of_xl_dump_core(file: Path) -> None:
    """A file of xl dump-core has Xen's contexts; they become PRSTATUS notes."""
    with CoredumpBackend(path=XL_CORE) as source:
        write_vmcore(source, file)
        assert len(source.notes) == 1
        with ElfCoreBackend(path=file) as backend:
            assert backend.notes == source.notes
    (status,) = backend.notes
    assert (status.name, status.note_type, len(status.data)) == ("CORE", 1, 336)
    assert struct.unpack_from("<I", status.data, 32) == (1,)
    registers = struct.unpack_from("<27Q", status.data, 112)
    assert registers[16] == 0x1000  # rip: the guest of 24 KiB begins there
    assert registers[18] == 2  # eflags


@pytest.mark.parametrize(("privilege", "base"), [(0, 21), (3, 22)])
def test_registers(privilege: int, base: int) -> None:
    """Each register is in its place; in user mode gs has the other base."""
    context = bytearray(5168)
    struct.pack_into(
        "<15Q2I9Q", context, 520, *range(1, 16), 7, 8, *range(0x10000, 0x90001, 0x10000)
    )
    struct.pack_into("<Q", context, 520 + 17 * 8 + 0, 0xAB0010 | privilege)  # cs, and what follows
    struct.pack_into("<3Q", context, 5144, 20, 21, 22)
    data = of_xen_context(bytes(context), 4)
    assert data is not None
    assert len(data) == 336
    assert struct.unpack_from("<I", data, 32) == (5,)
    found = struct.unpack_from("<27Q", data, 112)
    assert found[:15] == tuple(range(1, 16))
    assert found[15] == (1 << 64) - 1
    assert found[16:21] == (0x10000, 0x10 | privilege, 0x30000, 0x40000, 0)
    assert found[21:] == (20, base, 0, 0, 0, 0)
    assert of_xen_context(bytes(5168), 0) is None


@pytest.mark.parametrize(
    ("machine", "entry", "order", "notes"),
    [
        (xl_files.X86_64, 5168, xl_files.PVH_SECTIONS, [2]),
        (xl_files.X86_32, 5168, xl_files.PVH_SECTIONS, []),
        (xl_files.X86_64, 2800, xl_files.PVH_SECTIONS, []),
        (xl_files.X86_64, 5168, [".shstrtab", ".note.Xen", ".xen_pages", ".xen_pfn"], []),
    ],
    ids=["x86-64", "another machine", "contexts of another size", "no contexts"],
)
def test_contexts_of_a_core(
    tmp_path: Path, machine: int, entry: int, order: Sequence[str], notes: list[int]
) -> None:
    """A vCPU that never started has no note; other machines' contexts are not read."""
    started = bytearray(5168)
    struct.pack_into("<Q", started, 520 + 16 * 8, 0xFFF0)
    path = tmp_path / "core"
    path.write_bytes(
        xl_files.Core(
            [1, 2],
            machine=machine,
            vcpus=3,
            order=order,
            contexts=bytes(5168) + bytes(started),
            changes={".xen_prstatus": {"entry": entry}},
        ).build()
    )
    with CoredumpBackend(path=path) as backend:
        assert [struct.unpack_from("<I", each.data, 32)[0] for each in backend.notes] == notes


@pytest.mark.parametrize(("cut", "notes"), [(0, 2), (1, 1), (5168, 1), (5169, 0), (1 << 40, 0)])
def test_contexts_of_a_truncated_core(tmp_path: Path, cut: int, notes: int) -> None:
    """Registers that a salvaged file has lost have no note, and nothing is raised."""
    path = tmp_path / "core"
    path.write_bytes(xl_files.Core(range(1, 9), vcpus=2).build())
    size = path.stat().st_size
    with CoredumpBackend(path=path) as backend:
        contexts = Section(".xen_prstatus", 1, size - 2 * 5168 + cut, 2 * 5168, 5168, 0)
        backend._core = backend._core._replace(contexts=contexts)
        assert len(backend.notes) == notes


def scattered(count: int) -> MockDomain:
    """Return a guest of runs of one page, with holes of one page between them."""
    guest = MockHypervisor().create_domain(
        memory=2 * count * PAGE_SIZE,
        holes=[((2 * number + 1) * PAGE_SIZE, PAGE_SIZE) for number in range(count)],
    )
    rng = random.Random(count)
    for number in rng.sample(range(count), count // 2):
        guest.write(2 * number * PAGE_SIZE, rng.randbytes(PAGE_SIZE))
    return guest


@pytest.mark.parametrize("indexed", [True, False])
def test_more_runs_than_was_room_for(file: Path, indexed: bool) -> None:
    """If nobody knew how many runs come, the first pages are moved to the file's end."""
    guest = scattered(3000)
    with open_backend("mock", domain=guest) as live:
        assert write_vmcore(live if indexed else Unindexed(live), file) == 3000
    found = pages_of(file)
    assert list(found) == list(range(0, 6000, 2))
    assert all(guest.read(gfn * PAGE_SIZE, PAGE_SIZE) == page for gfn, page in found.items())
    loads = segments(file.read_bytes())[1:]
    assert len(loads) == 3000
    assert [load[2] for load in loads] == sorted(load[2] for load in loads) or not indexed


def test_a_run_of_which_a_part_is_moved(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it has two segments; nothing is left of the pages' old place."""
    monkeypatch.setattr(vmcore, "_RUNS_AT_FIRST", 0)
    guest = MockHypervisor().create_domain(
        memory="4M", holes=[((300 + 2 * number) * PAGE_SIZE, PAGE_SIZE) for number in range(200)]
    )
    for gfn in range(300):
        guest.write(gfn * PAGE_SIZE, memory(gfn, 1))
    with open_backend("mock", domain=guest) as live:
        write_vmcore(Unindexed(live), file)
    found = pages_of(file)
    assert len(found) == 1024 - 200
    assert all(guest.read(gfn * PAGE_SIZE, PAGE_SIZE) == page for gfn, page in found.items())
    data = file.read_bytes()
    _, first, second, *_ = loads = segments(data)
    assert len(loads) == 1 + 201 + 1
    assert first[4] + first[5] == second[4]
    assert first[2] > second[2]
    end = 64 + len(loads) * 56
    assert not any(data[end : min(load[2] for load in loads[1:])])


class Scattered(Backend):
    """A source of runs of one page: every second page is missing."""

    name = "scattered"

    def __init__(self, count: int) -> None:
        self.count = count
        self.memory_end = 2 * count * PAGE_SIZE
        self.zeros = copy_pages(1, [bytes(PAGE_SIZE)])

    def present(self, gfn: int, count: int) -> Iterator[tuple[int, int]]:
        return ((number, 1) for number in range(gfn, gfn + count, 2))

    def map(self, gfn: int, count: int, *, writable: bool) -> Mapping:
        assert (gfn % 2, count) == (0, 1)
        return self.zeros if gfn % 999 else copy_pages(gfn, [memory(gfn, 1)])

    def close(self) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("runs", [PN_XNUM - 2, PN_XNUM - 1])
def test_more_segments_than_the_header_can_count(file: Path, runs: int) -> None:
    """Then a section header has their number (PN_XNUM); up to 65,534 there is none."""
    assert write_vmcore(Scattered(runs), file) == runs
    with file.open("rb") as stream:
        data = stream.read(64 + (runs + 1) * 56 + 64)
    shoff, phnum, shentsize, shnum = (header(data)[place] for place in (5, 9, 10, 11))
    if runs + 1 < PN_XNUM:
        assert (phnum, shoff, shentsize, shnum) == (runs + 1, 0, 0, 0)
    else:
        assert (phnum, shoff, shentsize, shnum) == (PN_XNUM, len(data) - 64, 64, 1)
        section = [0] * 10
        section[7] = runs + 1  # sh_info
        assert list(struct.unpack_from("<IIQQQQIIQQ", data, shoff)) == section
    loads = segments(data, runs + 1)[1:]
    assert [load[4] for load in loads] == list(range(0, 2 * runs * PAGE_SIZE, 2 * PAGE_SIZE))
    with ElfCoreBackend(path=file) as backend, MapCache(backend, bucket_shift=12) as cache:
        assert sum(1 for _ in cache.present(0, 2 * runs * PAGE_SIZE)) == runs
        assert cache.read(999 * 2 * PAGE_SIZE, PAGE_SIZE) == memory(999 * 2, 1)


def test_it_streams(file: Path) -> None:
    """However large a guest is, little of it is held."""
    guest = MockHypervisor().create_domain(memory="64M")
    for address in range(0, 64 * MiB, 64 * PAGE_SIZE):
        guest.write(address, b"page")
    with open_backend("mock", domain=guest) as source:
        write_vmcore(source, file, length=0)
        tracemalloc.start()
        write_vmcore(source, file)
        assert tracemalloc.get_traced_memory()[1] < 4 * MiB
        tracemalloc.stop()
    assert file.stat().st_blocks * 512 < 8 * MiB


def test_a_dump_of_itself(file: Path) -> None:
    """A file may be replaced by what is read from it."""
    file.write_bytes(elf_core([Load(0x1000, memory(1, 3)), Load(0x9000, memory(9, 1))]))
    with ElfCoreBackend(path=file) as source:
        write_vmcore(source, file)
    assert pages_of(file) == {gfn: memory(gfn, 1) for gfn in (1, 2, 3, 9)}


@pytest.mark.parametrize(
    ("machine", "number"), [("x86-64", 62), ("x86-32", 3), ("arm", 183), (None, 183)]
)
def test_machines(
    guest: MockDomain,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: str | None,
    number: int,
) -> None:
    """The name is the caller's, the source's or this machine's."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with open_backend("mock", domain=guest) as source:
        write_vmcore(source, file, machine=machine, length="1M")
    assert header(file.read_bytes())[1] == number


def test_arguments(guest: MockDomain, file: Path) -> None:
    """What is wrong is said before anything is written; an end inside a page takes the page."""
    with open_backend("mock", domain=guest) as source:
        with pytest.raises(ValueError, match="machine must be one of x86-64, x86-32, arm, not 'v"):
            write_vmcore(source, file, machine="vax")
        with pytest.raises(ValueError, match="52-bit"):
            write_vmcore(source, file, length=1 << 53)
        assert os.listdir(file.parent) == []
        assert write_vmcore(source, file, length=0x3001) == 4
        assert write_vmcore(source, file, length=0) == 0
    assert header(file.read_bytes())[9] == 1


def test_progress(guest: MockDomain, file: Path) -> None:
    """It goes from 0 to the end of memory; what it raises ends the work and leaves nothing."""
    calls: list[int] = []
    with open_backend("mock", domain=guest) as source:
        write_vmcore(source, file, progress=lambda done, total: calls.append(done))
        assert (calls, calls[0], calls[-1]) == (sorted(calls), 0, 16 * MiB)
        file.unlink()

        def stop(done: int, total: int) -> None:
            if done > MiB:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_vmcore(source, file, progress=stop)
    assert os.listdir(file.parent) == []
