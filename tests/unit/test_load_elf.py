"""MockDomain.load_elf(): an ELF kernel in a mock guest's memory, and its symbols."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.xen.lab.image import cache_folder
from xenmapcache import (
    CorruptImageError,
    FaultError,
    GuestMemory,
    MapCache,
    MockDomain,
    MockHypervisor,
    open_backend,
)

ROOT = Path(__file__).parents[2]

SOURCE = r"""
const char linux_banner[] = "Linux version 6.1.0-test (gcc) #1 SMP\n";
static const char twice[] = "a static one";
const char *used = twice;
int counter = 0x12345678;
char bss[0x3000];
extern char _end[];
void *end = _end;
void _start(void) { for (;;) counter++; }
"""
OTHER = """
static const char twice[] = "another static one";
const char *other = twice;
"""
SCRIPT = """
ENTRY(phys_start)
phys_start = 0x1000000;
PHDRS { text PT_LOAD; data PT_LOAD; }
SECTIONS {
    . = 0xffffffff81000000;
    .text : AT(0x1000000) { *(.text*) } :text
    .rodata : AT(ADDR(.rodata) - 0xffffffff80000000) { *(.rodata*) } :text
    . = 0xffffffff81800000;
    .data : AT(0x400000) { *(.data*) } :data
    .bss : { *(.bss*) _end = .; } :data
    /DISCARD/ : { *(.comment) *(.note*) *(.eh_frame*) }
    an_absolute_one = 0xffffffff81000004;
}
"""


@pytest.fixture(scope="module")
def vmlinux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel, as far as its layout goes: linked high, loaded low, data below text."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    folder = tmp_path_factory.mktemp("kernel")
    for name, text in (("main.c", SOURCE), ("other.c", OTHER), ("kernel.lds", SCRIPT)):
        (folder / name).write_text(text)
    command = "gcc -O1 -ffreestanding -nostdlib -static -fno-pic -no-pie -mcmodel=kernel -g -w"
    arguments = ["-Wl,-T,kernel.lds,--build-id=none", "main.c", "other.c", "-o", "vmlinux"]
    done = subprocess.run(
        [*command.split(), *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"gcc does not link for x86-64: {done.stderr}")
    return folder / "vmlinux"


@pytest.fixture
def guest() -> MockDomain:
    guest = MockHypervisor().create_domain(memory="20M")
    for address in range(0, guest.memory_end, 1 << 20):
        guest.write(address, b"\xee" * (1 << 20))
    return guest


def test_segments_and_symbols(vmlinux: Path, guest: MockDomain) -> None:
    """A symbol's object is at its physical address, and zeros follow a segment's bytes."""
    symbols = guest.load_elf(vmlinux)
    assert guest.read(symbols["linux_banner"], 38) == b"Linux version 6.1.0-test (gcc) #1 SMP\n"
    assert guest.read(symbols["counter"], 4) == (0x12345678).to_bytes(4, "little")
    assert 0x1000000 <= symbols["linux_banner"] < 0x1010000
    assert 0x400000 <= symbols["counter"] < 0x401000
    assert guest.read(symbols["bss"], 0x3000) == bytes(0x3000)
    assert guest.read(symbols["_end"], 2) == b"\xee\xee"
    assert guest.read(0x3FFFFF, 1) == b"\xee"
    (text, _), (data, length) = symbols.segments
    assert (text, data, data + length) == (0x1000000, 0x400000, symbols["_end"])
    assert symbols["_start"] == 0x1000000
    assert symbols.entry == 0x1000000
    assert not {"an_absolute_one", "main.c", ".text", ""} & set(symbols)
    assert guest.read(symbols["twice"], 13) == b"a static one\0"


def test_a_stripped_kernel(vmlinux: Path, guest: MockDomain, tmp_path: Path) -> None:
    """Without its symbols a kernel is loaded all the same, and its banner found by searching."""
    shutil.copy(vmlinux, stripped := tmp_path / "stripped")
    subprocess.run(["strip", "--strip-all", stripped], check=True)
    symbols = guest.load_elf(stripped)
    assert symbols == {}
    assert len(symbols.segments) == 2
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        ((address, _),) = GuestMemory(cache).find(b"Linux version")
        assert 0x1000000 <= address < 0x1010000


def test_a_global_symbol_goes_before_a_local_one(vmlinux: Path, guest: MockDomain) -> None:
    """Of two with one name the global one counts, wherever it stands in the table."""
    content = bytearray(vmlinux.read_bytes())
    before = guest.load_elf(vmlinux)["linux_banner"]
    of_global, of_local = (find_symbol(content, name) for name in (b"linux_banner", b"twice"))
    assert of_local < of_global
    content[of_local : of_local + 4] = content[of_global : of_global + 4]
    changed = vmlinux.with_name("changed")
    changed.write_bytes(content)
    assert guest.load_elf(changed)["linux_banner"] == before


def find_symbol(content: bytearray, name: bytes) -> int:
    """Return the offset of a symbol in the table."""
    (table,) = struct.unpack_from("<Q", content, 40)
    size, count = struct.unpack_from("<HH", content, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", content, table + size * n) for n in range(count)]
    ((offset, length, link),) = (part[4:7] for part in sections if part[1] == 2)
    for symbol in range(offset, offset + length, 24):
        (start,) = struct.unpack_from("<I", content, symbol)
        if content[sections[link][4] + start :].startswith(name + b"\0"):
            return int(symbol)
    raise AssertionError(name)


def test_no_room(vmlinux: Path) -> None:
    """A kernel that does not fit is refused, naming where memory lacks, and nothing has changed."""
    for memory, holes, address in (
        ("16M", [], 0x1000000),
        ("20M", [(0x401000, 0x1000)], 0x401000),
    ):
        guest = MockHypervisor().create_domain(memory=memory, holes=holes)
        with pytest.raises(FaultError) as caught:
            guest.load_elf(vmlinux)
        assert caught.value.address == address
        for start in (0x400000, 0x1000000):
            if start < guest.memory_end:
                assert guest.read(start, 0x1000) == bytes(0x1000)


def elf32(*, machine: int = 3) -> bytes:
    """A 32-bit kernel of one segment at 1 MiB, linked to 3 GiB, with one symbol."""
    names = b"\0.symtab\0.strtab\0.shstrtab\0"
    symbols = bytes(16) + struct.pack("<IIIBBH", 1, 0xC0100010, 4, 0x11, 0, 1)
    strings = b"\0linux_banner\0"
    data = bytes(16) + b"Linux version 2.6.18\0"
    parts = [data, symbols, strings, names]
    offsets = [0x100]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    header = struct.pack(
        "<16sHHIIIIIHHHHHH",
        b"\x7fELF\1\1\1",
        *(2, machine, 1, 0xC0100000, 52, offsets[4], 0, 52, 32, 1, 40, 5, 4),
    )
    program = struct.pack("<8I", 1, 0x100, 0xC0100000, 0x100000, len(data), 0x2000, 7, 0x1000)
    sections = bytes(40)
    for (name, kind, link, entry), offset, part in zip(
        ((0, 1, 0, 0), (1, 2, 3, 16), (9, 3, 0, 0), (17, 3, 0, 0)), offsets, parts, strict=False
    ):
        sections += struct.pack("<10I", name, kind, 0, 0, offset, len(part), link, 0, 1, entry)
    return (header + program).ljust(0x100, b"\0") + b"".join(parts) + sections


def test_32_bits(guest: MockDomain, tmp_path: Path) -> None:
    """A kernel of 32 bits is loaded, its entry translated as its symbols are."""
    (tmp_path / "kernel").write_bytes(elf32())
    symbols = guest.load_elf(tmp_path / "kernel")
    assert (dict(symbols), symbols.entry) == ({"linux_banner": 0x100010}, 0x100000)
    assert symbols.segments == ((0x100000, 0x2000),)
    assert guest.read(0x100010, 20) == b"Linux version 2.6.18"
    assert guest.read(0x100100, 0x1F00) == bytes(0x1F00)


def test_what_is_wrong_is_named(guest: MockDomain, tmp_path: Path) -> None:
    """A file that is corrupt or not a kernel is refused, and guest memory is unchanged."""
    good = elf32()
    cases = {
        "magic": (b"MZ" + good, "not an ELF file"),
        "cut off": (good[:-60], "is truncated or corrupt"),
        "segment": (good[:68] + b"\xff\xff\xff\x7f" + good[72:], "segment 0 is 0x100..0x800000ff"),
        "memory": (
            good[:72] + bytes(4) + good[76:],
            "0: p_filesz 0x.* exceeds p_memsz 0x0",
        ),
        "no segment": (good[:52] + b"\4" + good[53:], "no PT_LOAD segment"),
        "count": (good[:44] + b"\xf0\xff" + good[46:], "table of program headers is 0x34"),
        "link": (
            good.replace(struct.pack("<III", 3, 0, 1), struct.pack("<III", 9, 0, 1)),
            "has no section 9",
        ),
        "names": (
            good.replace(struct.pack("<III", 3, 0, 1), struct.pack("<III", 1, 0, 1)),
            "should have the names of the symbols",
        ),
        "name": (
            good.replace(struct.pack("<II", 1, 0xC0100010), b"\xff" * 8),
            "name at 0xffffffff of 0xe does not end",
        ),
    }
    before = guest.read(0, guest.memory_end)
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CorruptImageError, match=message):
            guest.load_elf(tmp_path / name)
    assert guest.read(0, guest.memory_end) == before


def debian_kernel() -> Path | None:
    """Return Debian's kernel, unpacked: the one that is named, or the lab's."""
    named = os.environ.get("XENMAPCACHE_VMLINUX")
    return Path(named) if named else next(iter(sorted(cache_folder().glob("*/vmlinux"))), None)


def test_debians_kernel() -> None:
    """The example reads the banner of a real kernel, which Debian has stripped."""
    kernel = debian_kernel()
    if kernel is None:
        pytest.skip("no vmlinux: the lab (make test-xen) unpacks one, or name XENMAPCACHE_VMLINUX")
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples/kernel_banner.py", "--kernel", kernel],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "segment at 0x1000000, " in done.stdout
    assert ": Linux version " in done.stdout.splitlines()[-1]
    assert "Debian" in done.stdout.splitlines()[-1]


def test_the_example_takes_a_kernel_with_symbols(vmlinux: Path) -> None:
    """Where the symbol is there, the example needs no search."""
    done = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples/kernel_banner.py", "--kernel", vmlinux],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "searching" not in done.stdout
    assert done.stdout.splitlines()[-1].endswith(": Linux version 6.1.0-test (gcc) #1 SMP")


def test_symbols_that_lie_nowhere(guest: MockDomain, tmp_path: Path) -> None:
    """A symbol outside of all segments is left out, and so is a table without symbols."""
    outside = elf32().replace(struct.pack("<I", 0xC0100010), struct.pack("<I", 0xD0000000))
    empty = bytearray(elf32())
    (sections,) = struct.unpack_from("<I", empty, 32)
    struct.pack_into("<I", empty, sections + 80 + 20, 0)
    for content in (outside, bytes(empty)):
        (tmp_path / "kernel").write_bytes(content)
        assert guest.load_elf(tmp_path / "kernel") == {}


def test_a_symbol_table_of_odd_entries(guest: MockDomain, tmp_path: Path) -> None:
    """Entries of another size than symbols have are refused."""
    content = bytearray(elf32())
    (sections,) = struct.unpack_from("<I", content, 32)
    struct.pack_into("<I", content, sections + 80 + 36, 8)
    (tmp_path / "kernel").write_bytes(content)
    with pytest.raises(CorruptImageError, match="sh_entsize 8 and sh_size 0x20 must"):
        guest.load_elf(tmp_path / "kernel")


def test_symbols_without_names(guest: MockDomain, tmp_path: Path) -> None:
    """A table of names that is empty is refused, naming which section it is."""
    content = bytearray(elf32())
    (sections,) = struct.unpack_from("<I", content, 32)
    struct.pack_into("<I", content, sections + 120 + 20, 0)
    (tmp_path / "kernel").write_bytes(content)
    with pytest.raises(CorruptImageError, match="section 3 should have the names of the symbols"):
        guest.load_elf(tmp_path / "kernel")
