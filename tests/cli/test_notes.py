"""``info``: what the notes of a core say, for people and for scripts."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

from tests.images import writers, xl_files
from tests.images.lab import Images
from xenmapcache.cli import main
from xenmapcache.formats import cpu_notes
from xenmapcache.formats.elf_notes import Note

VMCOREINFO = b"OSRELEASE=6.1.0-example\nPAGESIZE=4096\nKERNELOFFSET=2ec00000\nno pair\nX(y)=a=b\n"


def prstatus(rip: int, *, size: int = 336) -> bytes:
    numbers = [0] * 27
    numbers[16], numbers[17], numbers[18], numbers[19] = rip, 0x10, 0x246, 0xFFFF8000
    return struct.pack("<112x27Q8x", *numbers).ljust(size, b"\0")


def qemu(rip: int, cr3: int, *, version: int = 1) -> bytes:
    numbers = [0] * 24
    numbers[16], numbers[6], numbers[21] = rip, 0xFFFF8000, cr3
    return struct.pack("<2I18Q240x6Q", version, 440, *numbers)


def core(tmp_path: Path, *notes: tuple[bytes, int, bytes], bits: int = 64) -> str:
    path = tmp_path / "guest.elf"
    loads = [writers.Load(0, writers.memory(0, 2))]
    written = b"".join(writers.note(*each) for each in notes)
    path.write_bytes(writers.elf_core(loads, notes=written, bits=bits))
    return str(path)


def info(path: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, object]]:
    """Return what is printed for people, and the notes of what is printed for scripts."""
    assert main(["info", path]) == 0
    text = capsys.readouterr().out
    assert main(["info", "--json", path]) == 0
    notes: dict[str, object] = json.loads(capsys.readouterr().out)["notes"]
    return text, notes


def test_ranges_come_before_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What memory there is, is what most people want to know."""
    text, _ = info(core(tmp_path, (b"VMCOREINFO", 0, VMCOREINFO)), capsys)
    assert text.index("ranges") < text.index("0x00002000") < text.index("What the source says")
    assert text.index("What the source says") < text.index("OSRELEASE")


def test_vmcoreinfo_in_a_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People see what kernel it was, and what its page tables need; scripts get a dictionary."""
    text, notes = info(core(tmp_path, (b"VMCOREINFO", 0, VMCOREINFO)), capsys)
    assert "vmcoreinfo  OSRELEASE=6.1.0-example\n              PAGESIZE=4096\n" in text
    assert "X(y)" not in text
    assert "4 lines in all: see --json" in text
    assert notes["vmcoreinfo"] == {
        "OSRELEASE": "6.1.0-example",
        "PAGESIZE": "4096",
        "KERNELOFFSET": "2ec00000",
        "X(y)": "a=b",
    }


def test_registers_of_processors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """QEMU writes two notes for each: the usual one, and one that has control registers."""
    path = core(
        tmp_path,
        (b"CORE", 1, prstatus(0xFFFFFFFF81000000)),
        (b"CORE", 1, prstatus(0x401000)),
        (b"QEMU", 0, qemu(0xFFFFFFFF81000000, 0x2976000)),
        (b"QEMU", 0, qemu(0x401000, 0x1234000)),
    )
    text, notes = info(path, capsys)
    assert "cpu 0    rip 0xffffffff81000000 rsp 0xffff8000 cr3 0x2976000\n" in text
    assert "cpu 1    rip 0x401000 rsp 0xffff8000 cr3 0x1234000\n" in text
    assert "notes    CORE 1 (2 times), QEMU 0 (2 times)\n" in text
    cpus = notes["cpus"]
    assert isinstance(cpus, list)
    assert [each["cpu"] for each in cpus] == [0, 1]
    assert cpus[1]["cr3"] == 0x1234000
    assert cpus[1]["cr3_hex"] == "0x1234000"
    assert cpus[1]["rflags"] == 0  # of QEMU's note, which counts where both say something
    assert cpus[1]["cs"] == 0x10


def test_many_processors_and_notes_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """People see the first; scripts get all of them."""
    status = [(b"CORE", 1, prstatus(number)) for number in range(20)]
    others = [(b"LINUX", number, b"") for number in range(20)]
    text, notes = info(core(tmp_path, *status, *others), capsys)
    assert "cpu 7    rip 0x7 rsp 0xffff8000\n" in text
    assert "cpu 8" not in text
    assert "and 12 more: see --json" in text
    assert "CORE 1 (20 times), LINUX 0, " in text
    assert "and 13 more: see --json" in text
    cpus = notes["cpus"]
    assert isinstance(cpus, list)
    assert len(cpus) == 20


def test_pages_in_part_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what is missing of each: the first for people, all for scripts."""
    path = tmp_path / "guest.elf"
    loads = [writers.Load(gfn << 12, b"x" * (4096 - gfn)) for gfn in range(1, 20, 2)]
    path.write_bytes(writers.elf_core(loads))
    text, notes = info(str(path), capsys)
    assert re.search("partial pages +0x1000, missing bytes: 1\n +0x3000, missing bytes: 3", text)
    assert "0xf000, missing bytes: 15" in text
    assert "0x11000: " not in text
    assert "and 2 more: see --json" in text
    pages = notes["partial_pages"]
    assert isinstance(pages, list)
    assert len(pages) == 10
    path.write_bytes(writers.elf_core(loads[:1]))
    assert "more: see --json" not in info(str(path), capsys)[0]


def test_notes_of_other_layouts_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another machine, another size or another version, nothing is known."""
    strange = [
        (b"CORE", 1, prstatus(1, size=400)),
        (b"CORE", 2, prstatus(1)),
        (b"QEMU", 0, qemu(1, 2, version=2)),
        (b"QEMU", 0, qemu(1, 2) + b"more"),
    ]
    text, notes = info(core(tmp_path, *strange), capsys)
    assert "cpu 0" not in text
    assert "cpus" not in notes
    _, notes = info(core(tmp_path, (b"CORE", 1, prstatus(1)), bits=32), capsys)
    assert "cpus" not in notes


def test_a_processor_may_have_one_note_only() -> None:
    """Whichever it is: the other one may be damaged."""
    notes = [
        Note("CORE", 1, prstatus(1)),
        Note("QEMU", 0, qemu(2, 0x1000)),
        Note("QEMU", 0, qemu(3, 0x2000)),
    ]
    first, second = cpu_notes.registers(notes)
    assert (first["rip"], first["cr3"], first["cs"]) == (2, 0x1000, 0x10)
    assert (second["rip"], second["cr3"]) == (3, 0x2000)
    assert "cs" not in second


def xen_context(**registers: int) -> bytes:
    """Return a vcpu_guest_context_t with some registers."""
    places = {"rip": 648, "cs": 656, "rflags": 664, "rsp": 672, "cr0": 4984, "cr3": 5008}
    context = bytearray(5168)
    for name, value in registers.items():
        struct.pack_into("<Q", context, places[name], value)
    return bytes(context)


def test_contexts_of_xl_dump_core(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control registers are in them, too. A vCPU that was never started keeps its number."""
    path = tmp_path / "guest.core"
    # Above the selector of cs, Xen has whether the vCPU takes events.
    contexts = xen_context() + xen_context(rip=0x1000, rsp=0x8000, cs=0x1_0000_0010, cr3=0x5000)
    changes = {".xen_prstatus": {"entry": 5168}}
    path.write_bytes(xl_files.dump_core([0, 1], vcpus=2, contexts=contexts, changes=changes))
    text, notes = info(str(path), capsys)
    assert re.search("cpu 1 +rip 0x1000 rsp 0x8000 cr3 0x5000\n", text)
    assert "cpu 0" not in text
    cpus = notes["cpus"]
    assert isinstance(cpus, list)
    assert [(each["cpu"], each["cs_hex"], each["cr3_hex"]) for each in cpus] == [
        (1, "0x10", "0x5000")
    ]


@pytest.mark.images
def test_registers_are_those_that_qemu_shows(
    lab_images: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a real guest, against QEMU's own list."""
    shown = lab_images.path("registers.txt").read_text()
    _, notes = info(str(lab_images.path("plain.elf")), capsys)
    cpus = notes["cpus"]
    assert isinstance(cpus, list)
    for name in ("RIP", "RSP", "CR0", "CR2", "CR3", "CR4"):
        found = re.search(rf"\b{name}=([0-9a-f]+)", shown)
        assert found
        assert cpus[0][name.lower()] == int(found[1], 16)
