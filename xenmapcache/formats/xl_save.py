"""Streams that ``xl save`` writes (Xen 4.6 and later), and other files that have them inside.

Theory of operation

A file has three layers, each of which may also stand alone at the start of a file:

    xl       a header and the guest's configuration, then
    libxl    records; one of them announces
    libxc    a domain header, and records: pages, and what else belongs to the guest.

Two other programs put their own container in the place of xl's:

    libvirt  (virsh save) a header and the domain's XML, then libxl's stream
    xenopsd  (XenServer, XCP-ng) a signature and sections, each after its type and length; one
             is libxc's stream. Its length is 0 in the file, because nobody knows it before
             the stream is written: the stream's own END record ends it.

`SaveStream.pages` goes through the file once, from start to end. It reads headers and frame
numbers and skips the pages' data, so that its work is in proportion to the number of records
and of frame numbers.

A record of pages has a list of entries, a frame number and a type each, and after it the data
of those entries whose type has data. A page that the guest changed during the save comes
again; its last copy counts. A page may also come again without data: it no longer exists.
After a VERIFY record all pages are repeated so that a receiver can compare them; these are
checked and not yielded.

Rules

  1. Nothing is allocated in proportion to a number in the file before that many bytes are
     known to be in the file.
  2. The number of records has a limit. libxc puts 1,024 entries into a record of pages, so a
     record has at least 8 KiB, except for the last of each pass over memory. One record of
     pages per 4 KiB of the file, and 1,024 more, is therefore twice what can be needed. A
     stream of records that are almost empty is refused at that point.
  3. What was yielded before an error stays right, but for pages that were to come again. So a
     stream can be salvaged up to the place of the error.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..address import ADDRESS_LIMIT, PAGE_SHIFT
from ..errors import CorruptImageError, WrongFormatError
from .content import Content, reason, start_of
from .order import is_ascending
from .signatures import EMPTY, LEGACY_REMEDY, LEGACY_SAVE, signature_of
from .spans import SALVAGE

Progress = Callable[[int, int], object]

_XL_MAGIC = b"Xen saved domain, xl format\n \0 \r"
_XL_HEADER = struct.Struct("<32sIIII")
"""magic, byte order, mandatory flags, optional flags, length of the optional data."""
_BYTE_ORDER = 0x01020304
_FLAG_JSON, _FLAG_STREAM_V2 = 1, 2
_LIBVIRT_MAGIC = b"libvirt-xml\n \0 \r"
_LIBVIRT_HEADER = struct.Struct("<16sII")
"""magic, version, length of the XML with its null byte; then zeros."""
_LIBVIRT_HEADER_SIZES = (64, 48)
"""With the zeros: libvirt's structure has 64 bytes; files with 48 exist, too."""
_LIBVIRT_VERSIONS = (1, 2)
_XENOPSD_MAGIC = b"XenSavedDomv2-\n"
_XENOPSD_SECTION = struct.Struct("<QQ")
"""type, length."""
_SECTION_LIBXC, _SECTION_LIBXL, _SECTION_LEGACY = 0xF0, 0xF1, 0xF2
_SECTION_VGPU, _SECTION_END = 0xF10, 0xFFFF
_SECTIONS_WITH_LENGTH = {0xF: "xenopsd", 0xF00: "QEMU", 0xF01: "QEMU", _SECTION_VGPU: "vGPU",
                         0xF11: "varstored", 0xF12: "swtpm", 0xF13: "swtpm"}  # fmt: skip
_LIBXL_HEADER = struct.Struct(">8sII")
_LIBXL_MAGIC = b"LibxlFmt"
_LIBXC_HEADER = struct.Struct(">8s4sIHHI")
_LIBXC_MARKER, _LIBXC_MAGIC = b"\xff" * 8, b"XENF"
_DOMAIN_HEADER = struct.Struct("<IHHII")
_RECORD = struct.Struct("<II")
_PAGE_DATA = struct.Struct("<II")
_BIG_ENDIAN = 1

_LIBXL_END, _LIBXL_LIBXC = 0, 1
_LIBXL_RECORDS = {0, 1, 2, 3, 4}
_END, _PAGES, _VERIFY = 0, 1, 0xD
_LIBXC_RECORDS = {2: {*range(0xF)}, 3: {*range(0xF), 0x10, 0x11, 0x12}}
"""By version. 0xF only ever goes back from a receiver; libxc refuses it, too."""
_OPTIONAL = 1 << 31
_MAX_RECORD_BYTES = 128 << 20  # as libxc
_MAX_OTHER_RECORDS = 1 << 15
"""Of records without pages: a virtual CPU has four."""
_EXTRA_PAGE_RECORDS, _BYTES_PER_PAGE_RECORD = 1024, 4096
_PFN_MASK = (1 << 52) - 1
_WITHOUT_DATA = {0xD, 0xE, 0xF}
_RESERVED = {5, 6, 7, 8}
_GFN_LIMIT = ADDRESS_LIMIT >> PAGE_SHIFT
GUEST_TYPES = {1: "pv", 2: "hvm"}
"""By the number in a domain header."""

_CHUNK_PAGES = 1 << 15
"""Entries that are handled at once, at most."""
_WINDOW_BYTES = 1 << 12
"""Read at once for headers: of small records a window has many."""
_LEGACY = f"{LEGACY_SAVE}; {LEGACY_REMEDY}"


class SaveHeader(NamedTuple):
    """What the headers of a stream say. Immutable.

    Attributes:
        guest_type: a key of :data:`GUEST_TYPES`.
        stream_version: of libxc's stream, 2 or 3.
        xen_major, xen_minor: of the Xen that wrote it.
    """

    guest_type: int
    stream_version: int
    xen_major: int
    xen_minor: int


class SaveStream:
    """One pass through a file.

    Args:
        content: the file's bytes.
        progress: called as ``progress(done, total)`` in bytes, some hundred times at most.
        salvage: end at the place at which the file is cut off or corrupt, without an error.

    Attributes:
        header: what the headers say; None until :meth:`pages` has read them.
        damage: why a salvaged stream ended early, and what is missing; empty if it did not.
    """

    def __init__(
        self, content: Content, progress: Progress | None = None, *, salvage: bool = False
    ) -> None:
        self.header: SaveHeader | None = None
        self.damage = ""
        self._salvage = salvage
        self._complete = False
        self._lost_pages = 0
        self._content = content
        self._progress = progress or (lambda _done, _total: None)
        self._shown = 0
        self._position = 0
        self._window, self._window_start = b"", 0
        self._other_records = self._page_records = 0
        self._verifying = False

    def pages(self) -> Iterator[tuple[array[int], int]]:
        """Yield ``(gfns, offset)``: frame numbers, and where in the file their pages begin.

        The numbers of one array ascend, and their pages lie one after the other. An offset
        of 0 says that these pages do not exist, or no longer. A number may come again in a
        later array, which then counts.

        Raises:
            CorruptImageError: the file contradicts the format; the message names the place.
        """
        try:
            yield from self._layers()
        except CorruptImageError as error:
            if self.header is None:
                raise
            found = reason(self._content, error)
            if not self._salvage:
                raise self._bad(f"{found}; {SALVAGE}") from None
            if self._complete or self._verifying:
                missing = "all of its pages come before that place"
            elif self._lost_pages:
                missing = f"{self._lost_pages} pages of that record are missing, and all later ones"
            else:
                missing = "the pages after that place are missing, and nothing says how many"
            self.damage = f"{found}: {missing}"

    def _layers(self) -> Iterator[tuple[array[int], int]]:
        start = start_of(self._content, _XL_HEADER.size)
        if start.startswith(_XL_MAGIC):
            self._read_xl_header()
            yield from self._libxl_records()
        elif start.startswith(_LIBVIRT_MAGIC):
            self._read_libvirt_header()
            yield from self._libxl_records()
        elif start.startswith(_XENOPSD_MAGIC):
            yield from self._xenopsd_sections()
        elif start.startswith(_LIBXL_MAGIC):
            yield from self._libxl_records()
        elif start.startswith(_LIBXC_MARKER):
            yield from self._libxc_records()
        else:
            raise self._not_a_save(start)

    def _not_a_save(self, start: bytes) -> CorruptImageError:
        found = signature_of(self._content)
        if found is None or found is EMPTY:
            return self._bad(f"begins with {start[:16]!r}: not a file of xl save")
        path = self._content.path
        other = "" if found.backend == "save" else "not a file of xl save; it "
        return WrongFormatError(f"{path}: {other}is {found.format}: {found.advice(path)}")

    def _read_xl_header(self) -> None:
        _, order, mandatory, _, length = _XL_HEADER.unpack(self._take("xl header", _XL_HEADER.size))
        if order != _BYTE_ORDER:
            raise self._bad(f"byte order {order:#010x}: only little-endian files are read", 32)
        if not mandatory & _FLAG_STREAM_V2:
            raise self._bad(f"is {_LEGACY}", 36)
        if mandatory & ~(_FLAG_JSON | _FLAG_STREAM_V2):
            raise self._bad(f"mandatory flags {mandatory:#x} are unknown", 36)
        self._skip("xl's configuration", length)

    def _read_libvirt_header(self) -> None:
        """Read libvirt's header and skip the XML, whose length tells how long the header is."""
        _, version, length = _LIBVIRT_HEADER.unpack(
            self._take("libvirt's header", _LIBVIRT_HEADER.size)
        )
        if version not in _LIBVIRT_VERSIONS:
            raise self._bad(f"libvirt's header has version {version:#x}: 1 and 2 are known", 16)
        for size in _LIBVIRT_HEADER_SIZES:
            at, end = size + length, size + length + len(_LIBXL_MAGIC)
            if end <= self._content.size and self._bytes(at, end - at) == _LIBXL_MAGIC:
                self._position = at
                return
        self._position = 0
        self._skip("libvirt's header and XML", _LIBVIRT_HEADER_SIZES[0] + length)
        raise self._bad(
            f"has no stream of libxl after libvirt's XML of {length:#x} bytes; it may be {_LEGACY}",
            self._position,
        )

    def _xenopsd_sections(self) -> Iterator[tuple[array[int], int]]:
        self._skip("signature", len(_XENOPSD_MAGIC))
        seen = False
        while True:
            at = self._position
            section, length = _XENOPSD_SECTION.unpack(
                self._take("a section's header", _XENOPSD_SECTION.size)
            )
            self._count_other_record(at)
            if section == _SECTION_END or (section == _SECTION_VGPU and not length):
                # The state of a vGPU has no length in the file; it comes after the memory.
                if not seen:
                    raise self._bad("ends without libxc's stream, which has the pages", at)
                return
            if section in (_SECTION_LIBXC, _SECTION_LIBXL):
                if seen:
                    raise self._bad("has a second stream of pages", at)
                seen = True
                is_libxc = section == _SECTION_LIBXC
                yield from self._libxc_records() if is_libxc else self._libxl_records()
            elif section == _SECTION_LEGACY:
                raise self._bad(f"is {_LEGACY}", at)
            elif section in _SECTIONS_WITH_LENGTH:
                self._skip(f"the section of {_SECTIONS_WITH_LENGTH[section]}", length)
            else:
                raise self._bad(f"section of unknown type {section:#x}", at)

    def _libxl_records(self) -> Iterator[tuple[array[int], int]]:
        at = self._position
        magic, version, options = _LIBXL_HEADER.unpack(
            self._take("libxl header", _LIBXL_HEADER.size)
        )
        if magic != _LIBXL_MAGIC:
            raise self._bad(f"has {magic!r} where libxl's stream should begin", at)
        if version != 2 or options & _BIG_ENDIAN:
            raise self._bad(f"libxl stream of version {version}, options {options:#x}: unknown", at)
        seen = False
        while True:
            at, rec_type, length = self._next_record("libxl")
            if rec_type == _LIBXL_END:
                if not seen:
                    raise self._bad("ends without libxc's stream, which has the pages", at)
                return
            if rec_type == _LIBXL_LIBXC:
                if seen:
                    raise self._bad("has a second stream of libxc", at)
                seen = True
                yield from self._libxc_records()
            elif rec_type in _LIBXL_RECORDS or rec_type & _OPTIONAL:
                self._skip(f"libxl record {rec_type:#x}", length + 7 & ~7)
            else:
                raise self._bad(f"libxl record of unknown type {rec_type:#x}", at)

    def _libxc_records(self) -> Iterator[tuple[array[int], int]]:
        known = _LIBXC_RECORDS[self._read_libxc_header()]
        while True:
            at, rec_type, length = self._next_record("libxc")
            if rec_type == _PAGES:
                yield from self._page_data(at, length)
            elif rec_type == _END:
                self._complete = True
                self._skip("record END", length + 7 & ~7)
                return
            elif rec_type in known or rec_type & _OPTIONAL:
                self._verifying |= rec_type == _VERIFY
                self._skip(f"libxc record {rec_type:#x}", length + 7 & ~7)
            else:
                raise self._bad(f"libxc record of unknown type {rec_type:#x}", at)

    def _read_libxc_header(self) -> int:
        """Read both headers of libxc's stream, and return its version."""
        at = self._position
        marker, magic, version, options, *_ = _LIBXC_HEADER.unpack(
            self._take("libxc header", _LIBXC_HEADER.size)
        )
        if (marker, magic) != (_LIBXC_MARKER, _LIBXC_MAGIC):
            raise self._bad(f"has no libxc stream there; it may be {_LEGACY}", at)
        if version not in _LIBXC_RECORDS or options & _BIG_ENDIAN:
            raise self._bad(f"libxc stream of version {version}, options {options:#x}: unknown", at)
        at = self._position
        guest_type, shift, _, *xen = _DOMAIN_HEADER.unpack(
            self._take("domain header", _DOMAIN_HEADER.size)
        )
        if guest_type not in GUEST_TYPES or shift != PAGE_SHIFT:
            raise self._bad(
                f"domain of type {guest_type} with pages of 2**{shift} bytes; expected type "
                f"1 (PV) or 2 (HVM), and 2**{PAGE_SHIFT}",
                at,
            )
        self.header = SaveHeader(guest_type, version, *xen)
        return int(version)

    def _next_record(self, layer: str) -> tuple[int, int, int]:
        """Return ``(offset, type, length)`` of the next record; the position is in its body."""
        at = self._position
        rec_type, length = _RECORD.unpack(self._take(f"{layer} record's header", _RECORD.size))
        if length > _MAX_RECORD_BYTES:
            raise self._bad(
                f"{layer} record {rec_type:#x} of {length:#x} bytes is implausible; "
                f"at most {_MAX_RECORD_BYTES:#x} are read",
                at,
            )
        if rec_type == _PAGES and layer == "libxc":
            self._page_records += 1
            size = self._content.size
            limit = _EXTRA_PAGE_RECORDS + size // _BYTES_PER_PAGE_RECORD
            if self._page_records > limit:
                raise self._bad(
                    f"more than {limit} records of pages are implausible in {size:#x} bytes", at
                )
        else:
            self._count_other_record(at)
        if at - self._shown > self._content.size >> 8:
            self._shown = at
            self._progress(at, self._content.size)
        return at, rec_type, length

    def _count_other_record(self, at: int) -> None:
        self._other_records += 1
        if self._other_records > _MAX_OTHER_RECORDS:
            raise self._bad(
                f"more than {_MAX_OTHER_RECORDS} records without pages are implausible", at
            )

    def _page_data(self, at: int, length: int) -> Iterator[tuple[array[int], int]]:
        """Yield the pages of a record, and go on to the next one."""
        end = self._position + length
        limit = min(end, self._content.size)
        if limit < end and not self._salvage:
            raise self._truncated(f"pages of {length:#x} bytes")
        if length < _PAGE_DATA.size:
            raise self._bad(f"a record of pages has {length} bytes; expected at least 8", at)
        count, _ = _PAGE_DATA.unpack(self._take("pages", _PAGE_DATA.size))
        entries = self._position
        data = entries + 8 * count
        if not count or data > end:
            raise self._bad(f"a record of {count:#x} pages cannot have {length:#x} bytes", at)
        self._lost_pages = count
        self._check_inside("numbers of pages", data)
        for first in range(0, count, _CHUNK_PAGES):
            place = entries + 8 * first
            numbers = array("Q", self._bytes(place, 8 * min(_CHUNK_PAGES, count - first)))
            # The last number is the largest: it has no type, and no bit beyond an address.
            ordered = numbers[-1] < _GFN_LIMIT and is_ascending(numbers)
            for gfns, has_data in ((numbers, True),) if ordered else self._by_data(numbers, place):
                size = len(gfns) << PAGE_SHIFT if has_data else 0
                if data + size > limit:
                    gfns = gfns[: max(0, limit - data >> PAGE_SHIFT)]
                if gfns and not self._verifying:
                    yield gfns, data if has_data else 0
                self._lost_pages -= len(gfns)
                if data + size > end:
                    raise self._bad("has more pages in a record than it has bytes for", data)
                if data + size > limit:
                    raise self._truncated(f"pages of {length:#x} bytes")
                data += size
        self._lost_pages = 0
        if data != end:
            raise self._bad(f"a record of {count:#x} pages has {end - data:#x} bytes too many", at)
        self._position = at + _RECORD.size
        self._skip("pages", length + 7 & ~7)

    def _by_data(self, numbers: array[int], place: int) -> Iterator[tuple[array[int], bool]]:
        """Cut entries into groups that ascend, each with data or without; drop their types."""
        group, group_has_data = array("Q"), True
        for position, number in enumerate(numbers):
            page_type, gfn = number >> 60, number & _PFN_MASK
            entry = place + 8 * position
            if page_type in _RESERVED:
                raise self._bad(f"page {gfn:#x} has the unknown type {page_type:#x}", entry)
            if gfn >= _GFN_LIMIT:
                raise self._bad(f"pfn {gfn:#x} is beyond 52 bits of address", entry)
            has_data = page_type not in _WITHOUT_DATA
            if group and (has_data != group_has_data or gfn <= group[-1]):
                yield group, group_has_data
                group = array("Q")
            group.append(gfn)
            group_has_data = has_data
        yield group, group_has_data

    def _take(self, name: str, length: int) -> bytes:
        self._skip(name, length)
        return self._bytes(self._position - length, length)

    def _bytes(self, offset: int, length: int) -> bytes:
        """Return bytes that are known to be in the file, from the window if they are there."""
        start = offset - self._window_start
        if start < 0 or start + length > len(self._window):
            if length > _WINDOW_BYTES:
                return self._content.read(offset, length)
            size = min(_WINDOW_BYTES, self._content.size - offset)
            self._window, self._window_start = self._content.read(offset, size), offset
            start = 0
        return self._window[start : start + length]

    def _skip(self, name: str, length: int) -> None:
        self._check_inside(name, self._position + length)
        self._position += length

    def _check_inside(self, name: str, end: int) -> None:
        if end > self._content.size:
            raise self._truncated(name)

    def _truncated(self, name: str) -> CorruptImageError:
        return self._bad(
            f"is truncated: it ends at {self._content.size:#x}, inside of {name}", self._position
        )

    def _bad(self, text: str, offset: int | None = None) -> CorruptImageError:
        place = "" if offset is None else f" (offset {offset:#x})"
        return CorruptImageError(f"{self._content.path}: {text}{place}")
