"""PageIndex: where each page of a guest lies in a file, in 16 bytes a page at most."""

from __future__ import annotations

import logging
import os
import struct
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import islice

from ..address import ADDRESS_LIMIT, PAGE_SHIFT, PAGE_SIZE
from ..binding.descriptor import Descriptor
from ..formats.order import is_ascending
from .atomic import new_file
from .regular import IrregularFileError, open_regular
from .runs import Run

logger = logging.getLogger("xenmapcache")

GFN_LIMIT = ADDRESS_LIMIT >> PAGE_SHIFT
_BLOCK = 1 << 12
_CHUNK_BYTES = 1 << 20
_KEPT = struct.Struct("<8sQQQ16s")
"""Magic, the image's size and mtime_ns, pages, notes. The checksum and the arrays follow."""
_KEPT_MAGIC = b"xmcindx1"
_WORD = (1 << 64) - 1  # of a time, which may be before 1970 or after 2262


class _UnusableError(Exception):
    """An index file does not fit the image, or is damaged."""


class PageIndex:
    """An index of pages. Immutable.

    Args:
        gfns: frame numbers, strictly ascending.
        offsets: of the pages in the file, in bytes; None if they lie one after the other.
        start: where the first one lies then.
    """

    def __init__(self, gfns: array[int], offsets: array[int] | None, start: int = 0) -> None:
        if offsets is not None:  # an array that grew has room to spare, which two cannot have
            gfns, offsets = gfns[:], offsets[:]
        self.gfns = gfns
        self.offsets = offsets
        self._start = start

    def __len__(self) -> int:
        return len(self.gfns)

    @property
    def memory_end(self) -> int:
        """One past the last address, in bytes."""
        return self.gfns[-1] + 1 << PAGE_SHIFT if self.gfns else 0

    def runs(self, gfn: int, count: int) -> Iterator[Run]:
        """Return the runs of a range's present pages; see :meth:`.ImageBackend.runs`."""
        gfns = self.gfns
        first = bisect_left(gfns, gfn)
        end = bisect_left(gfns, gfn + count, first)
        while first < end:
            number = gfns[first]
            stop = end
            if gfns[end - 1] - number != end - 1 - first:
                # Where numbers ascend, number - position never falls. Runs may be short: gallop.
                step = 1
                while first + step < end and gfns[first + step] - number == step:
                    step *= 2
                low, high = first + step // 2, min(first + step, end)
                stop = low + bisect_right(
                    range(low, high), number - first, key=lambda position: gfns[position] - position
                )
            if self.offsets is None:
                yield Run(number, stop - first, self._start + (first << PAGE_SHIFT))
            else:
                yield from self._adjacent(self.offsets, number, first, stop)
            first = stop

    @staticmethod
    def _adjacent(offsets: array[int], gfn: int, first: int, stop: int) -> Iterator[Run]:
        """Cut consecutive pages where they are not so in the file, too."""
        pages, begin = stop - first, offsets[first]
        end = begin + (pages << PAGE_SHIFT)
        # A bucket's mostly are: compared at once, in half the time.
        if (
            pages <= _BLOCK
            and offsets[stop - 1] == end - PAGE_SIZE
            and offsets[first:stop] == array("Q", range(begin, end, PAGE_SIZE))
        ):
            yield Run(gfn, pages, begin)
            return
        while first < stop:
            begin = expected = offsets[first]
            pages = 0
            for offset in islice(offsets, first, stop):
                if offset != expected:
                    break
                expected += PAGE_SIZE
                pages += 1
            yield Run(gfn, pages, begin)
            gfn += pages
            first += pages


def store_index(path: str, size: int, mtime_ns: int, index: PageIndex, notes: bytes) -> None:
    """Write an index to a file of its own; log a warning if that is impossible.

    Only an index is replaced: not a symbolic link, and no file that begins in another way.

    Args:
        path: of the index file.
        size: of the image, in bytes.
        mtime_ns: the image's time of change.
        index: one with offsets.
        notes: 16 bytes to keep with it.
    """
    assert index.offsets is not None  # noqa: S101 - the others are read as fast as they are kept
    head = _KEPT.pack(_KEPT_MAGIC, size, mtime_ns & _WORD, len(index), notes)
    checksum = zlib.crc32(index.offsets, zlib.crc32(index.gfns, zlib.crc32(head)))
    try:
        with new_file(path, replaceable=_is_index) as fd, open(fd, "wb", closefd=False) as file:
            file.write(head + checksum.to_bytes(4, "little"))
            file.write(index.gfns)
            file.write(index.offsets)
    except OSError as error:
        if error.errno is None:
            raise  # a signal handler's, such as TimeoutError
        logger.warning("%s cannot be written, so the index is not kept: %s", path, error)


def _is_index(fd: int) -> bool:
    """Return whether an open regular file is an index, of whatever version."""
    return os.pread(fd, len(_KEPT_MAGIC), 0)[:-1] == _KEPT_MAGIC[:-1]


def load_index(path: str, size: int, mtime_ns: int) -> tuple[PageIndex, bytes] | None:
    """Return an index that was kept, and its notes; None if there is no correct one.

    Args:
        path: of the index file.
        size: of the image, in bytes.
        mtime_ns: the image's time of change.
    """
    try:
        return _load(open_regular(path, follow_links=False), size, mtime_ns)
    except FileNotFoundError:
        return None
    except (OSError, IrregularFileError, _UnusableError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # a signal handler's, such as TimeoutError
        logger.info("%s is not used: %s", path, error)
        return None


def _load(file: Descriptor, size: int, mtime_ns: int) -> tuple[PageIndex, bytes]:
    """Return what an open index file holds, or raise _UnusableError.

    The numbers are checked while they are read, so a file takes at most as much memory
    as it has bytes on the disk: frame numbers ascend, and a hole in a sparse file reads as zeros.
    """
    head = os.pread(file.fileno(), _KEPT.size + 4, 0)
    if len(head) < _KEPT.size + 4:
        raise _UnusableError("it is truncated")
    magic, old_size, old_mtime_ns, pages, notes = _KEPT.unpack_from(head)
    if (magic, old_size, old_mtime_ns) != (_KEPT_MAGIC, size, mtime_ns & _WORD):
        raise _UnusableError("it belongs to another file, or to an earlier state of this file")
    ends = os.fstat(file.fileno()).st_size
    if ends != len(head) + 16 * pages or pages > size // PAGE_SIZE:
        raise _UnusableError(f"it has {ends:#x} bytes, which do not fit {pages:#x} pages")
    gfns = _read_numbers(file, len(head), pages, ascending=True)
    if pages and gfns[-1] >= GFN_LIMIT:
        raise _UnusableError(f"it is damaged: frame number {gfns[-1]:#x} is too large")
    offsets = _read_numbers(file, len(head) + 8 * pages, pages)
    if pages and max(offsets) + PAGE_SIZE > size:
        raise _UnusableError("it is damaged: a page lies beyond the file's end")
    checksum = zlib.crc32(offsets, zlib.crc32(gfns, zlib.crc32(head[: _KEPT.size])))
    if int.from_bytes(head[_KEPT.size :], "little") != checksum:
        raise _UnusableError("it is damaged: its checksum is wrong")
    return PageIndex(gfns, offsets), notes


def _read_numbers(
    file: Descriptor, position: int, count: int, *, ascending: bool = False
) -> array[int]:
    """Return numbers from an open index file; check while reading that they ascend."""
    numbers = array("Q")
    while len(numbers) < count:
        wanted = min(_CHUNK_BYTES, 8 * (count - len(numbers)))
        chunk = array("Q", os.pread(file.fileno(), wanted, position + 8 * len(numbers)))
        if 8 * len(chunk) != wanted:
            raise _UnusableError("it is truncated")
        if ascending and not is_ascending(numbers[-1:] + chunk):
            raise _UnusableError("it is damaged: its frame numbers do not ascend")
        numbers += chunk
    return numbers
