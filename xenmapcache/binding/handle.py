"""A handle of one of Xen's libraries: found, opened, called and closed safely."""

from __future__ import annotations

import errno as _errno
import os
import platform
import re
import sys
import sysconfig
import threading
import warnings
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from ..errors import BackendUnavailableError, ClosedError, UnsupportedOperationError, XenCallError
from .declarations import Library
from .loader import Argument, Function, Loader, get_loader
from .toollog import ToolLog

HINTS = {
    _errno.ENOMEM: "out of memory, of address space (ulimit -v) or of mappings "
    "(sysctl vm.max_map_count), or the range is in use by another mapping",
    _errno.EPERM: "no right to that domain: the handle is restricted to another one, or the "
    "hypervisor's policy forbids it",
    _errno.ESRCH: "there is no such domain (see xl list), or it is this one, whose own memory "
    "cannot be mapped this way",
    _errno.EINVAL: "the hypervisor or kernel refused the arguments",
}


def library_folders() -> list[Path]:
    """Return the folders in which a shared library is looked for, first to last."""
    named = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    system = [f"/usr/lib/{multiarch}", "/usr/local/lib64", "/usr/local/lib", "/usr/lib64"]
    return [Path(each) for each in [*named, *system, "/usr/lib", "/lib64", "/lib"] if each]


def xen_version() -> str | None:
    """Return the running hypervisor's version as ``4.17``, or None if there is none."""
    try:
        major, minor = (
            Path("/sys/hypervisor/version", part).read_text().strip() for part in ("major", "minor")
        )
    except OSError:
        return None
    return f"{major}.{minor}"


def find_library(library: Library) -> str:
    """Return what to hand to the dynamic linker.

    A name that carries Xen's release is searched for: the one of the hypervisor that
    runs, or else the newest.

    Raises:
        BackendUnavailableError: none is installed.
    """
    if "*" not in library.soname:
        return library.soname
    pattern = re.compile(re.escape(library.soname).replace(r"\*", r"(\d+)\.(\d+)"))
    running = xen_version()
    found = []
    for order, folder in enumerate(library_folders()):
        for path in folder.glob(library.soname):
            match = pattern.fullmatch(path.name)
            if match:
                major, minor = int(match[1]), int(match[2])
                found.append((f"{major}.{minor}" == running, (major, minor), -order, str(path)))
    if not found:
        folders = ", ".join(map(str, library_folders()))
        raise BackendUnavailableError(
            f"{library.soname} is in none of {folders}: install Debian's package "
            f"{library.package} or your distribution's Xen tools, or name the file with library="
        )
    return max(found)[-1]


def unwritten_errors(pages: int) -> array[int]:
    """Return an ``err[]`` in which a page counts as failed until the library says otherwise."""
    return array("i", [_errno.EIO]) * pages


def positive_errors(errors: array[int]) -> bytes | None:
    """Turn the ``err[]`` of a map call into one positive errno a page; None if all is well.

    The header promises an errno, the code stores it negated: both are understood.
    """
    return bytes(min(abs(error), 255) for error in errors) if any(errors) else None


def load(
    declared: Library, loader: Loader, library: str | None, required: Iterable[str]
) -> tuple[str, dict[str, Function]]:
    """Load a library.

    Args:
        declared: what is called in it.
        loader: how.
        library: a SONAME or path instead of the declared one.
        required: functions that cannot be done without.

    Returns:
        What the dynamic linker was asked for, and the functions that are there.

    Raises:
        BackendUnavailableError: there is none, or it is another library.
    """
    path = os.fspath(library) if library else find_library(declared)
    try:
        functions = loader.open(declared, path)
    except OSError as error:
        raise BackendUnavailableError(
            f"{path} cannot be loaded ({error}): install Debian's package "
            f"{declared.package} or your distribution's Xen tools"
        ) from error
    for name in required:
        if name not in functions:
            raise BackendUnavailableError(
                f"{path} has no function {name}: it is not {declared.name}"
            )
    return path, functions


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

    Synchronization: calls may run in parallel in any threads. ``close`` waits for
    nobody: the last call that is under way frees the handle.
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
        self._gate = threading.RLock()  # reentrant: a finalizer may close during a call's entry
        self._calls_under_way = 0
        self._closed = True
        self._pid = os.getpid()
        loader = get_loader(binding)
        self.binding = loader.name
        required = (self.open_call, self.close_call, *self.required)
        self.path, self._functions = load(self.declared, loader, library, required)
        self._log = ToolLog(loader)
        self._pointer, errno = self._open()
        if not self._pointer:
            complaint = self._log.drain()
            self._log.close()
            raise BackendUnavailableError(self._why_not(errno, complaint))
        self._closed = False

    def _open(self) -> tuple[int, int]:
        return self._functions[self.open_call](self._log.pointer, 0)

    def _why_not(self, errno: int, complaint: str) -> str:
        what = f"{self.open_call} failed ({complaint or os.strerror(errno)})"
        node = next((path for path in self.nodes if path.exists()), None)
        if errno in (_errno.EACCES, _errno.EPERM):
            return f"{what}: no permission for {node or self.nodes[0]}: run as root in Dom0"
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
        self, function: str, *arguments: Argument, left: list[int] | None = None
    ) -> tuple[int, int]:
        """Call a function of the library, whose first parameter is the handle.

        Args:
            function: its name.
            *arguments: after the handle.
            left: see :data:`.loader.Function`.

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
        with self._gate:
            if self._closed:
                raise ClosedError(f"this {self.declared.name} handle is closed")
            self._calls_under_way += 1
        try:
            return target(self._pointer, *arguments, left=left)
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._gate:
            self._calls_under_way -= 1
            free = self._closed and not self._calls_under_way
        if free:
            self._free()

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
        """Close the handle. Mappings that it made live on. Idempotent, and safe after a fork."""
        if os.getpid() != self._pid:
            return  # the handle is the parent's, and a thread that is not here may hold the gate
        with self._gate:
            if self._closed:
                return
            self._closed = True
            free = not self._calls_under_way
        if free:
            self._free()

    def _free(self) -> None:
        if os.getpid() == self._pid:
            self._functions[self.close_call](self._pointer)
            self._log.close()

    def __del__(self) -> None:
        # At exit nothing that close() needs may be left, and the kernel closes.
        if getattr(self, "_closed", True) or os.getpid() != self._pid or sys.is_finalizing():
            return
        self.close()  # before the warning, which may be turned into an exception
        message = f"unclosed {self.declared.name} handle"
        warnings.warn(message, ResourceWarning, stacklevel=1, source=self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
