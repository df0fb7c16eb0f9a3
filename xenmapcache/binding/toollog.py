"""Xen's libraries write their complaints to stderr; this brings them to :mod:`logging`.

libxentoollog can write to any ``FILE *``. Ours is a memfd that is read after each
failed call: no C code ever calls back into Python.
"""

from __future__ import annotations

import logging
import os
import threading

from .declarations import TOOL_LOG
from .libc import functions as libc_functions
from .loader import Loader

logger = logging.getLogger("xenmapcache.xen")

_XTL_WARN = 7
_IONBF = 2
_KEPT = 1 << 16  # bytes of complaints after which the memfd is emptied


class ToolLog:
    """A ``xentoollog_logger`` whose lines end up in the logger ``xenmapcache.xen``.

    Attributes:
        pointer: what to hand to Xen's open functions; None, which makes them write
            to stderr, where libxentoollog is missing.

    Synchronization: any thread may drain; close it only after the handle that uses it.
    """

    def __init__(self, loader: Loader) -> None:
        self.pointer: int | None = None
        self._offset = 0
        self._lock = threading.RLock()  # a failed call may drain while another thread closes
        try:
            self._functions = loader.open(TOOL_LOG, TOOL_LOG.soname)
        except OSError as error:
            logger.debug("%s cannot be loaded (%s): Xen will write to stderr", TOOL_LOG.name, error)
            return
        self._fd = os.memfd_create("xentoollog", os.MFD_CLOEXEC)
        self._libc = libc_functions()
        self._file, errno = self._libc["fdopen"](self._fd, b"a")
        if not self._file:
            os.close(self._fd)
            raise OSError(errno, os.strerror(errno), "fdopen")
        self._libc["setvbuf"](self._file, None, _IONBF, 0)
        self.pointer, _ = self._functions["xtl_createlogger_stdiostream"](self._file, _XTL_WARN, 0)

    def drain(self) -> str:
        """Log at DEBUG what Xen wrote since the last time, and return it on one line."""
        with self._lock:
            if self.pointer is None:
                return ""
            text = os.pread(self._fd, 1 << 16, self._offset)
            self._offset += len(text)
            if self._offset > _KEPT:
                os.ftruncate(self._fd, 0)  # the stream appends, so it goes on at the start
                self._offset = 0
        lines = [line.strip() for line in text.decode(errors="replace").splitlines()]
        for line in lines:
            logger.debug("%s", line)
        return "; ".join(lines)

    def close(self) -> None:
        """Free the logger and its file. Idempotent."""
        with self._lock:
            if self.pointer is not None:
                self.drain()
                self._functions["xtl_logger_destroy"](self.pointer)
                self._libc["fclose"](self._file)
                self.pointer = None
