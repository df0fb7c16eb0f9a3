"""What every source of guest memory promises; see xenmapcache.backend.Backend."""

from __future__ import annotations

import copy
import ctypes
import errno
import gc
import pickle
from pathlib import Path

import pytest

from tests.fake_xen.child import in_child
from xenmapcache import (
    Capability,
    ClosedError,
    FaultError,
    Mapping,
    UnsupportedOperationError,
    XenCallError,
)
from xenmapcache.address import PAGE_SIZE
from xenmapcache.binding import libc
from xenmapcache.mapping import live_mappings

from .guests import Guest, Span


@pytest.fixture(params=["start", "middle", "end"])
def span(request: pytest.FixtureRequest, guest: Guest) -> Span:
    """A span of pages with a hole at its start, in its middle and at its end."""
    if request.param not in guest.holes:
        pytest.skip(f"this guest has no hole with memory so as for {request.param!r}")
    return guest.holes[request.param]


def foreign(address: int, length: int) -> int:
    """Return how many pieces of guest memory, and of holes, lie in a range of this process."""
    found = 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        place, access, _ = line.split(maxsplit=2)
        first, end = (int(part, 16) for part in place.split("-"))
        # What is private and usable is Python's own, which was given the address since.
        ours = access.endswith("s") or access == "---p"
        found += ours and first < address + length and address < end
    return found


def test_map(guest: Guest) -> None:
    """A mapping is what was asked for, and its bytes can be seen, all of them."""
    mapping = guest.backend.map(guest.gfn, 3, writable=False)
    assert (mapping.gfn, mapping.count, mapping.length) == (guest.gfn, 3, 3 * PAGE_SIZE)
    assert (mapping.errors, mapping.holes, mapping.writable) == (None, 0, False)
    assert mapping.address % PAGE_SIZE == 0
    assert guest.copied or foreign(mapping.address, mapping.length) >= 1
    assert len(bytes(mapping.view(0, mapping.length))) == mapping.length


def test_a_mapping_shows_its_frames(guest: Guest) -> None:
    """Page n of a mapping is frame gfn + n, however large it is and wherever it begins."""
    whole = guest.backend.map(guest.gfn, 64, writable=False)
    for page in (0, 1, 31, 63):
        single = guest.backend.map(guest.gfn + page, 1, writable=False)
        assert whole.view(page * PAGE_SIZE, PAGE_SIZE) == single.view(0, PAGE_SIZE)


def test_both_sides_see_the_same(scratch: Guest) -> None:
    """What the guest writes is seen here at once, and what is written here is seen by the guest."""
    assert scratch.read is not None
    assert scratch.write is not None
    view = scratch.backend.map(scratch.gfn, 2, writable=True).view(0, 2 * PAGE_SIZE)
    scratch.write(scratch.address + PAGE_SIZE - 2, b"guest")
    assert bytes(view[PAGE_SIZE - 2 : PAGE_SIZE + 3]) == b"guest"
    view[100:104] = b"host"
    assert scratch.read(scratch.address + 99, 6) == b"\0host\0"


def test_holes(guest: Guest, span: Span) -> None:
    """Just the pages that are not there carry an errno; the others can be read."""
    mapping = guest.backend.map(span.gfn, span.pages, writable=False)
    assert mapping.errors is not None
    bad = [page for page in range(span.pages) if mapping.errors[page]]
    assert bad == list(range(span.first, span.end))
    assert mapping.holes == len(bad)
    for page in range(span.pages):
        if page not in bad:
            assert mapping.view(page * PAGE_SIZE, PAGE_SIZE).nbytes == PAGE_SIZE


def test_a_hole_is_never_handed_out(guest: Guest, span: Span) -> None:
    """A view that would touch a hole raises, naming the first address that cannot be reached."""
    mapping = guest.backend.map(span.gfn, span.pages, writable=False)
    start, end = span.first * PAGE_SIZE, span.end * PAGE_SIZE
    hole = (span.gfn + span.first) * PAGE_SIZE
    cases = {(start + 5, 1): hole + 5, (end - 1, 1): hole + end - start - 1}
    cases[0, mapping.length] = cases[start, 1] = hole
    for (offset, length), address in cases.items():
        with pytest.raises(FaultError) as caught:
            mapping.view(offset, length)
        behind = (span.gfn * PAGE_SIZE) + offset + length - address
        assert (caught.value.address, caught.value.length) == (address, behind)
        assert caught.value.errno > 0


def test_a_range_without_a_page(guest: Guest) -> None:
    """Where nothing is there, the call succeeds, and every page is a hole."""
    span = guest.holes["end"]
    mapping = guest.backend.map(guest.hole, span.end - span.first, writable=False)
    assert mapping.holes == mapping.count


def test_view_ends_where_it_was_told_to(guest: Guest) -> None:
    """A view has just the bytes that were asked for: no byte beyond it can be reached."""
    mapping = guest.backend.map(guest.gfn, 2, writable=False)
    for offset, length in ((0, 1), (PAGE_SIZE - 1, 2), (mapping.length - 1, 1), (7, 0)):
        view = mapping.view(offset, length)
        assert view.nbytes == length
        with pytest.raises(IndexError):
            view[length]
    for offset, length in ((mapping.length - 1, 2), (-1, 1), (0, -1), (1 << 40, 1)):
        with pytest.raises(ValueError, match="is not inside <Mapping of "):
            mapping.view(offset, length)


def test_read_only_memory_is_exported_read_only(guest: Guest) -> None:
    """Neither by the view nor by ctypes over it can memory be written that was not mapped so."""
    view = guest.backend.map(guest.gfn, 1, writable=False).view(0, 16)
    assert view.readonly
    with pytest.raises(TypeError, match="read-only"):
        view[:1] = view[:1]
    with pytest.raises(TypeError, match="not writable"):
        ctypes.c_char.from_buffer(view)


def test_two_mappings_show_the_same_page(writable: Guest) -> None:
    """What is written through one mapping is seen through another."""
    one = writable.backend.map(writable.gfn, 2, writable=True).view(PAGE_SIZE, PAGE_SIZE)
    two = writable.backend.map(writable.gfn + 1, 1, writable=True).view(0, PAGE_SIZE)
    assert one == two
    one[:] = bytes(one)
    if writable.scratch:
        one[17] = 0xA5
    assert one == two
    assert two[17] == one[17]


def test_unmapped_whole_and_once(guest: Guest) -> None:
    """With its last view all of a mapping goes, holes included, and never a second time."""
    gc.collect()
    before = live_mappings()
    span = guest.holes["end"]
    mapping: Mapping | None = guest.backend.map(span.gfn, span.pages, writable=False)
    assert mapping is not None
    address, length = mapping.address, mapping.length
    view: memoryview | None = mapping.view(10, 10)
    mapping = None
    gc.collect()
    assert live_mappings() == before + 1
    assert guest.copied or foreign(address, length) >= 1
    part = view[3:] if view else None
    view = None
    assert part is not None
    assert len(bytes(part)) == 7
    assert guest.copied or foreign(address, length) >= 1
    part = None
    assert live_mappings() == before
    assert foreign(address, length) == 0
    if not libc.map_zeros_over(address, length):
        return  # the address was given to another mapping, so it was free
    gc.collect()
    # SAFETY: the cover is there, unless a second unmap took it: then this is the crash.
    assert ctypes.string_at(address, length) == bytes(length)
    libc.unmap(address, length)


def test_mappings_outlive_the_backend(guest: Guest) -> None:
    """After close nothing new can be mapped, twice is once, and what is mapped stays readable."""
    with guest.reopen() as backend:
        view = backend.map(guest.gfn, 2, writable=False).view(0, 2 * PAGE_SIZE)
        before = bytes(view)
    backend.close()
    with pytest.raises(ClosedError, match="closed"):
        backend.map(guest.gfn, 1, writable=False)
    assert view == before
    assert guest.backend.map(guest.gfn, 1, writable=False).view(0, 9) == before[:9]


def test_neither_a_backend_nor_a_mapping_is_copied(guest: Guest) -> None:
    """Two objects would close the same handles, or account for the same memory."""
    mapping = guest.backend.map(guest.gfn, 1, writable=False)
    for original in (guest.backend, mapping):
        for refused in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                refused(original)


def test_remap(guest: Guest) -> None:
    """A mapping moves, with its views and at its address; where that cannot be, it says so."""
    mapping = guest.backend.map(guest.gfn, 4, writable=False)
    view, address = mapping.view(0, mapping.length), mapping.address
    before = bytes(view)
    if Capability.REMAP not in guest.backend.capabilities:
        with pytest.raises(UnsupportedOperationError, match="cannot move"):
            guest.backend.remap(mapping, guest.gfn + 16)
        assert view == before
        return
    target = guest.backend.map(guest.gfn + 16, 4, writable=False)
    guest.backend.remap(mapping, guest.gfn + 16)
    assert mapping.address == address
    assert view == target.view(0, target.length)
    guest.backend.remap(mapping, guest.gfn)
    assert view == before


def test_remap_shows_what_the_guest_has_there(scratch: Guest) -> None:
    """After a move both sides share the new pages, and no longer the old ones."""
    assert scratch.read is not None
    if Capability.REMAP not in scratch.backend.capabilities:
        pytest.skip(f"the backend {scratch.backend.name!r} cannot move a mapping")
    mapping = scratch.backend.map(scratch.gfn, 2, writable=True)
    view = mapping.view(0, mapping.length)
    view[:3] = b"old"
    scratch.backend.remap(mapping, scratch.gfn + 8)
    assert view[:3] == bytes(3)
    view[:3] = b"new"
    assert scratch.read(scratch.address, 3) == b"old"
    assert scratch.read(scratch.address + 8 * PAGE_SIZE, 3) == b"new"


def test_remap_to_a_hole(guest: Guest) -> None:
    """Moved to where a page is missing, a mapping stays as it was."""
    if Capability.REMAP not in guest.backend.capabilities:
        pytest.skip(f"the backend {guest.backend.name!r} cannot move a mapping")
    mapping = guest.backend.map(guest.gfn, 4, writable=False)
    view = mapping.view(0, mapping.length)
    before = bytes(view)
    with pytest.raises(FaultError) as caught:
        guest.backend.remap(mapping, guest.hole - 2)
    assert caught.value.address == guest.hole * PAGE_SIZE
    assert view == before


def test_mark_dirty(guest: Guest) -> None:
    """A source that tracks dirty pages is told, and any other says that it does not."""
    if Capability.DIRTY not in guest.backend.capabilities:
        with pytest.raises(UnsupportedOperationError, match="keeps no dirty pages"):
            guest.backend.mark_dirty(guest.gfn, 2)
        return
    guest.backend.mark_dirty(guest.gfn, 2)
    assert guest.dirty is None or guest.dirty() == {guest.gfn, guest.gfn + 1}


def test_no_such_guest(guest: Guest) -> None:
    """A guest that is not there is an error that says so, and not a guest full of holes."""
    kind, number = (
        (FileNotFoundError, errno.ENOENT) if guest.copied else (XenCallError, errno.ESRCH)
    )
    with pytest.raises(kind) as caught:
        guest.open_absent()
    assert caught.value.errno == number


def test_forked_child(guest: Guest) -> None:
    """In a child the backend is closed and a kept view shows private zeros; the parent goes on."""
    mapping = guest.backend.map(guest.gfn, 2, writable=guest.scratch)
    view = mapping.view(0, mapping.length)
    if guest.scratch:
        view[:6] = b"parent"
    before = bytes(view)

    def child() -> bool:
        nonlocal mapping, view
        zeros = view == bytes(len(view))
        if guest.scratch:
            view[:5] = b"child"
        del mapping, view  # what the child drops is not the parent's to lose
        gc.collect()
        try:
            guest.backend.map(guest.gfn, 1, writable=False)
        except ClosedError:
            guest.backend.close()
            return zeros
        return False

    assert in_child(child) == 0
    assert view == before
    assert guest.backend.map(guest.gfn, 1, writable=False).view(0, 9) == before[:9]
