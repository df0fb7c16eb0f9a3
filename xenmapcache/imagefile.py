"""ImageFile: a file that must not change while it is open, and is mapped without risk.

Whoever touches a mapped page that a truncated file has lost is ended by SIGBUS. So a
piece of a file is mapped only under a read lease (``fcntl(F_SETLEASE)``): the kernel
then makes everybody wait who opens the file for writing, or truncates it, until we
have put copies in the place of what is mapped. Where there is no lease to be had, or
it would not help, pieces are read instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import signal
import stat
import struct
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from .address import PAGE_MASK
from .binding import libc
from .errors import ClosedError, CorruptImageError, XenCallError

logger = logging.getLogger("xenmapcache")

_F_SETOWN_EX, _F_OWNER_TID = 15, 0
_OWNER = struct.Struct("ii")
_IOV_MAX = os.sysconf("SC_IOV_MAX")
_PIECE = 1 << 24
_TICK_NS = 20_000_000
"""More than the grain of a file's time on kernels before 6.13."""

# Where a file changes only by what this kernel does. Others grant leases, too, and do not
# keep them: before Linux 7.0 even FUSE does.
_LOCAL = frozenset({
    "bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "iso9660", "ntfs3",
    "overlay", "squashfs", "tmpfs", "vfat", "xfs", "zfs",
})  # fmt: skip
# Where touching a hole of a mapped file takes memory; if there is none left, that is a SIGBUS.
_FILLED_WHEN_TOUCHED = frozenset({"overlay", "ramfs", "tmpfs"})


class ImageFile:
    """An open file of guest memory.

    Args:
        path: a regular file.

    Attributes:
        path: as given.
        size: in bytes, when it was opened.
        changed: its time of change then, in ns.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file.

    Synchronization: all methods may be called in any threads; ``unmap`` in finalizers.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = -1
        self._closed = False
        self._leased: bool | None = None  # None: not tried yet
        self._lock = threading.RLock()
        self._reads = 0  # under way, and in need of the descriptor
        self._pieces: dict[int, tuple[int, int]] = {}  # host address: offset, length
        self._dropped: deque[tuple[int, int]] = deque()  # host address, length; to be unmapped
        self.path = os.fsdecode(path)
        if not stat.S_ISREG(Path(self.path).stat().st_mode):  # before open, which waits at a pipe
            raise ValueError(f"{self.path} is no regular file: copy it to one first")
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        _guard.files[id(self)] = weakref.ref(self)
        age = time.time_ns() - os.fstat(self._fd).st_mtime_ns
        if 0 <= age < _TICK_NS:  # or the next change might leave it with the same time
            time.sleep((_TICK_NS - age) / 1e9)
        state = os.fstat(self._fd)
        self.size = state.st_size
        self.changed = state.st_mtime_ns

    def check(self) -> None:
        """Raise CorruptImageError if the file has changed since it was opened."""
        with self._using() as fd:
            self._check(fd)

    def _check(self, fd: int) -> None:
        state = os.fstat(fd)
        if (state.st_size, state.st_mtime_ns) != (self.size, self.changed):
            raise CorruptImageError(
                f"{self.path} has changed since it was opened (it had {self.size:#x} bytes and "
                f"has {state.st_size:#x}): open it again"
            )

    def read(self, offset: int, length: int) -> bytes:
        """Return a piece of it.

        Raises:
            CorruptImageError: the file ends before; nothing was allocated.
            XenCallError: it cannot be read.
        """
        self._check_inside(offset, length)
        chunks = []
        with self._using() as fd:
            while length:
                try:
                    chunk = os.pread(fd, length, offset)
                except OSError as error:
                    raise self._unreadable(offset, length, error) from None
                if not chunk:
                    raise self._ends_at(offset, length)
                chunks.append(chunk)
                offset += len(chunk)
                length -= len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def read_into(self, offset: int, *views: memoryview) -> None:
        """Fill views, one after the other, from an offset on.

        Raises:
            CorruptImageError: the file ends before.
            XenCallError: it cannot be read.
        """
        length = sum(view.nbytes for view in views)
        self._check_inside(offset, length)
        left = list(views)
        with self._using() as fd:
            while length:
                try:
                    got = os.preadv(fd, left[:_IOV_MAX], offset)
                except OSError as error:
                    raise self._unreadable(offset, length, error) from None
                if not got:
                    raise self._ends_at(offset, length)
                offset += got
                length -= got
                left = _behind(left, got)

    def _check_inside(self, offset: int, length: int) -> None:
        if min(offset, length) < 0 or offset + length > self.size:
            raise CorruptImageError(
                f"{self.path}: {length:#x} bytes at {offset:#x} are wanted, and the file ends at "
                f"{self.size:#x}"
            )

    def _ends_at(self, offset: int, length: int) -> CorruptImageError:
        return CorruptImageError(
            f"{self.path} ends at {offset:#x} now: it has changed since it was opened, and "
            f"{length:#x} more bytes are wanted"
        )

    def _unreadable(self, offset: int, length: int, error: OSError) -> XenCallError:
        return XenCallError(
            "pread", None, error.errno or 0, f"{length:#x} bytes at {offset:#x} of {self.path}"
        )

    @contextlib.contextmanager
    def _using(self) -> Iterator[int]:
        """Keep the descriptor: once closed, its number may be another file's."""
        with self._exclusive():
            if self._closed:
                raise ClosedError(f"{self.path} is closed")
            self._reads += 1
            fd = self._fd
        try:
            yield fd
        finally:
            with self._exclusive():
                self._reads -= 1
                self._close_unused()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the lock; at its end unmap what finalizers have left."""
        try:
            with self._lock:
                yield
        finally:
            self._unmap_dropped()

    def map(self, offset: int, length: int) -> int | None:
        """Map a piece of it; give it back with :meth:`unmap`.

        Args:
            offset: in bytes, page-aligned.
            length: in bytes, whole pages, of which the file has the last at least in part.

        Returns:
            The host address, or None if it has to be read instead.

        Raises:
            CorruptImageError: the file has changed, or ends before.
            XenCallError: mmap failed.
        """
        self._check_inside(offset, max(1, length - PAGE_MASK))
        with self._exclusive():
            if self._closed:
                raise ClosedError(f"{self.path} is closed")
            if self._leased is None:
                self._leased = _guard.take_lease(self._fd, self.path)
            if not self._leased or self._is_asked_for() or length > _largest_copy():
                return None
            self._check(self._fd)
            address = libc.map_file(self._fd, offset, length, writable=False)
            try:
                libc.dont_fork(address, length)
                self._pieces[address] = offset, length
            except BaseException:
                libc.unmap(address, length)
                raise
            if self._fd >= 0:
                return address
            # A signal's handler has closed it in between, and the lease is gone.
            self._pieces.pop(address)
            libc.unmap(address, length)
            return None

    def unmap(self, address: int, length: int) -> None:
        """Unmap what :meth:`map` has mapped. Waits for nobody: finalizers get here."""
        self._dropped.append((address, length))
        self._unmap_dropped()

    def _unmap_dropped(self) -> None:
        # Under the lock, or a copy could be put where nothing, or something else, is by now.
        # Whoever holds it meanwhile looks here after letting go of it.
        lock, dropped = self._lock, self._dropped
        while dropped and not _is_owned(lock) and lock.acquire(blocking=False):
            try:
                while dropped:
                    address, length = dropped.popleft()
                    self._pieces.pop(address, None)
                    libc.unmap(address, length)
                self._close_unused()
            finally:
                lock.release()

    def answer(self) -> None:
        """Let those go on who wait to write to the file; called by the guard."""
        with self._exclusive():
            if not self._leased or not self._is_asked_for():
                return
            self._leased = False
            pieces, lost = len(self._pieces), 0
            try:
                for address, piece in self._pieces.items():
                    lost += not self._copy(address, *piece)
                self._pieces.clear()
            finally:
                self._end_lease()
                self._close_unused()
        logger.info(
            "%s: somebody opens it for writing: %d pieces that were mapped are copied, and others "
            "are read from now on",
            self.path,
            pieces,
        )
        if lost:
            logger.critical(
                "%s: %d of %d pieces could not be saved from being changed: they show zeros",
                self.path,
                lost,
                pieces,
            )

    def _is_asked_for(self) -> bool:
        return fcntl.fcntl(self._fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK

    def _copy(self, address: int, offset: int, length: int) -> bool:
        """Put a copy where a piece is mapped, in one step; or zeros, if that cannot be."""
        # A file for each: its memory goes when the piece is unmapped.
        copy = -1
        try:
            copy = os.memfd_create("xenmapcache-image", os.MFD_CLOEXEC)
            os.ftruncate(copy, length)  # the file's last page may be a part of one
            end = min(offset + length, self.size)
            while offset < end:
                sent = os.sendfile(copy, self._fd, offset, min(end - offset, _PIECE))
                if not sent:
                    raise self._ends_at(offset, end - offset)
                offset += sent
            self._check(self._fd)  # the kernel does not wait for ever, and files go bad
            libc.map_file(copy, 0, length, writable=False, address=address)
        except Exception as error:
            logger.debug("%s at %#x: %s", self.path, offset, error)
            libc.cover(address, length, replace=True)
            return False
        finally:
            if copy >= 0:  # pragma: no branch - without one it has returned
                os.close(copy)
        with contextlib.suppress(XenCallError):
            libc.dont_fork(address, length)
        return True

    def close(self) -> None:
        """Read and map no more. What is mapped lives on, and keeps the lease. Idempotent."""
        with self._exclusive():
            self._closed = True
            self._close_unused()

    def _close_unused(self) -> None:
        if self._closed and self._fd >= 0 and not self._pieces and not self._reads:
            _guard.files.pop(id(self), None)
            if self._leased:  # a forked child may have the descriptor, and the lease with it
                self._leased = False
                self._end_lease()
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _end_lease(self) -> None:
        with contextlib.suppress(OSError):  # the kernel has ended it
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def forget_parent(self) -> None:
        """In a forked child: let go of the file, and leave the lease, which is the parent's."""
        fd, self._fd = self._fd, -1
        self._lock = threading.RLock()  # another thread of the parent may have held it
        self._closed, self._leased = True, False
        self._pieces, self._dropped = {}, deque()
        os.close(fd)

    def __del__(self) -> None:
        if self._fd < 0:
            return
        unclosed = not self._closed
        self.close()
        if unclosed:
            warnings.warn(f"unclosed image {self.path}", ResourceWarning, stacklevel=1, source=self)


def _is_owned(lock: threading.RLock) -> bool:
    owned: bool = lock._is_owned()  # type: ignore[attr-defined] # noqa: SLF001 - no other name tells
    return owned


def _largest_copy() -> int:
    """Return how large a file may be that this process writes: one of a copy, too (ulimit -f)."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def _behind(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """Return what of some views comes after ``count`` bytes."""
    for number, view in enumerate(views):
        if count < view.nbytes:
            return [view[count:], *views[number + 1 :]]
        count -= view.nbytes
    return []


def _file_system(fd: int) -> str:
    """Return the type of the file system that a file lies in; empty if it cannot be told."""
    wanted = None
    try:
        for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
            if line.startswith("mnt_id:"):
                wanted = line.split()[1]
        with Path("/proc/self/mountinfo").open(encoding="utf-8", errors="replace") as mounts:
            for mount in mounts:
                if mount.partition(" ")[0] == wanted:
                    return mount.rpartition(" - ")[2].split()[0]
    except (OSError, ValueError, IndexError):
        pass
    return ""


class _Guard:
    """The thread that the kernel tells when somebody wants to write to a leased file.

    The signal goes to that thread alone, which waits for it, and is one that nobody
    uses: what the program does with signals is not disturbed.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew; in a forked child, which has neither the thread nor its files."""
        self._lock = threading.RLock()
        self.files: dict[int, weakref.ref[ImageFile]] = {}
        self._thread = 0

    def take_lease(self, fd: int, path: str) -> bool:
        """Take a read lease of an open file; False if there is none to be had."""
        try:
            reason = self._take_lease(fd)
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            reason = str(error)
            if isinstance(error, BlockingIOError):
                logger.warning(
                    "%s is open for writing: what is changed in it by mmap is not noticed", path
                )
        if reason:
            logger.debug("%s: it is read, not mapped: %s", path, reason)
        return not reason

    def _take_lease(self, fd: int) -> str:
        number = getattr(signal, "SIGSTKFLT", None)
        if number is None:
            return "no signal to spare"
        kind = _file_system(fd)
        if kind not in _LOCAL:
            return f"leases of the file system {kind!r} are not relied on"
        state = os.fstat(fd)
        if kind in _FILLED_WHEN_TOUCHED and state.st_blocks * 512 < state.st_size:
            return f"sparse, on {kind}"
        with self._lock:
            if not self._thread:
                self._start(number)
        fcntl.fcntl(fd, _F_SETOWN_EX, _OWNER.pack(_F_OWNER_TID, self._thread))
        fcntl.fcntl(fd, fcntl.F_SETSIG, number)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        return ""

    def _start(self, number: int) -> None:
        started = threading.Event()
        thread = threading.Thread(
            target=self._run, args=(number, started), name="xenmapcache image guard", daemon=True
        )
        # The thread inherits this: no signal of the program's is ever to be delivered there.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        started.wait()

    def _run(self, number: int, started: threading.Event) -> None:
        self._thread = threading.get_native_id()
        started.set()
        del started
        while True:
            signal.sigwaitinfo({number})
            self._answer_all()

    def _answer_all(self) -> None:
        for reference in list(self.files.values()):
            file = reference()
            if file is not None:
                try:
                    file.answer()
                except Exception:
                    logger.critical(
                        "%s: cannot be saved from being changed", file.path, exc_info=True
                    )

    def forget_parent(self) -> None:
        """In a forked child: let go of all files."""
        for reference in list(self.files.values()):
            file = reference()
            if file is not None:
                file.forget_parent()
        self.reset()


_guard = _Guard()
os.register_at_fork(after_in_child=_guard.forget_parent)
