"""FileLease: the kernel's read lease on an open file, and the thread that answers for it.

A *file lease* (``fcntl(F_SETLEASE)``) has nothing to do with the :class:`.Lease` of a cache. While
a process holds one, the kernel makes other programs wait that open the file for writing or
truncate it, and sends a signal to the holder. fcntl(2) calls that a *lease break*.
"""

# Theory of operation
#
# Touching a mapped page that a truncated file has lost is a SIGBUS. So memory is mapped from a file
# only under a file lease, and one thread of the process, the image guard, answers lease breaks:
# it puts a copy over each mapped range (MAP_FIXED), and only then ends the file lease, so that
# the writer continues.
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
#
# The guard cannot be held up
#   6. It takes no lock that a frame of the user's code can hold: a signal handler, which may
#      truncate the file itself, runs on top of such frames. `_election` is held only by threads
#      that want to be the guard, in which no signal handler runs.
#   7. It runs no foreign code, and imports nothing. Log lines are written by another thread, after
#      the answer (latelog.py): a logging filter may raise, wait for a lock, or never return.
#   8. It continues after every exception. What it could not do it tries again 20 ms later, until
#      the kernel's patience ends (fs.lease-break-time).
#   9. Should the thread have ended all the same, the next map starts another one, which first
#      takes over all file leases, and answers what the dead one was sent.

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import struct
import threading
import weakref
from typing import NamedTuple

from ..binding.collector import untrack
from ..binding.descriptor import Descriptor
from ..errors import CorruptImageError
from ..mapping import LiveMapping, live_records
from .copies import put_copy_over
from .filesystem import why_not_mapped
from .latelog import LateLog
from .regular import is_foreign

logger = logging.getLogger("xenmapcache")

_F_SETOWN_EX, _F_OWNER_TID = 15, 0
_OWNER = struct.Struct("ii")
_RETRY_S = 0.02
_SIGNAL = getattr(signal, "SIGSTKFLT", None)
"""A signal that no program uses, so that the program's own use of signals is not disturbed."""


class FileLease:
    """The file lease of an open file, and the descriptor that it belongs to.

    Args:
        file: the descriptor.
        path: of the file, for messages.

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

    def __init__(self, file: Descriptor, path: str) -> None:
        state = os.fstat(file.fileno())
        self.file = file
        self.path = path
        self.size = state.st_size
        self.mtime_ns = state.st_mtime_ns
        self.asked = self.held = self.ended = self.refused = False
        self._pid = os.getpid()
        # It refers to nothing that could refer to it. So the collector need not see it, and does
        # not clear the guard's weak reference while finalizers still use the file.
        untrack(self)
        image_guard.leases.add(weakref.ref(self, image_guard.leases.discard))

    def take(self) -> bool:
        """Return whether the file can be mapped; ask for the file lease if there is none yet."""
        if self.ended or self.refused:
            return False
        if self.held and image_guard.is_alive():
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
        if _SIGNAL is None:
            return "no signal is free on this system"
        fd = self.file.fileno()
        reason = why_not_mapped(fd)
        if not reason:
            self.give_to(image_guard.start())
            fcntl.fcntl(fd, fcntl.F_SETSIG, _SIGNAL)
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


_Ranges = list[tuple[LiveMapping, MappedRange]]


class FileLeaseThread:
    """The image guard: the one thread that the kernel signals when a file lease breaks.

    Attributes:
        leases: weak references to the file leases of all open files.
        log: for what it has to say.
    """

    name = "xenmapcache image guard"

    def __init__(self) -> None:
        self.leases: set[weakref.ref[FileLease]] = set()
        self.reset()

    def reset(self) -> None:
        """Begin again: in a forked child, which has neither the thread nor its files."""
        self.leases.clear()
        self._election = threading.Lock()
        self._elected: tuple[threading.Thread, int] | None = None
        self.log = LateLog("xenmapcache file lease report")
        self._last_failure = ""

    def is_alive(self) -> bool:
        """Return whether the thread runs."""
        elected = self._elected
        return elected is not None and elected[0].is_alive()

    def start(self) -> int:
        """Return the kernel's id of the thread, which is started if none runs.

        Raises:
            OSError: no thread can be started.
        """
        for _ in range(3):
            elected = self._elected
            if elected is not None and elected[0].is_alive():
                return elected[1]
            self._start_candidate()
        raise OSError(errno.ESRCH, f"the thread {self.name!r} ends at once")

    def _start_candidate(self) -> None:
        """Start a thread that becomes the guard, unless another one has become it first."""
        election = self._election
        ready = threading.Lock()
        ready.acquire()
        thread = threading.Thread(target=self._run, args=(ready,), name=self.name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not str(error).startswith("can't"):  # a signal handler has raised it
                raise
            raise OSError(errno.ENOMEM, str(error)) from None
        while not ready.acquire(timeout=0.1):
            if self._election is not election:
                raise OSError(errno.ECHILD, "a signal handler forked while a thread started")

    def _run(self, ready: threading.Lock) -> None:
        # All signals wait for other threads from here on. So far this thread had the signal mask of
        # the one that has started it, and could be given no signal which that one could not.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            with self._election:
                if self.is_alive():
                    return
                self._elected = threading.current_thread(), threading.get_native_id()
                self._take_over()
        finally:
            ready.release()
        del ready
        again = True  # what was signalled to a thread that has ended
        while True:
            try:
                self._serve(again)
            except BaseException as error:  # a MemoryError, or what another thread has thrown in
                again = True
                self._report_failure(error)

    def _take_over(self) -> None:
        """Let the kernel signal this thread for the file leases of one that has ended."""
        for reference in tuple(self.leases):
            lease = reference()
            if lease is not None and (lease.asked or lease.held):
                with contextlib.suppress(OSError, ValueError):  # it has been closed
                    lease.give_to(threading.get_native_id())

    def _serve(self, again: bool) -> None:
        """Answer lease breaks, for ever."""
        assert _SIGNAL is not None  # noqa: S101 - or no file lease was taken
        signals = {_SIGNAL}
        while True:
            if again:
                signal.sigtimedwait(signals, _RETRY_S)
            else:
                signal.sigwaitinfo(signals)
            again = not self.answer_all()

    def answer_all(self) -> bool:
        """Answer all lease breaks; return False if one has to be tried again."""
        breaks, complete = self._breaks()
        if breaks:
            for record in live_records():
                mapped = record.keeps
                if isinstance(mapped, MappedRange) and mapped.lease in breaks:
                    breaks[mapped.lease].append((record, mapped))
        for lease, ranges in breaks.items():
            try:
                self._answer(lease, ranges)
            except Exception as error:
                complete = False
                self._report_failure(error)
        return complete

    def _breaks(self) -> tuple[dict[FileLease, _Ranges], bool]:
        """Return the file leases that the kernel wants back, and whether all could be asked for."""
        breaks: dict[FileLease, _Ranges] = {}
        complete = True
        for reference in tuple(self.leases):
            lease = reference()
            if lease is None:
                self.leases.discard(reference)
            elif lease.asked or lease.held:
                try:
                    if lease.is_breaking():
                        breaks[lease] = []
                        lease.ended = True  # before the look at the table, see rule 1
                except Exception as error:
                    complete = False
                    self._report_failure(error)
        return breaks, complete

    def _answer(self, lease: FileLease, ranges: _Ranges) -> None:
        """Replace all ranges of a file that others see by copies, then end its file lease."""
        failures = []
        for record, mapped in ranges:
            if mapped.claim():
                mapped.lease = None
                continue
            memory = record()  # nobody unmaps it until `del memory`, see rule 2
            if memory is not None:
                try:
                    failures += [_copy(lease, part, record) for part in mapped.parts(record)]
                finally:
                    del memory
            mapped.lease = None
        if not lease.end() and not lease.held:
            lease.ended = False  # it was not broken: another thread is just asking for it
        lost = list(filter(None, failures))
        if lost:
            text = "%s: %d of %d mapped ranges could not be copied, and show zeros: %s"
            self.log.report(logging.CRITICAL, text, lease.path, len(lost), len(failures), lost[-1])
        elif failures:
            text = "%s is opened for writing: %d mapped ranges are copied now, others are read"
            self.log.report(logging.INFO, text, lease.path, len(failures))

    def _report_failure(self, error: BaseException) -> None:
        """Report that a file could not be protected; the same failure once."""
        with contextlib.suppress(MemoryError):
            text = f"{type(error).__name__}: {error}"
            if text != self._last_failure:
                self._last_failure = text
                self.log.report(logging.CRITICAL, "a lease break is not answered yet: %s", text)

    def forget_parent(self) -> None:
        """In a forked child: close all files."""
        for reference in tuple(self.leases):
            lease = reference()
            if lease is not None:
                lease.forget_parent()
        self.reset()


def _copy(lease: FileLease, part: MappedPart, record: LiveMapping) -> str:
    fd = lease.file.fileno()
    address = record.address + part.position
    return put_copy_over(address, part.length, fd, part.offset, lease.size, lease.change)


image_guard = FileLeaseThread()
os.register_at_fork(after_in_child=image_guard.forget_parent)
