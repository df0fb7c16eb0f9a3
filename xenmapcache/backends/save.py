"""The backend of files that ``xl save`` writes."""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import ClassVar

from ..address import PAGE_SHIFT, PAGE_SIZE
from ..errors import CorruptImageError
from ..files.image import ImageFile
from ..files.pageindex import PageIndex, load_index, store_index
from ..files.runs import Run
from ..formats.xl_save import GUEST_TYPES, Progress, SaveHeader, SaveStream
from .image import ImageBackend

_KEPT_HEADER = struct.Struct("<IIII")
"""A :class:`SaveHeader`, as it is kept with the index."""
_MAX_LATE = 1 << 15
"""Pages that wait to be merged, at most."""


class SaveBackend(ImageBackend):
    """The backend ``"save"``: a file that ``xl save`` wrote (Xen 4.6 and later), or its stream.

    ``virsh save`` of a Xen guest and suspend images of XenServer and XCP-ng have that stream
    inside, and are read, too.

    Opening the file makes an index of its pages, in one pass that reads no page. The last
    copy of a page counts. For PV guests the addresses are pseudo-physical, and page tables
    hold pfns where the live guest's hold mfns, because ``xl save`` writes them so.

    Args:
        path: the file.
        progress: called as ``progress(done, total)`` in bytes, some hundred times at most.
        keep_index: keep the index next to the file, as ``PATH.index``, and use it the next
            time. It is made again when the file has changed. That of a file which is not
            complete is not kept.
        salvage: open the intact part of a file that was cut off or is damaged.

    Attributes:
        guest_type: ``"pv"`` or ``"hvm"``; PVH guests are ``"hvm"``, too.
        xen_version: of the Xen that saved it, for example ``"4.17"``.
        stream_version: of libxc's stream, 2 or 3.
        pages: how many are in the file.
        page_size: in bytes, always 4096.

    Raises:
        CorruptImageError: the file contradicts the format or is truncated; the message names
            the place.
        WrongFormatError: it is compressed, or of another known format.
        ValueError: the path is not a regular file.
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
        salvage: bool = False,
    ) -> None:
        super().__init__(ImageFile(path))
        try:
            kept = f"{os.fsdecode(self.path)}.index" if keep_index else None
            self._open(progress, kept, salvage)
            if progress is not None:
                progress(self._file.size, self._file.size)
        except BaseException:
            self.close()
            raise
        self.pages = len(self._index)
        self.memory_end = self._index.memory_end

    def _open(self, progress: Progress | None, kept: str | None, salvage: bool) -> None:
        state = self._file.size, self._file.mtime_ns
        loaded = load_index(kept, *state) if kept else None
        header = SaveHeader._make(_KEPT_HEADER.unpack(loaded[1])) if loaded else None
        if loaded is None or header is None or header.guest_type not in GUEST_TYPES:
            self._index, header, damage = _read(self._file, progress, salvage)
            if damage:
                self.warn(damage)
            elif kept:
                store_index(kept, *state, self._index, _KEPT_HEADER.pack(*header))
        else:
            self._index = loaded[0]
        self.guest_type = GUEST_TYPES[header.guest_type]
        self.stream_version = header.stream_version
        self.xen_version = f"{header.xen_major}.{header.xen_minor}"

    def runs(self, gfn: int, count: int) -> Iterator[Run]:
        """Yield the runs of a range of pages; see :meth:`ImageBackend.runs`."""
        return self._index.runs(gfn, count)

    def describe(self) -> dict[str, object]:
        """Return what the headers say; see :meth:`Backend.describe`."""
        return {
            "guest_type": self.guest_type,
            "pages": self.pages,
            "page_size": self.page_size,
            "xen_version": self.xen_version,
            "stream_version": self.stream_version,
        }


def _read(
    file: ImageFile, progress: Progress | None, salvage: bool
) -> tuple[PageIndex, SaveHeader, str]:
    """Read a stream from start to end. Return what it has, and what is missing of it."""
    stream, pages = SaveStream(file, progress, salvage=salvage), _Pages()
    for gfns, offset in stream.pages():
        pages.add(gfns, offset)
    assert stream.header is not None  # noqa: S101 - a stream without one was refused
    index = pages.index()
    if stream.damage and not len(index):
        raise CorruptImageError(f"{file.path}: {stream.damage}; it has no intact page")
    return index, stream.header, stream.damage


class _Pages:
    """The pages seen so far. Those in order are appended; others wait to be merged in.

    A page that no longer exists keeps its place with an offset of 0 until the end: to remove
    pages at each merge would go through all of them each time.
    """

    def __init__(self) -> None:
        self._gfns, self._offsets = array("Q"), array("Q")
        self._late: dict[int, int] = {}

    def add(self, gfns: array[int], offset: int) -> None:
        """Note ascending pages whose data follow each other; an offset of 0 removes them."""
        if not self._gfns or gfns[0] > self._gfns[-1]:
            if offset:
                self._gfns.extend(gfns)
                end = offset + (len(gfns) << PAGE_SHIFT)
                self._offsets.extend(array("Q", range(offset, end, PAGE_SIZE)))
            return
        last = self._gfns[-1]
        for position, gfn in enumerate(gfns):
            place = offset + (position << PAGE_SHIFT) if offset else 0
            if gfn <= last:
                self._late[gfn] = place
            elif place:
                self._gfns.append(gfn)
                self._offsets.append(place)
        if len(self._late) >= _MAX_LATE:
            self._merge()

    def _merge(self) -> None:
        """Merge what waits into the arrays: in place, from the end, to need no second pair."""
        gfns, offsets = self._gfns, self._offsets
        new = []
        for gfn, place in sorted(self._late.items()):
            position = bisect_left(gfns, gfn)
            if gfns[position] == gfn:
                offsets[position] = place
            elif place:
                new.append((gfn, place, position))
        self._late.clear()
        end = len(gfns)
        gfns.extend(array("Q", bytes(8 * len(new))))
        offsets.extend(array("Q", bytes(8 * len(new))))
        for shift in range(len(new), 0, -1):
            gfn, place, position = new[shift - 1]
            gfns[position + shift : end + shift] = gfns[position:end]
            offsets[position + shift : end + shift] = offsets[position:end]
            gfns[position + shift - 1], offsets[position + shift - 1] = gfn, place
            end = position

    def index(self) -> PageIndex:
        """Return the index of all pages."""
        self._merge()
        kept = 0
        if 0 in self._offsets:
            for position, place in enumerate(self._offsets):
                if place:
                    self._gfns[kept], self._offsets[kept] = self._gfns[position], place
                    kept += 1
            del self._gfns[kept:], self._offsets[kept:]
        return PageIndex(self._gfns, self._offsets)
