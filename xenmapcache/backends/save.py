"""The backend of files that ``xl save`` writes."""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import ClassVar

from ..address import PAGE_SHIFT, PAGE_SIZE
from ..errors import CorruptImageError
from ..imagefile import ImageFile
from .image import ImageBackend, Run
from .pageindex import GFN_LIMIT, PageIndex, is_ascending, load_index, store_index

Progress = Callable[[int, int], object]

_XL_MAGIC = b"Xen saved domain, xl format\n \0 \r"
_XL_HEADER = struct.Struct("<32sIIII")
"""magic, byte order, mandatory flags, optional flags, length of the optional data."""
_BYTE_ORDER = 0x01020304
_FLAG_JSON, _FLAG_STREAM_V2 = 1, 2
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
_MAX_RECORD = 128 << 20  # as libxc
_MAX_RECORDS = 1 << 15
"""But for those of pages: a virtual CPU has four."""
_PFN_MASK = (1 << 52) - 1
_WITHOUT_DATA = {0xD, 0xE, 0xF}
_RESERVED = {5, 6, 7, 8}
_KINDS = {1: "pv", 2: "hvm"}

_NOTES = struct.Struct("<IIII")
_PIECE = 1 << 15
"""Pages that are dealt with at once, at most."""

_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
}
_LEGACY = (b"Xen saved domain", b"LinuxGuestRecord", b"XenSavedDomain")
_LEGACY_FORMAT = "the legacy format, of Xen 4.5 and before: restore it there, and save it anew"


class SaveBackend(ImageBackend):
    """The backend ``"save"``: a file that ``xl save`` wrote (Xen 4.6 and later), or its stream.

    An index of its pages is made when it is opened, in one pass that reads no page: the last
    copy of a page is the one that counts. Of PV guests the addresses are pseudo-physical, and
    page tables hold pfns where the live guest's hold mfns: ``xl save`` writes them so.

    Args:
        path: the file.
        progress: called as ``progress(done, total)`` in bytes, some hundred times at most.
        keep_index: keep the index beside the file, as ``PATH.index``, and use it when the
            file is opened the next time. It is made anew when the file has changed.

    Attributes:
        kind: ``"pv"`` or ``"hvm"`` (PVH guests are that, too).
        xen_version: of the Xen that saved it, for example ``"4.17"``.
        stream_version: of libxc's stream, 2 or 3.
        pages: how many are in the file.
        page_size: in bytes, always 4096.

    Raises:
        CorruptImageError: the file contradicts the format, is cut off, compressed, or of
            another format; the message names the place.
        ValueError: that is no regular file.
        OSError: the file cannot be opened.
    """

    name: ClassVar[str] = "save"
    page_size = PAGE_SIZE

    def __init__(
        self,
        *,
        path: str | os.PathLike[str],
        progress: Progress | None = None,
        keep_index: bool = False,
    ) -> None:
        super().__init__(ImageFile(path))
        try:
            self._open(progress, f"{os.fsdecode(self.path)}.index" if keep_index else None)
            if progress is not None:
                progress(self._file.size, self._file.size)
        except BaseException:
            self.close()
            raise
        self.pages = len(self._index)
        self.memory_end = self._index.memory_end

    def _open(self, progress: Progress | None, kept: str | None) -> None:
        state = self._file.size, self._file.changed
        loaded = load_index(kept, *state) if kept else None
        if loaded is None or _NOTES.unpack(loaded[1])[0] not in _KINDS:
            stream = _Stream(self._file, progress)
            self._index = stream.read()
            notes = stream.notes
            if kept:
                store_index(kept, *state, self._index, _NOTES.pack(*notes))
        else:
            self._index, packed = loaded
            notes = _NOTES.unpack(packed)
        kind, self.stream_version, major, minor = notes
        self.kind = _KINDS[kind]
        self.xen_version = f"{major}.{minor}"

    def runs(self, gfn: int, count: int) -> Iterator[Run]:
        """Return what is there of a range of pages; see :meth:`ImageBackend.runs`."""
        return self._index.runs(gfn, count)

    def describe(self) -> dict[str, object]:
        """Return what the headers say; see :meth:`Backend.describe`."""
        return {
            "kind": self.kind,
            "pages": self.pages,
            "page_size": self.page_size,
            "xen_version": self.xen_version,
            "stream_version": self.stream_version,
        }


class _Stream:
    """One pass through a file.

    Attributes:
        notes: the domain's kind, libxc's version, Xen's major and minor one.
    """

    def __init__(self, file: ImageFile, progress: Progress | None) -> None:
        self._file = file
        self._progress = progress or (lambda _done, _total: None)
        self._shown = 0
        self._position = 0
        self._records = 0
        self._pages = _Pages()
        self._verifying = False
        self.notes = (0, 0, 0, 0)

    def read(self) -> PageIndex:
        """Read all of it, and return the index."""
        start = self._peek(_XL_HEADER.size)
        if start.startswith(_XL_MAGIC):
            self._xl_header()
            self._libxl()
        elif start.startswith(_LIBXL_MAGIC):
            self._libxl()
        elif start.startswith(_LIBXC_MARKER):
            self._libxc()
        else:
            raise self._unknown(start)
        return self._pages.index()

    def _unknown(self, start: bytes) -> CorruptImageError:
        for magic, program in _PACKED.items():
            if start.startswith(magic):
                return self._bad(f"is compressed by {program}: unpack it first")
        if start.startswith(_LEGACY):
            return self._bad(f"is of {_LEGACY_FORMAT}")
        return self._bad(f"begins with {start[:16]!r}: that is no file of xl save")

    def _xl_header(self) -> None:
        _, order, mandatory, _, length = _XL_HEADER.unpack(self._take("xl header", _XL_HEADER.size))
        if order != _BYTE_ORDER:
            raise self._bad(f"has the byte order {order:#010x}: only little-endian is read", 32)
        if not mandatory & _FLAG_STREAM_V2:
            raise self._bad(f"is of {_LEGACY_FORMAT}", 36)
        if mandatory & ~(_FLAG_JSON | _FLAG_STREAM_V2):
            raise self._bad(f"has mandatory flags {mandatory:#x}, which are not known", 36)
        self._skip("xl's configuration", length)

    def _libxl(self) -> None:
        at = self._position
        magic, version, options = _LIBXL_HEADER.unpack(
            self._take("libxl header", _LIBXL_HEADER.size)
        )
        if magic != _LIBXL_MAGIC:
            raise self._bad(f"has {magic!r} where libxl's stream should begin", at)
        if version != 2 or options & _BIG_ENDIAN:
            raise self._bad(f"has a libxl stream of version {version}, options {options:#x}", at)
        seen = False
        while True:
            at, kind, length = self._record("libxl")
            if kind == _LIBXL_END:
                if not seen:
                    raise self._bad("ends without libxc's stream, which has the pages", at)
                return
            if kind == _LIBXL_LIBXC:
                if seen:
                    raise self._bad("has a second stream of libxc", at)
                seen = True
                self._libxc()
            elif kind in _LIBXL_RECORDS or kind & _OPTIONAL:
                self._skip(f"libxl record {kind:#x}", length + 7 & ~7)
            else:
                raise self._bad(f"has a libxl record of unknown type {kind:#x}", at)

    def _libxc(self) -> None:
        at = self._position
        marker, magic, version, options, *_ = _LIBXC_HEADER.unpack(
            self._take("libxc header", _LIBXC_HEADER.size)
        )
        if (marker, magic) != (_LIBXC_MARKER, _LIBXC_MAGIC):
            raise self._bad(f"has no libxc stream there; it may be of {_LEGACY_FORMAT}", at)
        if version not in _LIBXC_RECORDS or options & _BIG_ENDIAN:
            raise self._bad(f"has a libxc stream of version {version}, options {options:#x}", at)
        at = self._position
        kind, shift, _, *xen = _DOMAIN_HEADER.unpack(
            self._take("domain header", _DOMAIN_HEADER.size)
        )
        if kind not in _KINDS or shift != PAGE_SHIFT:
            raise self._bad(f"has a domain of type {kind}, pages of 2**{shift} bytes: unknown", at)
        self.notes = (kind, version, *xen)
        known = _LIBXC_RECORDS[version]
        while True:
            at, kind, length = self._record("libxc")
            if kind == _PAGES:
                self._page_data(at, length)
            elif kind == _END:
                self._skip("record END", length + 7 & ~7)
                return
            elif kind in known or kind & _OPTIONAL:
                self._verifying |= kind == _VERIFY
                self._skip(f"libxc record {kind:#x}", length + 7 & ~7)
            else:
                raise self._bad(f"has a libxc record of unknown type {kind:#x}", at)

    def _record(self, layer: str) -> tuple[int, int, int]:
        """Return ``(offset, type, length)`` of the next record; the position is in its body."""
        at = self._position
        kind, length = _RECORD.unpack(self._take(f"{layer} record's header", _RECORD.size))
        if length > _MAX_RECORD:
            raise self._bad(f"has a {layer} record {kind:#x} of {length:#x} bytes: absurd", at)
        self._records += kind != _PAGES
        if self._records > _MAX_RECORDS:
            raise self._bad(f"has more than {_MAX_RECORDS} records beside the pages': absurd", at)
        if at - self._shown > self._file.size >> 8:
            self._shown = at
            self._progress(at, self._file.size)
        return at, kind, length

    def _page_data(self, at: int, length: int) -> None:
        end = self._position + length
        if end > self._file.size:
            raise self._cut_off(f"pages of {length:#x} bytes")
        if length < _PAGE_DATA.size:
            raise self._bad(f"has a record of pages of {length} bytes", at)
        count, _ = _PAGE_DATA.unpack(self._take("pages", _PAGE_DATA.size))
        place = self._position + 8 * count
        if not count or place > end:
            raise self._bad(f"has a record of {count:#x} pages in {length:#x} bytes", at)
        for first in range(0, count, _PIECE):
            numbers = array("Q", bytes(8 * min(_PIECE, count - first)))
            self._file.read_into(self._position, memoryview(numbers).cast("B"))
            place = self._add(numbers, place, end)
            self._position += 8 * len(numbers)
        if place != end:
            raise self._bad(f"has {count:#x} pages in {length:#x} bytes, which cannot be", at)
        self._position = at + _RECORD.size
        self._skip("pages", length + 7 & ~7)

    def _add(self, numbers: array[int], place: int, end: int) -> int:
        """Note pages whose data begin at a place; return where they end."""
        # The last one is the largest: no type, no bit beyond an address.
        if numbers[-1] < GFN_LIMIT and not self._verifying and is_ascending(numbers):
            self._check_room(len(numbers), place, end)
            self._pages.add(numbers, place)
            return place + (len(numbers) << PAGE_SHIFT)
        for position, number in enumerate(numbers):
            kind, gfn = number >> 60, number & _PFN_MASK
            entry = self._position + 8 * position
            if kind in _RESERVED:
                raise self._bad(f"has page {gfn:#x} of type {kind:#x}, which is not known", entry)
            if gfn >= GFN_LIMIT:
                raise self._bad(f"has pfn {gfn:#x}: no guest has an address beyond 52 bits", entry)
            data = kind not in _WITHOUT_DATA
            if data:
                self._check_room(1, place, end)
            if not self._verifying:  # what follows repeats pages for a receiver to compare
                self._pages.put(gfn, place if data else 0)
            place += PAGE_SIZE * data
        return place

    def _check_room(self, pages: int, place: int, end: int) -> None:
        if place + (pages << PAGE_SHIFT) > end:
            raise self._bad("has more pages in a record than the record has bytes for", place)

    def _peek(self, length: int) -> bytes:
        length = min(length, self._file.size - self._position)
        return self._file.read(self._position, length) if length else b""

    def _take(self, what: str, length: int) -> bytes:
        self._skip(what, length)
        return self._file.read(self._position - length, length)

    def _skip(self, what: str, length: int) -> None:
        if self._position + length > self._file.size:
            raise self._cut_off(what)
        self._position += length

    def _cut_off(self, what: str) -> CorruptImageError:
        return self._bad(
            f"is cut off: it ends at {self._file.size:#x}, inside of {what}", self._position
        )

    def _bad(self, what: str, offset: int | None = None) -> CorruptImageError:
        place = "" if offset is None else f" (offset {offset:#x})"
        return CorruptImageError(f"{self._file.path} {what}{place}")


class _Pages:
    """The pages seen so far. Those that come in order are appended; others wait to be merged in."""

    def __init__(self) -> None:
        self._gfns, self._offsets = array("Q"), array("Q")
        self._late: dict[int, int] = {}

    def add(self, gfns: array[int], place: int) -> None:
        """Note ascending pages whose data lie one after the other."""
        if not self._gfns or gfns[0] > self._gfns[-1]:
            self._gfns.extend(gfns)
            end = place + (len(gfns) << PAGE_SHIFT)
            self._offsets.extend(array("Q", range(place, end, PAGE_SIZE)))
        else:
            for position, gfn in enumerate(gfns):
                self.put(gfn, place + (position << PAGE_SHIFT))

    def put(self, gfn: int, place: int) -> None:
        """Note a page, or with a place of 0 that it is no more."""
        if not self._gfns or gfn > self._gfns[-1]:
            if place:
                self._gfns.append(gfn)
                self._offsets.append(place)
            return
        self._late[gfn] = place
        if len(self._late) >= _PIECE:
            self._merge()

    def _merge(self) -> None:
        """Merge what waits into the arrays: in place, from the end, to need no second pair."""
        gfns, offsets = self._gfns, self._offsets
        fresh = []
        gone = False
        for gfn, place in sorted(self._late.items()):
            position = bisect_left(gfns, gfn)
            if position < len(gfns) and gfns[position] == gfn:
                offsets[position] = place
                gone |= not place
            elif place:
                fresh.append((gfn, place, position))
        self._late.clear()
        end = len(gfns)
        gfns.extend(array("Q", bytes(8 * len(fresh))))
        offsets.extend(array("Q", bytes(8 * len(fresh))))
        for shift in range(len(fresh), 0, -1):
            gfn, place, position = fresh[shift - 1]
            gfns[position + shift : end + shift] = gfns[position:end]
            offsets[position + shift : end + shift] = offsets[position:end]
            gfns[position + shift - 1], offsets[position + shift - 1] = gfn, place
            end = position
        if gone:
            self._drop()

    def _drop(self) -> None:
        """Take out the pages that are no more."""
        kept = 0
        for position, place in enumerate(self._offsets):
            if place:
                self._gfns[kept], self._offsets[kept] = self._gfns[position], place
                kept += 1
        del self._gfns[kept:], self._offsets[kept:]

    def index(self) -> PageIndex:
        """Return the index of all pages."""
        self._merge()
        return PageIndex(self._gfns, self._offsets)
