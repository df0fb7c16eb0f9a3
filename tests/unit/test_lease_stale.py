"""Leases across invalidations: warnings, and what on_stale does about stale DMA."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

import pytest

from tests.kit import BUCKET, connected, reballoon
from xenmapcache import (
    Backend,
    DmaDirection,
    FaultError,
    LeaseError,
    MapCache,
    Mapping,
    MockDomain,
    XenCallError,
)

AT = 0x200000


def test_a_lease_that_ended_in_time_is_not_stale(cache: MapCache) -> None:
    """An invalidation after the release does not concern the lease, nor its name in a log."""
    lease = cache.map_dma(AT, 8, owner="t")
    lease.release()
    cache.invalidate()
    assert not lease.stale


def test_the_warning_of_the_seed(
    domain: MockDomain, backend: Backend, warnings: Callable[[], list[str]]
) -> None:
    """One WARNING per DMA lease, with all that is known; none for device leases or in a burst."""
    cache = connected(domain, backend)
    vram = cache.map_device(0x800000, 0x10000, owner="vga")
    cache.map_dma(AT, 0x1000, owner="disk0", direction=DmaDirection.FROM_DEVICE)
    cache.map_dma(AT + BUCKET - 8, 16, owner="nic1", direction=DmaDirection.TO_DEVICE)
    reports = []
    domain.on_invalidate(lambda: reports.append(cache.invalidate()))
    domain.balloon_out(0x400000, 0x100000)
    assert len(reports) == 4  # 256 pages in batches of 84
    first, second = warnings()
    assert first.startswith("invalidation 1: still held, may be lost: DMA lease of 'disk0': ")
    assert "address 0x200000, length 0x1000, direction from-device, age 0." in first
    assert "'nic1': address 0x20fff8, length 0x10, direction to-device" in second
    for report in reports:
        assert [info.owner for info in report.device] == ["vga"]
        assert [info.owner for info in report.dma] == ["disk0", "nic1"]
        assert all(info.stale for info in report.dma)
    assert [report.sequence for report in reports] == [2, 4, 6, 8]
    assert not vram.stale
    vram.view[:3] = b"pix"
    assert domain.read(0x800000, 3) == b"pix"
    cache.close(force=True)


def test_a_new_lease_after_the_burst_is_warned_of_anew(
    cache: MapCache, warnings: Callable[[], list[str]]
) -> None:
    """Once a lease, not once a cache; and a fresh lease is not stale."""
    for round_ in range(1, 4):
        lease = cache.map_dma(AT, 8, owner="t")
        before = lease.stale
        cache.invalidate()
        cache.invalidate()
        assert (before, lease.stale) == (False, True)
        assert sum("still held" in message for message in warnings()) == round_
        lease.release()


def test_a_view_survives_and_shows_the_orphan(domain: MockDomain, backend: Backend) -> None:
    """After an invalidation a lease's view is alive, and is what the guest gave up."""
    cache = connected(domain, backend)
    lease = cache.map_dma(AT, 0x1000, owner="t")
    lease.view[:3] = b"old"
    reballoon(domain, AT)
    assert bytes(lease.view[:3]) == b"old"
    assert domain.read(AT, 3) == bytes(3)
    assert cache.read(AT, 3) == bytes(3)
    lease.release()


def test_stale_dma_that_wrote(
    domain: MockDomain, backend: Backend, policy: str, warnings: Callable[[], list[str]]
) -> None:
    """warn: lost and said; raise: lost and raised; copy: the guest sees it. Counted each time."""
    cache = connected(domain, backend, policy)
    lease = cache.map_dma(AT + 8, 0x1800, owner="disk0", direction=DmaDirection.FROM_DEVICE)
    reballoon(domain, AT)
    reballoon(domain, AT + 0x1000)
    domain.write(AT, b"\x99" * 0x2000)
    lease.view[:] = b"\x42" * 0x1800
    before = warnings()
    domain.dirty_gfns.clear()
    if policy == "raise":
        with pytest.raises(LeaseError, match="released stale: DMA lease of 'disk0'.* may be lost"):
            lease.release()
    else:
        lease.release()
    inside = b"\x42" if policy == "copy" else b"\x99"
    assert domain.read(AT, 0x2000) == b"\x99" * 8 + inside * 0x1800 + b"\x99" * 0x7F8
    said = [message for message in warnings() if message not in before]
    assert len(said) == (policy == "warn")
    assert all("released stale: DMA lease of 'disk0'" in message for message in said)
    assert domain.dirty_gfns == {0x200, 0x201}
    assert cache.leases() == ()
    assert cache.stats().stale_dma_released == 1
    assert lease.stale
    assert lease.released


def test_copy_leaves_alone_what_is_still_the_guests(
    domain: MockDomain, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """A page that kept its frame is not written back: the guest may be writing it."""
    cache = connected(domain, backend, "copy")
    lease = cache.map_dma(AT, 0x2000, owner="t", direction=DmaDirection.FROM_DEVICE)
    reballoon(domain, AT)
    lease.view[:] = b"\x42" * 0x2000
    with caplog.at_level(logging.INFO, "xenmapcache"):
        lease.release()
    assert caplog.messages[-1].endswith("copied 1 of 2 pages to the guest")
    assert domain.read(AT, 0x2000) == b"\x42" * 0x2000


def test_copy_is_for_what_is_stale(domain: MockDomain, backend: Backend) -> None:
    """A lease that no invalidation has met is released without a call, as under other policies."""
    cache = connected(domain, backend, "copy")
    reballoon(domain, AT)
    for take in (cache.map_dma, cache.map_device):
        lease = take(AT, 8, owner="t")
        before = cache.stats().maps, len(domain.calls)
        lease.view[:] = b"in time!"
        lease.release()
        assert domain.calls[before[1]].name == "mark_dirty"
        assert cache.stats().maps == before[0]


def test_copy_to_a_page_that_is_gone_is_a_fault(domain: MockDomain, backend: Backend) -> None:
    """What can be delivered is; the first that cannot is named; the lease is given back."""
    cache = connected(domain, backend, "copy")
    lease = cache.map_dma(AT + 8, 0x4000 - 8, owner="t")
    lease.view[:] = b"\x42" * (0x4000 - 8)
    reballoon(domain, AT)
    domain.balloon_out(AT + 0x1000, 0x1000)
    reballoon(domain, AT + 0x2000)
    domain.balloon_out(AT + 0x3000, 0x1000)
    with pytest.raises(FaultError, match="no page at 0x201000: ") as caught:
        lease.release()
    assert caught.value.length == 0x3000
    assert lease.released
    assert domain.read(AT, 0x1000) == bytes(8) + b"\x42" * (0x1000 - 8)
    assert domain.read(AT + 0x2000, 0x1000) == b"\x42" * 0x1000


def test_a_device_lease_is_no_stale_dma(
    domain: MockDomain, backend: Backend, warnings: Callable[[], list[str]]
) -> None:
    """Its release after an invalidation is neither refused, nor told of, nor counted."""
    cache = connected(domain, backend, "raise")
    lease = cache.map_device(AT, 0x1000, owner="vga")
    reballoon(domain, 0x900000)
    lease.release()
    assert warnings() == []
    assert cache.stats().stale_dma_released == 0


def test_copy_that_fails_can_be_repeated(domain: MockDomain, backend: Backend) -> None:
    """When the fresh mapping fails as a whole, nothing is lost: the lease is still held."""
    cache = connected(domain, backend, "copy")
    lease = cache.map_dma(AT, 8, owner="t")
    reballoon(domain, AT)
    lease.view[:] = b"precious"
    domain.inject_fault("map", errno=errno.EIO)
    with pytest.raises(XenCallError):
        lease.release()
    assert not lease.released
    lease.release()
    assert domain.read(AT, 8) == b"precious"
    assert cache.stats().stale_dma_released == 1


@pytest.mark.parametrize("on_stale", ["warn", "copy"])
def test_stale_dma_that_read(
    domain: MockDomain, backend: Backend, on_stale: str, warnings: Callable[[], list[str]]
) -> None:
    """A transfer to the device writes nothing back, and its report speaks of reading."""
    cache = connected(domain, backend, on_stale)
    lease = cache.map_dma(AT, 8, owner="t", direction=DmaDirection.TO_DEVICE)
    reballoon(domain, AT)
    domain.write(AT, b"guest's!")
    lease.release()
    assert domain.read(AT, 8) == b"guest's!"
    assert domain.dirty_gfns == set()
    assert cache.stats().stale_dma_released == 1
    assert "the device may have read pages that the guest has given up" in warnings()[-1]


def test_two_invalidations_at_once_warn_once(
    cache: MapCache, warnings: Callable[[], list[str]]
) -> None:
    """The one that comes second finds the lease warned of when its turn has come."""
    lease = cache.map_dma(AT, 8, owner="t")
    let_an_invalidation_warn_first(cache)
    assert [info.id for info in cache.invalidate().dma] == [lease.id]
    assert len(warnings()) == 1


def let_an_invalidation_warn_first(cache: MapCache) -> None:
    """Have another invalidation come when a thread is about to warn of a lease."""
    turn = cache._registry._warning

    class Second:
        def acquire(self) -> None:
            cache._registry._warning = turn
            cache.invalidate()
            turn.acquire()

        def release(self) -> None:
            turn.release()

    cache._registry._warning = Second()  # type: ignore[assignment] # for this test alone


def test_a_lease_that_begins_stale_is_warned_of_once(
    cache: MapCache,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    warnings: Callable[[], list[str]],
) -> None:
    """An invalidation that comes between the grant and its warning warns in its place."""
    original = backend.map

    def mapped(gfn: int, count: int, *, writable: bool) -> Mapping:
        mapping = original(gfn, count, writable=writable)
        cache.invalidate()
        return mapping

    monkeypatch.setattr(backend, "map", mapped)
    let_an_invalidation_warn_first(cache)
    lease = cache.map_dma(AT, 8, owner="t")
    assert lease.stale
    (warning,) = warnings()
    assert "still held, may be lost" in warning
    lease.release()


def test_a_lease_taken_during_an_invalidation_belongs_to_the_next(
    cache: MapCache, warnings: Callable[[], list[str]]
) -> None:
    """It is not in the report, is not warned of, and is when the next invalidation comes."""
    survivors = cache._registry.held_across

    def late(sequence: int) -> object:
        cache.map_dma(AT, 8, owner="late")
        cache._registry.held_across = survivors  # type: ignore[method-assign] # for this test alone
        return survivors(sequence)

    cache.map_dma(AT, 8, owner="early")
    cache._registry.held_across = late  # type: ignore[method-assign,assignment] # for this test alone
    assert [info.owner for info in cache.invalidate().dma] == ["early"]
    assert [info.owner for info in cache.invalidate().dma] == ["early", "late"]
    assert sum("'late'" in message for message in warnings()) == 1


@pytest.mark.usefixtures("interrupted")
def test_a_stale_release_that_was_interrupted_counts_once(cache: MapCache) -> None:
    """Interrupted at its warning, the release can be repeated, and is counted once."""
    lease = cache.map_dma(AT, 8, owner="t")
    with pytest.raises(KeyboardInterrupt):
        cache.invalidate()
    assert len(cache.invalidate().dma) == 1
    lease.release()
    assert cache.stats().stale_dma_released == 1


def test_a_copy_is_delivered_once(domain: MockDomain, backend: Backend) -> None:
    """When only the marking fails, the repeated release does not overwrite what came since."""
    cache = connected(domain, backend, "copy")
    lease = cache.map_dma(AT, 4, owner="t")
    reballoon(domain, AT)
    lease.view[:] = b"DMA!"
    domain.inject_fault("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError):
        lease.release()
    assert domain.read(AT, 4) == b"DMA!"
    domain.write(AT, b"NEW!")
    lease.release()
    assert domain.read(AT, 4) == b"NEW!"
    assert domain.dirty_gfns == {0x200}


def test_what_a_copy_could_not_reach_is_told_when_the_lease_ends(
    domain: MockDomain, backend: Backend
) -> None:
    """A release that fails in between does not lose the FaultError."""
    cache = connected(domain, backend, "copy")
    lease = cache.map_dma(AT, 4, owner="t")
    domain.balloon_out(AT, 0x1000)
    lease.view[:] = b"DMA!"
    domain.inject_fault("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError):
        lease.release()
    assert not lease.released
    with pytest.raises(FaultError, match="no page at 0x200000: "):
        lease.release()
    assert lease.released


def test_a_copy_is_delivered_anew_after_another_invalidation(
    domain: MockDomain, backend: Backend
) -> None:
    """What was delivered to pages that the guest then gave up is delivered to the next ones."""
    cache = MapCache(backend, bucket_shift=16, on_stale="copy")
    domain.on_invalidate(cache.invalidate)
    lease = cache.map_dma(AT, 4, owner="t")
    lease.view[:] = b"DMA!"
    for _ in range(2):
        domain.balloon_out(AT, 0x1000)
        domain.balloon_in(AT, 0x1000)
        domain.inject_fault("mark_dirty", errno=errno.EIO)
        with pytest.raises(XenCallError):
            lease.release()
        assert domain.read(AT, 4) == b"DMA!"
    lease.release()


def test_stale_dma_that_read_is_refused(domain: MockDomain, backend: Backend) -> None:
    """on_stale="raise" raises for a transfer to the device, too, and gives the lease back."""
    cache = MapCache(backend, bucket_shift=16, on_stale="raise")
    lease = cache.map_dma(AT, 8, owner="t", direction=DmaDirection.TO_DEVICE)
    cache.invalidate()
    with pytest.raises(LeaseError, match="the device may have read pages that the guest has"):
        lease.release()
    assert lease.released


def test_a_copy_is_logged_with_its_pages(
    domain: MockDomain, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """How many pages a lease has, and how many of them had to be copied."""
    caplog.set_level(logging.INFO, "xenmapcache")
    cache = MapCache(backend, bucket_shift=16, on_stale="copy")
    domain.on_invalidate(cache.invalidate)
    lease = cache.map_dma(AT, 0x3000, owner="t")
    domain.balloon_out(AT, 0x2000)
    domain.balloon_in(AT, 0x2000)
    lease.view[:] = b"x" * 0x3000
    lease.release()
    assert "copied 2 of 3 pages to the guest" in caplog.text
