"""A guest with holes: none of our paths touches a page that Xen could not map.

On Arm a touch would kill the process, and a system call on such a page would be an oops of Dom0's
kernel, after which the process hangs.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.failed_pages import HOLES, PAGES, exercise
from tests.fake_xen.child import in_child
from tests.xen.control import control
from tests.xen.lab.platform import Platform
from xenmapcache import Backend, open_backend, write_lime
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.cli import main

pytestmark = pytest.mark.xen

FIRST = 32 * MiB
"""Where the range begins, after the start of the guest's memory."""
OOPS = re.compile(r"Oops|Unable to handle|BUG:")


def give_up(domid: int, gfns: list[int]) -> None:
    """Take pages from a guest."""
    frames = (ctypes.c_uint64 * len(gfns))(*gfns)
    with control() as xen:
        count = ctypes.c_ulong(len(gfns))
        xen.call("xc_domain_decrease_reservation_exact", ctypes.c_uint32(domid), count, 0, frames)


@pytest.fixture
def gfn(victim: int, machine: Platform) -> int:
    """Where a range with holes begins, of a guest that does not run."""
    first = (machine.memory[0] + FIRST) // PAGE_SIZE
    give_up(victim, [first + page + i for page, count in HOLES for i in range(count)])
    return first


@pytest.fixture(params=["xen-cffi", "xenctrl-ctypes"])
def reopen(victim: int, request: pytest.FixtureRequest) -> Callable[[], Backend]:
    """Opens that guest."""
    name, _, binding = request.param.partition("-")
    return lambda: open_backend(name, domid=victim, binding=binding)


def oopses() -> int:
    """How often Dom0's kernel has complained."""
    log = subprocess.run(["dmesg"], check=True, capture_output=True, text=True, errors="replace")
    return len(OOPS.findall(log.stdout))


def test_no_access_touches_one(reopen: Callable[[], Backend], gfn: int, tmp_path: Path) -> None:
    """Reads, writes, views, leases, their system calls, windows, eviction and a fork."""
    before = oopses()
    assert in_child(lambda: exercise(reopen, gfn, tmp_path), timeout=200) == 0
    assert oopses() == before


def test_no_dump_touches_one(victim: int, gfn: int, tmp_path: Path) -> None:
    """A dump by copies and one by views have what exists."""
    before = oopses()
    start, length = gfn * PAGE_SIZE, PAGES * PAGE_SIZE
    raw, lime = tmp_path / "raw", tmp_path / "lime"

    def child() -> bool:
        options = ["--start", hex(start), "--length", str(length)]
        assert main(["dump", f"xen:{victim}", "-o", str(raw), *options]) == 0
        with open_backend("xen", domid=victim) as backend:
            return write_lime(backend, lime, length=start + length) > 0

    assert in_child(child, timeout=200) == 0
    assert raw.stat().st_size == length
    assert oopses() == before
