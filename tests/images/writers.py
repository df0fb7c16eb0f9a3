"""Writers of images for tests: what they hold is known, and nothing is stored."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from xenmapcache.address import PAGE_SIZE, page_span
from xenmapcache.backends.image import SpanBackend
from xenmapcache.formats import lime as lime_format
from xenmapcache.formats.elf import PN_XNUM, PT_LOAD, PT_NOTE

_WORDS = PAGE_SIZE // 8
_EHDR = {64: "<16sHHIQQQIHHHHHH", 32: "<16sHHIIIIIHHHHHH"}
_PHDR = {64: "<IIQQQQQQ", 32: "<IIIIIIII"}
_SHDR = {64: "<IIQQQQIIQQ", 32: "<10I"}


def memory(gfn: int, pages: int) -> bytes:
    """Return what the test guests have in some pages: each eight bytes are different."""
    return array("Q", range(gfn * _WORDS, (gfn + pages) * _WORDS)).tobytes()


def memory_at(address: int, length: int) -> bytes:
    """Return the same by address and length, in bytes."""
    gfn, count = page_span(address, length)
    return memory(gfn, count)[address % PAGE_SIZE :][:length]


def packed(ranges: Sequence[tuple[int, int]]) -> bytes:
    """Return ranges of pages, ``(gfn, pages)``, one after the other."""
    return b"".join(memory(*pages) for pages in ranges)


def lime_range(first: int, data: bytes, *, version: int = lime_format.VERSION) -> bytes:
    """Return a range of a LiME file."""
    return (
        lime_format.HEADER.pack(lime_format.MAGIC, version, first, first + len(data) - 1, 0) + data
    )


def lime(ranges: Sequence[tuple[int, int]]) -> bytes:
    """Return a LiME file of ranges of pages, ``(gfn, pages)``."""
    return b"".join(lime_range(gfn * PAGE_SIZE, memory(gfn, pages)) for gfn, pages in ranges)


class Load(NamedTuple):
    """A segment of an ELF core; ``memory_size`` is that of the data, if it is None."""

    physical: int
    data: bytes
    memory_size: int | None = None


def note(name: bytes, kind: int, data: bytes) -> bytes:
    """Return a note, padded."""
    name += b"\0"
    header = struct.pack("<III", len(name), len(data), kind)
    return header + name + bytes(-len(name) % 4) + data + bytes(-len(data) % 4)


def elf_core(
    loads: Sequence[Load],
    *,
    notes: bytes = b"",
    bits: int = 64,
    align: int = 1,
    many: bool = False,
) -> bytes:
    """Return an ELF core.

    Args:
        loads: its segments, in the file's order.
        notes: what its note segment has.
        bits: 64 or 32.
        align: of the segments in the file.
        many: count the segments in a section header, as if there were too many (PN_XNUM).
    """
    header, segment, section = (struct.Struct(x[bits]) for x in (_EHDR, _PHDR, _SHDR))
    count = len(loads) + 1
    start = header.size + segment.size * count + (section.size if many else 0)
    body = bytearray(notes)
    rows = [(PT_NOTE, 0, 0, 0, start, len(notes), len(notes))]
    for load in loads:
        body += bytes(-(start + len(body)) % align)
        size = len(load.data) if load.memory_size is None else load.memory_size
        place = start + len(body)
        rows.append((PT_LOAD, 7, load.physical, load.physical, place, len(load.data), size))
        body += load.data
    table = bytearray()
    for kind, flags, virtual, physical, offset, length, size in rows:
        if bits == 64:
            table += segment.pack(kind, flags, offset, virtual, physical, length, size, 0)
        else:
            table += segment.pack(kind, offset, virtual, physical, length, size, flags, 0)
    ident = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    shoff = header.size + segment.size * count if many else 0
    head = header.pack(
        ident, 4, 62 if bits == 64 else 3, 1, 0, header.size, shoff, 0, header.size, segment.size,
        PN_XNUM if many else count, section.size if many else 0, int(many), 0,
    )  # fmt: skip
    if many:
        table += section.pack(0, 0, 0, 0, 0, 0, 0, count, 0, 0)
    return head + bytes(table + body)


def elf_core_of(ranges: Sequence[tuple[int, int]], *, bits: int = 64, align: int = 1) -> bytes:
    """Return an ELF core of ranges of pages, ``(gfn, pages)``."""
    loads = [Load(gfn * PAGE_SIZE, memory(gfn, pages)) for gfn, pages in ranges]
    return elf_core(loads, notes=note(b"CORE", 1, bytes(336)), bits=bits, align=align)


def check_parts(content: bytes, backend: SpanBackend) -> None:
    """Check each page that a file has in parts: it has these parts, and zeros."""
    partial = dict(backend.partial_pages)
    for run in backend.runs(0, 1 << 40):
        if run.fragments is not None:
            page = bytearray(PAGE_SIZE)
            for start, length, offset in run.fragments:
                assert offset + length <= len(content)
                page[start : start + length] = content[offset : offset + length]
            assert backend.map(run.gfn, 1, writable=False).view(0, PAGE_SIZE) == page
            have = sum(fragment.length for fragment in run.fragments)
            assert partial.get(run.gfn, 0) == PAGE_SIZE - have
