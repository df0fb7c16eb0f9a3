"""Files of xl dump-core, written by xl_files.py and by Xen itself."""

from __future__ import annotations

import gc
import os
import random
import re
import resource
import struct
import subprocess
import sys
import tracemalloc
from array import array
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.descriptors import open_files
from tests.effort import calls_at_most
from tests.images import xl_files
from xenmapcache import (
    CorruptImageError,
    FaultError,
    GuestMemory,
    MapCache,
    open_backend,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.backends.coredump import CoredumpBackend
from xenmapcache.files.runs import Run
from xenmapcache.formats.order import is_ascending
from xenmapcache.writers.coredump import _Layout

from .xl_files import (
    ARM,
    PADDING,
    PAGE,
    PV,
    PV_SECTIONS,
    PVH_SECTIONS,
    X86_32,
    Core,
    dump_core,
    dump_core_pv,
    memory,
    note,
    page,
)

REAL = Path(__file__).parent / "data/xl-dump-core-pvh.core"
PFNS = [0, 1, 2, 5, 6, 0x100]


def opened(path: Path, content: bytes) -> CoredumpBackend:
    path.write_bytes(content)
    os.utime(path, (1, 1))  # a file of just now is looked at a second time, which takes a while
    return CoredumpBackend(path=path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "guest.core"


def pages_of(backend: CoredumpBackend, end: int) -> dict[int, bytes]:
    """Return all present pages below a frame, read one by one."""
    found = {}
    for gfn in range(end):
        mapping = backend.map(gfn, 1, writable=False)
        if mapping.errors is None:
            found[gfn] = bytes(mapping.view(0, PAGE))
    return found


def test_a_dump_of_xens() -> None:
    """A file that Xen 4.17's library wrote: its notes, each of its pages, and its holes."""
    with CoredumpBackend(path=REAL) as backend:
        assert (backend.guest_type, backend.machine, backend.vcpus, backend.pages) == (
            "hvm",
            "x86-64",
            1,
            6,
        )
        assert (backend.xen_version, backend.format_version) == ("4.17.7", (0, 1))
        assert (backend.page_size, backend.memory_end) == (4096, 0x101000)
        assert backend.describe() == {
            "guest_type": "hvm",
            "machine": "x86-64",
            "vcpus": 1,
            "pages": 6,
            "page_size": 4096,
            "xen_version": "4.17.7",
            "format_version": "0.1",
        }
        filled = zip(PFNS, range(0x10, 0x16), strict=True)
        assert pages_of(backend, 0x102) == {gfn: bytes([byte]) * PAGE for gfn, byte in filled}
        with MapCache(backend) as cache:
            assert list(cache.present(0, 1 << 30)) == [
                (0, 0x3000),
                (0x5000, 0x2000),
                (0x100000, 0x1000),
            ]
            assert next(GuestMemory(cache).find(b"\x15" * 8)) == (0x100000, b"\x15" * 8)
            with pytest.raises(FaultError):
                cache.read(0x2FFF, 2)


@pytest.mark.parametrize("machine", [62, X86_32, ARM], ids=["x86-64", "x86-32", "arm"])
@pytest.mark.parametrize("shift", [0, 8], ids=["aligned", "unaligned"])
def test_pv_and_hvm(file: Path, machine: int, shift: int) -> None:
    """Each page of a PV and an HVM guest is at its address, page 0 too, whatever the machine."""
    for build, kind in ((dump_core, "hvm"), (dump_core_pv, "pv")):
        content = build(PFNS, machine=machine, shift=shift, vcpus=3, xen=(4, 20, b".1-pre"))
        with opened(file, content) as backend:
            assert (backend.guest_type, backend.vcpus, backend.xen_version) == (
                kind,
                3,
                "4.20.1-pre",
            )
            assert backend.machine == {62: "x86-64", X86_32: "x86-32", ARM: "arm"}[machine]
            assert pages_of(backend, 0x102) == {gfn: page(gfn) for gfn in PFNS}


def test_any_order_of_sections(file: Path) -> None:
    """Sections are found by their names, wherever they are, the optional and unknown ones too."""
    rng = random.Random(4)
    for sections in (PVH_SECTIONS, PV_SECTIONS):
        for _ in range(10):
            order = [*sections, ".xen_shared_info"]
            rng.shuffle(order)
            magic = PV if sections is PV_SECTIONS else 0xF00FEBEE
            content = Core(PFNS, order=order, magic=magic).build()
            with opened(file, content) as backend:
                assert pages_of(backend, 0x102) == {gfn: page(gfn) for gfn in PFNS}


@pytest.mark.parametrize("build", [dump_core, dump_core_pv])
@pytest.mark.parametrize(
    "pfns",
    [
        [0, 1, 2, PADDING, PADDING],
        [PADDING, 0, 1, 2],
        [0, 1, PADDING, 2, PADDING, 7, 0xFFFFFFFF],
        [PADDING] * 3,
        [],
    ],
    ids=["last", "first", "between", "only", "empty"],
)
def test_padding(file: Path, build: Callable[[list[int]], bytes], pfns: list[int]) -> None:
    """Padding is not a page, wherever it stands; 32 bits of ones are a page as others."""
    with opened(file, build(pfns)) as backend:
        there = [gfn for gfn in pfns if gfn != PADDING]
        assert backend.pages == len(there)
        assert backend.memory_end == (there[-1] + 1 if there else 0) * PAGE
        for gfn in there:
            assert backend.map(gfn, 1, writable=False).view(0, PAGE) == page(gfn)
        assert list(backend.present(0, 1 << 40)) == [
            (first, count) for first, count in ((0, 3), (7, 1), (0xFFFFFFFF, 1)) if first in there
        ]


def test_consecutive_pages_are_one_run(file: Path) -> None:
    """Of scattered and of consecutive pages, runs are as long as they can be, and no longer."""
    rng = random.Random(5)
    for _ in range(30):
        gfns = sorted(rng.sample(range(600), rng.randrange(1, 600)))
        start = 0
        with opened(file, dump_core(gfns)) as backend:
            start = next(backend.runs(gfns[0], 1)).offset
            for _ in range(20):
                gfn, count = rng.randrange(610), rng.randrange(1, 300)
                expected: list[Run] = []
                for place, number in enumerate(gfns):
                    if gfn <= number < gfn + count:
                        last = expected[-1] if expected else None
                        if last and last.gfn + last.pages == number:
                            expected[-1] = last._replace(pages=last.pages + 1)
                        else:
                            expected.append(Run(number, 1, start + place * PAGE))
                assert list(backend.runs(gfn, count)) == expected


def test_buckets_are_mapped_from_the_file(file: Path) -> None:
    """A bucket without holes is the file's own pages, in the page cache, and no copy."""
    with opened(file, dump_core(range(512))) as backend:
        mapping = backend.map(256, 256, writable=False)
        maps = Path("/proc/self/maps").read_text()
        assert re.search(rf"^{mapping.address:x}-.* r--s .*guest\.core", maps, re.MULTILINE)
        assert mapping.view(0, 256 * PAGE) == memory(256 * PAGE, 256 * PAGE)


def test_is_ascending() -> None:
    """The order check finds what a comparison of all neighbours finds."""
    for base in (1 << 16, 1 << 20, 1 << 32):  # blocks whose numbers differ in high octets only
        assert is_ascending(array("Q", [*range(4096), *range(base, base + 4096)]))
        assert not is_ascending(array("Q", [*range(base, base + 4096), *range(4096)]))
    rng = random.Random(6)
    for _ in range(400):
        number = rng.choice([0, 4090, 0xFFF0, (1 << 40) - 7, 1 << 62])
        numbers = []
        dense = rng.choice([0, 0.01, 0.5])
        for _ in range(rng.choice([0, 1, 2, 63, 64, 65, 513, 9000])):
            numbers.append(number)
            number += 1 if rng.random() >= dense else rng.randrange(1, 9)
        if len(numbers) > 1 and rng.random() < 0.7:
            place = rng.randrange(1, len(numbers))
            numbers[place] = rng.choice([numbers[place - 1], max(0, numbers[place] - 2), 0])
        expected = all(a < b for a, b in pairwise(numbers))
        assert is_ascending(array("Q", numbers)) == expected


# --- what is wrong ---------------------------------------------------------------------

BIG = 1 << 40
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "begins with nothing"),
    "magic": (b"\x7fELG" + bytes(200), "begins with 7f454c47"),
    "class": (dump_core(PFNS, changes={"elf": {"ident": b"\x7fELF\1\1\1"}}), "of type 4, 32 bits"),
    "order": (dump_core(PFNS, changes={"elf": {"ident": b"\x7fELF\2\2\1"}}), "little-endian"),
    "type": (dump_core(PFNS, changes={"elf": {"type": 2}}), "ELF file of type 2"),
    "machine": (dump_core(PFNS, machine=8), "machine 8"),
    "section count": (dump_core(PFNS, changes={"elf": {"shnum": 65000}}), "65000 section headers"),
    "no sections": (
        dump_core(PFNS, changes={"elf": {"shnum": 0}}),
        "file has 0 sections",
    ),
    "section size": (dump_core(PFNS, changes={"elf": {"shentsize": 40}}), "e_shentsize is 40"),
    "section table": (dump_core(PFNS, changes={"elf": {"shoff": BIG}}), "section headers is 0x1"),
    "names": (dump_core(PFNS, changes={"elf": {"shstrndx": 9}}), "e_shstrndx is 9"),
    "names' type": (dump_core(PFNS, changes={".shstrtab": {"type": 1}}), "has sh_type 1"),
    "names' size": (dump_core(PFNS, changes={".shstrtab": {"size": BIG}}), "sh_size 0x1"),
    "names' place": (dump_core(PFNS, changes={".shstrtab": {"offset": BIG}}), "names is 0x1"),
    "names' end": (dump_core(PFNS, changes={".shstrtab": {"size": 54}}), "has no end"),
    "name": (dump_core(PFNS, changes={".xen_pfn": {"name": 500}}), "sh_name 0x1f4"),
    "no notes": (dump_core(PFNS, order=PVH_SECTIONS[:1] + PVH_SECTIONS[2:]), "no section .note"),
    "no pages": (dump_core(PFNS, order=[".shstrtab", ".note.Xen", ".xen_pfn"]), ".xen_pages"),
    "no pfns": (dump_core(PFNS, order=PVH_SECTIONS[:-1]), "no section .xen_pfn or .xen_p2m"),
    "both": (dump_core(PFNS, order=[*PVH_SECTIONS, ".xen_p2m"]), "both .xen_p2m"),
    "two": (dump_core(PFNS, order=[*PVH_SECTIONS, ".xen_pfn"]), "two sections named .xen_pfn"),
    "nobits": (dump_core(PFNS, changes={".xen_pages": {"type": 8}}), "no section .xen_pages"),
    "overlap": (dump_core(PFNS, changes={".xen_pfn": {"offset": 0x3000}}), "overlaps .xen_pages"),
    "header": (dump_core(PFNS, changes={".note.Xen": {"offset": 8}}), "overlaps the header"),
    "pfn size": (dump_core(PFNS, changes={".xen_pfn": {"size": 40}}), ".xen_pfn has 0x28 bytes"),
    "page size": (
        dump_core(PFNS, changes={".xen_pages": {"size": 40}}),
        "_pages has 0x28 bytes",
    ),
    "beyond": (dump_core(PFNS, changes={".xen_pages": {"size": BIG}}), "section .xen_pages is"),
    "wrap": (dump_core(PFNS, changes={".xen_pages": {"offset": 2**64 - PAGE}}), ".xen_pages is"),
    "page count": (dump_core(PFNS, pages=BIG), "0x10000000000 pages"),
    "pages of": (dump_core(PFNS, page_size=16384), "pages of 0x4000 bytes"),
    "notes' magic": (dump_core(PFNS, magic=0xF00FEBEC), "magic 0xf00febec"),
    "version": (dump_core(PFNS, format_version=1 << 32), "format version 1.0 is unknown"),
    "notes' header": (dump_core(PFNS, notes=note(0x2000000, b"")), "no header note"),
    "notes of another": (
        dump_core(PFNS, notes=note(0x2000001, bytes(32), b"Xem\0")),
        "no header note",
    ),
    "notes' end": (
        dump_core(PFNS, notes=struct.pack("<III", 4, 99, 1)),
        "section .note.Xen, at 0x",
    ),
    "notes' length": (dump_core(PFNS, notes=bytes(2 << 20)), "sh_size 0x200000 is implausible"),
    "unsorted": (
        dump_core([0, 1, 5, 3, 6]),
        r"entry 3 of .xen_pfn, at 0x\w+, is pfn 0x3 after 0x5",
    ),
    "doubled": (dump_core([0, 1, 1, 6]), "entry 2 of .xen_pfn, at 0x.* is pfn 0x1 again"),
    "unsorted, padded": (dump_core([9, PADDING, 8]), "entry 2 of .xen_pfn, at .* 0x8 after 0x9"),
    "unsorted, pv": (dump_core_pv([7, 9, 8]), "entry 2 of .xen_p2m, at 0x.* 0x8 after 0x9"),
    "doubled, far": (dump_core([*range(70000 // 7), 9999]), "entry 10000 of .xen_pfn.* again"),
    "address": (dump_core([0, 1 << 40]), "entry 1 of .xen_pfn.* beyond 52 bits"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(file: Path, name: str) -> None:
    """A file that contradicts the format is refused, naming what and where, and is closed."""
    content, message = BAD[name]
    files = open_files()
    with pytest.raises(CorruptImageError, match=message) as caught:
        opened(file, content)
    assert str(file) in str(caught.value)
    assert open_files() <= files


def test_the_order_over_pieces(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is read in pieces: what is wrong at the edge of two is seen, and all is kept."""
    monkeypatch.setattr("xenmapcache.formats.xl_core._CHUNK_ENTRIES", 3)
    for pfns in ([0, 1, 2, 2, 3], [4, 5, 6, 0, 1, 2]):
        with pytest.raises(CorruptImageError, match="entry 3 of .xen_pfn"):
            opened(file, dump_core(pfns))
    for pfns in ([1, 2, 4, 5, 6, 9, 10], [0, 1, PADDING, 2, 3, 4, PADDING, PADDING, PADDING, 7]):
        with opened(file, dump_core(pfns)) as backend:
            assert pages_of(backend, 12) == {n: page(n) for n in pfns if n != PADDING}


def test_cut_off_anywhere(file: Path) -> None:
    """However much of its end a file has lost, it is refused."""
    content = dump_core(PFNS)
    end = len(content)
    cuts = {*range(0, 600, 7), *range(600, end, 501), *range(end - 60, end)}
    for length in cuts:
        with pytest.raises(CorruptImageError, match="guest.core"):
            opened(file, content[:length])


def test_lies_cost_nothing(file: Path) -> None:
    """Implausible sizes of a sparse file are found out with little work and memory."""
    pages = 1 << 27  # 512 GiB, and an index of 1 GiB that is all zeros
    core = Core([], pages=pages)
    core.changes = {".xen_pages": {"size": pages * PAGE, "offset": 0x100000}}
    core.changes[".xen_pfn"] = {"size": pages * 8, "offset": 0x100000 + pages * PAGE}
    file.write_bytes(core.build())
    os.truncate(file, 0x100000 + pages * (PAGE + 8))
    tracemalloc.start()
    try:
        with calls_at_most(10_000):
            with pytest.raises(CorruptImageError, match=r"entry 1 of .xen_pfn, .* pfn 0x0 again"):
                CoredumpBackend(path=file)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_little_memory_is_enough(tmp_path: Path) -> None:
    """All the files that are wrong are refused by a process that may take 64 MiB more."""
    for number, (content, _) in enumerate(BAD.values()):
        tmp_path.joinpath(str(number)).write_bytes(content)
    code = (
        "import resource, sys, pathlib, xenmapcache, xenmapcache.backends.coredump as c\n"
        "pathlib.Path(sys.argv[1], 'x').write_bytes(b''); refused = 0\n"
        "try: c.CoredumpBackend(path=sys.argv[1] + '/x')\n"
        "except xenmapcache.CorruptImageError: pass\n"
        "used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try: c.CoredumpBackend(path=path)\n"
        "    except xenmapcache.CorruptImageError: refused += 1\n"
        "print(refused)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stderr, done.stdout) == ("", f"{len(BAD) + 1}\n")
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@pytest.mark.slow
def test_the_index_is_small(file: Path) -> None:
    """An index takes 8 bytes a page, and where padding stands between pages 16."""
    for pfns, most in (
        (range(20000), 8),
        ([*range(10000), PADDING, *range(10000, 20000)], 16),
    ):
        file.write_bytes(dump_core(pfns))
        CoredumpBackend(path=file).close()  # what is imported and cached
        tracemalloc.start()
        backend = CoredumpBackend(path=file)
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        backend.close()
        assert size < most * 20000 + 20000


def test_an_index_that_grows_is_not_copied(file: Path) -> None:
    """Reading the index of 4 GiB takes room for one and a piece: it grows where it is."""
    entries = 1 << 20
    with file.open("wb") as empty:
        _Layout(1, (4, 17, b""), 62).write(empty.fileno(), array("Q", range(entries)))
    CoredumpBackend(path=file).close()  # what is imported and cached
    tracemalloc.start()
    with CoredumpBackend(path=file) as backend:
        assert backend.pages == entries
        _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * 8 * entries


def test_reading_needs_no_pyelftools(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ELF files are parsed here: no other package is needed."""
    file.write_bytes(dump_core(PFNS))
    monkeypatch.setitem(sys.modules, "elftools", None)
    with open_backend("coredump", path=file) as backend:
        assert backend.describe()["pages"] == len(PFNS)


def test_a_pv_guests_table_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a table of pairs, too, each piece is read where the one before it has ended."""
    monkeypatch.setattr("xenmapcache.formats.xl_core._CHUNK_ENTRIES", 3)
    path = tmp_path / "guest.core"
    pfns = [0, 1, 2, 5, 6, 7, 9, 20]
    path.write_bytes(xl_files.dump_core_pv(pfns))
    with CoredumpBackend(path=path) as backend:
        assert list(backend.present(0, 100)) == [(0, 3), (5, 3), (9, 1), (20, 1)]
        for pfn in pfns:
            view = backend.map(pfn, 1, writable=False).view(0, PAGE_SIZE)
            assert view == xl_files.page(pfn)


def test_a_header_note_that_is_too_short(tmp_path: Path) -> None:
    """A header note with less than its four numbers does not count."""
    path = tmp_path / "guest.core"
    path.write_bytes(xl_files.dump_core([0], notes=xl_files.note(0x2000001, bytes(24))))
    with pytest.raises(CorruptImageError, match="has no header note"):
        CoredumpBackend(path=path)
