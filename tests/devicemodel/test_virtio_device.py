"""VirtioDevice: rounds, bounds, broken drivers, resets, INVALIDATE and the end, with VirtioRng."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.devicemodel.virtio_kit import ALL_FEATURES, Line, MmioDriver, Ring
from tests.kit import in_thread, wait_for_the_log
from xenmapcache import DmaDirection, MapCache, MockDomain
from xenmapcache.devicemodel import DmaEngine, IoreqServer, dma
from xenmapcache.devicemodel.virtio import (
    GuestBuffer,
    Job,
    Request,
    VirtioDevice,
    VirtioMmio,
    VirtioRng,
)
from xenmapcache.devicemodel.virtio.job import Done
from xenmapcache.guest import Segments

BASE, RING, DATA = 0xFE00_0000, 0x10000, 0x40000


class Blocking(VirtioDevice):
    """A device whose requests end when the test says so. Two queues of 8."""

    device_id = 42
    queue_sizes = (8, 8)
    config = b"\x01\x02\x03"

    def __init__(self, server: IoreqServer, *, limit: int = 64) -> None:
        super().__init__(server, name="slow0", features=1, limit=limit)
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)
        self.order: list[int] = []

    def prepare(self, request: Request) -> Job:
        def work(memory: Segments) -> int:
            self.begun.release()
            assert self.go.wait(20)
            self.order.append(request.head)
            memory[:1] = b"x"
            return 1

        return Job(request.writable, work, lambda moved: 0 if moved is None else moved)


@pytest.fixture
def driver(guest: MockDomain, line: Line) -> MmioDriver:
    return MmioDriver(guest, BASE, line)


@pytest.fixture
def rng(server: IoreqServer, line: Line) -> Iterator[VirtioRng]:
    with VirtioRng(server) as rng:
        VirtioMmio(server, BASE, rng, interrupt=line)
        with server, server.serving():
            yield rng


@pytest.fixture
def slow(server: IoreqServer, line: Line) -> Iterator[Blocking]:
    with Blocking(server, limit=3) as slow:
        VirtioMmio(server, BASE, slow, interrupt=line)
        try:
            with server, server.serving():
                yield slow
        finally:
            slow.go.set()


# --- random numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("events", [False, True], ids=["flags", "event index"])
def test_random_numbers(
    guest: MockDomain, cache: MapCache, rng: VirtioRng, driver: MmioDriver, events: bool
) -> None:
    """The driver gets different bytes with each request, and at most 4096 of one."""
    ring = Ring(guest, RING, 8, events=events)
    driver.start(ring)
    seen = set()
    for number in range(20):
        driver.send(ring, ring.chain(writable=[(DATA, 16), (DATA + 0x1000, 16)]))
        assert driver.collect(ring, 1) == [(2 * number % 8, 32)]
        seen.add(guest.read(DATA, 16) + guest.read(DATA + 0x1000, 16))
    assert len(seen) == 20
    assert all(any(data[16:]) for data in seen)
    driver.send(ring, ring.chain(writable=[(DATA, 0x2000)]))
    assert driver.collect(ring, 1)[0][1] == 4096
    assert cache.leases() == ()
    assert repr(rng) == "<VirtioRng 'rng0' of domain 1: 1 queues>"


def test_random_numbers_for_nowhere(guest: MockDomain, rng: VirtioRng, driver: MmioDriver) -> None:
    """A buffer without memory gets nothing, and the next request is served."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    driver.send(ring, ring.chain(writable=[(1 << 40, 16)]))
    assert driver.collect(ring, 1) == [(0, 0)]
    driver.send(ring, ring.chain(writable=[(DATA, 16)]))
    assert driver.collect(ring, 1) == [(1, 16)]


# --- features and configuration -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "accepted"),
    [(1 << 32, True), (ALL_FEATURES | 1, True), (1, False), (1 << 32 | 1 << 40, False), (0, False)],
)
def test_features(slow: Blocking, driver: MmioDriver, features: int, accepted: bool) -> None:
    """What was not offered is refused, and so is a driver of the time before virtio 1."""
    assert driver.features() == ALL_FEATURES | 1
    assert driver.begin(features) is accepted
    assert slow.negotiated == (features if accepted else 0)


def test_the_configuration_space(slow: Blocking, driver: MmioDriver) -> None:
    """Beyond its end are zeros, and writes have no effect."""
    assert driver.read(0x100, 2) == 0x0201
    assert driver.read(0x102, 4) == 0x03
    driver.write(0x100, 0xFF, 1)
    assert driver.read(0x100, 8) == 0x030201
    assert driver.read(0x180, 8) == 0


def test_a_limit_of_no_request(server: IoreqServer) -> None:
    """It is refused: the device would serve nobody."""
    with pytest.raises(ValueError, match="limit must be at least 1 request, not 0"):
        Blocking(server, limit=0)


def test_a_device_without_prepare(server: IoreqServer) -> None:
    """The message says what is missing."""
    with VirtioDevice(server, name="none") as device:
        with pytest.raises(NotImplementedError, match=r"VirtioDevice must have prepare\(\)"):
            device.prepare(Request(0, *[GuestBuffer(server.cache, [], DmaDirection.TO_DEVICE)] * 2))


# --- bounds ---------------------------------------------------------------------------------------


def test_more_requests_than_may_be_under_way(
    guest: MockDomain, slow: Blocking, driver: MmioDriver
) -> None:
    """Those beyond the limit stay in the ring without a notification, and are served later."""
    rings = [Ring(guest, RING, 8, events=True), Ring(guest, RING + 0x1000, 8, events=True)]
    driver.start(*rings)
    ring = rings[0]
    heads = [ring.chain(writable=[(DATA + 16 * n, 16)]) for n in range(7)]
    driver.send(ring, *heads)
    assert slow.begun.acquire(timeout=20)
    assert len(slow._queues[0].in_flight) == 3
    heads.append(ring.chain(writable=[(DATA, 16)]))
    ring.offer(heads[-1])
    assert not ring.wants_kick()
    slow.go.set()
    assert driver.collect(ring, 8) == [(head, 1) for head in heads]
    assert slow.order == heads
    driver.send(ring, ring.chain(writable=[(DATA, 16)]))
    assert len(driver.collect(ring, 1)) == 1


def test_a_round_ends_although_the_driver_adds_requests(
    guest: MockDomain, rng: VirtioRng, driver: MmioDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One round pops one request for each entry at most; the end of one begins the next round."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    queue = rng._queues[0]
    pop = queue.pop
    threads: list[int] = []

    def fed_pop() -> Request | None:
        threads.append(threading.get_ident())
        free = 8 - (ring.idx - ring.u16(ring.device + 2))
        if ring.idx < 100 and free:  # the queue would hardly ever be empty
            ring.offer(ring.idx % 8)
        request = pop()
        queue.notifies = False  # this driver never does
        return request

    monkeypatch.setattr(queue, "pop", fed_pop)
    for number in range(8):
        ring.put(number, DATA, 1, 2)
    rng.notify_queue(0)
    assert 0 < threads.count(threading.get_ident()) <= 8
    while len(driver.collect(ring, 1)) and ring.seen < 100:
        pass
    assert ring.seen == 100


@pytest.mark.parametrize("number", [1, 2, 0xFFFFFFFF])
def test_a_notification_for_a_queue_that_is_not_in_use(
    guest: MockDomain, rng: VirtioRng, driver: MmioDriver, number: int
) -> None:
    """It has no effect."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    driver.kick(number)
    assert driver.read(0x70) == 15


# --- broken drivers -------------------------------------------------------------------------------


def test_a_broken_driver_and_its_next_reset(
    guest: MockDomain,
    cache: MapCache,
    rng: VirtioRng,
    driver: MmioDriver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """NEEDS_RESET is set once, with an interrupt; nothing is served until the reset."""
    caplog.set_level(logging.INFO, "xenmapcache.devicemodel")
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    driver.send(ring, ring.chain(readable=[(DATA, 16)]))
    assert driver.handle_interrupt() == 2
    assert driver.read(0x70) == 15 | 0x40
    assert repr(rng) == "<VirtioRng 'rng0' of domain 1: broken>"
    driver.send(ring, ring.chain(writable=[(DATA, 16)]))
    assert (ring.used(), driver.line.rises) == ([], 1)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "domain 1: 'rng0' needs a reset by its driver" in caplog.messages[0]
    assert "has no place for a random byte" in caplog.messages[0]
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    driver.send(ring, ring.chain(writable=[(DATA, 16)]))
    assert driver.collect(ring, 1) == [(0, 16)]
    assert cache.leases() == ()


@pytest.mark.parametrize(("size", "address"), [(16, RING), (3, RING), (0, RING), (8, RING + 2)])
def test_a_queue_that_cannot_be(
    guest: MockDomain, slow: Blocking, driver: MmioDriver, size: int, address: int
) -> None:
    """A size or address against the rules needs a reset."""
    assert driver.begin(ALL_FEATURES)
    driver.set_up(0, size, address, RING + 0x1000, RING + 0x2000)
    assert driver.read(0x70) == 11 | 0x40


@pytest.mark.parametrize("index", [0, 2], ids=["twice", "not there"])
def test_a_queue_that_cannot_be_started(
    guest: MockDomain, slow: Blocking, driver: MmioDriver, index: int
) -> None:
    """If a transport starts one in use, or one that does not exist, the driver is told once."""
    ring = Ring(guest, RING, 8)
    slow.start_queue(0, size=8, **ring.at())
    assert driver.line.rises == 0
    for _ in range(2):
        slow.start_queue(index, size=8, **ring.at())
        assert (driver.read(0x70), driver.line.rises) == (0x40, 1)
        driver.write(0x64, 3)


def test_two_threads_find_it_broken(guest: MockDomain, slow: Blocking, driver: MmioDriver) -> None:
    """The driver is told once; requests under way end without touching the ring."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    driver.send(ring, *(ring.chain(writable=[(DATA, 16)]) for _ in range(2)))
    assert slow.begun.acquire(timeout=20)
    ring.put_u16(ring.driver + 2, 0x100)
    driver.kick()
    driver.kick()
    slow.go.set()
    slow._engine.drain()
    assert driver.handle_interrupt() == 2
    assert driver.read(0x70) & 0x40
    assert (ring.used(), driver.line.rises) == ([], 1)


def test_an_error_of_this_machine_is_logged_as_one(
    guest: MockDomain,
    slow: Blocking,
    driver: MmioDriver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If no thread can be started, the driver has to reset the device, and ERROR says why."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)

    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(slow._engine, "_start", refuse)
    driver.send(ring, ring.chain(writable=[(DATA, 16)]))
    assert driver.read(0x70) & 0x40
    wait_for_the_log(slow._server)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "no thread can be started" in record.getMessage()


def test_an_interrupt_that_fails(
    guest: MockDomain, slow: Blocking, driver: MmioDriver, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the requests that wait are served all the same."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    failures: list[Callable[[], None]] = [lambda: None]

    class Broken:
        is_running = True

        def interrupt_queue(self, index: int) -> None:
            failures.pop()  # the first one only

        def interrupt_config(self) -> None: ...
        def needs_reset(self) -> None: ...
        def set_line(self) -> None: ...

    failures.clear()
    slow.transport = Broken()
    slow.go.set()
    slow._limit = 1
    driver.send(ring, *(ring.chain(writable=[(DATA, 16)]) for _ in range(3)))
    while ring.u16(ring.device + 2) < 3:
        pass
    slow._engine.drain()
    assert "IndexError: pop from empty list" in caplog.messages[0]
    assert len(ring.used()) == 3


# --- resets, INVALIDATE, the end ------------------------------------------------------------------


def test_a_reset_amid_requests(
    guest: MockDomain, cache: MapCache, slow: Blocking, driver: MmioDriver
) -> None:
    """It waits for those under way; none of them is answered, and the device is as new."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    driver.send(ring, *(ring.chain(writable=[(DATA, 16)]) for _ in range(6)))
    assert slow.begun.acquire(timeout=20)
    thread, seen = in_thread(lambda: driver.write(0x70, 0))
    while not slow._queues[0].stopped:
        pass
    assert thread.is_alive()
    slow.go.set()
    thread.join(20)
    assert seen == [None]
    assert (ring.used(), driver.read(0x70), cache.leases()) == ([], 0, ())
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    driver.send(ring, ring.chain(writable=[(DATA, 16)]))
    assert driver.collect(ring, 1) == [(0, 1)]


def test_a_reset_that_times_out(
    guest: MockDomain,
    server: IoreqServer,
    slow: Blocking,
    driver: MmioDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver sees in the status that it is not over, and resets again."""
    monkeypatch.setattr(slow._engine._table, "drain_timeout", 0.01)
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    driver.send(ring, ring.chain(writable=[(DATA, 16)]))
    assert slow.begun.acquire(timeout=20)
    driver.write(0x70, 0)
    assert driver.read(0x70) == 15
    assert server.failures == 1
    monkeypatch.undo()
    driver.kick()
    slow.go.set()
    slow._engine.drain(20)
    driver.write(0x70, 0)
    assert driver.read(0x70) == 0
    assert ring.used() == []


def test_transfers_of_a_reset_that_timed_out_fill_the_engine(
    guest: MockDomain, slow: Blocking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the engine is full, the device needs another reset, and the process lives."""
    monkeypatch.setattr(slow._engine._table, "drain_timeout", 0.01)
    rings = [Ring(guest, RING + 0x1000 * number, 8) for number in range(2)]
    for resets in range(10):
        for index, ring in enumerate(rings):
            slow.start_queue(index, size=8, **ring.at())
            ring.idx = 0
            ring.offer(*(ring.chain(writable=[(DATA, 16)]) for _ in range(3)))
            slow.notify_queue(index)
        if slow._broken:
            assert (resets, len(slow._engine.transfers)) == (2, 17)
            return
        if not resets:
            assert slow.begun.acquire(timeout=20)
        with pytest.raises(TimeoutError):
            slow.reset()
        slow._queues = {}  # a transport that does not wait
    raise AssertionError("it took all of them")


def test_a_queue_does_not_wait_for_another_one(
    guest: MockDomain, slow: Blocking, driver: MmioDriver
) -> None:
    """The only worker is busy with a request of queue 1; one of queue 0 is never begun."""
    rings = [Ring(guest, RING + 0x1000 * number, 8) for number in range(2)]
    driver.start(*rings)
    for index in (1, 0):
        rings[index].offer(rings[index].chain(writable=[(DATA, 16)]))
        driver.kick(index)
    assert slow.begun.acquire(timeout=20)
    slow._engine._table.drain_timeout = 0.01
    slow.stop_queue(0)
    with pytest.raises(TimeoutError, match="cancel: still under way"):
        slow.stop_queue(1)
    slow.go.set()
    slow.stop_queue(1)
    slow._engine.drain(20)
    assert (slow.order, [ring.used() for ring in rings]) == ([0], [[], []])


def test_a_queue_is_stopped(guest: MockDomain, slow: Blocking, driver: MmioDriver) -> None:
    """Requests under way end without an answer; another queue goes on; it can be started again."""
    rings = [Ring(guest, RING, 8), Ring(guest, RING + 0x1000, 8)]
    driver.start(*rings)
    slow.go.set()
    slow.stop_queue(0)
    slow.stop_queue(0)
    rings[0].offer(rings[0].chain(writable=[(DATA, 16)]))
    driver.kick()
    rings[1].offer(rings[1].chain(writable=[(DATA, 16)]))
    driver.kick(1)
    assert driver.collect(rings[1], 1) == [(0, 1)]
    assert rings[0].used() == []
    slow.start_queue(0, size=8, **rings[0].at())
    driver.kick()
    assert driver.collect(rings[0], 1) == [(0, 1)]


def test_a_queue_is_stopped_amid_a_request(
    guest: MockDomain, slow: Blocking, driver: MmioDriver
) -> None:
    """The driver waits until nothing of it is under way."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    driver.send(ring, ring.chain(writable=[(DATA, 16)]))
    assert slow.begun.acquire(timeout=20)
    driver.write(0x30, 0)
    thread, _ = in_thread(lambda: driver.write(0x44, 0))
    while not slow._queues[0].stopped:
        pass
    slow.go.set()
    thread.join(20)
    assert (driver.read(0x44), ring.used(), slow._queues) == (0, [], {})


def test_an_invalidate_amid_requests(
    guest: MockDomain, cache: MapCache, slow: Blocking, driver: MmioDriver
) -> None:
    """It waits for those under way. Later ones are carried out after it, and none is stale."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    driver.send(ring, *(ring.chain(writable=[(DATA, 16)]) for _ in range(6)))
    assert slow.begun.acquire(timeout=20)
    thread, _ = in_thread(lambda: guest.balloon_out(0x80_0000, 0x1000, vcpu=1))
    while slow._engine._table._hold is None:
        pass
    slow.go.set()
    assert len(driver.collect(ring, 6)) == 6
    thread.join(20)
    assert (cache.stats().invalidations, cache.stats().stale_dma_released) == (2, 0)
    assert slow.begun._value == 5


def test_the_server_closes_amid_requests(
    guest: MockDomain, cache: MapCache, server: IoreqServer, line: Line, driver: MmioDriver
) -> None:
    """Requests under way are answered; those that wait stay in the ring, without an error."""
    with Blocking(server, limit=2) as slow:
        VirtioMmio(server, BASE, slow, interrupt=line)
        with server, server.serving():
            ring = Ring(guest, RING, 8)
            driver.start(ring)
            driver.send(ring, *(ring.chain(writable=[(DATA, 16)]) for _ in range(6)))
            assert slow.begun.acquire(timeout=20)
            release = threading.Timer(0, slow.go.set)
            release.start()
        release.join()
    assert 2 <= len(ring.used()) <= 6
    assert cache.leases() == ()
    assert server.failures == 0


def test_a_request_after_the_server_has_closed(
    guest: MockDomain, server: IoreqServer, line: Line
) -> None:
    """A thread that still pops one has no vCPU to answer to."""
    with Blocking(server) as slow:
        VirtioMmio(server, BASE, slow, interrupt=line)
        with server:
            ring = Ring(guest, RING, 8)
            slow.start_queue(0, size=8, **ring.at())
        ring.offer(ring.chain(writable=[(DATA, 16)]))
        slow.notify_queue(0)
        assert (ring.used(), slow._broken) == ([], False)


def test_idle_workers_do_not_keep_requests_waiting(
    guest: MockDomain, slow: Blocking, driver: MmioDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the engine's thread has ended, a request starts another one."""
    monkeypatch.setattr(dma, "_IDLE_S", 0.001)
    slow.go.set()
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    for number in range(3):
        driver.send(ring, ring.chain(writable=[(DATA, 16)]))
        assert driver.collect(ring, 1) == [(number, 1)]
        while not slow._engine._idle:
            pass
    assert isinstance(slow._engine, DmaEngine)


def foreign(*_: object) -> int:
    """Fail as code of a subclass may."""
    raise KeyError("foreign")


@pytest.mark.parametrize(
    "job",
    [
        foreign,
        lambda request: Job(request.writable, lambda _: 1, foreign),
        lambda request: Job(request.writable, lambda _: 1, foreign, lambda _: 1),
        lambda request: Job(request.writable, lambda _: 1, lambda _: 1, foreign),
        lambda request: Job(request.writable, None, lambda _: 0),  # type: ignore[arg-type] # wrong
    ],
    ids=["prepare", "end", "end of a quick one", "quick", "no work"],
)
def test_a_subclass_that_raises(
    guest: MockDomain,
    rng: VirtioRng,
    driver: MmioDriver,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    job: Callable[[Request], Job],
) -> None:
    """The driver is told that the device needs a reset, instead of waiting for an answer."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    monkeypatch.setattr(rng, "prepare", job)
    driver.send(ring, ring.chain(writable=[(DATA, 16)]))
    assert driver.handle_interrupt() == 2
    assert driver.read(0x70) == 15 | 0x40
    (record,) = caplog.records  # logged before the driver was told
    assert record.levelno == logging.ERROR
    assert "'rng0' needs a reset by its driver" in record.getMessage()


def test_a_quick_way_that_fails(
    guest: MockDomain, rng: VirtioRng, driver: MmioDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the file or the memory fails, the request is a worker's."""

    def fail(_: object) -> int:
        raise OSError(errno.EIO, "the file")

    ring = Ring(guest, RING, 8)
    driver.start(ring)
    monkeypatch.setattr(
        rng,
        "prepare",
        lambda each: Job(each.writable, lambda _: 5, lambda moved: moved or 0, fail),
    )
    driver.send(ring, ring.chain(writable=[(DATA, 16)]))
    assert driver.collect(ring, 1) == [(0, 5)]


# --- quick requests -------------------------------------------------------------------------------


def test_a_quick_request_is_done_when_the_notification_returns(
    guest: MockDomain, cache: MapCache, rng: VirtioRng, driver: MmioDriver
) -> None:
    """No worker takes part, and several requests have one interrupt."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    ring.offer(*(ring.chain(writable=[(DATA + 16 * n, 16)]) for n in range(4)))
    driver.kick()
    assert ring.used() == [(n, 16) for n in range(4)]
    assert (driver.line.rises, len(rng._engine._idle), cache.leases()) == (1, 1, ())


def test_a_request_that_ends_amid_a_reset(
    guest: MockDomain, slow: Blocking, driver: MmioDriver
) -> None:
    """Its end had begun when the queue was stopped: it is not answered, and its end not called."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    ring.offer(ring.chain(writable=[(DATA, 16)]))
    queue = slow._queues[0]
    request = queue.pop()
    assert request is not None
    queue.stopped = True
    assert not slow._complete(queue, [Done(request, foreign, 1)])
    assert ring.used() == []


def test_requests_before_a_broken_one_are_answered(
    guest: MockDomain, rng: VirtioRng, driver: MmioDriver
) -> None:
    """Although they were taken together; after it the device needs a reset."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    heads = [ring.chain(writable=[(DATA + 16 * n, 16)]) for n in range(2)]
    ring.offer(*heads, 77)
    driver.kick()
    assert ring.used() == [(head, 16) for head in heads]
    assert driver.read(0x70) == 15 | 0x40


def test_no_worker_looks_at_a_ring_that_was_empty(
    guest: MockDomain, slow: Blocking, driver: MmioDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver was asked to notify of the next request; if some were left, a worker looks."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    queue, pops = slow._queues[0], []
    pop = queue.pop

    def counted() -> Request | None:
        pops.append(threading.get_ident())
        return pop()

    monkeypatch.setattr(queue, "pop", counted)
    slow.go.set()
    driver.send(ring, ring.chain(writable=[(DATA, 16)]))
    assert len(driver.collect(ring, 1)) == 1
    slow._engine.drain()
    assert (len(pops), len({*pops})) == (2, 1)
    driver.send(ring, *(ring.chain(writable=[(DATA, 16)]) for _ in range(5)))  # limit: 3
    assert len(driver.collect(ring, 5)) == 5
    slow._engine.drain()
    assert len({*pops}) == 2


def test_a_quick_request_while_the_guest_is_saved(
    guest: MockDomain, server: IoreqServer, rng: VirtioRng, driver: MmioDriver
) -> None:
    """It is held back as each transfer, until the server is resumed."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    server.suspend()
    driver.send(ring, ring.chain(writable=[(DATA, 16)]))
    assert ring.used() == []
    server.resume()
    assert driver.collect(ring, 1) == [(0, 16)]


def test_the_last_request_of_a_round_is_a_workers(
    guest: MockDomain, rng: VirtioRng, driver: MmioDriver
) -> None:
    """Its end begins the next round, so none is left in a ring whose kicks are suppressed."""
    ring = Ring(guest, RING, 4)
    driver.start(ring)
    heads = [ring.chain(writable=[(DATA + 16 * n, 16)]) for n in range(4)]
    for _ in range(5):
        driver.send(ring, *heads)
        assert sorted(driver.collect(ring, 4)) == [(head, 16) for head in heads]
        rng._engine.drain()


def test_a_quick_request_whose_answer_has_no_place(
    guest: MockDomain, rng: VirtioRng, driver: MmioDriver
) -> None:
    """A ring that vanishes before the answer is a broken driver, as with a worker."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    ring.offer(ring.chain(writable=[(DATA, 16)]))
    rng._queues[0]._device = 1 << 40
    driver.kick()
    assert driver.read(0x70) == 15 | 0x40
