"""VirtioDevice: requests that a device keeps until it can carry them out, as a console's input."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.devicemodel.virtio_kit import Line, MmioDriver, Ring
from tests.kit import in_thread
from xenmapcache import MapCache, MockDomain
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import BrokenDriverError, Job, Request, VirtioDevice, VirtioMmio
from xenmapcache.guest import Segments

BASE, RING, DATA = 0xFE00_0000, 0x10000, 0x40000
RECEIVE, TRANSMIT = 0, 1


class Console(VirtioDevice):
    """Queue 0 has room for input, and queue 1 has output."""

    device_id = 3
    queue_sizes = (64, 64)

    def __init__(self, server: IoreqServer, *, limit: int = 64, record: Path | None = None) -> None:
        super().__init__(server, name="console0", limit=limit, record=record)
        self.pending = bytearray()
        self.output = bytearray()
        self.prepared: list[tuple[int, int]] = []

    def prepare(self, request: Request) -> Job | None:
        self.prepared.append((request.queue, request.head))
        if request.queue == TRANSMIT:
            self.output += request.readable.read()
            return Job(request.writable, len, lambda moved: moved or 0)
        if not len(request.writable):
            raise BrokenDriverError(f"{request!r} has no room for input")
        data = bytes(self.pending[: len(request.writable)])
        del self.pending[: len(data)]
        if not data:
            return None

        def work(memory: Segments) -> int:
            memory[:] = data
            return len(data)

        return Job(request.writable[: len(data)], work, lambda moved: moved or 0)

    def feed(self, data: bytes) -> None:
        self.pending += data
        self.retry(RECEIVE)


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def driver(guest: MockDomain, line: Line) -> MmioDriver:
    return MmioDriver(guest, BASE, line)


@pytest.fixture
def console(server: IoreqServer, line: Line) -> Iterator[Console]:
    with Console(server) as console:
        VirtioMmio(server, BASE, console, interrupt=line)
        with server, server.serving():
            yield console


def make_rings(guest: MockDomain, size: int = 8) -> tuple[Ring, Ring]:
    return Ring(guest, RING, size, events=True), Ring(guest, RING + 0x2000, size, events=True)


def offer_room(ring: Ring, driver: MmioDriver, count: int, length: int = 4) -> list[int]:
    """Make buffers available, one after the other in memory, and notify the device."""
    heads = [ring.chain(writable=[(DATA + length * n, length)]) for n in range(count)]
    driver.send(ring, *heads)
    return heads


def test_input_comes_after_the_buffers(
    guest: MockDomain, cache: MapCache, console: Console, driver: MmioDriver
) -> None:
    """Buffers wait without a lease; data goes to the oldest; output is not held up."""
    receive, transmit = make_rings(guest)
    driver.start(receive, transmit)
    heads = offer_room(receive, driver, 3)
    assert [*console._queues[RECEIVE].kept] == [*console._queues[RECEIVE].in_flight.values()]
    assert cache.leases() == ()
    guest.write(DATA + 0x100, b"out")
    transmit.offer(transmit.chain(readable=[(DATA + 0x100, 3)]))
    driver.kick(TRANSMIT)
    assert driver.collect(transmit, 1) == [(0, 0)]
    assert console.output == b"out"
    assert receive.used() == []
    console.feed(b"abcdef")
    assert driver.collect(receive, 2) == [(heads[0], 4), (heads[1], 2)]
    assert guest.read(DATA, 6) == b"abcdef"
    console.feed(b"g")
    assert driver.collect(receive, 1) == [(heads[2], 1)]
    console.feed(b"later")
    offer_room(receive, driver, 1, 8)
    assert driver.collect(receive, 1)[0][1] == 5
    assert guest.read(DATA, 5) == b"later"
    assert {queue for queue, _ in console.prepared} == {RECEIVE, TRANSMIT}


def test_all_entries_are_kept(guest: MockDomain, console: Console, driver: MmioDriver) -> None:
    """A queue that is full of them is taken in one round, and empties in order."""
    receive, transmit = make_rings(guest, 64)
    driver.start(receive, transmit)
    heads = offer_room(receive, driver, 64, 1)
    assert len(console._queues[RECEIVE].kept) == 64
    text = bytes(range(64))
    console.feed(text)
    assert driver.collect(receive, 64) == [(head, 1) for head in heads]
    assert guest.read(DATA, 64) == text
    assert offer_room(receive, driver, 1) == [0]
    assert len(console._queues[RECEIVE].kept) == 1


def test_a_limit_counts_them(server: IoreqServer, guest: MockDomain, line: Line) -> None:
    """The end of one has a worker pop the next ones, which may be kept, too."""
    with Console(server, limit=2) as console:
        VirtioMmio(server, BASE, console, interrupt=line)
        driver = MmioDriver(guest, BASE, line)
        with server, server.serving():
            receive, transmit = make_rings(guest)
            driver.start(receive, transmit)
            heads = offer_room(receive, driver, 6)
            assert len(console._queues[RECEIVE].kept) == 2
            for number, head in enumerate(heads):
                console.feed(b"%d" % number)
                assert driver.collect(receive, 1) == [(head, 1)]
                console._engine.drain()
                assert len(console._queues[RECEIVE].kept) == min(2, 5 - number)
            assert guest.read(DATA, 24).replace(b"\0", b"") == b"012345"


def test_retry_waits_for_a_prepare_that_saw_nothing(
    guest: MockDomain, console: Console, driver: MmioDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Input that comes while a buffer is looked at is not left behind."""
    receive, transmit = make_rings(guest)
    driver.start(receive, transmit)
    prepare, looked, go = console.prepare, threading.Event(), threading.Event()

    def slow_prepare(request: Request) -> Job | None:
        job = prepare(request)
        looked.set()
        assert go.wait(20)
        return job

    monkeypatch.setattr(console, "prepare", slow_prepare)
    vcpu, _ = in_thread(partial(offer_room, receive, driver, 1))
    assert looked.wait(20)
    feeder, _ = in_thread(partial(console.feed, b"x"))
    go.set()
    vcpu.join()
    feeder.join()
    assert driver.collect(receive, 1) == [(0, 1)]


def test_a_reset_forgets_them(guest: MockDomain, console: Console, driver: MmioDriver) -> None:
    """Input goes to buffers of the driver that comes after it, and to no others."""
    for _ in range(2):
        receive, transmit = make_rings(guest)
        driver.start(receive, transmit)
        offer_room(receive, driver, 2)
    assert len(console._queues[RECEIVE].kept) == 2
    driver.write(0x70, 0)
    calls = len(console.prepared)
    console.feed(b"late")
    assert len(console.prepared) == calls
    assert console.pending == b"late"


@pytest.mark.parametrize("cause", ["stopped", "broken"])
def test_a_queue_that_is_not_served_keeps_them(
    guest: MockDomain, console: Console, driver: MmioDriver, cause: str
) -> None:
    """No request is prepared while a reset is under way, or before it has come."""
    receive, transmit = make_rings(guest)
    driver.start(receive, transmit)
    offer_room(receive, driver, 1)
    if cause == "stopped":
        console._queues[RECEIVE].stopped = True
    else:
        driver.send(receive, receive.chain(readable=[(DATA, 1)]))
        assert driver.read(0x70) & 0x40
    console.feed(b"x")
    assert console.pending == b"x"


def test_a_broken_one_after_kept_ones(
    guest: MockDomain, console: Console, driver: MmioDriver, caplog: pytest.LogCaptureFixture
) -> None:
    """The device needs a reset, and serves the next driver."""
    caplog.set_level(logging.INFO, "xenmapcache.devicemodel")
    receive, transmit = make_rings(guest)
    driver.start(receive, transmit)
    heads = [receive.chain(writable=[(DATA, 4)]), receive.chain(readable=[(DATA, 4)])]
    driver.send(receive, *heads)
    assert driver.read(0x70) & 0x40
    assert "has no room for input" in caplog.text
    receive, transmit = make_rings(guest)
    driver.start(receive, transmit)
    console.feed(b"x")
    offer_room(receive, driver, 1)
    assert driver.collect(receive, 1) == [(0, 1)]


def test_ballooning_does_not_wait_for_them(
    guest: MockDomain, cache: MapCache, console: Console, driver: MmioDriver
) -> None:
    """A kept request has no lease; its data goes to the page that the guest has then."""
    receive, transmit = make_rings(guest)
    driver.start(receive, transmit)
    offer_room(receive, driver, 1)
    guest.balloon_out(DATA, 0x1000)
    guest.balloon_in(DATA, 0x1000)
    console.feed(b"new")
    assert driver.collect(receive, 1) == [(0, 3)]
    assert guest.read(DATA, 3) == b"new"
    stats = cache.stats()
    assert (stats.stale_dma_held, stats.stale_dma_released) == (0, 0)


def test_a_reset_between_prepare_and_the_engine(
    guest: MockDomain, cache: MapCache, console: Console, driver: MmioDriver
) -> None:
    """A request is not begun if the queue was stopped after it was prepared.

    Its transfer would write to memory that the guest uses for something else since the reset.
    """
    receive, transmit = make_rings(guest)
    driver.start(receive, transmit)
    offer_room(receive, driver, 1)
    queue = console._queues[RECEIVE]
    job = Job(queue.kept[0].writable, lambda memory: pytest.fail("begun"), lambda moved: 0)
    console.stop_queue(RECEIVE)
    console._submit(queue, queue.kept[0], job)
    assert console._engine.transfers == ()
    console._engine.drain()
    assert (receive.used(), cache.leases()) == ([], ())


def test_the_next_process_keeps_them_again(
    guest: MockDomain, cache: MapCache, line: Line, tmp_path: Path
) -> None:
    """After a kill they are prepared again, in their order, and answered once."""
    driver = MmioDriver(guest, BASE, line)
    receive, transmit = make_rings(guest)
    record = tmp_path / "console.record"
    heads: list[int] = []
    for process in range(2):
        server = IoreqServer(guest, cache)
        with Console(server, record=record) as console:
            VirtioMmio(server, BASE, console, interrupt=line)
            with server:
                console.resume()
                with server.serving():
                    if process == 0:
                        driver.start(receive, transmit)
                        heads = offer_room(receive, driver, 3)
                        continue
                    assert [request.head for request in console._queues[RECEIVE].kept] == heads
                    console.feed(b"abcdefgh")
                    assert driver.collect(receive, 2) == [(heads[0], 4), (heads[1], 4)]
