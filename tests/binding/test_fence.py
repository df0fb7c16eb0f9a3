"""Fences: libatomic's, the package's own machine code, and hosts that give neither."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.descriptors import open_files
from tests.fake_xen import FakeXen, missing
from tests.fake_xen.fixtures import MakeFake
from xenmapcache.arch import ARM64, X86_64
from xenmapcache.binding import fence, libc
from xenmapcache.errors import UnsupportedOperationError, XenCallError

NOWHERE = "no-such-libatomic.so"
HOST = {"x86_64": "0faef0c3", "aarch64": "bf3b03d5c0035fd6"}
"""A fence and a return, as machine code."""


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Each test looks for its fence itself."""
    fence.find_fence.cache_clear()
    yield
    fence.find_fence.cache_clear()


@pytest.mark.parametrize(
    ("machine", "name"), [("x86_64", "x86-64"), ("i686", "x86-64"), ("aarch64", "arm64")]
)
def test_the_host(machine: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel says what it is."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert fence.host_architecture().name == name


def test_a_host_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fence is known for it."""
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    message = "serving needs x86-64 or arm64, not riscv64: .*; run the device model on such a host"
    with pytest.raises(UnsupportedOperationError, match=message):
        fence.host_architecture()


def test_x86_needs_none() -> None:
    """Its processors keep the order, and nothing is loaded or mapped."""
    assert fence.find_fence(X86_64, NOWHERE) is None


def test_libatomic(make_fake: MakeFake) -> None:
    """It is called with memory_order_seq_cst, and looked for once."""
    fake: FakeXen = make_fake()
    function = fence.find_fence(ARM64, fake.library)
    assert function is not None
    assert function() is None
    assert [call.arguments for call in fake.calls if call.name == "atomic_thread_fence"] == [(5,)]
    assert fence.find_fence(ARM64, fake.library) is function


def area_of(address: int) -> list[str]:
    """Return the line of /proc/self/maps for an address."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            return line.split()
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.mark.parametrize("library", [NOWHERE, "WRONG"])
def test_own_code(library: str, make_fake: MakeFake) -> None:
    """Without libatomic, eight bytes are mapped, executable and not writable; it is not called."""
    if library == "WRONG":  # one without that function
        library = make_fake("WRONG").library
    before = open_files()
    function = fence.find_fence(ARM64, library)
    address = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type] # a ctypes function
    assert address is not None
    assert ctypes.string_at(address, 8) == ARM64.fence_code == bytes.fromhex(HOST["aarch64"])
    assert area_of(address)[1] == "r-xs"
    assert "xenmapcache-fence" in area_of(address)[-2]
    assert open_files() <= before


def test_own_code_runs() -> None:
    """Machine code of this host is called, and returns."""
    if platform.machine() not in HOST:
        missing(f"no machine code for {platform.machine()} is here")
    code = bytes.fromhex(HOST[platform.machine()])
    function = fence.find_fence(ARM64._replace(fence_code=code), NOWHERE)
    assert function is not None
    assert function() is None


def refuse_the_file(*_: object) -> NoReturn:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def refuse_to_map(*_: object) -> NoReturn:
    raise XenCallError("mmap", None, errno.EPERM)


@pytest.mark.parametrize(
    ("place", "name", "value", "reason"),
    [
        (os, "memfd_create", refuse_the_file, r"\[Errno 13\] Permission denied"),
        (libc, "map_code", refuse_to_map, r"mmap failed with EPERM \(Operation not permitted\)"),
        (sys, "maxsize", (1 << 31) - 1, "this Python is a 32-bit program.*"),
    ],
)
def test_no_fence(
    place: object, name: str, value: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what is missing, what was refused, and what to install."""
    monkeypatch.setattr(place, name, value)
    before = open_files()
    message = (
        f"serving on arm64: no memory fence: {NOWHERE}: cannot open shared object file.*, and the "
        rf"package's own code cannot be executed \({reason}\); install libatomic \(Debian: apt "
        r"install libatomic1\)"
    )
    with pytest.raises(UnsupportedOperationError, match=message):
        fence.find_fence(ARM64, NOWHERE)
    assert open_files() <= before


def test_code_that_cannot_be_mapped() -> None:
    """The kernel's errno is in the error."""
    with pytest.raises(XenCallError, match="mmap failed with EBADF"):
        libc.map_code(-1, 8)
