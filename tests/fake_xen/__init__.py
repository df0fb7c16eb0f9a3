"""A stand-in for Xen's libraries: built by gcc, its guest memory seen from both sides."""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from xenmapcache.address import PAGE_SHIFT, page_span
from xenmapcache.binding.declarations import Library
from xenmapcache.binding.library import find_library
from xenmapcache.binding.loader import get_loader
from xenmapcache.errors import BackendUnavailableError

SOURCE: Final = Path(__file__).with_name("fake_xen.c")
FLAGS: Final = ("-std=gnu11", "-O1", "-fPIC", "-shared", "-fvisibility=hidden")
WARNINGS: Final = ("-Wall", "-Wextra", "-Werror")
DOMID: Final = 3


def missing(what: str) -> NoReturn:
    """Skip a test for what this machine lacks; fail it where nothing may be missing."""
    import pytest  # which processes that a test starts do without

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


def real_library(library: Library) -> str:
    """Return where a real library of Xen's is; without it the test is skipped."""
    try:
        path = find_library(library)
        get_loader("ctypes").open(library, path)
    except (BackendUnavailableError, OSError):
        missing(f"{library.soname} is not installed (Debian: {library.package})")
    return path


def build(folder: Path, variant: str = "") -> Path:
    """Build the library into ``folder``, once.

    ``variant`` is ``""``, ``"OLD"``, ``"WRONG"`` or ``"ALONE"``, as the C source explains.
    """
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
    PARTIAL = 6
    """It returns a pointer, and of err[] only the first half is written; there are no others."""
    ASKEW = 7
    """It returns a pointer to where no page begins, and nothing is there."""
    BLOCK = 8
    """It tells that it has begun, and goes on when it is told to."""


class Call(NamedTuple):
    """A call that the library received: arguments as numbers, pointers too, and the frames."""

    name: str
    arguments: tuple[int, ...]
    gfns: tuple[int, ...]


class _Call(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 48),
        ("arguments", ctypes.c_uint64 * 9),
        ("count", ctypes.c_uint32),
        ("frames", ctypes.c_uint32),
        ("gfns", ctypes.c_uint64 * 16),
    )


class _Plan(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 48),
        ("behaviour", ctypes.c_int32),
        ("value", ctypes.c_int32),
        ("nth", ctypes.c_int32),
    )


class _Server(ctypes.Structure):
    _fields_ = (
        ("live", ctypes.c_uint8),
        ("enabled", ctypes.c_uint8),
        ("buffered", ctypes.c_uint8),
        ("unused", ctypes.c_uint8),
    )


class _Grant(ctypes.Structure):
    _fields_ = (
        ("gfn", ctypes.c_uint32),
        ("live", ctypes.c_uint8),
        ("readonly", ctypes.c_uint8),
        ("mapped", ctypes.c_uint16),
    )


class _GrantMap(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("refs", ctypes.c_uint32 * 64),
    )


class _State(ctypes.Structure):
    _fields_ = (
        ("fd", ctypes.c_int32),
        ("domid", ctypes.c_uint32),
        ("pages", ctypes.c_uint64),
        ("entered", ctypes.c_int32),
        ("proceed", ctypes.c_int32),
        ("notified", ctypes.c_int32),
        ("ioreq_fd", ctypes.c_int32),
        ("vcpus", ctypes.c_uint32),
        ("calls", ctypes.c_uint32),
        ("misuses", ctypes.c_uint32),
        ("handles", ctypes.c_int32),
        ("plans", _Plan * 8),
        ("servers", _Server * 8),
        ("log", _Call * 1024),
        ("errors", ctypes.c_int32 * 4096),
        ("dirty", ctypes.c_uint8 * 4096),
        ("xens", ctypes.c_uint8 * 4096),
        ("nowhere", ctypes.c_int64),
        ("grants", _Grant * 128),
        ("maps", _GrantMap * 32),
    )


class FakeXen:
    """One copy of the library, and its one guest.

    Args:
        built: the library; it is copied, as a copy has a state of its own.
        folder: for the copy; used for nothing else.
        pages: of guest memory, zeroed, at most 4096.
        holes: ``(gfn, count)`` pairs that are not there.
        vcpus: of the guest, at most 63.

    Attributes:
        library: the path to hand to a backend.
        inode: of guest memory, as in /proc/self/maps.
    """

    def __init__(
        self,
        built: Path,
        folder: Path,
        *,
        pages: int = 64,
        holes: Iterable[tuple[int, int]] = (),
        vcpus: int = 1,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.library = str(shutil.copy(built, folder / f"{len(list(folder.iterdir()))}.so"))
        library = ctypes.CDLL(self.library)
        library.fake_xen_state.restype = ctypes.POINTER(_State)
        library.fake_xen_state_size.restype = ctypes.c_size_t
        assert library.fake_xen_state_size() == ctypes.sizeof(_State)
        # SAFETY: the library never unmaps it, and is never unloaded.
        self._state: _State = library.fake_xen_state().contents
        self._c = library
        self._fd = os.memfd_create("fake-xen", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, pages << PAGE_SHIFT)
        self.inode = os.fstat(self._fd).st_ino
        self._entered, entered = os.pipe()
        proceed, self._proceed = os.pipe()
        ioreq = os.memfd_create("fake-xen-ioreq", os.MFD_CLOEXEC)
        os.ftruncate(ioreq, len(self._state.servers) * 2 << PAGE_SHIFT)
        self._notified, notified = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        pipes = (self._entered, entered, proceed, self._proceed, self._notified, notified)
        self._fds = (self._fd, ioreq, *pipes)
        self._state.fd, self._state.domid, self._state.pages = self._fd, DOMID, pages
        self._state.entered, self._state.proceed = entered, proceed
        self._state.notified, self._state.ioreq_fd, self._state.vcpus = notified, ioreq, vcpus
        for gfn, count in holes:
            self.set_error(22, gfn, count)

    def close(self) -> None:
        """Close its files; mappings live on."""
        for fd in self._fds:
            os.close(fd)

    def set_error(self, errno: int, gfn: int, count: int = 1) -> None:
        """Let pages fail to map with a positive errno, or with 0 be there."""
        self._state.errors[gfn : gfn + count] = [errno] * count

    def keep(self, gfn: int, count: int = 1) -> None:
        """Let pages be Xen's own, such as frames of the grant table: they can be mapped."""
        self._state.xens[gfn : gfn + count] = [1] * count

    def count_nowhere(self, pages: int) -> None:
        """Let Xen count pages as the guest's that have no frame number."""
        self._state.nowhere = pages

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

    def take_dirty(self) -> set[int]:
        """Return the frames that were reported as written since the last time."""
        dirty = {gfn for gfn in range(self._state.pages) if self._state.dirty[gfn]}
        ctypes.memset(self._state.dirty, 0, ctypes.sizeof(self._state.dirty))
        return dirty

    def grant(self, ref: int, gfn: int, *, readonly: bool = False) -> None:
        """Grant a page, as the guest does."""
        self._state.grants[ref] = _Grant(gfn, 1, readonly, 0)

    def revoke(self, ref: int) -> None:
        """Take a grant back. Mappings of the page live on."""
        self._state.grants[ref].live = 0

    def granted(self, ref: int) -> int:
        """Return how often a granted page is mapped."""
        return int(self._state.grants[ref].mapped)

    # --- a device model's other side: Xen and the guest -------------------------------

    @property
    def servers(self) -> dict[int, bool]:
        """The ioreq servers that there are, and whether each is enabled."""
        servers = enumerate(self._state.servers)
        return {number: bool(server.enabled) for number, server in servers if server.live}

    def ioreq_page(self, server: int, *, buffered: bool = False) -> mmap.mmap:
        """Return the page that a server shares with Xen, to read and to write; close it."""
        offset = (server * 2 + (not buffered)) << PAGE_SHIFT
        return mmap.mmap(self._state.ioreq_fd, 1 << PAGE_SHIFT, offset=offset)

    def send(self, port: int) -> None:
        """Send an event through a port of the guest, which must be bound."""
        assert self._c.fake_xen_send(port)

    def notified(self, wait: float = 20.0) -> int:
        """Return the guest's port that was notified next; 0 if none is, for that many seconds."""
        poll = select.poll()
        poll.register(self._notified, select.POLLIN)
        if not poll.poll(wait * 1000):
            return 0
        return int.from_bytes(os.read(self._notified, 4), sys.byteorder)

    # --- what is to go wrong, and what was called -------------------------------------

    def plan(self, name: str, behaviour: Behaviour, value: int = 0, *, nth: int = 1) -> None:
        """Let the n-th call of a function from now on go wrong."""
        free = next(plan for plan in self._state.plans if not plan.nth)
        free.name, free.behaviour, free.value, free.nth = name.encode(), behaviour, value, nth

    def wait_until_blocked(self) -> None:
        """Wait for a call that is planned to BLOCK to have begun."""
        assert os.read(self._entered, 1)

    def unblock(self) -> None:
        """Let it continue."""
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
    def handles(self) -> int:
        """How many handles are open, of all kinds."""
        return int(self._state.handles)

    @property
    def misuses(self) -> int:
        """How often a closed handle was used, one closed during a call, an event not polled for."""
        return int(self._state.misuses)
