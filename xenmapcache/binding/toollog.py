"""Xen's libraries write their complaints to stderr; this brings them to :mod:`logging`.

libxentoollog can write to any ``FILE *``. Ours is a memfd that is read after each
failed call: no C code ever calls back into Python.
"""

from __future__ import annotations

import logging
import os
import threading

from .declarations import TOOL_LOG
from .interface import Loader
from .libc import functions as libc_functions
from .resource import Resource

logger = logging.getLogger("xenmapcache.xen")

_XTL_WARN = 7
_IONBF = 2
_KEPT = 1 << 16  # bytes of complaints after which the memfd is emptied


class ToolLog:
    """A ``xentoollog_logger`` whose lines end up in the logger ``xenmapcache.xen``.

    Attributes:
        logger: the logger, which the handle that uses it must keep; None where libxentoollog is
            missing.

    Synchronization: any thread may drain or close.
    """

    def __init__(self, loader: Loader) -> None:
        self.logger: Resource | None = None
        self._offset = 0
        self._lock = threading.RLock()  # reentrant: a signal handler may drain during a drain
        try:
            functions = loader.open(TOOL_LOG, TOOL_LOG.soname)
        except OSError as error:
            logger.debug("%s cannot be loaded (%s): Xen will write to stderr", TOOL_LOG.name, error)
            return
        libc = libc_functions()
        stream = Resource(libc["fclose"].for_each)
        self._fd = _open_stream(stream.pointers)
        libc["setvbuf"](stream.pointer, None, _IONBF, 0)
        made = Resource(functions["xtl_logger_destroy"].for_each, needs=stream)
        functions["xtl_createlogger_stdiostream"](
            stream.pointer, _XTL_WARN, 0, result_out=made.pointers
        )
        self.logger = made

    @property
    def pointer(self) -> int | None:
        """What to hand to Xen's open functions; with None they write to stderr."""
        return self.logger.pointer if self.logger else None

    def drain(self) -> str:
        """Log at DEBUG what Xen wrote since the last time, and return it on one line."""
        with self._lock:
            used = self.logger  # this reference keeps the memfd open
            if used is None:
                return ""
            text = os.pread(self._fd, 1 << 16, self._offset)
            self._offset += len(text)
            if self._offset > _KEPT:
                os.ftruncate(self._fd, 0)  # the stream appends, so it continues at the start
                self._offset = 0
        lines = [line.strip() for line in text.decode(errors="replace").splitlines()]
        for line in lines:
            logger.debug("%s", line)
        return "; ".join(lines)

    def close(self) -> None:
        """Drain, and drop the logger: it is freed when no handle uses it. Idempotent."""
        try:
            self.drain()
        finally:
            self.logger = None


def _open_stream(result_out: list[int]) -> int:
    """Make a memfd and a ``FILE *`` that owns it, and return the memfd's number."""
    fds: list[int] = []
    try:
        # One step of C, so that no interrupt comes between the call and the list.
        fds.extend(map(os.memfd_create, ("xentoollog",), (os.MFD_CLOEXEC,)))
        _, errno = libc_functions()["fdopen"](fds[0], b"a", result_out=result_out)
        if not any(result_out):
            raise OSError(errno, os.strerror(errno), "fdopen")
    except BaseException:
        if fds and not any(result_out):
            os.close(fds[0])
        raise
    return fds[0]
