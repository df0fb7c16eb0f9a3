"""Files whose content is a guest's memory, read through a map cache; and a folder of them.

:func:`virtual_files` lays the files out: that needs nothing but a cache. :func:`serve` shows them
to other programs, through the kernel's FUSE.
"""

from __future__ import annotations

import abc
import errno as _errno
import itertools
import logging
import os
import shutil
import signal
import stat
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..address import PAGE_MASK, PAGE_SHIFT, MiB, as_int
from ..cache import MapCache
from ..errors import BackendUnavailableError, XenMapCacheError
from ..escape import printable
from ..extras import require
from ..formats.lime import HEADER, MAGIC, VERSION
from ..guest.vmcoreinfo import find_vmcoreinfo
from ..writers.guest import Guest
from ..writers.vmcore_head import MACHINES, Head

logger = logging.getLogger("xenmapcache")

MAX_READ_BYTES = 16 * MiB
"""The longest read of a file at once. The kernel asks for at most 1 MiB."""
MAX_RANGES = 1 << 20
LEECHCORE_RANGES = 144
"""Of an ELF core that LeechCore reads: the headers of more do not fit where it looks for them."""

_WINDOW_BYTES = 16 * MiB
_MAX_LOGGED = 100
_LOOK_S = 1.0
_DEVICE = Path("/dev/fuse")
_IDLE_THREADS = 8
_READ_ONLY_FILE = stat.S_IFREG | 0o400
_READ_ONLY_FOLDER = stat.S_IFDIR | 0o500
_INSTALL = "apt install fuse3 (Debian), dnf install fuse3 (Fedora)"


class Ranges:
    """Where the pages of a guest are: runs, and the number of each run's first page.

    Args:
        runs: ``(gfn, pages)``, in ascending order; runs that touch become one.

    Attributes:
        pages: how many pages there are.

    Raises:
        ValueError: there are more than :data:`MAX_RANGES`.
    """

    def __init__(self, runs: Iterator[tuple[int, int]]) -> None:
        self._gfns = array("Q")
        self._counts = array("Q")
        self._numbers = array("Q")
        self.pages = 0
        end = -1
        for gfn, count in runs:
            if gfn == end:
                self._counts[-1] += count
            else:
                if len(self._gfns) == MAX_RANGES:
                    raise ValueError(
                        f"the memory below {gfn << PAGE_SHIFT:#x} is in {MAX_RANGES} ranges, and "
                        "files of more are not made: give a smaller length"
                    )
                self._gfns.append(gfn)
                self._counts.append(count)
                self._numbers.append(self.pages)
            self.pages += count
            end = gfn + count

    def __len__(self) -> int:
        return len(self._gfns)

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """Return ``(gfn, pages, number)`` of all runs."""
        return zip(self._gfns, self._counts, self._numbers, strict=True)

    def find(self, place: int, header_bytes: int = 0) -> tuple[int, int, int]:
        """Return the run at a place among all pages, where each run has a header before it.

        Args:
            place: in bytes.
            header_bytes: the length of a header.

        Returns:
            How far the place is from the beginning of the run's header; the address of the run,
            and one past its last address.
        """

        def begin(index: int) -> int:
            return (self._numbers[index] << PAGE_SHIFT) + index * header_bytes

        index = bisect_right(range(len(self)), place, key=begin) - 1
        first, count = self._gfns[index], self._counts[index]
        return place - begin(index), first << PAGE_SHIFT, first + count << PAGE_SHIFT


class VirtualFile(abc.ABC):
    """A read-only file whose content is read through a cache when it is asked for.

    Attributes:
        name: of the file.
        size: in bytes.

    Synchronization: all methods may be called in any threads at once.
    """

    name: str
    size: int

    def __init__(self, cache: MapCache) -> None:
        self._cache = cache

    def read(self, offset: int, length: int) -> bytes:
        """Return a part of the file; less than `length` only at its end.

        Args:
            offset: in bytes.
            length: in bytes, at most :data:`MAX_READ_BYTES`.

        Raises:
            ValueError: a number is negative, or the length is too large.
            FaultError: a page has vanished since the file was laid out.
            XenMapCacheError: others as :meth:`MapCache.read`.
        """
        offset, length = as_int("offset", offset), as_int("length", length)
        if offset < 0 or not 0 <= length <= MAX_READ_BYTES:
            raise ValueError(
                f"offset {offset:#x} must not be negative, and length {length:#x} must be "
                f"0 to {MAX_READ_BYTES:#x}"
            )
        end = min(offset + length, self.size)
        parts = []
        while offset < end:
            part = self._part(offset, end - offset)
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @abc.abstractmethod
    def _part(self, offset: int, length: int) -> bytes:
        """Return at least one byte of a part that is in the file, and at most all of it."""


class RawFile(VirtualFile):
    """``memory.raw``: an address is an offset. Holes are zeros.

    Args:
        cache: to read through.
        end: one past the last address.
    """

    name = "memory.raw"

    def __init__(self, cache: MapCache, end: int) -> None:
        super().__init__(cache)
        self.size = end

    def _part(self, offset: int, length: int) -> bytes:
        return self._cache.read(offset, length, fill=0)


class ElfFile(VirtualFile):
    """``memory.elf``: an ELF core, as :func:`.write_vmcore` writes it.

    Args:
        cache: to read through.
        ranges: the memory.
        machine: of :data:`.MACHINES`.
        end: where to stop looking for VMCOREINFO, unless the source has it as a note.
    """

    name = "memory.elf"

    def __init__(self, cache: MapCache, ranges: Ranges, machine: str, end: int) -> None:
        super().__init__(cache)
        self._ranges = ranges
        head = Head(machine, getattr(cache.backend, "notes", ()), len(ranges))
        if not head.described:
            info = find_vmcoreinfo(cache, 0, end)
            if info is not None:
                head.describe(info)
        self.described = head.described
        self._head = b"".join(head.chunks(ranges.segments)).ljust(head.start, b"\0")
        self.size = head.start + (ranges.pages << PAGE_SHIFT)

    def _part(self, offset: int, length: int) -> bytes:
        start = len(self._head)
        if offset < start:
            return self._head[offset : offset + length]
        inside, address, end = self._ranges.find(offset - start)
        address += inside
        return self._cache.read(address, min(length, end - address))


class LimeFile(VirtualFile):
    """``memory.lime``: ranges, each after a header, as :func:`.write_lime` writes them.

    Args:
        cache: to read through.
        ranges: the memory.
    """

    name = "memory.lime"

    def __init__(self, cache: MapCache, ranges: Ranges) -> None:
        super().__init__(cache)
        self._ranges = ranges
        self.size = (ranges.pages << PAGE_SHIFT) + len(ranges) * HEADER.size

    def _part(self, offset: int, length: int) -> bytes:
        inside, address, end = self._ranges.find(offset, HEADER.size)
        if inside < HEADER.size:
            header = HEADER.pack(MAGIC, VERSION, address, end - 1, 0)
            return header[inside : inside + length]
        address += inside - HEADER.size
        return self._cache.read(address, min(length, end - address))


def virtual_files(cache: MapCache, length: int | str | None = None) -> list[VirtualFile]:
    """Return the files of a guest: ``memory.raw``, ``memory.elf`` and ``memory.lime``.

    Which pages exist is found out once, here. A page that a guest gets later is only in
    ``memory.raw``. A page that it gives up is zeros there; in the others, reading it fails.
    VMCOREINFO, which a Linux guest keeps, is looked for in memory if the source has no such note.
    Without it a WARNING says what does not work.

    Args:
        cache: stays yours to close, after the last read.
        length: how far to go, in bytes or as ``"4GiB"``; by default to the end of memory.

    Returns:
        The files; ``memory.elf`` is missing, and a WARNING is logged, if ELF cores of the guest's
        machine cannot be made.

    Raises:
        TypeError, ValueError: the length is wrong; the source does not know its end and no length
            is given; or there are more than :data:`MAX_RANGES` ranges.
        XenMapCacheError: others as :meth:`MapCache.present` and :meth:`MapCache.read`.
    """
    guest = Guest(cache, length)
    end = guest.end + PAGE_MASK & ~PAGE_MASK
    ranges = Ranges(_runs(cache, guest))
    files: list[VirtualFile] = [RawFile(cache, end), LimeFile(cache, ranges)]
    machine = guest.machine(None)
    if machine not in MACHINES:
        logger.warning("there is no memory.elf of the machine %s", printable(machine))
        return files
    elf = ElfFile(cache, ranges, machine, end)
    if not elf.described:
        logger.warning(
            "no VMCOREINFO was found in the guest's memory, as a Linux guest has it: drgn and "
            "crash cannot translate virtual addresses in memory.elf; physical ones can be read"
        )
    if len(ranges) > LEECHCORE_RANGES:
        logger.warning(
            "memory.elf has %d ranges, and MemProcFS reads at most %d: give it memory.raw",
            len(ranges),
            LEECHCORE_RANGES,
        )
    return [files[0], elf, files[1]]


def _runs(cache: MapCache, guest: Guest) -> Iterator[tuple[int, int]]:
    """Yield ``(gfn, pages)`` of the present pages, in order; one run may touch the next."""
    known = guest.known_runs()
    if known is not None:
        yield from known
        return
    for window in range(0, guest.end, _WINDOW_BYTES):
        for address, size in cache.present(window, min(_WINDOW_BYTES, guest.end - window)):
            first = address >> PAGE_SHIFT
            yield first, (address + size + PAGE_MASK >> PAGE_SHIFT) - first


class Operations:
    """What the kernel asks of the file system; mfusepy calls it, in any threads.

    Args:
        files: the files of the folder.
        live: whether they change, so that the kernel must not keep their content.
        mounted: called when the kernel has mounted the folder.

    Attributes:
        use_ns: that times are in nanoseconds, for mfusepy.
        mounted: whether the kernel has mounted the folder.
    """

    use_ns = True

    def __init__(
        self, files: Sequence[VirtualFile], *, live: bool, mounted: Callable[[], object]
    ) -> None:
        self._files = {f"/{file.name}": file for file in files}
        self._live = live
        self._call = mounted
        self._failures = itertools.count(1)
        now = time.time_ns()
        times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), now)
        self._common: dict[str, Any] = {"st_uid": os.getuid(), "st_gid": os.getgid()} | times
        self.mounted = False

    def init(self, path: str) -> None:  # noqa: ARG002 - mfusepy's
        """Take note that the folder is mounted."""
        self.mounted = True
        self._call()

    def getattr(self, path: str, fh: object = None) -> dict[str, Any]:  # noqa: ARG002 - mfusepy's
        """Return the attributes of a file or the folder."""
        if path == "/":
            return self._common | {"st_mode": _READ_ONLY_FOLDER, "st_nlink": 2}
        size = self._file(path).size
        return self._common | {"st_mode": _READ_ONLY_FILE, "st_nlink": 1, "st_size": size}

    def readdir(self, path: str, fh: object) -> list[str]:  # noqa: ARG002 - mfusepy's
        """Return the names in the folder."""
        return [".", "..", *(path[1:] for path in self._files)]

    def open(self, path: str, info: Any) -> int:  # noqa: ANN401 - struct fuse_file_info
        """Open a file. Of a live guest, each read is to reach us."""
        self._file(path)
        if self._live:
            info.direct_io = 1
        else:
            info.keep_cache = 1
        return 0

    def read(self, path: str, size: int, offset: int, info: object) -> bytes:  # noqa: ARG002 - mfusepy's
        """Return a part of a file.

        Raises:
            OSError: EIO, after a WARNING, if a page has vanished or cannot be read.
        """
        file = self._file(path)
        try:
            return file.read(offset, size)
        except (XenMapCacheError, MemoryError) as error:
            self._log(file.name, offset, error)
            raise OSError(_errno.EIO, os.strerror(_errno.EIO)) from None

    def _file(self, path: str) -> VirtualFile:
        file = self._files.get(path)
        if file is None:
            raise OSError(_errno.ENOENT, os.strerror(_errno.ENOENT))
        return file

    def _log(self, name: str, offset: int, error: Exception) -> None:
        """Log a read that failed. A tool may try millions of them."""
        number = next(self._failures)
        if number <= _MAX_LOGGED:
            reason = str(error) or "out of memory"
            logger.warning("%s at %#x cannot be read: %s", name, offset, reason)
        if number == _MAX_LOGGED:
            logger.warning("reads that fail are no longer logged, after %d of them", _MAX_LOGGED)


class Watch:
    """A thread that looks after a live guest while its memory is mounted.

    At each look it drops what the cache has mapped: a guest that gives up a page gets no other one
    while another process maps it. If the guest has ended, it calls a function, and ends.

    Args:
        cache: over the guest.
        ended: called when the guest has ended.
        seconds: between looks.

    Synchronization: for one thread.
    """

    def __init__(
        self, cache: MapCache, ended: Callable[[], object], seconds: float = _LOOK_S
    ) -> None:
        self._cache = cache
        self._ended = ended
        self._seconds = seconds
        self._stop = threading.Event()
        self._asks = True
        self._thread = threading.Thread(target=self._run, name="xenmapcache-mount", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> bool:
        """Look once. Return whether the guest has ended."""
        self._cache.invalidate()
        if not self._asks:
            return False
        try:
            return self._cache.backend.has_ended()
        except XenMapCacheError as error:
            self._asks = False
            logger.warning(
                "whether the guest has ended cannot be told: %s; unmount the folder when it has, "
                "because Xen keeps a guest whose memory is mapped",
                error,
            )
            return False

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            if self.look():
                logger.warning("the guest has ended: its memory is unmounted")
                self._ended()
                return


def check_fuse(folder: str | os.PathLike[str]) -> Any:  # noqa: ANN401 - mfusepy need not be installed
    """Return the module mfusepy, if a folder can be mounted with it.

    Raises:
        BackendUnavailableError: a library, a device or a permission is missing; the message says
            what to do.
        OSError: the folder is missing, is not a folder, or is not empty.
    """
    try:
        names = os.listdir(folder)  # noqa: PTH208 - the names are enough
    except OSError as error:
        if error.errno != _errno.ENOTCONN:
            raise
        raise BackendUnavailableError(
            f"{os.fspath(folder)} is still mounted by a process that was killed: umount it"
        ) from error
    if names:
        error_number = _errno.ENOTEMPTY
        raise OSError(error_number, "is not empty; give an empty folder", os.fspath(folder))
    try:
        module = require("mfusepy", "mfusepy", "mount")
    except (OSError, AttributeError) as error:  # no library, or one that is too old
        raise BackendUnavailableError(
            f"mfusepy does not find a libfuse that it can use ({error}): {_INSTALL}"
        ) from error
    try:
        os.close(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError as error:
        raise BackendUnavailableError(
            f"{_DEVICE} is missing: modprobe fuse; or start the container with --device {_DEVICE} "
            "--cap-add SYS_ADMIN"
        ) from error
    except OSError as error:
        raise BackendUnavailableError(
            f"{_DEVICE} cannot be opened: {error.strerror}; run this as root"
        ) from error
    if os.geteuid() and shutil.which("fusermount3") is None and shutil.which("fusermount") is None:
        raise BackendUnavailableError(
            f"fusermount3 is missing, which mounts for users other than root: {_INSTALL}"
        )
    return module


def serve(
    cache: MapCache,
    files: Sequence[VirtualFile],
    folder: str | os.PathLike[str],
    *,
    mounted: Callable[[], object] = lambda: None,
) -> None:
    """Mount files in a folder, read-only, until they are unmounted.

    That is when SIGTERM, SIGINT or SIGHUP arrives, when ``fusermount3 -u`` or ``umount`` is
    called, or when a live guest ends. Only this user's processes can read the files. What is
    mapped of a live guest is dropped each second, so that it can have its pages back.

    Args:
        cache: that the files read through.
        files: what :func:`virtual_files` has returned.
        folder: an empty folder.
        mounted: called when the folder is mounted, in some thread.

    Raises:
        BackendUnavailableError: FUSE does not work here; the message says what to do.
        OSError: it is not a folder.

    Synchronization: call it in the main thread, whose handlers of signals libfuse replaces.
    """
    fuse = check_fuse(folder)
    live = getattr(cache.backend, "domid", None) is not None
    operations = Operations(files, live=live, mounted=mounted)
    options: dict[str, Any] = {"fsname": "xenmapcache", "subtype": "xenmapcache", "ro": True}
    if (fuse.fuse_version_major, fuse.fuse_version_minor) >= (3, 12):
        options["max_idle_threads"] = _IDLE_THREADS  # libfuse complains of its own default
    main = threading.get_ident()

    def unmount() -> None:
        signal.pthread_kill(main, signal.SIGTERM)  # libfuse's handler ends its loop

    watch = Watch(cache, unmount) if live else nullcontext()
    try:
        with watch:
            fuse.FUSE(operations, os.path.realpath(folder), raw_fi=True, foreground=True, **options)
    except RuntimeError as error:
        if not operations.mounted:
            raise BackendUnavailableError(
                f"{os.fspath(folder)} cannot be mounted: libfuse failed with status {error}, and "
                "says why on stderr; mounting needs root or fusermount3, and in a container "
                "--cap-add SYS_ADMIN"
            ) from error
        # Otherwise a signal has ended it, which libfuse counts as an error.
