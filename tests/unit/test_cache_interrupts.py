"""Signal handlers amid an operation: they raise, invalidate, close or release at a given point.

The folder tests/interrupts tries every point. Here each mechanism has its own case.
"""

from __future__ import annotations

import errno
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from xenmapcache import (
    Backend,
    ClosedError,
    LeaseError,
    MapCache,
    Mapping,
    MockDomain,
    XenCallError,
)
from xenmapcache.backend import Capability
from xenmapcache.cache.buckets import BucketTable
from xenmapcache.cache.clock import Clock
from xenmapcache.cache.registry import LeaseRegistry

BUCKET = 1 << 16
AT = 0x200000


def once(action: Callable[[], object]) -> Callable[[], None]:
    """Return a function that does something at its first call alone."""
    calls: list[None] = []

    def call() -> None:
        calls.append(None)
        if len(calls) == 1:
            action()

    return call


def new_page(domain: MockDomain, address: int = AT, data: bytes = b"new!") -> None:
    domain.balloon_out(address, 0x1000)
    domain.balloon_in(address, 0x1000)
    domain.write(address, data)


# --- generations ---


def test_an_invalidation_amid_an_access_leaves_nothing_stale(
    domain: MockDomain, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler invalidates right before a bucket is made hot: the store reaches an orphan."""
    domain.on_invalidate(cache.invalidate)
    cache.read(AT, 4)
    original = BucketTable.find
    handler = once(lambda: new_page(domain))

    def find(table: BucketTable, generation: object, *rest: object, **options: bool) -> object:
        handler()
        return original(table, generation, *rest, **options)  # type: ignore[arg-type] # as given

    monkeypatch.setattr(BucketTable, "find", find)
    cache.read(AT, 4)
    assert cache._table.generation.readable == {}
    assert cache.read(AT, 4) == b"new!"
    cache.write(AT + 4, b"zz")
    assert domain.read(AT + 4, 2) == b"zz"


def test_an_invalidation_before_the_store_of_a_bucket(
    domain: MockDomain, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket that was mapped before is stored into its own generation, which no access finds."""
    domain.on_invalidate(cache.invalidate)
    original = Clock.admit
    handler = once(lambda: new_page(domain))

    def admit(clock: Clock, index: int, *, replaces: bool) -> None:
        handler()
        original(clock, index, replaces=replaces)

    monkeypatch.setattr(Clock, "admit", admit)
    cache.read(AT, 4)
    assert cache.read(AT, 4) == b"new!"


def test_a_lease_of_a_resident_bucket_is_taken_again_if_an_invalidation_came(
    domain: MockDomain, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was time to map again, so the lease is not stale."""
    domain.on_invalidate(cache.invalidate)
    cache.read(AT, 1)
    original = LeaseRegistry.grant
    handler = once(lambda: new_page(domain))

    def grant(registry: LeaseRegistry, *arguments: object) -> None:
        handler()
        original(registry, *arguments)  # type: ignore[arg-type] # as given

    monkeypatch.setattr(LeaseRegistry, "grant", grant)
    lease = cache.map_dma(AT, 64, owner="nic")
    assert not lease.stale
    assert bytes(lease.view[:4]) == b"new!"
    assert (lease.id, lease.owner) == (cache.leases()[0].id, "nic")
    lease.release()
    assert cache.leases() == ()


def test_an_interrupt_before_the_first_byte_of_a_write_reports_nothing(
    domain: MockDomain, backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No page was written."""

    def interrupted(gfn: int, count: int, *, writable: bool) -> Mapping:
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "map", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.write(AT, b"abc")
    assert domain.dirty_gfns == set()


def test_a_report_of_a_hot_write_that_fails_is_raised(domain: MockDomain, cache: MapCache) -> None:
    """XenCallError says that the bytes are written and not reported; the caller writes again."""
    for _ in range(3):
        cache.read(AT, 1)
    domain.inject_fault("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError):
        cache.write(AT, b"abc")
    assert domain.dirty_gfns == set()
    assert not cache._dirty.owed
    cache.write(AT, b"abc")
    assert domain.dirty_gfns == {0x200}


@pytest.mark.parametrize("length", [64, BUCKET + 64])
def test_a_lease_made_across_an_invalidation_is_stale_from_the_start(
    domain: MockDomain, cache: MapCache, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """A handler invalidates when the lease's memory is known, and before it is in the registry."""
    domain.on_invalidate(cache.invalidate)
    original = LeaseRegistry.grant
    handler = once(lambda: new_page(domain))

    def grant(registry: LeaseRegistry, *arguments: object) -> None:
        handler()
        original(registry, *arguments)  # type: ignore[arg-type] # as given

    monkeypatch.setattr(LeaseRegistry, "grant", grant)
    lease = cache.map_dma(AT, length, owner="nic")
    assert lease.stale or bytes(lease.view[:4]) == b"new!"
    lease.release()


@pytest.mark.parametrize("length", [64, BUCKET + 64])
@pytest.mark.parametrize("on_stale", ["warn", "raise"])
def test_invalidations_without_end_do_not_keep_a_lease_for_ever(
    domain: MockDomain,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    length: int,
    on_stale: str,
) -> None:
    """After three attempts the lease is stale from the start: one WARNING, or LeaseError."""
    cache = MapCache(backend, bucket_shift=16, on_stale=on_stale)  # type: ignore[arg-type] # from parametrize
    original = backend.map
    calls = []

    def mapped(gfn: int, count: int, *, writable: bool) -> Mapping:
        mapping = original(gfn, count, writable=writable)
        calls.append(gfn)
        cache.invalidate()
        return mapping

    monkeypatch.setattr(backend, "map", mapped)
    with caplog.at_level(logging.WARNING, "xenmapcache"):
        if on_stale == "raise":
            with pytest.raises(LeaseError, match="came faster than pages could be mapped"):
                cache.map_dma(AT, length, owner="nic")
            assert cache.leases() == ()
        else:
            lease = cache.map_dma(AT, length, owner="nic")
            assert lease.stale
            cache.invalidate()
            assert cache.stats().stale_dma_held == 1
            lease.release()
            assert cache.stats().stale_dma_held == 0
    assert len(calls) == 3
    text = [record.getMessage() for record in caplog.records]
    assert sum("stale from the start" in line for line in text) == (on_stale == "warn")
    assert not any("still held, may be lost" in line for line in text)


def test_a_device_lease_is_granted_at_once_during_invalidations(
    backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An invalidation means nothing to it."""
    original = backend.map

    def mapped(gfn: int, count: int, *, writable: bool) -> Mapping:
        mapping = original(gfn, count, writable=writable)
        cache.invalidate()
        return mapping

    monkeypatch.setattr(backend, "map", mapped)
    lease = cache.map_device(AT, 64, owner="vga")
    assert not lease.stale
    assert cache.stats().maps == 1


@pytest.mark.parametrize("length", [64, BUCKET + 64])
@pytest.mark.parametrize("take", [MapCache.map_dma, MapCache.map_device])
def test_a_close_before_a_lease_is_granted(
    cache: MapCache, monkeypatch: pytest.MonkeyPatch, take: Callable[..., object], length: int
) -> None:
    """A handler closes the cache: the lease is refused, and nothing is kept."""
    original = LeaseRegistry.grant
    handler = once(lambda: cache.close(force=True))

    def grant(registry: LeaseRegistry, *arguments: object) -> None:
        handler()
        original(registry, *arguments)  # type: ignore[arg-type] # as given

    monkeypatch.setattr(LeaseRegistry, "grant", grant)
    with pytest.raises(ClosedError):
        take(cache, AT, length, owner="nic")
    assert cache.leases() == ()
    assert cache.stats().resident_bytes == 0


def test_an_invalidation_does_not_open_a_closed_cache(
    cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler closes the cache between the look and the swap."""
    original = BucketTable.retire
    handler = once(cache.close)

    def retire(table: BucketTable, **options: bool) -> object:
        handler()
        return original(table, **options)

    monkeypatch.setattr(BucketTable, "retire", retire)
    with pytest.raises(ClosedError):
        cache.invalidate()
    with pytest.raises(ClosedError):
        cache.read(AT, 1)


def test_a_handler_finds_the_room_of_a_generation_that_is_being_dropped(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the swap and the unmapping a read drops the old mappings itself."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    cache.read(AT, 1)
    original = BucketTable.clear_retired
    seen: list[bytes] = []
    handler = once(lambda: seen.append(cache.read(AT + BUCKET, 1)))

    def clear(table: BucketTable) -> bool:
        handler()
        return original(table)

    monkeypatch.setattr(BucketTable, "clear_retired", clear)
    cache.invalidate()
    assert seen == [b"\0"]


def test_an_error_of_a_handler_comes_out_of_the_dropping(backend: Backend) -> None:
    """A ValueError is not taken for one that says that another thread has dropped it."""
    raised = 0
    for number in range(20):
        cache = MapCache(backend, bucket_shift=16)
        cache.read(AT, 1)
        cache._table.retire()
        count = itertools.count()

        def handler(
            frame: FrameType, *_: object, at: int = number, count: Iterator[int] = count
        ) -> None:
            # Not in finalizers of the mappings, out of which nothing comes.
            near = BucketTable.clear_retired.__code__ in (
                frame.f_code,
                frame.f_back and frame.f_back.f_code,
            )
            if near and next(count) == at:
                raise ValueError("the handler's")

        previous = sys.getprofile()
        try:
            sys.setprofile(handler)
            cache._table.clear_retired()
        except ValueError:
            raised += 1
        finally:
            sys.setprofile(previous)
        if next(count) <= number:
            break
        cache._table.clear_retired()
        assert not cache._table.retired
        cache.close()
    assert raised == number > 5


# --- releases ---


@pytest.mark.parametrize(("step", "stale"), [("_drop", False), ("_drop", True), ("_end", True)])
@pytest.mark.parametrize("length", [64, BUCKET + 64])
def test_an_interrupted_release_is_completed_by_a_second_one(
    domain: MockDomain,
    cache: MapCache,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    length: int,
    stale: bool,
) -> None:
    """Until it has ended, the lease is held, named in leases(), and its room is taken."""
    lease = cache.map_dma(AT, length, owner="nic")
    if stale:
        cache.invalidate()
    original = getattr(LeaseRegistry, step)

    def interrupted(registry: LeaseRegistry, *arguments: object) -> None:
        monkeypatch.setattr(LeaseRegistry, step, original)
        raise KeyboardInterrupt

    monkeypatch.setattr(LeaseRegistry, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        lease.release()
    held = lease.released, [info.id for info in cache.leases()]
    lease.release()
    assert (held, lease.released, cache.leases()) == ((False, [lease.id]), True, ())
    assert 0x200 in domain.dirty_gfns
    assert cache.stats().stale_dma_released == stale
    with pytest.raises(LeaseError, match="was released before"):
        lease.release()


def test_an_interrupted_release_is_completed_by_a_forced_close(
    cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the room comes back, and its pages are reported."""
    lease = cache.map_dma(AT, 64, owner="nic")
    original = LeaseRegistry._drop

    def interrupted(registry: LeaseRegistry, *arguments: object) -> None:
        monkeypatch.setattr(LeaseRegistry, "_drop", original)
        raise KeyboardInterrupt

    monkeypatch.setattr(LeaseRegistry, "_drop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lease.release()
    cache.close(force=True)
    assert lease.released
    assert cache.stats().resident_bytes == 0


def test_a_release_amid_a_release_is_refused(
    domain: MockDomain, backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that releases the same lease gets LeaseError; the outer release succeeds."""
    lease = cache.map_dma(AT, 64, owner="nic")
    other = cache.map_dma(AT, 64, owner="disk")
    refused: list[str] = []
    original = backend.mark_dirty

    def report(gfn: int, count: int) -> None:
        monkeypatch.setattr(backend, "mark_dirty", original)
        other.release()  # which is another one's, and is not
        try:
            lease.release()
        except LeaseError as error:
            refused.append(str(error))
        original(gfn, count)

    monkeypatch.setattr(backend, "mark_dirty", report)
    lease.release()
    assert len(refused) == 1
    assert "is being released by another call" in refused[0]
    assert lease.released
    assert other.released
    assert cache._registry._releasing == {}


def test_a_forced_close_amid_a_release_leaves_the_lease_to_it(
    backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release that is under way ends the lease, once."""
    lease = cache.map_dma(AT, 64, owner="nic")
    original = backend.mark_dirty

    def report(gfn: int, count: int) -> None:
        monkeypatch.setattr(backend, "mark_dirty", original)
        cache.close(force=True)
        assert not lease.released
        original(gfn, count)

    monkeypatch.setattr(backend, "mark_dirty", report)
    lease.release()
    assert lease.released
    assert cache.leases() == ()


def test_a_forced_close_that_is_interrupted_at_a_report_is_repeated(
    domain: MockDomain, backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease whose pages were not reported is still held, and the second close reports them."""
    cache.map_dma(AT, 64, owner="nic")

    def report(gfn: int, count: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "mark_dirty", report)
    with pytest.raises(KeyboardInterrupt):
        cache.close(force=True)
    monkeypatch.undo()
    assert len(cache.leases()) == 1
    cache.close(force=True)
    assert cache.leases() == ()
    assert domain.dirty_gfns == {0x200}


def test_a_warning_that_cannot_be_logged_does_not_keep_the_lease(
    domain: MockDomain, cache: MapCache
) -> None:
    """Log lines come after the lease has ended: a filter that raises changes nothing."""
    lease = cache.map_dma(AT, 64, owner="nic")
    cache.invalidate()

    def broken(record: logging.LogRecord) -> bool:
        raise RuntimeError("a filter with a bug")

    logger = logging.getLogger("xenmapcache")
    logger.addFilter(broken)
    try:
        with pytest.raises(RuntimeError, match="a filter with a bug"):
            lease.release()
        assert lease.released
        assert domain.dirty_gfns == {0x200}
        late = cache.map_dma(AT, 64, owner="nic")
        with pytest.raises(RuntimeError, match="a filter with a bug"):
            cache.close(force=True)
        assert late.released
    finally:
        logger.removeFilter(broken)


# --- written pages ---


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("length", [3, BUCKET])
def test_an_interrupt_after_the_bytes_of_a_write_loses_no_report(
    domain: MockDomain,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    hot: bool,
    length: int,
) -> None:
    """The handler raises before the report: the pages are reported all the same."""
    original = backend.mark_dirty
    cache = None

    def report(gfn: int, count: int) -> None:
        monkeypatch.setattr(backend, "mark_dirty", original)
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "mark_dirty", report)
    cache = MapCache(backend, bucket_shift=16)
    for _ in range(2 * hot):
        cache.read(AT, 1)
    address = AT if length == 3 else AT + 0x8000
    with pytest.raises(KeyboardInterrupt):
        cache.write(address, b"x" * length)
    assert domain.read(address, length) == b"x" * length
    pages = range(address >> 12, (address + length + 0xFFF) >> 12)
    assert domain.dirty_gfns == set(pages)


def test_a_report_that_fails_after_an_interrupt_is_made_later(
    domain: MockDomain, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages are owed, and reported with the next ones or when asked for."""
    calls = []

    def report(gfn: int, count: int) -> None:
        calls.append(gfn)
        raise KeyboardInterrupt if len(calls) == 1 else XenCallError("mark", 1, errno.EIO)

    monkeypatch.setattr(backend, "mark_dirty", report)
    cache = MapCache(backend, bucket_shift=16)
    with pytest.raises(KeyboardInterrupt):
        cache.write(AT, b"abc")
    assert len(calls) == 2
    assert list(cache._dirty.owed) == [(0x200, 1)]
    with pytest.raises(XenCallError):
        cache.mark_leases_dirty()
    monkeypatch.undo()
    cache.mark_leases_dirty()
    assert domain.dirty_gfns == {0x200}
    assert not cache._dirty.owed


def test_nothing_is_owed_to_a_source_that_keeps_no_dirty_pages(backend: Backend) -> None:
    """What such a source is not told is forgotten."""
    backend.capabilities = Capability.WRITE
    cache = MapCache(backend)
    cache._dirty.owed.append((1, 1))
    cache._dirty.settle()
    assert not cache._dirty.owed


def test_an_interrupted_move_reports_the_old_pages(
    domain: MockDomain, backend: Backend, cache: MapCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device may have written them, and the lease is stale."""
    lease = cache.map_device(AT, 0x1000, owner="vram")
    rom = cache.map_device(0x600000, 0x1000, owner="rom", writable=False)

    def remap(mapping: Mapping, gfn: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "remap", remap)
    for address in (AT, 0x600000):
        with pytest.raises(KeyboardInterrupt):
            cache.replace(address, 0x900000, 0x1000)
    assert lease.stale
    assert rom.stale
    assert domain.dirty_gfns == {0x200}


# --- the clock ---


def test_an_interrupted_sweep_loses_no_bucket(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket leaves the clock last of all, so the next sweep meets it again."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    for address in (AT, AT + BUCKET):
        cache.read(address, 1)
    generation = cache._table.generation
    original = type(generation).cool

    def interrupted(tables: object, index: int) -> bool:
        monkeypatch.setattr(type(generation), "cool", original)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(generation), "cool", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.read(AT + 2 * BUCKET, 1)
    for step in range(2, 8):
        assert cache.read(AT + step * BUCKET, 1) == b"\0"
    assert sorted(generation.clock.order) == sorted(generation.buckets)
