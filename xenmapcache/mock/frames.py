"""Frames: the memory of the mock's machine, in a memfd that all domains share."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial

from ..address import PAGE_SHIFT
from ..binding import libc
from ..binding.descriptor import own
from ..errors import ClosedError

_MAX_FRAMES = 1 << 50
"""So that the file's size in bytes fits 63 bits."""
_CHUNK_BYTES = 1 << 30
"""The most that one call reads or writes: the kernel stops short of 2 GiB."""


class Frames:
    """Frames of 4 KiB. A frame is handed out once, and never to another page.

    The memory is freed when no domain, no hypervisor and no mapping shows it. Only the process
    that made the frames may use them: a forked child shares the file, but not the count of frames.

    Attributes:
        pid: the process that made them.

    Synchronization: all methods may be called in any threads, signal handlers and finalizers.
    """

    def __init__(self) -> None:
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        # Freed by its reference count, so after every finalizer that still uses it.
        self._memfd = own(partial(os.memfd_create, "xenmapcache-mock", flags))
        # No code can make it shorter under a mapping, whose pages would raise SIGBUS then.
        fcntl.fcntl(
            self._memfd.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        )
        self._next = 0
        self._lock = threading.RLock()
        self.pid = os.getpid()

    def fileno(self) -> int:
        """Return the number of the memfd."""
        return self._memfd.fileno()

    def check_process(self) -> None:
        """Refuse to work in a forked child.

        Raises:
            ClosedError: another process has made the frames.
        """
        if os.getpid() != self.pid:
            raise ClosedError(f"this mock belongs to process {self.pid}, which forked this one")

    def allocate(self, count: int) -> int:
        """Return the first of ``count`` new frames, all zeros.

        Raises:
            ValueError: the machine has handed out 2**50 frames.
        """
        self.check_process()
        with self._lock:
            # No call, and so no signal handler, comes between these two.
            first = self._next
            self._next = first + count
            if first + count > _MAX_FRAMES:
                raise ValueError(f"the mock's machine has no {count:#x} frames left")
            end = first + count << PAGE_SHIFT
            while os.fstat(self.fileno()).st_size < end:
                # Refused if a signal handler has made the file longer: it is sealed.
                with suppress(PermissionError):
                    os.ftruncate(self.fileno(), end)
        return first

    def read(self, pieces: Iterable[tuple[int, int]]) -> bytes:
        """Return the content of ``(offset, size)`` pieces, one after the other."""
        fd = self.fileno()
        return b"".join(os.pread(fd, size, offset) for offset, size in _chunks(pieces))

    def write(self, pieces: Iterable[tuple[int, int]], data: memoryview) -> None:
        """Write data into ``(offset, size)`` pieces, one after the other."""
        position = 0
        for offset, size in _chunks(pieces):
            os.pwrite(self.fileno(), data[position : position + size], offset)
            position += size

    def map(
        self,
        runs: list[tuple[int, int, int]],
        count: int,
        writable: bool,
        result_out: list[int],
    ) -> None:
        """Map frames; pages that no run has cannot be touched.

        Args:
            runs: ``(position, frame, pages)``, in ascending order, positions in pages.
            count: pages in all.
            writable: map for writing too.
            result_out: gets the host address, as soon as there is one. The caller unmaps.

        Raises:
            XenCallError: the kernel refused.
        """
        length = count << PAGE_SHIFT
        if len(runs) == 1 and runs[0][2] == count:
            offset = runs[0][1] << PAGE_SHIFT
            libc.map_file(self.fileno(), offset, length, writable=writable, result_out=result_out)
        else:
            libc.reserve(length, result_out=result_out)
            self.map_over(result_out[0], runs, writable, [])
        libc.dont_fork(result_out[0], length)

    def map_over(
        self,
        address: int,
        runs: list[tuple[int, int, int]],
        writable: bool,
        result_out: list[int],
    ) -> None:
        """Map runs of frames over what is at an address; see :meth:`map`.

        ``result_out`` gets the address of each run that was mapped.
        """
        for position, frame, pages in runs:
            libc.map_file(
                self.fileno(),
                frame << PAGE_SHIFT,
                pages << PAGE_SHIFT,
                writable=writable,
                address=address + (position << PAGE_SHIFT),
                result_out=result_out,
            )


def _chunks(pieces: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for offset, size in pieces:
        for start in range(0, size, _CHUNK_BYTES):
            yield offset + start, min(_CHUNK_BYTES, size - start)
