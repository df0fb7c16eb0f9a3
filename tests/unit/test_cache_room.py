"""Room under max_resident: who waits for whom, who is refused, and that the accounts are right."""

from __future__ import annotations

import errno
import gc
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.effort import RACES
from xenmapcache import (
    Backend,
    CacheFullError,
    FaultError,
    MapCache,
    Mapping,
    MockDomain,
    XenCallError,
    write_coredump,
)
from xenmapcache import mapping as mapping_module
from xenmapcache.cache.budget import Budget, Operation, Reservation
from xenmapcache.cache.clock import Clock
from xenmapcache.cache.locked import locked
from xenmapcache.mapping import FREE_THREADED, LiveMapping

BUCKET = 1 << 16


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


STEPS = 40 if FREE_THREADED else 100 * RACES  # without a GIL they mostly sleep


@pytest.mark.parametrize("buckets", [1, 2])
def test_threads_on_a_small_cache_are_never_refused(
    domain: MockDomain, backend: Backend, buckets: int
) -> None:
    """Eight threads share room for one bucket or two: each read waits its turn and succeeds."""
    cache = MapCache(backend, bucket_shift=12, max_resident=buckets << 12)
    for gfn in range(64):
        domain.write(gfn << 12, gfn.to_bytes(8, "little"))
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for step in range(STEPS):
                gfn = (seed * 31 + step * 7) % 64
                if cache.read(gfn << 12, 8) != gfn.to_bytes(8, "little"):
                    wrong.append(gfn)
        except BaseException as error:
            wrong.append(error)

    threads = [in_thread(partial(work, seed)) for seed in range(8)]
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert wrong == []
    assert cache.stats().resident_bytes <= buckets << 12
    assert not cache._budget.operations
    assert not cache._budget.waiting


def test_writes_over_several_buckets_do_not_wait_for_each_other(backend: Backend) -> None:
    """Each needs two of the three buckets that fit; one after the other they all get them."""
    cache = MapCache(backend, bucket_shift=12, max_resident=3 << 12)
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for step in range(200):
                cache.write(((seed * 13 + step * 5) % 60 << 12) - 4 + 0x1000, b"12345678")
        except BaseException as error:
            wrong.append(error)

    threads = [in_thread(partial(work, seed)) for seed in range(4)]
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_memory_in_the_hands_of_another_thread_is_waited_for(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A miss waits for the operation that still holds the only bucket, and then succeeds."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    held, go_on = threading.Event(), threading.Event()
    original = Mapping.valid

    def valid(mapping: Mapping, offset: int, length: int) -> bool:
        if mapping.gfn == 0x100 and not held.is_set():
            held.set()
            go_on.wait(10)
        return original(mapping, offset, length)

    monkeypatch.setattr(Mapping, "valid", valid)
    read: list[bytes] = []
    first = in_thread(lambda: read.append(cache.read(0x100000, 1)))
    assert held.wait(10)
    sleep = Budget._sleep

    def sleeping(budget: Budget, operation: Operation) -> None:
        go_on.set()  # not before the other one waits
        sleep(budget, operation)

    monkeypatch.setattr(Budget, "_sleep", sleeping)
    assert cache.read(0x200000, 1) == b"\0"
    first.join(10)
    assert read == [b"\0"]


def test_a_view_that_is_kept_is_not_waited_for(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No operation is under way that could drop it, so the error comes at once."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    view = next(cache.views(0x100000, 8))
    monkeypatch.setattr(Budget, "_sleep", lambda *_: pytest.fail("it waited"))
    with pytest.raises(CacheFullError, match="in views that are kept"):
        cache.read(0x200000, 1)
    view.release()
    assert cache.read(0x200000, 1) == b"\0"


def test_a_signal_handler_is_refused_and_does_not_wait(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operation inside of another one of its own thread waits for no third thread."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    outcomes: list[type[BaseException]] = []
    original = backend.map
    monkeypatch.setattr(Budget, "_sleep", lambda *_: pytest.fail("it waited"))
    elsewhere = Operation()
    elsewhere.thread = -1  # another thread's, and under way

    def interrupted(gfn: int, count: int, *, writable: bool) -> Mapping:
        cache._budget.operations[elsewhere] = None
        try:
            cache.read(0x200000, 1)
        except CacheFullError as error:
            outcomes.append(type(error))
        finally:
            del cache._budget.operations[elsewhere]
        return original(gfn, count, writable=writable)

    monkeypatch.setattr(backend, "map", interrupted)
    assert cache.read(0x100000, 1) == b"\0"
    assert outcomes == [CacheFullError]


def test_the_first_to_wait_goes_first() -> None:
    """A later operation does not overtake one that waits, unless it is exclusive or nested."""
    budget = Budget(4096)
    first, second, exclusive = Operation(), Operation(), Operation(exclusive=True)
    budget.waiting[first] = None
    assert budget._is_turn(first, nested=False)
    assert not budget._is_turn(second, nested=False)
    assert budget._is_turn(second, nested=True)
    assert budget._is_turn(exclusive, nested=False)
    assert not locked(budget.lock, budget._take, Reservation(1), second, False)
    assert locked(budget.lock, budget._take, Reservation(1), first, False)


def test_who_waits_is_woken() -> None:
    """An operation that ends lets the waiting ones look again."""
    budget = Budget(4096)
    waiting = Operation()
    budget.waiting[waiting] = None
    budget.wake()  # it does not sleep yet, and misses nothing
    budget._sleep(waiting)
    assert waiting.gate is not None
    budget.wake()
    assert waiting.gate.qsize() == 1
    assert not waiting.idle


def test_a_hint_that_was_lost_loses_no_room(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is the truth: unmapped memory that no hint names is found when room is short."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    cache.read(0x100000, 1)
    monkeypatch.setattr(Mapping, "notify", lambda *_: None)
    for address in (0x200000, 0x300000, 0x400000):
        cache.read(address, 1)
    assert cache.stats().resident_bytes == BUCKET
    assert (cache.stats().maps, cache.stats().unmaps) == (4, 3)


def test_the_accounts_are_repaired_if_an_interrupt_left_them_too_high(backend: Backend) -> None:
    """`used` may be too high after an interrupt; the entries are added up again before refusing."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    cache._budget.used += BUCKET
    assert cache.read(0x100000, 1) == b"\0"
    assert cache._budget.used == BUCKET


def test_a_sum_that_a_signal_handler_changed_is_made_again(backend: Backend) -> None:
    """A handler that maps during a recount is not forgotten by it."""
    budget = Budget(1 << 20)

    class Accounts(dict[LiveMapping | Reservation, int]):
        changed = False

        def values(self):  # type: ignore[no-untyped-def] # noqa: ANN202 - as of a dictionary
            found = list(super().values())
            if not self.changed:  # what the handler does, right after the entries were read
                self.changed = True
                self[Reservation(4096)] = 4096
                budget.used += 4096
            return found

    budget.accounts = Accounts()
    budget.recount()
    assert budget.used == 4096


class RecountingLock:
    """A reentrant lock: each time before it is taken, another thread has added the accounts up."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.lock = budget, budget.lock
        self.ready = True
        self.too_low = 0

    def acquire(self) -> bool:
        if self.ready and not self.lock._is_owned():  # type: ignore[attr-defined] # as Budget asks
            self.ready = False
            thread = in_thread(self.budget.recount)
            thread.join(60)
            assert not thread.is_alive()
            self.ready = True
        return self.lock.acquire()

    def release(self) -> None:
        missing = sum(self.budget.accounts.values()) - self.budget.used
        self.too_low = max(self.too_low, missing)
        self.lock.release()

    def _is_owned(self) -> bool:
        return bool(self.lock._is_owned())  # type: ignore[attr-defined] # as Budget asks


@pytest.mark.parametrize("work", ["replace", "map"])
def test_a_recount_of_another_thread_takes_no_room_off_twice(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    """It comes when a reservation has ended, and before its room is given back.

    `used` was too low then, and the cache mapped more than `max_resident`.
    """
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    lease = cache.map_device(0x100000, 0x1000, owner="vram")
    budget = cache._budget
    lock = RecountingLock(budget)
    budget.lock = lock  # type: ignore[assignment] # it has what is used of one
    if work == "replace":
        cache.replace(0x100000, 0x300000, 0x1000)
    else:
        monkeypatch.setattr(backend, "map", partial(refuse, errno.EINVAL))
        with pytest.raises(XenCallError):
            cache.read(0x400000, 1)
    assert budget.used == sum(budget.accounts.values()) == lease.length
    assert lock.too_low == 0
    lease.release()


def refuse(error: int, *_: object, **__: object) -> Mapping:
    raise XenCallError("map", None, error)


def test_an_interrupt_before_room_is_given_back_loses_none(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reservation says that it has ended, so the next operation without room finds it."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    monkeypatch.setattr(backend, "map", partial(refuse, errno.EINVAL))
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "end", lambda *_: refuse(errno.EINTR))
        with pytest.raises(XenCallError):
            cache.read(0x100000, 1)
    assert cache._budget.used == BUCKET
    monkeypatch.undo()
    assert cache.read(0x200000, 1) == b"\0"
    assert cache._budget.used == BUCKET


def test_a_failed_map_gives_its_room_back(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the interrupt comes after the backend has mapped."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    original = backend.map

    def mapped(gfn: int, count: int, *, writable: bool) -> Mapping:
        original(gfn, count, writable=writable)
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "map", mapped)
    with pytest.raises(KeyboardInterrupt):
        cache.read(0x100000, 1)
    assert cache._budget.used == 0
    assert cache._budget.accounts == {}


@pytest.mark.parametrize("access", ["read", "write"])
def test_a_hot_bucket_makes_room_for_a_range_over_its_edge(backend: Backend, access: str) -> None:
    """The access that begins in the bucket does not keep it itself."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    for _ in range(3):
        cache.write(0x100000, b"hot")
        assert cache.read(0x100000, 3) == b"hot"
    edge = 0x100000 + BUCKET - 2
    if access == "read":
        assert cache.read(edge, 4) == bytes(4)
    else:
        cache.write(edge, b"over")
        assert cache.read(edge, 4) == b"over"


def test_an_error_of_a_report_keeps_no_bucket(domain: MockDomain, backend: Backend) -> None:
    """The caller may keep the exception of a write whose pages could not be reported."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    domain.inject_fault("mark_dirty", errno=errno.EIO)
    with pytest.raises(XenCallError) as kept:
        cache.write(0x100000, b"written")
    assert cache.read(0x200000, 1) == b"\0"
    assert kept.value.errno == errno.EIO


def peak_of(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how much was mapped in all, after each map call."""
    original, peak = backend.map, [0]

    def noted(gfn: int, count: int, *, writable: bool) -> Mapping:
        mapping = original(gfn, count, writable=writable)
        peak[0] = max(peak[0], sum(record.length for record in list(mapping_module._live)))
        return mapping

    gc.collect()
    mapping_module.sweep()
    before = sum(record.length for record in list(mapping_module._live))
    monkeypatch.setattr(backend, "map", noted)
    peak.append(before)
    return peak


def test_a_copy_of_a_stale_lease_stays_under_max_resident(
    domain: MockDomain, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease fills all but one MiB, and is delivered in chunks that fit."""
    cache = MapCache(backend, max_resident="4M", on_stale="copy")
    lease = cache.map_dma(0x180000, 3 << 20, owner="nic")
    domain.balloon_out(0x200000, 0x3000)
    domain.balloon_in(0x200000, 0x3000)
    cache.invalidate()
    lease.view[:] = b"\x5a" * (3 << 20)
    peak = peak_of(backend, monkeypatch)
    lease.release()
    assert peak[0] - peak[1] <= 1 << 20
    assert domain.read(0x180000, 3 << 20) == b"\x5a" * (3 << 20)


def test_a_lease_that_fills_everything_can_still_be_delivered(
    domain: MockDomain, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be held for ever otherwise: one page at a time is mapped beyond the limit."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET, on_stale="copy")
    lease = cache.map_dma(0x100000, BUCKET, owner="nic")
    domain.balloon_out(0x100000, 0x2000)
    domain.balloon_in(0x100000, 0x2000)
    cache.invalidate()
    lease.view[:] = b"\x5a" * BUCKET
    peak = peak_of(backend, monkeypatch)
    lease.release()
    assert peak[0] - peak[1] <= 0x1000
    assert domain.read(0x100000, BUCKET) == b"\x5a" * BUCKET


def test_a_dump_of_a_cache_stays_under_max_resident(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dump of a cache with room for one small bucket maps no more than that at a time."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    cache.read(0x100000, 1)
    peak = peak_of(backend, monkeypatch)
    pages = write_coredump(cache, tmp_path / "guest.core")
    assert peak[0] <= peak[1]  # the bucket went for the first chunk
    assert pages == write_coredump(backend, tmp_path / "other.core")
    assert (tmp_path / "guest.core").read_bytes() == (tmp_path / "other.core").read_bytes()


def test_replace_needs_room_for_a_second_mapping(backend: Backend) -> None:
    """Xen's libraries map the new range elsewhere first; without room nothing changes."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    lease = cache.map_device(0x100000, BUCKET // 2 + 1, owner="vram")
    with pytest.raises(CacheFullError, match="no room for 0x9000 bytes at 0x300000"):
        cache.replace(0x100000, 0x300000, BUCKET // 2 + 1)
    assert (lease.address, lease.stale) == (0x100000, False)
    lease.release()
    small = cache.map_device(0x100000, BUCKET // 2, owner="vram")
    cache.replace(0x100000, 0x300000, BUCKET // 2)
    assert small.address == 0x300000
    assert cache.stats().resident_bytes == BUCKET // 2
    small.release()


def test_a_handler_under_the_lock_is_refused_at_once(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the lock nothing can come free, as another thread may wait for that lock."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    lease = cache.map_dma(0x100000, 1, owner="t")
    monkeypatch.setattr(Budget, "_sleep", lambda *_: pytest.fail("it waited"))
    with cache._budget.lock, pytest.raises(CacheFullError):
        cache.read(0x200000, 1)
    lease.release()


def test_more_pages_than_max_resident_are_refused(backend: Backend) -> None:
    """Before they are mapped."""
    cache = MapCache(backend, bucket_shift=16, max_resident=BUCKET)
    with pytest.raises(CacheFullError, match="0x11000 bytes at 0x0 are more than max_resident"):
        cache.map_pages(0, 17)
    assert cache.map_pages(0, 16).count == 16


def test_a_failed_call_for_the_second_bucket_drops_the_first(
    domain: MockDomain, backend: Backend
) -> None:
    """A write that Xen refuses in its middle keeps no memory."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    domain.inject_fault("map", errno=errno.EIO, nth=2)
    with pytest.raises(XenCallError) as caught:
        cache.write(0x20FFFE, b"1234")
    cache.invalidate()
    assert cache.stats().resident_bytes == 0
    assert caught.value.errno == errno.EIO


def test_a_handler_writes_over_an_edge_amid_such_a_write(
    domain: MockDomain, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not wait for its own thread's turn."""
    cache = MapCache(backend, bucket_shift=16)
    original = backend.map

    def interrupted(gfn: int, count: int, *, writable: bool) -> Mapping:
        monkeypatch.setattr(backend, "map", original)
        cache.write(0x30FFFE, b"1234")
        return original(gfn, count, writable=writable)

    monkeypatch.setattr(backend, "map", interrupted)
    cache.write(0x20FFFE, b"abcd")
    assert domain.read(0x30FFFE, 4) == b"1234"
    assert domain.read(0x20FFFE, 4) == b"abcd"


def test_a_pin_that_is_on_the_clock_is_not_put_back() -> None:
    """A release that was repeated has put it back already."""
    clock = Clock()
    pin = clock.pin(3)
    clock.put_back(returned := deque([pin]))
    assert not returned
    assert not clock.order


def test_a_lock_is_released_if_its_wait_is_interrupted(backend: Backend) -> None:
    """The interrupt is raised, not the error of a release without an acquire."""

    class Interrupted:
        def acquire(self) -> None:
            raise KeyboardInterrupt

        def release(self) -> None:
            raise RuntimeError("cannot release un-acquired lock")

    with pytest.raises(KeyboardInterrupt):
        locked(Interrupted(), lambda: None)  # type: ignore[arg-type] # for this test alone
    cache = MapCache(backend)
    cache._budget.lock, lock = Interrupted(), cache._budget.lock  # type: ignore[assignment] # as above
    with pytest.raises(KeyboardInterrupt):
        cache.map_dma(0x2000, 8, owner="t")
    cache._budget.lock = lock
    assert cache.leases() == ()


def test_errors_keep_no_memory_of_several_buckets(backend: Backend) -> None:
    """A write that fails in its second bucket drops the first one, though the error is kept."""
    cache = MapCache(backend, bucket_shift=16, max_resident=2 * BUCKET)
    gc.disable()
    try:
        with pytest.raises(FaultError) as caught:
            cache.write((16 << 20) - 4, b"12345678")
        cache.invalidate()
        assert cache.stats().resident_bytes == 0
        assert caught.value.address == 16 << 20
    finally:
        gc.enable()
