"""Formats by their first bytes: what a bare path and every kind of name say of each."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import pytest

from tests.descriptors import open_files
from tests.unit.test_source import elf, lime
from xenmapcache import CorruptImageError, UnsupportedOperationError, WrongFormatError, open_source
from xenmapcache.formats import signatures
from xenmapcache.formats.content import InMemory
from xenmapcache.formats.signatures import (
    BACKENDS,
    EMPTY,
    LONGEST,
    SIGNATURES,
    Signature,
    identify,
    refuse_others,
    signature_of,
)

PAGE = bytes(4096)


def at(offset: int, data: bytes) -> bytes:
    """Return a page with some bytes in it."""
    return PAGE[:offset] + data + PAGE[offset + len(data) :]


NOT_READ = {
    "AVML": (at(0, b"AVML\2"), "is compressed by AVML: convert it to LiME with avml-convert"),
    "big-endian LiME": (at(0, b"LiME\0\0\0\1"), "is a big-endian LiME file: only little-endian"),
    "PAGEDUMP": (at(0, b"PAGEDUMP"), "a Windows crash dump of 32 bits: Volatility 3"),
    "PAGEDU64": (at(0, b"PAGEDU64"), "a Windows crash dump of 64 bits: Volatility 3"),
    "minidump": (at(0, b"MDMP"), "a Windows minidump"),
    "hibr": (at(0, b"hibr"), "a hibernation file of Windows"),
    "HIBR": (at(0, b"HIBR"), "a hibernation file of Windows"),
    "wake": (at(0, b"wake"), "a hibernation file of Windows"),
    "WAKE": (at(0, b"WAKE"), "a hibernation file of Windows"),
    "RSTR": (at(0, b"RSTR"), "a hibernation file of Windows"),
    "vmss": (at(0, (0xBED2BED2).to_bytes(4, "little")), "of VMware .* vmss2core"),
    "vmsn": (at(0, (0xBED2BED0).to_bytes(4, "little")), "of VMware .* Volatility 3"),
    "vmss, partial": (at(0, (0xBED3BED3).to_bytes(4, "little")), "of VMware"),
    "vmss, restored": (at(0, (0xBAD1BAD1).to_bytes(4, "little")), "of VMware"),
    "VirtualBox": (at(0, b"\x7fVirtualBox SavedState V2.0\n"), "of VirtualBox .* dumpvmcore"),
    "QEVM": (at(0, b"QEVM\0\0\0\3"), "a migration stream of QEMU: .* dump-guest-memory"),
    "virsh save": (at(0, b"LibvirtQemudSave"), "QEMU guest .* virsh dump --memory-only"),
    "partial": (at(0, b"LibvirtQemudPart"), "an unfinished file of virsh save"),
    "qcow2": (at(0, b"QFI\xfb\0\0\0\3"), "a disk of QEMU"),
    "VDI": (at(0x40, b"\x7f\x10\xda\xbe"), "a disk of VirtualBox"),
    "E01": (at(0, b"EVF\x09\x0d\x0a\xff\x00\x01"), "an EnCase image .E01.: .* ewfexport"),
    "gz": (at(0, b"\x1f\x8b\x08"), "is compressed by gzip: unpack it first"),
    "xz": (at(0, b"\xfd7zXZ\0"), "is compressed by xz"),
    "zst": (at(0, b"\x28\xb5\x2f\xfd"), "is compressed by zstd"),
    "lz4": (at(0, b"\x04\x22\x4d\x18"), "is compressed by lz4"),
    "bz2": (at(0, b"BZh91AY&SY"), "is compressed by bzip2"),
    "zip": (at(0, b"PK\x03\x04"), "is a zip archive: unpack it first"),
    "tar": (at(257, b"ustar"), "is a tar archive"),
    "vmlinuz": (at(0x202, b"HdrS"), "a packed Linux kernel .vmlinuz.: it has no guest memory"),
    "arm64 Image": (at(0x38, b"ARMd"), "a Linux kernel for arm64"),
    "xm dump-core": (at(0, (0xF00FEBED).to_bytes(4, "little")), "an old file of xm dump-core"),
    "program": (elf(2) + PAGE, "is an ELF file, but not a core: programs, libraries"),
    "program, 32 bits": (elf(3, bits=32) + PAGE, "is an ELF file, but not a core"),
    "ELF, cut": (b"\x7fELF", "is an ELF file, but not a core"),
}
"""Files that no backend reads, and what is said of them."""


@pytest.mark.parametrize("name", NOT_READ)
def test_a_format_that_is_not_read(tmp_path: Path, name: str) -> None:
    """A bare path says what the file is and what reads it, and never to write raw:."""
    content, message = NOT_READ[name]
    path = tmp_path / "file"
    path.write_bytes(content)
    os.utime(path, (1, 1))
    before = open_files()
    with pytest.raises(WrongFormatError, match=message) as caught:
        open_source(path)
    assert str(path) in str(caught.value)
    assert "raw:" not in str(caught.value)
    for backend in BACKENDS:
        with pytest.raises(CorruptImageError, match=re.escape(str(path))) as caught_too:
            open_source(f"{backend}:{path}")
        assert "raw:" not in str(caught_too.value)
        if backend == "raw" or (backend == "save" and content):
            assert re.search(message, str(caught_too.value))
    assert open_files() <= before


@pytest.mark.parametrize("name", NOT_READ)
def test_raw_with_a_place_reads_any_file(tmp_path: Path, name: str) -> None:
    """An address or ranges say that the file is meant as it is, whatever it begins with."""
    path = tmp_path / "file"
    path.write_bytes(NOT_READ[name][0][:4096].ljust(4096, b"\0"))
    os.utime(path, (1, 1))
    with pytest.raises(UnsupportedOperationError, match="give an address: @0 after the name"):
        open_source(f"raw:{path}")
    with open_source(f"raw:{path}@0") as image:
        assert list(image.present(0, 9) or ()) == [(0, 1)]
    with open_source(f"raw:{path}@0x5000+4k") as image:
        assert list(image.present(0, 9) or ()) == [(5, 1)]


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    """A dump that failed has left nothing; raw: refuses it with an address, too."""
    path = tmp_path / "file"
    path.touch()
    for spec in (str(path), f"raw:{path}", f"raw:{path}@0", f"raw:{path}@0+4k"):
        with pytest.raises(WrongFormatError, match=f"{path} is empty: .* write the dump again"):
            open_source(spec)
    for backend in BACKENDS:
        with pytest.raises(CorruptImageError):
            open_source(f"{backend}:{path}")


READ = {
    "coredump": elf(4, b"\0.shstrtab\0.xen_pages\0"),
    "elfcore": elf(4),
    "save": b"\xff" * 8 + b"XENF",
    "raw": b"EMiL" + struct.pack("<IQQ", 1, 0x2000, 0x1000),  # ends before it begins
}


@pytest.mark.parametrize("backend", READ)
@pytest.mark.parametrize("named", READ)
def test_the_wrong_backend_names_the_right_one(tmp_path: Path, backend: str, named: str) -> None:
    """Each backend refuses the files of the others, and says how to open them."""
    path = tmp_path / "file"
    path.write_bytes(READ[backend].ljust(4096, b"\0"))
    os.utime(path, (1, 1))
    if {backend, named} <= {"coredump", "elfcore"} or backend == named:
        with pytest.raises(CorruptImageError) as own:  # of the parser
            open_source(f"{named}:{path}")
        assert not isinstance(own.value, WrongFormatError)
        return
    with pytest.raises(WrongFormatError, match=f"open it as {backend}:{path}, or by its path"):
        open_source(f"{named}:{path}")


def test_raw_reads_lime_by_both_names(tmp_path: Path) -> None:
    """LiME has its own ranges, and the backend "raw" is the one that reads it."""
    path = lime(tmp_path / "guest.lime", {0x3000: PAGE})
    for spec in (str(path), f"raw:{path}"):
        with open_source(spec) as source:
            assert list(source.present(0, 99) or ()) == [(3, 1)]


def test_a_message_is_printable(tmp_path: Path) -> None:
    """A file's name may have escape sequences."""
    path = tmp_path / "a\x1b[2Jb"
    path.write_bytes(b"QEVM")
    for spec in (str(path), f"raw:{path}", f"save:{path}", f"raw:{path}@0x123"):
        with pytest.raises(ValueError) as caught:
            open_source(spec)
        assert r"a\x1b[2Jb" in str(caught.value)
        assert "\x1b" not in str(caught.value)


# --- the table ---------------------------------------------------------------------------


def test_every_row_can_be_reached() -> None:
    """No row hides a later one, and each says who reads the file or what to do."""
    for row in SIGNATURES:
        start = bytearray(LONGEST)
        for offset, data in ((row.offset, row.magic), *row.also):
            assert offset + len(data) <= LONGEST
            start[offset : offset + len(data)] = data
        assert identify(bytes(start), row.section) is row
        assert row.backend or row.remedy
        assert row.magic
    assert {row.backend for row in SIGNATURES} == {"", *BACKENDS}


def test_no_advice_is_to_open_a_known_format_as_raw() -> None:
    """Only LiME is read by the backend "raw"."""
    for row in SIGNATURES:
        assert "raw:" not in row.advice("file") or row.magic == b"EMiL"


def test_memory_has_no_signature() -> None:
    """Zeros, a real mode's interrupt table and a page table are not taken for a format."""
    for start in (bytes(LONGEST), b"\x53\xff\x00\xf0" * 200, b"\x67\x30\x00\x00\0\0\0\0" * 70):
        assert identify(start) is None
        assert signature_of(InMemory(start)) is None
    assert identify(b"") is EMPTY


def test_section_names_decide_only_for_cores() -> None:
    """A core is one of xl dump-core if its section names say so; names beyond the file do not."""
    core = elf(4, b"\0.xen_pages\0")

    def format_of(content: bytes) -> str:
        found = signature_of(InMemory(content))
        assert found is not None
        return found.format

    assert format_of(core) == "a file of xl dump-core"
    assert format_of(core[:-1]) == "an ELF core of 64 bits"
    assert format_of(core[:100]) == "an ELF core of 64 bits"
    assert format_of(elf(2, b"\0.xen_pages\0")) == "an ELF file, but not a core"
    far = bytearray(core)
    far[64 + 0x18 : 64 + 0x20] = b"\xff" * 8
    assert format_of(bytes(far)) == "an ELF core of 64 bits"


def test_little_is_read_to_recognise_a_file() -> None:
    """Section names may be said to be large; 64 KiB of them are read."""
    asked: list[int] = []
    core = bytearray(elf(4, b"\0.xen_pages\0"))
    core[64 + 0x20 : 64 + 0x28] = b"\xff" * 8

    def read(offset: int, length: int) -> bytes:
        asked.append(length)
        return bytes(core[offset : offset + length])

    found = signatures.recognise(read)
    assert found is not None
    assert found.backend == "coredump"
    assert max(asked) == 1 << 16


def test_a_row_of_another_backend_is_refused_for_its_remedy() -> None:
    """A row may have a backend and a remedy: the backend's own format, in a form it cannot read."""
    with pytest.raises(WrongFormatError, match="x is a big-endian ELF file: only little-endian"):
        refuse_others(InMemory(elf(4, little=False), "x"), "elfcore", "ELF")
    with pytest.raises(WrongFormatError, match="big-endian ELF file, not a core of Xen: only"):
        refuse_others(InMemory(elf(4, little=False), "x"), "coredump", "a core of Xen")
    refuse_others(InMemory(b"not known", "x"), "elfcore")
    assert Signature(b"x", "y", "z").advice("p") == "open it as z:p, or by its path alone"
