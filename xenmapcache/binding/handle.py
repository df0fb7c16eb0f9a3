"""A handle of one of Xen's libraries: found, opened, called and closed safely."""

from __future__ import annotations

import errno as _errno
import os
import sys
import warnings
from array import array
from pathlib import Path
from typing import Self

from ..errors import BackendUnavailableError, ClosedError, UnsupportedOperationError, XenCallError
from .declarations import Library
from .hints import HINTS, permission_remedy
from .interface import Argument
from .library import load, xen_version
from .loader import get_loader
from .resource import Resource, sweep
from .toollog import ToolLog


def unwritten_errors(pages: int) -> array[int]:
    """Return an ``err[]`` in which a page counts as failed until the library says otherwise."""
    return array("i", [_errno.EIO]) * pages


def positive_errors(errors: array[int]) -> bytes | None:
    """Turn the ``err[]`` of a map call into one positive errno a page; None if all is well.

    The header promises an errno, the code stores it negated: both are understood.
    """
    return bytes(min(abs(error), 255) for error in errors) if any(errors) else None


def failure(function: str, domid: int | None, errno: int, complaint: str = "") -> XenCallError:
    """Return the exception for a failed call, with what its errno means."""
    hint = "; ".join(filter(None, (HINTS.get(errno, ""), complaint)))
    return XenCallError(function, domid, errno or _errno.EIO, hint)


class Handle:
    """An open handle of a library. The base of this package's bindings.

    Args:
        binding: ``"cffi"`` or ``"ctypes"``; None takes cffi if it is there.
        library: a SONAME or path to load instead of the declared one.

    Raises:
        BackendUnavailableError: no library, no Xen, or no permission.

    Synchronization: calls may run in parallel in any threads. ``close`` does not wait: each call
    holds a reference to C's handle, and the last one closes it.
    """

    declared: Library
    open_call: str
    close_call: str
    required: tuple[str, ...]
    nodes: tuple[Path, ...] = (Path("/dev/xen/privcmd"), Path("/proc/xen/privcmd"))
    """The device nodes that the library opens, of which it needs one."""
    module = "xen-privcmd"
    """The kernel's, which brings them."""

    def __init__(self, *, binding: str | None = None, library: str | None = None) -> None:
        self._opened: Resource | None = None
        self._pid = os.getpid()
        loader = get_loader(binding)
        self.binding = loader.name
        required = (self.open_call, self.close_call, *self.required)
        self.path, self._functions = load(self.declared, loader, library, required)
        self._log = ToolLog(loader)
        opened = Resource(self._functions[self.close_call].for_each, needs=self._log.logger)
        _, errno = self._open(opened.pointers)
        if not opened.pointer:
            complaint = self._log.drain()
            self._log.close()
            raise BackendUnavailableError(self._why_not(errno, complaint))
        self._opened = opened

    def _open(self, result_out: list[int]) -> tuple[int, int]:
        return self._functions[self.open_call](self._log.pointer, 0, result_out=result_out)

    def _why_not(self, errno: int, complaint: str) -> str:
        what = f"{self.open_call} failed ({complaint or os.strerror(errno)})"
        node = next((path for path in self.nodes if path.exists()), None)
        if errno in (_errno.EACCES, _errno.EPERM):
            path = node or self.nodes[0]
            return f"{what}: no permission for {path}: {permission_remedy(path, errno)}"
        lacks = "" if node else f": there is no {self.nodes[0]}"
        if xen_version() is None:
            return (
                f"{what}{lacks}: this is not a Xen host. Run it in Dom0 (or load the kernel module "
                f"{self.module} there), or use open_backend('mock', memory='256M') without Xen"
            )
        if lacks:
            return f"{what}{lacks}: load the kernel module {self.module} (modprobe), in Dom0"
        return f"{what}: see the kernel's log, and try `xenmapcache doctor`"

    def supports(self, function: str) -> bool:
        """Tell whether the library exports a function."""
        return function in self._functions

    def call(
        self, function: str, *arguments: Argument, result_out: list[int] | None = None
    ) -> tuple[int, int]:
        """Call a function of the library, whose first parameter is the handle.

        Args:
            function: its name.
            *arguments: after the handle.
            result_out: see :class:`.interface.Function`.

        Returns:
            ``(result, errno)``.

        Raises:
            UnsupportedOperationError: this build of the library does not have it.
            ClosedError: the handle is closed, or belongs to the parent process.
        """
        target = self._functions.get(function)
        if target is None:
            raise UnsupportedOperationError(
                f"{self.path} has no function {function}: a newer Xen has it"
            )
        if os.getpid() != self._pid:
            raise ClosedError(
                f"this {self.declared.name} handle belongs to process {self._pid}, which forked "
                "this one: open a backend of your own after the fork"
            )
        opened = self._opened  # this reference keeps C's handle open during the call
        if opened is None:
            raise ClosedError(f"this {self.declared.name} handle is closed")
        try:
            return target(opened.pointer, *arguments, result_out=result_out)
        finally:
            del opened  # or a traceback that is kept would keep the handle open

    def fail(self, function: str, domid: int | None, errno: int) -> XenCallError:
        """Return the exception for a failed call, after Xen's complaint has been logged."""
        return failure(function, domid, errno, self._log.drain())

    def check(self, function: str, domid: int | None, *arguments: Argument) -> int:
        """Call a function that returns a negative number when it fails.

        Args:
            function: its name.
            domid: the domain that it is about, for the exception.
            *arguments: after the handle.

        Returns:
            What it returned.

        Raises:
            XenCallError: it failed.
            UnsupportedOperationError, ClosedError: as :meth:`call`.
        """
        result, errno = self.call(function, *arguments)
        if result < 0:
            raise self.fail(function, domid, errno)
        return result

    def close(self) -> None:
        """Close the handle. Mappings that it made live on. Idempotent, and safe after a fork.

        If a call is under way in another thread, C's handle is closed when that call returns.
        """
        if os.getpid() != self._pid:
            return  # the handle is the parent's
        self._opened = None
        self._log.close()
        sweep()

    def __del__(self) -> None:
        # C's handle is closed when its last user has gone: in a garbage cycle, another object's
        # finalizer may still use it. At exit the kernel closes it; at the very end the globals of
        # modules are None.
        if (
            getattr(self, "_opened", None) is None
            or sys is None
            or sys.is_finalizing()
            or os.getpid() != self._pid
        ):
            return
        message = f"unclosed {self.declared.name} handle"
        warnings.warn(message, ResourceWarning, stacklevel=1, source=self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
