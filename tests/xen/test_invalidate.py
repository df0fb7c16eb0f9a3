"""INVALIDATE from Xen: what a guest that gives up memory means to leases and to what is read."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.xen.agent import MEMORY
from tests.xen.conftest import Serve, Served, balloon, paused, warnings_of
from tests.xen.control import Control, control
from xenmapcache import Backend, DmaDirection, FaultError, LeaseError, MapCache
from xenmapcache.address import PAGE_SIZE, MiB
from xenmapcache.cache.lease import Lease
from xenmapcache.mapping import Mapping

pytestmark = pytest.mark.xen

BUCKETS = range(0, MEMORY * MiB, MiB)
PAGE = 100
"""Of the agent's buffer, which the tests give up and take back."""
PLACE = PAGE * PAGE_SIZE


def touch(cache: MapCache) -> None:
    """Read a little everywhere, so that everything is resident."""
    for address in BUCKETS:
        with suppress(FaultError):
            cache.read(address, 8)


def differing(cache: MapCache, backend: Backend) -> tuple[int, int]:
    """Compare each page, read through the cache, with a new mapping.

    Returns:
        How many pages the guest has, and how many differ or are in one only.
    """
    there = wrong = 0
    for address in BUCKETS:
        fresh = backend.map(address // PAGE_SIZE, MiB // PAGE_SIZE, writable=False)
        for offset in range(0, MiB, PAGE_SIZE):
            now = fresh.memory[offset : offset + PAGE_SIZE] if fresh.valid(offset, 1) else None
            there += now is not None
            try:
                wrong += cache.read(address + offset, PAGE_SIZE) != now
            except FaultError:
                wrong += now is not None
    return there, wrong


def orphaned(old: Mapping, backend: Backend) -> bool:
    """Whether an old mapping of one page shows another frame than the guest has there now."""
    fresh = backend.map(old.gfn, 1, writable=True)
    if not fresh.valid(0, 1):
        return True
    before = fresh.memory[:8]
    old.view(0, 8)[:] = bytes(byte ^ 0xFF for byte in before)
    arrived = fresh.memory[:8] != before
    if arrived:
        fresh.view(0, 8)[:] = before
    return not arrived


def test_the_seed(
    served: Served, caplog: pytest.LogCaptureFixture, record_property: Callable[..., None]
) -> None:
    """The guest balloons: DMA is warned of, once each; device memory stays; all reads are fresh."""
    agent, cache, server = served.agent, served.cache, served.server
    screen = cache.map_device(agent.address(4 * MiB), MiB // 2, owner="vga")
    ways = zip(("ide0", "ahci0", "e1000"), DmaDirection, strict=True)
    leases = [
        cache.map_dma(agent.address((5 + i) * MiB), 0x800, owner=owner, direction=direction)
        for i, (owner, direction) in enumerate(ways)
    ]
    # An HVM guest has some 16 MiB less than its configuration says.
    had = sum(length for _, length in cache.present(0, MEMORY * MiB)) // PAGE_SIZE
    touch(cache)
    # Mappings that nobody drops, to see that there is something to be wrong about. Few: what is
    # mapped still counts as the guest's, and Xen gives it no more than 1 MiB over its target.
    middles = [address // PAGE_SIZE + 128 for address in BUCKETS]
    mapped = [served.backend.map(gfn, 1, writable=True) for gfn in middles]
    kept = [mapping for mapping in mapped if mapping.valid(0, 1)]

    balloon(served, MEMORY - 28, while_waiting=lambda: touch(cache))

    bursts = server.invalidations
    assert bursts > 10
    warnings = warnings_of(caplog)
    assert len(warnings) == 3, warnings
    for owner, warning in zip(("ide0", "ahci0", "e1000"), warnings, strict=True):
        assert f"may be lost: DMA lease of '{owner}'" in warning
    assert [lease.stale for lease in (screen, *leases)] == [False, True, True, True]

    with paused(served.domid):
        there, wrong = differing(cache, served.backend)
        assert wrong == 0
        assert there > had - 2 * MiB // PAGE_SIZE
        gfn, count = screen.address // PAGE_SIZE, screen.length // PAGE_SIZE
        fresh = served.backend.map(gfn, count, writable=False)
        assert screen.view == fresh.view(0, screen.length)
        orphans = sum(orphaned(mapping, served.backend) for mapping in kept)
        assert orphans
    screen.view[:8] = b"a pixel "
    assert agent.peek(4 * MiB, 8) == b"a pixel "
    for cpu in (0, 1):
        agent.on(cpu).renew(cpu)
    assert server.invalidations == bursts + 2
    assert not server.failures
    assert len(warnings_of(caplog)) == 3
    for lease in leases:
        lease.release()
    assert len(warnings_of(caplog)) == 6  # "released stale", once each
    screen.release()
    record_property(
        "measured",
        f"28 MiB out and in again: {bursts} INVALIDATEs, 3 warnings; of {len(kept)} pages in "
        f"mappings that were kept, {orphans} are not the guest's any more",
    )


# --- a page that is certainly another one -----------------------------------------------


def stale_lease(served: Served) -> Lease:
    """Take a lease of a page, let the guest exchange that page, and write to the old one."""
    agent = served.agent
    agent.poke(PLACE, b"the old.")
    lease = served.cache.map_dma(
        agent.address(PLACE), 16, owner="disk0", direction=DmaDirection.FROM_DEVICE
    )
    assert bytes(lease.view[:8]) == b"the old."
    agent.renew(PAGE)
    agent.poke(PLACE, b"the new.")
    assert served.server.invalidations == 1
    assert bytes(lease.view[:8]) == b"the old."
    lease.view[:8] = b"LOSTDMA!"
    return lease


def test_lost_dma(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """By default what is written to a page that is gone is lost, and reported as such."""
    lease = stale_lease(served)
    assert len(warnings_of(caplog)) == 1
    lease.release()
    _, released = warnings_of(caplog)
    assert released.startswith("released stale: DMA lease of 'disk0'")
    assert released.endswith("what the device wrote may be lost")
    assert served.agent.peek(PLACE, 8) == b"the new."
    assert served.cache.stats().stale_dma_released == 1
    served.cache.write(lease.address, b"arrives.")
    assert served.agent.peek(PLACE, 8) == b"arrives."


def test_lost_dma_copied(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """With on_stale="copy" the guest sees what was written to the page that is gone."""
    with serve(on_stale="copy") as served:
        stale_lease(served).release()
        assert served.agent.peek(PLACE, 8) == b"LOSTDMA!"
    assert len(warnings_of(caplog)) == 1  # at the INVALIDATE; none at the release


def test_lost_dma_refused(serve: Serve) -> None:
    """With on_stale="raise" who releases the lease is told."""
    with serve(on_stale="raise") as served:
        lease = stale_lease(served)
        with pytest.raises(LeaseError, match="released stale.* what the device wrote may be lost"):
            lease.release()
        assert lease.released
        assert served.agent.peek(PLACE, 8) == b"the new."


def test_a_page_that_is_not_there(serve: Serve) -> None:
    """Between giving a page up and taking one back, the copy says what it could not deliver."""
    with serve(on_stale="copy") as served:
        agent, cache = served.agent, served.cache
        lease = cache.map_dma(agent.address(PLACE), 16, owner="disk0")
        agent.give(PAGE)
        with pytest.raises(FaultError):
            cache.read(lease.address, 16)
        lease.view[:4] = b"gone"
        with pytest.raises(FaultError, match=f"no page at {lease.address:#x}"):
            lease.release()
        agent.take(PAGE)
        assert served.server.invalidations == 1  # taking memory asks for nothing
        agent.poke(PLACE, b"the new.")
        assert cache.read(lease.address, 8) == b"the new."


def test_on_quiesce(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """DMA that is ended before the mappings go is neither stale nor warned of."""
    agent, cache = served.agent, served.cache
    lease = cache.map_dma(agent.address(PLACE), 16, owner="disk0")
    ended = []

    @served.server.on_quiesce
    def end() -> None:
        if not lease.released:
            lease.release()
            ended.append(lease.stale)

    agent.renew(PAGE)
    assert ended == [False]
    assert (served.server.invalidations, cache.stats().stale_dma_released) == (1, 0)
    assert not warnings_of(caplog)


def test_each_vcpu_asks(served: Served) -> None:
    """INVALIDATE comes from whichever vCPU gave a page up, once for each."""
    agent = served.agent
    for number, cpu in enumerate((0, 1, 1, 0), start=1):
        agent.on(cpu).renew(PAGE)
        assert served.server.invalidations == number
        agent.poke(PLACE, f"page {number:3}".encode())
        assert served.cache.read(agent.address(PLACE), 8) == f"page {number:3}".encode()


# --- pages that were written, for a migration --------------------------------------------

ENABLE, OFF, CLEAN, PEEK = 2, 0, 11, 12  # XEN_DOMCTL_SHADOW_OP_*, the first of them LOGDIRTY


class HypercallBuffer(ctypes.Structure):
    """struct xc_hypercall_buffer."""

    _fields_ = (
        ("hbuf", ctypes.c_void_p),
        ("param_shadow", ctypes.c_void_p),
        ("dir", ctypes.c_int),
        ("ubuf", ctypes.c_void_p),
        ("sz", ctypes.c_size_t),
    )


class DirtyLog:
    """Xen's log of a guest's written pages, as a migration reads it (libxenctrl)."""

    def __init__(self, xen: Control, domid: int) -> None:
        self._library, self._handle = library, _ = xen.library, xen.handle
        library.xc__hypercall_buffer_alloc_pages.restype = ctypes.c_void_p
        library.xc_logdirty_control.restype = ctypes.c_longlong
        self._domid = ctypes.c_uint32(domid)
        self._pages = MEMORY * MiB // PAGE_SIZE
        self._buffer = HypercallBuffer()
        bitmap = library.xc__hypercall_buffer_alloc_pages(
            self._handle, ctypes.byref(self._buffer), self._pages // 8 // PAGE_SIZE
        )
        assert bitmap
        self._bitmap = (ctypes.c_char * (self._pages // 8)).from_address(bitmap)
        assert library.xc_shadow_control(self._handle, self._domid, ENABLE, None, 0) == 0
        self.dirty(CLEAN)

    def dirty(self, operation: int = PEEK) -> set[int]:
        """The frames that were written since the last CLEAN."""
        stats = (ctypes.c_uint32 * 2)()
        done = self._library.xc_logdirty_control(
            self._handle,
            self._domid,
            operation,
            ctypes.byref(self._buffer),
            ctypes.c_ulong(self._pages),
            0,
            ctypes.byref(stats),
        )
        assert done == self._pages, ctypes.get_errno()
        bits = int.from_bytes(self._bitmap.raw, "little")
        return {gfn for gfn in range(self._pages) if bits >> gfn & 1} if bits else set()

    def close(self) -> None:
        """Stop the log of Xen."""
        self._library.xc_shadow_control(self._handle, self._domid, OFF, None, 0)


@contextmanager
def dirty_log(domid: int) -> Iterator[DirtyLog]:
    """The log of a guest that is paused, so that only Dom0 writes."""
    with paused(domid), control() as xen:
        log = DirtyLog(xen, domid)
        try:
            yield log
        finally:
            log.close()


def test_written_pages_are_logged(served: Served) -> None:
    """In log-dirty mode writes and DMA that wrote mark just their pages; reads mark none."""
    agent, cache, backend = served.agent, served.cache, served.backend
    gfns = agent.gfns()
    first = gfns[PAGE]
    assert gfns[PAGE + 4] == first + 4
    with dirty_log(served.domid) as log:
        cache.read(first * PAGE_SIZE, 5 * PAGE_SIZE)
        read = cache.map_dma(first * PAGE_SIZE, 8, owner="disk0", direction=DmaDirection.TO_DEVICE)
        read.release()
        assert log.dirty() == set()

        cache.write((first + 1) * PAGE_SIZE - 4, b"8 bytes.")
        assert log.dirty() == {first, first + 1}

        lease = cache.map_dma((first + 3) * PAGE_SIZE + 8, PAGE_SIZE, owner="disk0")
        lease.view[:4] = b"data"
        assert log.dirty() == {first, first + 1}
        lease.release()
        assert log.dirty() == {first, first + 1, first + 3, first + 4}

        log.dirty(CLEAN)
        backend.log_dirty = False
        cache.write(first * PAGE_SIZE, b"8 bytes.")
        assert log.dirty() == set()
    for cpu in (0, 1):
        agent.on(cpu)
    assert agent.peek(PLACE, 8) == b"8 bytes."
