"""A dump of ours against ``xl dump-core`` of the same paused guest."""

from __future__ import annotations

import subprocess
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.xen.control import held_still
from xenmapcache import Backend, MapCache, open_backend, write_coredump
from xenmapcache.address import PAGE_SHIFT, PAGE_SIZE, MiB
from xenmapcache.binding.control import Control

pytestmark = [pytest.mark.xen, pytest.mark.slow]

TIMEOUT = 1800
"""``xl dump-core`` maps each frame below 4 GiB on its own, which takes minutes under emulation."""

LEFT_OUT = {*range(0xA0, 0xC0), *range(0xF0000, 0x100000)}
"""Frames that xl takes for the screen's memory, and for that of devices below 4 GiB."""


def frames(backend: Backend) -> set[int]:
    """Return the frames that a dump has."""
    runs = backend.present(0, (backend.memory_end or 0) >> PAGE_SHIFT)
    return {gfn for first, count in runs or () for gfn in range(first, first + count)}


def test_it_has_the_same_pages(
    live_domid: int,
    tmp_path: Path,
    pytestconfig: pytest.Config,
    record_property: Callable[[str, object], None],
) -> None:
    """Each page of the guest's memory is in both files, and is the same.

    xl adds pages of Xen's own where we map nothing, and leaves out what it takes for devices'.
    """
    if pytestconfig.getoption("xen_timeout") < TIMEOUT:
        pytest.skip(f"xl dump-core takes minutes: --xen-timeout={TIMEOUT} gives them")
    theirs, ours = tmp_path / "xl.core", tmp_path / "our.core"
    with held_still(live_domid), open_backend("xen", domid=live_domid) as live:
        began = time.monotonic()
        pages = write_coredump(live, ours)
        took = time.monotonic() - began
        began = time.monotonic()
        subprocess.run(["xl", "dump-core", str(live_domid), str(theirs)], check=True)
        xl_took = time.monotonic() - began
        with (
            open_backend("coredump", path=theirs) as first,
            open_backend("coredump", path=ours) as second,
        ):
            only_theirs = sorted(frames(first) - frames(second))
            only_ours = sorted(frames(second) - frames(first))
            both = sorted(frames(first) & frames(second))
            with MapCache(first) as expected, MapCache(second) as found:
                different = [
                    gfn
                    for gfn in both
                    if expected.read(gfn << PAGE_SHIFT, PAGE_SIZE)
                    != found.read(gfn << PAGE_SHIFT, PAGE_SIZE)
                ]
            with Control() as control:
                lost = [
                    gfn
                    for gfn in only_theirs
                    if any(control.has_pages(live_domid, array("Q", [gfn])))
                ]
        measured = (
            f"{pages} pages in {took:.1f} s, xl dump-core {xl_took:.0f} s; only in xl's: "
            f"{[hex(gfn) for gfn in only_theirs[:20]]} of {len(only_theirs)}, only in ours: "
            f"{[hex(gfn) for gfn in only_ours[:20]]} of {len(only_ours)}, different: "
            f"{[hex(gfn) for gfn in different[:20]]} of {len(different)}"
        )
    record_property("measured", measured)
    assert lost == [], measured
    assert len(both) > 100 * MiB >> PAGE_SHIFT
    assert different == [], measured
    assert [hex(gfn) for gfn in only_ours if gfn not in LEFT_OUT] == [], measured
