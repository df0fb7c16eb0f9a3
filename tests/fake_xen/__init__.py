"""A stand-in for Xen's libraries: built by gcc, its guest memory seen from both sides."""

from __future__ import annotations

import ctypes
import enum
import os
import shutil
import subprocess
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

import pytest

from xenmapcache.address import PAGE_SHIFT, page_span

SOURCE: Final = Path(__file__).with_name("fake_xen.c")
FLAGS: Final = ("-std=gnu11", "-O1", "-fPIC", "-shared", "-fvisibility=hidden")
WARNINGS: Final = ("-Wall", "-Wextra", "-Werror")
DOMID: Final = 3


def missing(what: str) -> NoReturn:
    """Skip a test for what this machine lacks; fail it where nothing may be missing."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and CI=true allows no skip", pytrace=False)
    pytest.skip(what)


def compiler() -> str:
    """Return the C compiler; without one the test is skipped."""
    found = shutil.which("gcc")
    if found is None:
        missing("gcc is not installed (Debian: apt install gcc libc6-dev)")
    return found


def need(module: str) -> None:
    """Skip a test that needs a Python module: ``_cffi_backend`` to load, ``cffi`` to generate."""
    if find_spec(module) is None:
        missing(f"{module} is not installed (Debian: apt install python3-cffi)")


def build(folder: Path, variant: str = "") -> Path:
    """Build the library into ``folder``, once; ``variant`` is ``""``, ``"OLD"`` or ``"WRONG"``."""
    target = folder / f"libfakexen{variant}.so"
    if not target.exists():
        folder.mkdir(exist_ok=True)
        defines = [f"-D{variant}"] if variant else []
        command = [compiler(), *FLAGS, *WARNINGS, *defines, "-o", str(target), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return target


class Behaviour(enum.IntEnum):
    """How a planned call goes wrong; as in the C source."""

    FAIL = 1
    """It returns NULL or -1 with an errno, which may be 0, and does not write err[]."""
    SIGN = 2
    """err[] is positive, as the header promises and the real code does not."""
    ALL_PAGES = 3
    """It returns a pointer, and every page failed with an errno."""
    IGNORE = 4
    """It maps somewhere else, whatever MAP_FIXED says."""
    DROP = 5
    """As FAIL, after the mapping at the fixed address has gone."""
    BLOCK = 6
    """It tells that it has begun, and goes on when it is told to."""


class Call(NamedTuple):
    """A call that the library received: arguments as numbers, pointers too, and the frames."""

    name: str
    arguments: tuple[int, ...]
    gfns: tuple[int, ...]


class _Call(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 40),
        ("arguments", ctypes.c_uint64 * 9),
        ("count", ctypes.c_uint32),
        ("frames", ctypes.c_uint32),
        ("gfns", ctypes.c_uint64 * 16),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 40),
        ("behaviour", ctypes.c_int32),
        ("value", ctypes.c_int32),
        ("nth", ctypes.c_int32),
    )


class _State(ctypes.Structure):
    _fields_ = (
        ("fd", ctypes.c_int32),
        ("domid", ctypes.c_uint32),
        ("pages", ctypes.c_uint64),
        ("entered", ctypes.c_int32),
        ("proceed", ctypes.c_int32),
        ("calls", ctypes.c_uint32),
        ("misuses", ctypes.c_uint32),
        ("plans", _Plan * 8),
        ("log", _Call * 256),
        ("errors", ctypes.c_int32 * 4096),
    )


class FakeXen:
    """One copy of the library, and its one guest.

    Args:
        built: the library; it is copied, as a copy has a state of its own.
        folder: for the copy; used for nothing else.
        pages: of guest memory, zeroed, at most 4096.
        holes: ``(gfn, count)`` pairs that are not there.

    Attributes:
        library: the path to hand to a backend.
        inode: of guest memory, as in /proc/self/maps.
    """

    def __init__(
        self, built: Path, folder: Path, *, pages: int = 64, holes: Iterable[tuple[int, int]] = ()
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.library = str(shutil.copy(built, folder / f"{len(list(folder.iterdir()))}.so"))
        library = ctypes.CDLL(self.library)
        library.fake_xen_state.restype = ctypes.POINTER(_State)
        library.fake_xen_state_size.restype = ctypes.c_size_t
        assert library.fake_xen_state_size() == ctypes.sizeof(_State)
        # SAFETY: the library never unmaps it, and is never unloaded.
        self._state: _State = library.fake_xen_state().contents
        self._fd = os.memfd_create("fake-xen", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, pages << PAGE_SHIFT)
        self.inode = os.fstat(self._fd).st_ino
        self._entered, entered = os.pipe()
        proceed, self._proceed = os.pipe()
        self._fds = (self._fd, self._entered, entered, proceed, self._proceed)
        self._state.fd, self._state.domid, self._state.pages = self._fd, DOMID, pages
        self._state.entered, self._state.proceed = entered, proceed
        for gfn, count in holes:
            self.set_error(22, gfn, count)

    def close(self) -> None:
        """Close its files; mappings live on."""
        for fd in self._fds:
            os.close(fd)

    def set_error(self, errno: int, gfn: int, count: int = 1) -> None:
        """Let pages fail to map with a positive errno, or with 0 be there."""
        self._state.errors[gfn : gfn + count] = [errno] * count

    def read(self, address: int, length: int) -> bytes:
        """Return what the guest sees."""
        self._check(address, length)
        return os.pread(self._fd, length, address)

    def write(self, address: int, data: bytes) -> None:
        """Write as the guest does."""
        self._check(address, len(data))
        os.pwrite(self._fd, data, address)

    def _check(self, address: int, length: int) -> None:
        gfn, count = page_span(address, length)
        assert gfn + count <= self._state.pages
        assert not any(self._state.errors[gfn : gfn + count])

    def plan(self, name: str, behaviour: Behaviour, value: int = 0, *, nth: int = 1) -> None:
        """Let the n-th call of a function from now on go wrong."""
        free = next(plan for plan in self._state.plans if not plan.nth)
        free.name, free.behaviour, free.value, free.nth = name.encode(), behaviour, value, nth

    def wait_until_blocked(self) -> None:
        """Wait for a call that is planned to BLOCK to have begun."""
        assert os.read(self._entered, 1)

    def unblock(self) -> None:
        """Let it go on."""
        os.write(self._proceed, b"x")

    @property
    def calls(self) -> list[Call]:
        """What was called, in order, by this process and by its forked children."""
        calls = self._state.log[: self._state.calls]
        return [
            Call(
                call.name.decode(),
                tuple(call.arguments[: call.count]),
                tuple(call.gfns[: call.frames]),
            )
            for call in calls
        ]

    def count(self, name: str) -> int:
        """Return how often a function was called."""
        return sum(call.name == name for call in self.calls)

    @property
    def misuses(self) -> int:
        """How often a closed handle was used, or one was closed during a call."""
        return int(self._state.misuses)
