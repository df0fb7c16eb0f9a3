"""KDUMP files, the compressed format of makedumpfile and QEMU: headers, page descriptors, notes.

A file has blocks of 4096 bytes: the header, the sub header with its notes, two bitmaps of
pages (those of the machine, and those that are in the file), a descriptor for each page in the
file, in order of address, and then the pages' data. Files of diskdump, which came before, differ
in the sub header only.

Every number in the file may be wrong on purpose. What has a place is checked against the file's
end before it is read, and page descriptors are checked before they are used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from ..address import PAGE_SIZE
from ..errors import CorruptImageError, UnsupportedOperationError
from .content import Content, start_of
from .elf_notes import Note

DISKDUMP, KDUMP = b"DISKDUMP", b"KDUMP   "
ZLIB, LZO, SNAPPY, INCOMPLETE, ZSTD = 1, 2, 4, 8, 32
"""Bits of a header's status and, but for INCOMPLETE, of a descriptor's flags."""
COMPRESSIONS: Final = {0: "none", ZLIB: "zlib", LZO: "lzo", SNAPPY: "snappy", ZSTD: "zstd"}
DESCRIPTOR: Final = struct.Struct("<QIIQ")
"""offset and size of the page's data, flags, flags of the kernel's."""
MAX_STORED: Final = PAGE_SIZE + PAGE_SIZE // 16 + 67
"""The most bytes that a compressed page can have: lzo's worst case. Writers store less."""

_HEADER = struct.Struct("<8sI65s65s65s65s65s65s22xIiIIIIIII")
_SUB_HEADER = struct.Struct("<QIIQQQQQQQQQQQ")
_BLOCK_SIZE_PLACES = {"big-endian": (">I", 0x1AC), "of 32 bits": ("<I", 0x1A0)}
_NOTE = struct.Struct("<III")
_MAX_VERSION = 6
_MAX_PAGES = 1 << 34
"""64 TiB of addresses, so that a bitmap has at most 2 GiB."""
_MAX_NOTE_BYTES = 1 << 24
_MAX_NOTES = 1 << 16
MAX_VMCOREINFO_BYTES = 1 << 16
_MAX_NAME_BYTES = 64


class Header(NamedTuple):
    """What the two headers say. Immutable.

    Attributes:
        version: of the format, 0 to 6.
        machine, release: of the kernel's ``uname``.
        status: bits such as ZLIB and INCOMPLETE.
        pages: page frames that the bitmaps are about; those beyond are not in the file.
        machine_bitmap: offset of the bitmap of the machine's pages, in bytes.
        bitmap: offset of the bitmap of pages that are in the file; the same one if all are.
        descriptors: offset of the page descriptors, in bytes.
        dump_level: what makedumpfile left out, as its option ``-d``.
        phys_base: where the kernel is in physical memory.
        vmcoreinfo, notes: ``(offset, size)`` in bytes; the size is 0 if there are none.
    """

    version: int
    machine: str
    release: str
    status: int
    pages: int
    machine_bitmap: int
    bitmap: int
    descriptors: int
    dump_level: int
    phys_base: int
    vmcoreinfo: tuple[int, int]
    notes: tuple[int, int]


def read_header(content: Content) -> Header:
    """Return what the headers of a file say.

    Raises:
        CorruptImageError: they contradict the format or the file.
        UnsupportedOperationError: the file is one of several parts, or not of a machine with
            64 bits, little-endian, and pages of 4096 bytes; or of a newer version.
    """
    start = start_of(content, PAGE_SIZE)
    if start[:8] not in (KDUMP, DISKDUMP):
        raise _corrupt(content, f"begins with {start[:8].hex() or 'nothing'}: not a KDUMP file")
    if len(start) < PAGE_SIZE:
        raise _corrupt(content, f"ends at {content.size:#x}, inside its header")
    (signature, version, _, _, release, _, machine, _, status, block_size, sub_blocks,
     bitmap_blocks, pages, *_) = _HEADER.unpack_from(start)  # fmt: skip
    _check_block_size(content, start, block_size)
    if version > _MAX_VERSION:
        raise UnsupportedOperationError(
            f"{content.path}: header_version is {version}; up to {_MAX_VERSION} is read"
        )
    bitmaps = (1 + sub_blocks) * PAGE_SIZE
    descriptors = bitmaps + bitmap_blocks * PAGE_SIZE
    if descriptors > content.size:
        raise _corrupt(
            content,
            f"is truncated or corrupt: its bitmaps are {bitmaps:#x}..{descriptors:#x}, but the "
            f"file ends at {content.size:#x}; no page of it can be read",
        )
    sub = _sub_header(content, version) if signature == KDUMP and sub_blocks else (0,) * 14
    (phys_base, dump_level, split, first, end, info_at, info_size, note_at, note_size,
     _, _, first_64, end_64, pages_64) = sub  # fmt: skip
    if split:
        first, end = (first_64, end_64) if version >= 6 else (first, end)
        raise UnsupportedOperationError(
            f"{content.path} is a part of a split dump, with the page frames {first:#x}..{end:#x}: "
            "join all parts with makedumpfile --reassemble, and open the result"
        )
    pages = pages_64 or pages
    bitmap = bitmaps + _second_bitmap(content, pages, bitmap_blocks)
    return Header(
        version=version, machine=_name(machine), release=_name(release), status=status,
        pages=pages, machine_bitmap=bitmaps, bitmap=bitmap, descriptors=descriptors,
        dump_level=dump_level, phys_base=phys_base, vmcoreinfo=(info_at, info_size),
        notes=(note_at, note_size),
    )  # fmt: skip


def _check_block_size(content: Content, start: bytes, block_size: int) -> None:
    if block_size == PAGE_SIZE:
        return
    for what, (layout, place) in _BLOCK_SIZE_PLACES.items():
        if struct.unpack_from(layout, start, place)[0] == PAGE_SIZE:
            raise UnsupportedOperationError(
                f"{content.path} is a dump of a machine that is {what}: only little-endian dumps "
                "of 64 bits are read"
            )
    raise UnsupportedOperationError(
        f"{content.path}: it is a KDUMP file, but its block_size is {block_size:#x}; only "
        f"{PAGE_SIZE:#x} is read. If the header is damaged, write the dump again"
    )


def _sub_header(content: Content, version: int) -> tuple[int, ...]:
    """Return the sub header's fields; 0 for those that its version does not have."""
    fields = _SUB_HEADER.unpack(content.read(PAGE_SIZE, _SUB_HEADER.size))
    known = (1, 2, 5, 7, 9, 11, 14)[version]
    return (*fields[:known], *(0,) * (len(fields) - known))


def _second_bitmap(content: Content, pages: int, blocks: int) -> int:
    """Return where the bitmap of pages in the file is, after the start of the bitmaps."""
    if not 0 < pages <= _MAX_PAGES:
        raise _corrupt(content, f"max_mapnr is {pages:#x}; expected 1 to {_MAX_PAGES:#x}")
    needed = -(-pages // (8 * PAGE_SIZE))
    if blocks >= 2 * needed:
        return blocks // 2 * PAGE_SIZE
    if blocks >= needed:  # all pages of the machine are in the file
        return 0
    raise _corrupt(
        content, f"bitmap_blocks is {blocks:#x}, but {pages:#x} pages need at least {needed:#x}"
    )


def _name(text: bytes) -> str:
    return text.partition(b"\0")[0][:_MAX_NAME_BYTES].decode("utf-8", "replace")


def fault_of_descriptor(
    header: Header, size: int, offset: int, stored: int, flags: int
) -> str | None:
    """Return what is wrong with a page descriptor; None if it can be used.

    Args:
        header: of the file.
        size: of the file, in bytes.
        offset: of the page's data, in bytes.
        stored: size of the page's data, in bytes.
        flags: the compression.
    """
    if offset + stored > size:
        return f"lies at {offset:#x}..{offset + stored:#x}, but the file ends at {size:#x}"
    if offset < header.descriptors:
        if not offset:
            return "was never written"
        return f"lies at {offset:#x}, but pages begin after {header.descriptors:#x}"
    if flags not in COMPRESSIONS:
        return f"has the flags {flags:#x}, which name no known compression"
    if stored > MAX_STORED or not stored or (not flags and stored != PAGE_SIZE):
        return (
            f"has {stored:#x} bytes, which cannot be a page with compression {COMPRESSIONS[flags]}"
        )
    return None


def read_vmcoreinfo(content: Content, header: Header) -> str | None:
    """Return the kernel's VMCOREINFO; None if the file has none.

    Raises:
        CorruptImageError: it is outside of the file, or too long.
    """
    offset, size = header.vmcoreinfo
    if not size:
        return None
    if size > MAX_VMCOREINFO_BYTES:
        raise _corrupt(
            content, f"size_vmcoreinfo is {size:#x}; at most {MAX_VMCOREINFO_BYTES:#x} is read"
        )
    return text_of(content.read(offset, size))


def text_of(vmcoreinfo: bytes) -> str:
    """Return VMCOREINFO as text."""
    return vmcoreinfo.rstrip(b"\0").decode("utf-8", "replace")


def notes(content: Content, header: Header) -> Iterator[Note]:
    """Yield the file's ELF notes, in its order.

    Raises:
        CorruptImageError: they are outside of the file, a note ends beyond them, or they are
            more than a file can plausibly have.
    """
    offset, size = header.notes
    if size > _MAX_NOTE_BYTES:
        raise _corrupt(content, f"size_note is {size:#x}; at most {_MAX_NOTE_BYTES:#x} is read")
    data = content.read(offset, size) if size else b""
    position = count = 0
    while position + _NOTE.size <= len(data):
        name_size, size, note_type = _NOTE.unpack_from(data, position)
        name = position + _NOTE.size
        start = name + (name_size + 3 & ~3)
        if not name_size and not size and not note_type:
            return  # the room that is left
        if start + size > len(data):
            raise _corrupt(
                content,
                f"the note at {offset + position:#x} ends beyond the notes, at "
                f"{offset + len(data):#x}",
            )
        count += 1
        if count > _MAX_NOTES:
            raise _corrupt(content, f"has more than {_MAX_NOTES} notes, which is implausible")
        text = data[name : name + name_size].rstrip(b"\0").decode("ascii", "replace")
        yield Note(text, note_type, data[start : start + size])
        position = start + (size + 3 & ~3)


def _corrupt(content: Content, text: str) -> CorruptImageError:
    return CorruptImageError(f"{content.path}: {text}")
