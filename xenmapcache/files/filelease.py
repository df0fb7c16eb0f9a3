"""FileLease: the kernel's read lease on an open file, and what is mapped under it.

A *file lease* (``fcntl(F_SETLEASE)``) has nothing to do with the :class:`.Lease` of a cache. While
a process holds one, the kernel makes other programs wait that open the file for writing or
truncate it, and sends a signal to the holder. fcntl(2) calls that a *lease break*.
"""

# Theory of operation
#
# Touching a mapped page that a truncated file has lost is a SIGBUS. So memory is mapped from a file
# only under a file lease, and one thread of the process, the image guard (`guard.py`), answers
# lease breaks: it puts a copy over each mapped range (MAP_FIXED), and only then ends the file
# lease, so that the writer continues.
#
# A file lease is in one of these states:
#
#   new      not asked for
#   held     asked for, and the kernel has granted it
#   ended    broken
#   refused  not granted
#
#   new --take--> held --lease break--> ended
#     `--take, refused--> refused
#
# In the last two the file is read, for ever. Of two threads that ask at once, one may be granted
# the file lease and the other be refused, because a writer waits: then it is held and refused,
# and nothing more is mapped.
#
# What is mapped is found in the table of live mappings: each record keeps a MappedRange, which
# keeps the FileLease, which keeps the descriptor. There is no second table, no count, and no lock.
# When the ImageFile is closed and the last record is gone, reference counts free the file lease,
# and with it the descriptor.
#
# Who may do what
#   1. The guard sets `ended` before it looks at the table. A thread that maps enters its record
#      first, and then looks whether the lease is intact. So either the guard finds the record, or
#      that thread drops its mapping, which nobody has seen. (Each stores, then loads what the
#      other stores.) What is held and has ended stays so.
#   2. The guard holds a strong reference to the memory while it replaces a range. So nobody unmaps
#      the range at that moment. If there is no memory any more, nobody can touch the range, and the
#      guard leaves it alone. The guard waits for no other thread, therefore, not even for one that
#      is stopped in munmap.
#   3. Any thread may take a file lease at any time: the kernel grants the same one again. The
#      guard looks at each one that was asked for, held or not: a lease break may come before a
#      thread has noted that the lease is held, or an interrupt may have kept it from noting that.
#      To end a file lease that does not exist is an error, so the guard learns which it was.
#   4. The kernel's answer decides whether a file lease is intact, never our own note of it.
#   5. Each range has a token until it is handed out. If the thread that maps takes it, the range is
#      handed out; if the guard does, the range is dropped, and needs no copy. Such a range may be
#      one of a file that had changed before the kernel granted the file lease, when nothing
#      could wait for us: it cannot be copied, and that harms nobody.

from __future__ import annotations

import fcntl
import logging
import os
import signal
import struct
import weakref
from typing import NamedTuple, Protocol

from ..binding.collector import untrack
from ..binding.descriptor import Descriptor
from ..errors import CorruptImageError
from ..mapping import LiveMapping
from .filesystem import why_not_mapped
from .regular import is_foreign

logger = logging.getLogger("xenmapcache")

_F_SETOWN_EX, _F_OWNER_TID = 15, 0
_OWNER = struct.Struct("ii")
SIGNAL = getattr(signal, "SIGSTKFLT", None)
"""A signal that no program uses, so that the program's own use of signals is not disturbed."""


class Guard(Protocol):
    """What a file lease needs of the image guard.

    Attributes:
        leases: weak references to the file leases of all open files.
    """

    leases: set[weakref.ref[FileLease]]

    def is_alive(self) -> bool:
        """Return whether the thread runs."""

    def start(self) -> int:
        """Return the kernel's id of the thread, which is started if none runs."""


class FileLease:
    """The file lease of an open file, and the descriptor that it belongs to.

    Args:
        file: the descriptor.
        path: of the file, for messages.
        guard: the thread that answers lease breaks.

    Attributes:
        file, path: as given.
        size: in bytes, when the file was opened.
        mtime_ns: the file's time of change then.
        asked: whether the kernel was asked for the file lease; the guard looks at it then.
        held: whether the kernel has granted it.
        ended: whether it was broken.
        refused: whether the kernel has refused it, to one thread at least.

    Synchronization: all methods may be called in any threads at once.
    """

    __slots__ = (
        "__weakref__",
        "_guard",
        "_pid",
        "asked",
        "ended",
        "file",
        "held",
        "mtime_ns",
        "path",
        "refused",
        "size",
    )

    def __init__(self, file: Descriptor, path: str, guard: Guard) -> None:
        state = os.fstat(file.fileno())
        self.file = file
        self.path = path
        self.size = state.st_size
        self.mtime_ns = state.st_mtime_ns
        self.asked = self.held = self.ended = self.refused = False
        self._guard = guard
        self._pid = os.getpid()
        # It refers to nothing that could refer to it. So the collector need not see it, and does
        # not clear the guard's weak reference while finalizers still use the file.
        untrack(self)
        guard.leases.add(weakref.ref(self, guard.leases.discard))

    def take(self) -> bool:
        """Return whether the file can be mapped; ask for the file lease if there is none yet."""
        if self.ended or self.refused:
            return False
        if self.held and self._guard.is_alive():
            return True
        self.asked = True
        open_for_writing = False
        try:
            reason = self._ask()
        except OSError as error:
            if is_foreign(error):
                raise
            reason = str(error)
            open_for_writing = isinstance(error, BlockingIOError)
        if not reason:
            self.held = True
            return True
        self.refused = True  # still asked for: it may just have been granted to another thread
        if open_for_writing:
            logger.warning("%s is open for writing: changes by mmap are not noticed", self.path)
        logger.debug("%s: it is read, not mapped: %s", self.path, reason)
        return False

    def _ask(self) -> str:
        """Ask the kernel for the file lease; return why that is useless, or an empty string."""
        if SIGNAL is None:
            return "no signal is free on this system"
        fd = self.file.fileno()
        reason = why_not_mapped(fd)
        if not reason:
            self.give_to(self._guard.start())
            fcntl.fcntl(fd, fcntl.F_SETSIG, SIGNAL)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        return reason

    def give_to(self, thread_id: int) -> None:
        """Let the kernel signal a thread when the lease breaks."""
        fcntl.fcntl(self.file.fileno(), _F_SETOWN_EX, _OWNER.pack(_F_OWNER_TID, thread_id))

    def is_intact(self) -> bool:
        """Return whether writers still wait for an answer before they change the file."""
        return not self.ended and not self.is_breaking()

    def is_breaking(self) -> bool:
        """Return whether the kernel wants the file lease back, or has taken it."""
        return fcntl.fcntl(self.file.fileno(), fcntl.F_GETLEASE) == fcntl.F_UNLCK

    def change(self) -> CorruptImageError | None:
        """Return the error to raise if the file has changed since it was opened.

        Returned, not raised: a traceback that a caller keeps would keep the descriptor.
        """
        state = os.fstat(self.file.fileno())
        if (state.st_size, state.st_mtime_ns) == (self.size, self.mtime_ns):
            return None
        return CorruptImageError(
            f"{self.path} has changed since it was opened (it had {self.size:#x} bytes and "
            f"has {state.st_size:#x}): open it again"
        )

    def end(self) -> bool:
        """End the file lease, so that writers continue; return whether there was one."""
        if self._pid != os.getpid():
            return False  # the descriptor is a forked child's, but the file lease is its parent's
        try:
            fcntl.fcntl(self.file.fileno(), fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except (OSError, ValueError):  # none was taken, or the kernel has ended it; it is closed
            return False
        return True

    def forget_parent(self) -> None:
        """In a forked child: close the file, and leave the file lease to the parent."""
        self.ended = True
        self.file.close()

    def __del__(self) -> None:
        # The descriptor's end ends the file lease, too, unless C code has forked a child.
        if getattr(self, "asked", False):  # or its making was interrupted
            self.end()


class MappedPart(NamedTuple):
    """A part of memory that is mapped from a file.

    Attributes:
        position: of the part in the memory, in bytes.
        length: in bytes.
        offset: in the file, in bytes.
    """

    position: int
    length: int
    offset: int


class MappedRange:
    """What a record of the table of live mappings keeps while its memory is mapped from a file.

    Attributes:
        lease: the file lease that protects the memory; None once it needs no protection: a copy
            has replaced it, or the guard has taken the token.
        offset: of the memory in the file, in bytes.
        token: a list with one element until the memory is handed out, see :meth:`claim`.
    """

    __slots__ = ("lease", "offset", "token")

    def __init__(self, lease: FileLease, offset: int) -> None:
        self.lease: FileLease | None = lease
        self.offset = offset
        self.token: list[None] = [None]

    def claim(self) -> bool:
        """Take the token; return False if the other party has it, or there is none.

        The thread that has mapped the memory hands it out only if it gets the token. If the guard
        gets it, that thread drops the memory, and nobody has seen it.
        """
        try:
            self.token.pop()  # one step of C
        except IndexError:
            return False
        return True

    def parts(self, record: LiveMapping) -> list[MappedPart]:
        """Return what of a record's memory is mapped from the file."""
        return [MappedPart(0, record.length, self.offset)]


class MappedParts(MappedRange):
    """The same for memory over parts of which ranges of a file are mapped.

    Attributes:
        mapped: the parts. A thread that maps one appends it, and then looks at the file lease.
        token: there is one for each part that is not finished. Without one, the parts before it
            count as handed out, although the caller may still be mapping others.
    """

    __slots__ = ("mapped",)

    def __init__(self, lease: FileLease) -> None:
        super().__init__(lease, 0)
        self.token.clear()
        self.mapped: list[MappedPart] = []

    def append(self, part: MappedPart) -> None:
        """Enter a part, and a token for it."""
        self.token.append(None)
        self.mapped.append(part)

    def parts(self, record: LiveMapping) -> list[MappedPart]:  # noqa: ARG002 - as of the others
        """Return what of a record's memory is mapped from the file."""
        return self.mapped[:]
