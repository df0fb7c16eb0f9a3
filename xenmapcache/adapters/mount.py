"""A folder of files whose content is a guest's memory, shown through the kernel's FUSE.

:func:`.virtual_files` lays the files out. :func:`serve` mounts them, and looks after a live guest
until they are unmounted.
"""

from __future__ import annotations

import errno as _errno
import itertools
import logging
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..cache import MapCache
from ..errors import BackendUnavailableError, XenMapCacheError
from ..extras import require
from .virtual_files import VirtualFile

logger = logging.getLogger("xenmapcache")

_MAX_LOGGED = 100
_LOOK_S = 1.0
_DEVICE = Path("/dev/fuse")
_IDLE_THREADS = 8
_READ_ONLY_FILE = stat.S_IFREG | 0o400
_READ_ONLY_FOLDER = stat.S_IFDIR | 0o500
_INSTALL = "apt install fuse3 (Debian), dnf install fuse3 (Fedora)"


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
