"""Streams of saved guests in the files of libvirt and XenServer, and on their own."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.descriptors import open_files
from tests.effort import calls_at_most
from xenmapcache import CorruptImageError, open_source

from .test_save import content_of, opened
from .xl_files import (
    END,
    libvirt,
    libxc,
    libxl,
    page,
    pages,
    record,
    section,
    suspend_image,
    xl,
)

XENOPS, LIBXC, LIBXL, LEGACY, QEMU, VGPU, VARSTORED = 0xF, 0xF0, 0xF1, 0xF2, 0xF00, 0xF10, 0xF11
STREAM = libxc(pages(0, 1, 5), record(END))
LIBXL_STREAM = libxl(STREAM, record(3, b"QEMU!"), record(END))
MEMORY = {gfn: page(gfn) for gfn in (0, 1, 5)}
META = section(XENOPS, b"((time now)(word_size 64))")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "guest.save"


@pytest.mark.parametrize(
    "content",
    [
        STREAM,
        LIBXL_STREAM,
        xl(LIBXL_STREAM),
        libvirt(LIBXL_STREAM),
        libvirt(LIBXL_STREAM, header=48),
        libvirt(LIBXL_STREAM, xml=b"<domain>" + bytes(9999)),
        libvirt(LIBXL_STREAM, version=1),
        suspend_image(META, section(LIBXC, STREAM, 0)),
        suspend_image(META, section(LIBXC, STREAM, 0), section(QEMU, b"QEVM" + bytes(99))),
        suspend_image(section(LIBXL, LIBXL_STREAM, 0), section(VARSTORED, b"{}")),
        suspend_image(META, section(VGPU, b"state"), section(LIBXC, STREAM)),
        suspend_image(META, section(LIBXC, STREAM, 0), section(VGPU, b"of any length", 0)),
    ],
)
def test_a_bare_path_opens_each_container(file: Path, content: bytes) -> None:
    """Whatever is around a stream of libxc's, the memory in it is found by the path alone."""
    with opened(file, content) as backend:
        assert content_of(backend) == MEMORY
    with open_source(file) as source:
        assert source.name == "save"
        assert list(source.present(0, 99) or ()) == [(0, 2), (5, 1)]
    with open_source(f"save:{file}", keep_index=True) as source:
        assert source.describe()["pages"] == 3


def test_text_in_the_xml_is_no_stream(file: Path) -> None:
    """If the XML ends as a stream begins, the header of 64 bytes decides."""
    xml = b"<domain>LibxlFmt" + bytes(8)
    with opened(file, libvirt(LIBXL_STREAM, xml=xml)) as backend:
        assert content_of(backend) == MEMORY


LIBVIRT = libvirt(LIBXL_STREAM)
SUSPENDED = suspend_image(META, section(LIBXC, STREAM, 0), section(QEMU, b"QEVM"))
BAD: dict[str, tuple[bytes, str]] = {
    "version": (libvirt(LIBXL_STREAM, version=3), r"version 0x3: 1 and 2 are known \(offset 0x10"),
    "byte order": (libvirt(LIBXL_STREAM, version=2 << 24), "version 0x2000000"),
    "legacy": (libvirt(bytes(99)), r"XML of 0xa bytes; .* legacy format .* \(offset 0x4a\)"),
    "XML": (LIBVIRT[:20] + b"\xff" * 4 + LIBVIRT[24:], "inside of libvirt's header and XML"),
    "only XML": (libvirt(b""), "has no stream of libxl after libvirt's XML"),
    "half a header": (LIBVIRT[:20], "inside of libvirt's header"),
    "no section": (b"XenSavedDomv2-\n", "inside of a section's header"),
    "no memory": (suspend_image(META), r"ends without libxc's stream.*\(offset 0x39\)"),
    "vGPU first": (suspend_image(section(VGPU, b"x", 0), section(LIBXC, STREAM)), "ends without"),
    "two": (suspend_image(*[section(LIBXC, STREAM)] * 2), "has a second stream of pages"),
    "old": (suspend_image(META, section(LEGACY, STREAM)), "is of the legacy format of Xen 4.5"),
    "unknown": (suspend_image(section(0xF0F, b"x")), "section of unknown type 0xf0f"),
    "long": (suspend_image(section(QEMU, b"x", (1 << 64) - 1)), "inside of the section of QEMU"),
    "not libxc": (suspend_image(section(LIBXC, bytes(99))), "has no libxc stream there"),
    "not libxl": (suspend_image(section(LIBXL, bytes(99))), "where libxl's stream should begin"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_container_that_lies(file: Path, name: str) -> None:
    """The error names the file, what is wrong and where; and the file is closed again."""
    content, message = BAD[name]
    files = open_files()
    with calls_at_most(10_000), pytest.raises(CorruptImageError, match=f"guest.save: .*{message}"):
        opened(file, content)
    assert open_files() <= files


@pytest.mark.parametrize("content", [LIBVIRT, SUSPENDED[:-100]])
def test_cut_off_anywhere(file: Path, content: bytes) -> None:
    """However much of its end a file has lost, it is refused."""
    for length in {*range(1, 400), *range(400, len(content), 97), len(content) - 1}:
        with pytest.raises(CorruptImageError, match="guest.save"):
            opened(file, content[:length])


def test_sections_without_end(file: Path) -> None:
    """Sections that have no memory are not followed for long."""
    file.write_bytes(suspend_image(section(XENOPS) * 500_000))
    os.utime(file, (1, 1))
    with calls_at_most(12 * 32_768):
        with pytest.raises(CorruptImageError, match="more than 32768 records without pages"):
            open_source(file)


@pytest.mark.parametrize("make", [libvirt, lambda stream: suspend_image(section(LIBXL, stream))])
def test_progress_of_a_container(file: Path, make: Callable[[bytes], bytes]) -> None:
    """Progress counts the whole file's bytes."""
    content = make(libxl(libxc(*(pages(gfn) for gfn in range(600)), record(END)), record(END)))
    calls: list[tuple[int, int]] = []
    with opened(file, content, progress=lambda done, total: calls.append((done, total))):
        assert calls == sorted(calls)
        assert calls[-1] == (len(content), len(content))


def test_the_fields_lie_where_libvirt_has_them() -> None:
    """The test's own writer has libvirt's structure: magic, version, length, ten unused words."""
    head = struct.pack("<16s2I10I", b"libvirt-xml\n \0 \r", 2, 10, *[0] * 10)
    assert LIBVIRT.startswith(head + b"<domain/>\0LibxlFmt")
