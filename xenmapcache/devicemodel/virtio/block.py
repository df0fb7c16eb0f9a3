"""VirtioBlock: a virtio disk over a file."""

# Theory of operation
#
# A request is one chain: a header of 16 bytes, data, and a status byte, the last writable one.
# Where descriptors begin and end means nothing; the bytes are counted across them.
#
#   header   type, reserved, sector      readable
#   data     to the disk                 readable: OUT, DISCARD, WRITE_ZEROES
#            from the disk               writable: IN, GET_ID
#   status   OK, IOERR or UNSUPP         writable
#
# Rules
#   1. The data of IN and OUT goes between the file and the guest's memory by preadv and pwritev.
#   2. A request without a header or a status byte is a broken driver. All else that is wrong
#      with a request, or with the file, is its status.
#   3. The file's size does not change: ranges are checked against what it was at the start. If it
#      was truncated since, a read that comes out short has failed.
#   4. A small read that the kernel has in its cache is done in the thread that serves.
#   5. Requests in flight have no order. FLUSH covers those that were answered before it came.
#   6. A driver that has not accepted FLUSH expects each write to be on the disk when it is
#      answered.

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

from ...binding import libc
from ...cache import DmaDirection
from ...guest.scatter import Segments
from ...logs import safely
from ..server import IoreqServer
from .buffer import BrokenDriverError, GuestBuffer
from .device import VirtioDevice
from .job import Job
from .queue import Request

logger = logging.getLogger("xenmapcache.devicemodel")

SIZE_MAX, SEG_MAX, RO, BLK_SIZE, FLUSH = 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 9
DISCARD, WRITE_ZEROES = 1 << 13, 1 << 14
"""Features of a disk, as bits."""
IN, OUT, FLUSH_OUT, GET_ID, DISCARD_OUT, ZEROES_OUT = 0, 1, 4, 8, 11, 13
"""Types of a request."""
OK, IOERR, UNSUPP = 0, 1, 2
"""The status of a request."""
UNMAP = 1
"""The flag of a range to be zeroed: the disk may forget it."""

SECTOR = 512
_QUEUE_SIZE = 128
_SEG_MAX = _QUEUE_SIZE - 2
_MAX_SEGMENT = 1 << 20
_MAX_RANGES = 16
"""Most ranges that one request discards or zeroes."""
_MAX_DISCARD = 1 << 22
"""Most sectors of such a range: 2 GiB are one call for the file system."""
_MAX_ZEROES = 1 << 13
"""Most sectors to be zeroed in one range: 4 MiB, because they may have to be written."""
_MAX_QUICK = 1 << 16
"""Most bytes that are read in the thread that serves, while each vCPU that uses it waits."""
_MAX_COPY = 1 << 13
"""Most bytes that are copied to be written, because a lease of so few costs more."""
_STATUSES = tuple(bytes([status]) for status in (OK, IOERR, UNSUPP))
_ZEROES = memoryview(bytes(1 << 16))
_ID_BYTES = 20
_HEADER = struct.Struct("<IIQ")
_RANGE = struct.Struct("<QII")
# capacity, size_max, seg_max, (geometry), blk_size, (topology, write-back, queues),
# discard: sectors, ranges, alignment; write zeroes: sectors, ranges, may unmap
_CONFIG = struct.Struct("<QII4xI12xIIIIIB3x")


class _File(Protocol):
    def fileno(self) -> int: ...


class _BadRequestError(Exception):
    """A request that is answered with a status, before its data is looked at."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class VirtioBlock(VirtioDevice):
    """A disk over a file or block device.

    The driver may read, write, flush, discard, write zeroes and ask for the serial number. A read
    or write that fails is answered with an error, and so is a range beyond the disk's end.

    Args:
        server: whose guest has the driver.
        file: open for reading, and for writing unless ``read_only``; a descriptor, or an object
            that has one. It stays yours to close, after the device. Its size in whole sectors of
            512 bytes is the disk's.
        read_only: refuse what would change it.
        serial: at most 20 bytes of ASCII, which the guest sees.
        name: for reports.
        workers: how many requests are carried out at the same time.
        limit: how many requests may be under way. The others stay in the guest's ring.
        record: path of a file with what the next process needs; see :class:`VirtioDevice`.

    Raises:
        ValueError: the serial number is too long, or not ASCII.
        OSError: the file has no size.
    """

    device_id = 2
    queue_sizes = (_QUEUE_SIZE,)

    def __init__(
        self,
        server: IoreqServer,
        file: int | _File,
        *,
        read_only: bool = False,
        serial: str = "",
        name: str = "disk0",
        workers: int = 4,
        limit: int = 64,
        record: str | os.PathLike[str] | None = None,
    ) -> None:
        features = SIZE_MAX | SEG_MAX | BLK_SIZE | FLUSH
        features |= RO if read_only else DISCARD | WRITE_ZEROES
        if not serial.isascii() or len(serial) > _ID_BYTES:
            raise ValueError(f"serial must be at most {_ID_BYTES} bytes of ASCII, not {serial!r}")
        self._fd = file if isinstance(file, int) else file.fileno()
        self._sectors = os.lseek(self._fd, 0, os.SEEK_END) // SECTOR
        # A hole of a block device is another matter: there it is not certain to read as zeros.
        self._has_holes = stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._can_peek = True
        self._read_only = read_only
        self._serial = serial.encode().ljust(_ID_BYTES, b"\0")
        super().__init__(
            server, name=name, features=features, workers=workers, limit=limit, record=record
        )
        self.config = _CONFIG.pack(
            self._sectors,
            _MAX_SEGMENT,
            _SEG_MAX,
            SECTOR,
            *(_MAX_DISCARD, _MAX_RANGES, 4096 // SECTOR),
            *(_MAX_ZEROES, _MAX_RANGES, 1),
        )

    @property
    def sectors(self) -> int:
        """How many sectors of 512 bytes the disk has."""
        return self._sectors

    # --- requests -------------------------------------------------------------------------------

    def prepare(self, request: Request) -> Job:
        """Read the header, and say how to carry out the rest."""
        if len(request.readable) < _HEADER.size or not len(request.writable):
            raise BrokenDriverError(f"{request!r} has no header of 16 bytes, or no status byte")
        kind, _, sector = _HEADER.unpack(request.readable.read(_HEADER.size))
        work: Callable[[Segments], int] = _nothing
        quick: Callable[[GuestBuffer], int | None] | None = None
        buffer, status = request.readable[:0], OK
        try:
            if kind == IN:
                buffer = request.writable[:-1]
                offset = self._offset(sector, len(buffer))
                work = partial(self._read, offset)
                if self._can_peek and len(buffer) <= _MAX_QUICK:
                    quick = partial(self._peek, offset)
            elif kind == OUT:
                self._check_writable()
                buffer = request.readable[_HEADER.size :]
                offset = self._offset(sector, len(buffer))
                work = partial(self._write, offset)
                if len(buffer) <= _MAX_COPY:
                    with contextlib.suppress(BrokenDriverError):  # the lease fails as well
                        work = partial(self._write_copy, offset, buffer.read())
                        buffer = request.readable[:0]
            elif kind == GET_ID:
                buffer, work = request.writable[:-1][:_ID_BYTES], self._identify
            elif kind == FLUSH_OUT:
                work = self._flush
            elif kind in (DISCARD_OUT, ZEROES_OUT):
                self._check_writable()
                ranges = [*self._ranges(kind, request.readable[_HEADER.size :])]
                work = partial(self._clear, kind, ranges)
            else:
                status = UNSUPP
        except _BadRequestError as bad:
            buffer, status = request.readable[:0], bad.status
        to_guest = buffer.direction is DmaDirection.FROM_DEVICE
        return Job(buffer, work, partial(self._answer, request, status, to_guest), quick)

    @staticmethod
    def _answer(request: Request, status: int, to_guest: bool, moved: int | None) -> int:
        """Write the status; return how many bytes were written, from the first writable one on.

        The status is the last byte. So it counts only if all bytes before it were written.
        """
        place = len(request.writable) - 1
        request.writable.write(_STATUSES[IOERR if moved is None else status], place)
        written = moved or 0 if to_guest else 0
        return written + 1 if written == place else written

    def _offset(self, sector: int, length: int) -> int:
        """Return where a range of sectors begins in the file."""
        if length % SECTOR or sector + length // SECTOR > self._sectors:
            raise _BadRequestError(IOERR)
        return sector * SECTOR

    def _check_writable(self) -> None:
        if self._read_only:
            raise _BadRequestError(IOERR)

    def _ranges(self, kind: int, data: GuestBuffer) -> Iterator[tuple[int, int, int]]:
        """Yield offset, length and flags of the ranges of DISCARD or WRITE_ZEROES."""
        count, rest = divmod(len(data), _RANGE.size)
        if rest or not 0 < count <= _MAX_RANGES:
            raise _BadRequestError(IOERR)
        most, known = (_MAX_DISCARD, 0) if kind == DISCARD_OUT else (_MAX_ZEROES, UNMAP)
        for sector, sectors, flags in _RANGE.iter_unpack(data.read()):
            if flags & ~known:
                raise _BadRequestError(UNSUPP)
            if sectors > most:
                raise _BadRequestError(IOERR)
            yield self._offset(sector, sectors * SECTOR), sectors * SECTOR, flags

    # --- work, in a worker ----------------------------------------------------------------------

    def _read(self, offset: int, memory: Segments) -> int:
        length = len(memory)
        count = memory.read_from(self._fd, offset)
        if count != length:
            memory.release(written=count)  # after an error all of it may have been written
        return _complete(count, length, offset)

    def _peek(self, offset: int, buffer: GuestBuffer) -> int | None:
        """Read what the kernel has in its cache, without waiting for the disk."""
        data = bytearray(len(buffer))
        try:
            count = os.preadv(self._fd, (data,), offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            self._can_peek = error.errno != errno.EOPNOTSUPP
            raise
        return buffer.write(data) if count == len(data) else None

    def _write(self, offset: int, memory: Segments) -> int:
        count = _complete(memory.write_to(self._fd, offset), len(memory), offset)
        self._write_through()
        return count

    def _write_copy(self, offset: int, data: bytes, _: Segments) -> int:
        _complete(os.pwrite(self._fd, data, offset), len(data), offset)
        self._write_through()
        return len(data)

    def _flush(self, _: Segments) -> int:
        os.fdatasync(self._fd)
        return 0

    def _identify(self, memory: Segments) -> int:
        memory[:] = self._serial[: len(memory)]
        return len(memory)

    def _clear(self, kind: int, ranges: list[tuple[int, int, int]], _: Segments) -> int:
        for offset, length, flags in ranges:
            if (kind == DISCARD_OUT or flags & UNMAP) and self._punch(offset, length):
                continue
            if kind == ZEROES_OUT:
                self._write_zeroes(offset, length)
        self._write_through()
        return 0

    def _punch(self, offset: int, length: int) -> bool:
        """Have the file forget a range, which reads as zeros then; False if it cannot."""
        if not self._has_holes or not length:
            return False
        try:
            libc.punch_hole(self._fd, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._has_holes = False
            safely(
                logger.info,
                "%r: its file system cannot punch holes, so a discard has no effect",
                self,
            )
            return False
        return True

    def _write_zeroes(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            offset += os.pwrite(self._fd, _ZEROES[: end - offset], offset)

    def _write_through(self) -> None:
        if not self.negotiated & FLUSH:
            os.fdatasync(self._fd)


def _nothing(_: Segments) -> int:
    return 0


def _complete(count: int, length: int, offset: int) -> int:
    """Return a count of moved bytes if it is all of them; an error if the file ended early."""
    if count != length:
        raise OSError(errno.EIO, f"the file moved {count} of {length} bytes at {offset:#x}")
    return count
