"""A file of two halves that take turns, in a mapping that is shared with the kernel.

What is stored is in the file at once, even if the process is killed. If one half is full, the other
one begins with a header and with lines that restate what is so, and overwrites what it had. A NUL
follows the last line of a half.
"""

# Rules
#   1. Space is allocated before it is stored to: otherwise a full disk is a SIGBUS.
#   2. A store has the line and the NUL after it. Until the next store, the NUL ends the half, and
#      what was in the half before the last turn is not read.
#   3. Who stores looks at `position` and `limit`, stores, and moves `position`, without a call in
#      between. So no signal handler comes between, and no thread: with a GIL it needs one for that,
#      without one the caller has a lock.
#   4. While room is made, nothing fits. Who comes then, in a signal handler or in another thread,
#      is told to come later.
#   5. What a turn changes changes in one moment, after the header was stored: an interrupted turn
#      has not begun.

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

from ..binding.descriptor import Descriptor, own

Begin: TypeAlias = Callable[[int, int], bytes]

_GROWTH_BYTES: Final = 1 << 20
_MADV_POPULATE_WRITE: Final = 23


class Halves:
    """The file.

    Args:
        path: of the file, for errors.
        fd: of it; it is duplicated, locked, and given its size.
        size: of it, in bytes.
        begin: called with the number of a half, and with the size of one; returns what it begins
            with, and a NUL.

    Attributes:
        memory: of the file.
        size: of a half, in bytes.
        number: of the half that is written, from 0 on.
        position: where the next line goes.
        limit: where a line and its NUL must end by, or less while room is made.

    Synchronization: rule 3.
    """

    __slots__ = (
        "_busy",
        "_closing",
        "_end",
        "_path",
        "_start",
        "file",
        "limit",
        "memory",
        "number",
        "position",
        "size",
    )

    def __init__(self, path: str, fd: int, size: int, begin: Begin) -> None:
        self._path = path
        self._busy = self._closing = False
        self.size = size // 2 // mmap.PAGESIZE * mmap.PAGESIZE
        self.number = -1
        self.position = self._start = self._end = self.limit = -1
        os.ftruncate(fd, 2 * self.size)
        self.file: Descriptor = own(partial(os.dup, fd))
        fcntl.flock(fd, fcntl.LOCK_EX)
        self.memory = mmap.mmap(fd, 2 * self.size)
        self._turn(begin)
        self.limit = self._end

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self.file.closed

    def make_room(self, size: int, begin: Begin) -> bool:
        """Have room for a line.

        Args:
            size: of the line and the NUL.
            begin: as of the class. It is not kept: it may know this object, which would be a cycle.

        Returns:
            Whether there may be room now. If not, this is being done already, or it is closed.

        Raises:
            OSError: no space is left.
        """
        if self._busy or self._closing:
            return False
        self._busy = True
        try:
            self.limit = -1
            while self.position + size > self._end:
                half_end = self._start + self.size
                if self._end < half_end:
                    end = min(half_end, self._end + _GROWTH_BYTES)
                    self._allocate(self._end, end)
                    self._end = end
                else:
                    self._turn(begin)
            self.limit = self._end
        finally:
            self._busy = False
            self._finish()
        return True

    def close(self) -> None:
        """Close the file, or have that done by who makes room. Idempotent."""
        self._closing = True
        self.limit = -1
        self._finish()

    def _finish(self) -> None:
        if not self._closing or self._busy or self.file.closed:
            return
        self.memory.close()
        if not self.number:
            os.ftruncate(self.file.fileno(), self.position)
        self.file.close()

    def forget(self) -> None:
        """Close it in a forked child, and leave the file to the parent."""
        self._closing = True
        self.limit = -1
        self.memory.close()
        self.file.close()

    def _allocate(self, begin: int, end: int) -> None:
        """Have space, and pages of it: one by one, faults would take longer than the stores."""
        try:
            os.posix_fallocate(self.file.fileno(), begin, end - begin)
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._path) from None
        with contextlib.suppress(OSError):  # a kernel before 5.14: pages come one by one
            self.memory.madvise(_MADV_POPULATE_WRITE, begin, end - begin)

    def _turn(self, begin: Begin) -> None:
        """Begin the other half: overwrite what it had."""
        number = self.number + 1
        start = number % 2 * self.size
        lines = begin(number, self.size)
        position = start + len(lines) - 1
        end = min(start + self.size, max(start + _GROWTH_BYTES, position + 1))
        self._allocate(start, end)
        self.memory[start : position + 1] = lines
        self.number, self._start, self.position, self._end = number, start, position, end
