"""Where a live guest has pages: Xen is asked, and what it tells is what mapping shows."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator

import pytest

from tests.xen.control import held_still
from xenmapcache import Backend, open_backend
from xenmapcache.address import PAGE_SHIFT, MiB
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


def test_no_page_of_the_guest_is_skipped(
    backend: Backend, live_domid: int, record_property: Callable[[str, object], None]
) -> None:
    """What can be mapped outside of the parts that are to be looked at are pages of Xen's own."""
    assert backend.memory_end is not None
    end = backend.memory_end >> PAGE_SHIFT
    with held_still(live_domid), Control() as control:
        parts = list(backend.extents(0, end))
        inside = {gfn for first, count in parts for gfn in range(first, first + count)}
        counted = control.domain_state(live_domid).pages
        found: set[int] = set()
        for first, count in parts:
            found |= shown(backend, first, count)
        last = max(0, end - (64 * MiB >> PAGE_SHIFT)) & -CHUNK
        around = shown(backend, last, end - last + CHUNK & -CHUNK)
        around |= shown(backend, 120 * MiB >> PAGE_SHIFT, 40 * MiB >> PAGE_SHIFT)
        more = array("Q", sorted(around - inside))
        assert not any(control.has_pages(live_domid, more[:1024])) if more else True
    record_property(
        "measured",
        f"Xen counts {counted} pages, {len(found)} were mapped, "
        f"in {sum(count for _, count in parts)} frames of {end}; {len(more)} others are Xen's",
    )
    assert found
    assert len(found) >= counted


def test_info_takes_as_long_as_mapping_the_guest(
    backend: Backend,
    live_domid: int,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    """At most 1.3 times as long as to map and unmap each page of it once, or a second."""
    assert backend.memory_end is not None
    end = backend.memory_end >> PAGE_SHIFT
    with Control() as control:
        began = time.perf_counter()
        control.has_pages(live_domid, array("Q", range(1024)))
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
    assert main(["info", f"xen:{live_domid}", "--json"]) == 0
    took = time.perf_counter() - began
    record_property(
        "measured",
        f"asked about 1024 frames {asked:.3f} s, survey {surveyed:.2f} s, "
        f"mapped and unmapped once {once:.2f} s, info {took:.2f} s: "
        f"{took / once:.2f} times",
    )
    assert '"pages"' in capsys.readouterr().out
    assert took <= max(1.3 * once, 1)
