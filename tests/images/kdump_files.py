"""Writers of KDUMP files for tests: any version, compression and shape, and flattened ones."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from tests.images.writers import memory
from xenmapcache.address import PAGE_SIZE
from xenmapcache.formats.kdump import DESCRIPTOR, KDUMP, SNAPPY, ZLIB, ZSTD

HEADER: Final = struct.Struct("<8sI65s65s65s65s65s65s22xIiIIIIIII")
SUB_HEADER: Final = struct.Struct("<QIIQQQQQQQQQQQ")
SUB_HEADER_FIELDS: Final = (
    "phys_base", "dump_level", "split", "start_pfn", "end_pfn", "offset_vmcoreinfo",
    "size_vmcoreinfo", "offset_note", "size_note", "offset_eraseinfo", "size_eraseinfo",
    "start_pfn_64", "end_pfn_64", "max_mapnr_64",
)  # fmt: skip
STATUS, BLOCK_SIZE, SUB_BLOCKS, BITMAP_BLOCKS, MAX_MAPNR = 0x1A8, 0x1AC, 0x1B0, 0x1B4, 0x1B8
"""Where fields of the header are."""


def _snappy(page: bytes) -> bytes:
    import cramjam  # not on machines where only uncompressed files are written, as the lab's Dom0

    return bytes(cramjam.snappy.compress_raw(page))


def _zstd(page: bytes) -> bytes:
    import zstandard  # likewise

    return bytes(zstandard.compress(page))


COMPRESS: Final[dict[int, Callable[[bytes], bytes]]] = {
    0: lambda page: page,
    ZLIB: lambda page: zlib.compress(page, 1),
    SNAPPY: _snappy,
    ZSTD: _zstd,
}


def field(name: str) -> int:
    """Return where a field of the sub header is in a file."""
    offset = PAGE_SIZE
    for each in SUB_HEADER_FIELDS:
        if each == name:
            return offset
        offset += 4 if each in ("dump_level", "split") else 8
    raise KeyError(name)


def pages_of(ranges: Sequence[tuple[int, int]]) -> dict[int, bytes]:
    """Return the test guests' pages of ranges ``(gfn, pages)``, by gfn."""
    return {gfn: memory(gfn, 1) for first, count in ranges for gfn in range(first, first + count)}


def bitmap(gfns: Sequence[int], blocks: int) -> bytes:
    """Return a bitmap in which the bits of some pages are set."""
    bits = bytearray(blocks * PAGE_SIZE)
    for gfn in gfns:
        bits[gfn // 8] |= 1 << gfn % 8
    return bytes(bits)


def kdump(
    pages: Mapping[int, bytes],
    *,
    compression: int = ZLIB,
    version: int = 6,
    signature: bytes = KDUMP,
    machine: bytes = b"x86_64",
    max_mapnr: int = 0,
    bitmaps: int = 2,
    left_out: Sequence[int] = (),
    notes: bytes = b"",
    vmcoreinfo: bytes = b"",
    compress: Callable[[bytes], bytes] | None = None,
) -> bytes:
    """Return a KDUMP file. Equal pages share their data, as makedumpfile's pages of zeros do.

    Args:
        pages: by gfn.
        compression: a bit of ``formats.kdump``, for pages that it makes smaller.
        version: of the header, 0 to 6.
        signature: the first bytes.
        machine: ``uname -m``.
        max_mapnr: frames of the machine; by default, up to the last page.
        bitmaps: how many of them, 2 or 1.
        left_out: further pages of the machine.
        notes: ELF notes that the sub header names.
        vmcoreinfo: likewise.
        compress: instead of the compression's own.
    """
    compress = compress or COMPRESS[compression]
    gfns = sorted(pages)
    max_mapnr = max_mapnr or max([*gfns, *left_out]) + 1
    blocks = -(-max_mapnr // (8 * PAGE_SIZE))
    sub = vmcoreinfo + notes
    sub_blocks = 1 + -(-len(sub) // PAGE_SIZE)
    at = 2 * PAGE_SIZE
    head = HEADER.pack(
        signature, version, b"Linux", b"guest", b"6.1.0-test", b"#1", machine, b"(none)",
        compression, PAGE_SIZE, sub_blocks, bitmaps * blocks, min(max_mapnr, 0xFFFFFFFF),
        len(gfns), 0, len(gfns), 0,
    )  # fmt: skip
    sub_header = SUB_HEADER.pack(
        0x1000000, 31, 0, 0, 0, at if vmcoreinfo else 0, len(vmcoreinfo),
        at + len(vmcoreinfo) if notes else 0, len(notes), 0, 0, 0, 0, max_mapnr,
    )  # fmt: skip
    known = (8, 12, 32, 48, 64, 80, 104)[version]  # an older version's file has other bytes there
    sub_header = sub_header[:known] + b"\xa5" * (SUB_HEADER.size - known)
    body = b"".join(part.ljust(PAGE_SIZE, b"\0") for part in (head, sub_header))
    body += sub.ljust((sub_blocks - 1) * PAGE_SIZE, b"\0")
    if bitmaps == 2:
        body += bitmap([*gfns, *left_out], blocks)
    body += bitmap(gfns, blocks)
    return body + _stored(pages, len(body), compression, compress)


def _stored(
    pages: Mapping[int, bytes], start: int, compression: int, compress: Callable[[bytes], bytes]
) -> bytes:
    """Return the descriptors of pages, and then their data."""
    descriptors, data = bytearray(), bytearray()
    known: dict[bytes, bytes] = {}
    start += DESCRIPTOR.size * len(pages)
    for _, page in sorted(pages.items()):
        if page not in known:
            packed, flags = compress(page), compression
            if len(packed) >= PAGE_SIZE:
                packed, flags = page, 0
            known[page] = DESCRIPTOR.pack(start + len(data), len(packed), flags, 0)
            data += packed
        descriptors += known[page]
    return bytes(descriptors + data)


def descriptors_at(data: bytes) -> int:
    """Return where the descriptors of a file begin."""
    sub_blocks, bitmap_blocks = struct.unpack_from("<II", data, SUB_BLOCKS)
    return int(1 + sub_blocks + bitmap_blocks) * PAGE_SIZE


def changed(data: bytes, offset: int, form: str, *values: int) -> bytes:
    """Return a file in which numbers at an offset are others."""
    copy = bytearray(data)
    struct.pack_into(f"<{form}", copy, offset, *values)
    return bytes(copy)


def piece(offset: int, data: bytes) -> bytes:
    """Return a piece of a flattened dump."""
    return struct.pack(">qq", offset, len(data)) + data


END: Final = struct.pack(">qq", -1, -1)
FLAT_HEADER: Final = struct.pack(">16sqq", b"makedumpfile", 1, 1).ljust(PAGE_SIZE, b"\0")


def flattened(data: bytes, size: int = 5000) -> bytes:
    """Return a flattened dump whose pieces go back and forth between two halves of the file."""
    half = len(data) // 2
    pieces: list[tuple[int, bytes]] = []
    for start in range(0, half, size):
        pieces.append((start, data[start : min(start + size, half)]))
        pieces.append((half + start, data[half + start : half + start + size]))
    pieces.append((2 * half, data[2 * half :]))
    return FLAT_HEADER + b"".join(piece(*each) for each in pieces) + END
