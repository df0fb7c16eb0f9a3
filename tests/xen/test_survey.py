"""Where a live guest has pages: Xen is asked, and what it tells is what mapping shows."""

from __future__ import annotations

import errno
import time
from array import array
from collections.abc import Callable, Iterable, Iterator

import pytest

from tests.xen.control import held_still
from tests.xen.lab.platform import Platform
from xenmapcache import Backend, XenCallError, open_backend
from xenmapcache.address import PAGE_SHIFT
from xenmapcache.binding.control import Control
from xenmapcache.cli import main

pytestmark = pytest.mark.xen

CHUNK = 256


@pytest.fixture
def backend(live_domid: int) -> Iterator[Backend]:
    """The guest."""
    with open_backend("xen", domid=live_domid) as backend:
        yield backend


def shown(backend: Backend, gfn: int, count: int) -> set[int]:
    """Return the frames of a range that can be mapped."""
    found = set()
    for first in range(gfn, gfn + count, CHUNK):
        errors = backend.map(first, CHUNK, writable=False).errors or bytes(CHUNK)
        found |= {first + number for number, error in enumerate(errors) if not error}
    return found


def told(control: Control, domid: int, gfns: Iterable[int]) -> bytes | None:
    """Return what Xen says of frames; None where it does not tell."""
    try:
        return control.has_pages(domid, array("Q", gfns))
    except XenCallError as error:
        assert error.errno in (errno.ENOSYS, errno.EOPNOTSUPP)
        return None


def test_no_page_of_the_guest_is_skipped(
    backend: Backend,
    live_domid: int,
    machine: Platform,
    record_property: Callable[[str, object], None],
) -> None:
    """What can be mapped outside of the parts that are to be looked at are pages of Xen's own.

    Looked at are the end of RAM and of all memory; where Xen does not tell, nothing is outside.
    """
    assert backend.memory_end is not None
    end = backend.memory_end >> PAGE_SHIFT
    ram = sum(machine.memory) >> PAGE_SHIFT
    with held_still(live_domid), Control() as control:
        parts = list(backend.extents(0, end))
        inside = {gfn for first, count in parts for gfn in range(first, first + count)}
        counted = control.domain_state(live_domid).pages
        found: set[int] = set()
        for first, count in parts:
            found |= shown(backend, first, count)
        around = shown(backend, ram - 8 * CHUNK, 40 * CHUNK)
        around |= shown(backend, max(0, end - 64 * CHUNK), 64 * CHUNK)
        more = sorted(around - inside)
        assert not any(told(control, live_domid, more) or more)
        exact = backend.survey(0, end)
        assert exact is None or found == {
            gfn for first, count in exact for gfn in range(first, first + count)
        }
    record_property(
        "measured",
        f"Xen counts {counted} pages, {len(found)} were mapped, in {len(inside)} frames of {end}; "
        f"{len(more)} others are Xen's",
    )
    assert found
    assert len(found) >= counted


def test_info_takes_as_long_as_mapping_the_guest(
    backend: Backend,
    live_domid: int,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    """At most 1.3 times as long as to map and unmap each page of it once, or a second longer."""
    assert backend.memory_end is not None
    end = backend.memory_end >> PAGE_SHIFT
    with Control() as control:
        began = time.perf_counter()
        told(control, live_domid, range(1024))
        asked = time.perf_counter() - began
    began = time.perf_counter()
    parts = list(backend.extents(0, end))
    surveyed = time.perf_counter() - began
    began = time.perf_counter()
    for first, count in parts:
        for gfn in range(first, first + count, CHUNK):
            backend.map(gfn, CHUNK, writable=False)
    once = time.perf_counter() - began
    began = time.perf_counter()
    assert main(["info", f"xen:{live_domid}", "--json"]) == 0  # with what it imports
    took = time.perf_counter() - began
    record_property(
        "measured",
        f"asked about 1024 frames {asked:.3f} s, survey {surveyed:.2f} s, "
        f"mapped and unmapped once {once:.2f} s, info {took:.2f} s: {took / once:.2f} times",
    )
    assert '"pages"' in capsys.readouterr().out
    assert took <= max(1.3 * once, once + 1)


def test_what_a_mapping_costs(
    backend: Backend, machine: Platform, record_property: Callable[[str, object], None]
) -> None:
    """Reported only: in a PVH Dom0 each page costs about as much as a call, in a PV Dom0 little."""
    gfn = (machine.memory[0] >> PAGE_SHIFT) + 32 * CHUNK
    costs = []
    for count in (1, 16, 64, CHUNK):
        taken = []
        for turn in range(5):
            began = time.perf_counter()
            backend.map(gfn + turn * CHUNK, count, writable=False)
            taken.append(time.perf_counter() - began)
        costs.append(f"{count} pages {sorted(taken)[2] * 1000:.1f} ms")
    record_property("measured", f"to map and unmap: {', '.join(costs)}")
    assert len(costs) == 4
