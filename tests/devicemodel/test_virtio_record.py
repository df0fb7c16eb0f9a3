"""What outlives a killed process: the file, each step of a queue, and a device with its driver."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.devicemodel.virtio_kit import ALL_FEATURES, EVENT_IDX, Line, MmioDriver, Ring
from tests.kit import in_thread, link_of, put_state
from xenmapcache import CorruptImageError, MapCache, MockDomain, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import (
    BrokenDriverError,
    Job,
    Request,
    VirtioDevice,
    VirtioMmio,
    VirtioRng,
    Virtqueue,
)
from xenmapcache.devicemodel.virtio.record import DeviceRecord, QueueRecord
from xenmapcache.guest import Segments
from xenmapcache.ioreq import RequestSlot, State
from xenmapcache.mock.ioreq_server import MockIoreqServer

BASE, RING, DATA, SIZE = 0xFE00_0000, 0x10000, 0x40000, 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk0.record"


@contextmanager
def a_record(
    path: Path, domid: int = 1, device: int = 2, sizes: tuple[int, ...] = (SIZE, 3)
) -> Iterator[DeviceRecord]:
    record = DeviceRecord(path, domid, device, sizes)
    try:
        yield record
    finally:
        record.close()


# --- the file -------------------------------------------------------------------------------------


def test_a_record_is_kept(path: Path) -> None:
    """What was stored is there for the next process, queue by queue; nobody else may read it."""
    with a_record(path) as record:
        assert (record.load(), [each.addresses for each in record.queues]) == (b"", [None, None])
        record.queues[1].start(size=2, descriptors=0x1000, driver=0x2000, device=2**64 - 4)
        record.queues[1].begin(2)
        record.save(b"first")
        record.save(b"second")
    assert path.stat().st_mode & 0o777 == 0o600
    with a_record(path) as record:
        assert record.load() == b"second"
        assert record.queues[0].addresses is None
        assert record.queues[1].addresses == {
            "size": 2,
            "descriptors": 0x1000,
            "driver": 0x2000,
            "device": 2**64 - 4,
        }
        assert record.queues[1].settle(0) == [2]
        record.queues[1].start(size=2, descriptors=0, driver=0, device=0)
        assert record.queues[1].settle(0) == []
        record.clear()
        assert record.queues[1].addresses is None


@pytest.mark.parametrize(
    ("domid", "device", "sizes"), [(2, 2, (SIZE, 3)), (1, 4, (SIZE, 3)), (1, 2, (SIZE, 64))]
)
def test_a_record_of_another_device(
    path: Path, domid: int, device: int, sizes: tuple[int, ...]
) -> None:
    """That of another domain, kind of device, or number of entries begins empty."""
    with a_record(path) as record:
        record.save(b"registers")
        record.queues[0].start(size=2, descriptors=0, driver=0, device=0)
    with a_record(path, domid, device, sizes) as record:
        assert (record.load(), record.queues[0].addresses) == (b"", None)


def test_a_record_that_is_in_use(path: Path) -> None:
    """Two processes cannot serve the same device; after a refusal nothing is open."""
    before = os.listdir("/proc/self/fd")
    with a_record(path) as record:
        with (
            pytest.raises(BlockingIOError, match=f"another process serves .*{path}"),
            a_record(path),
        ):
            pass
        record.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_record_that_was_not_finished(path: Path) -> None:
    """A process that is killed while it makes the file leaves one that can be used."""
    with a_record(path):
        length = path.stat().st_size
    for content in b"", bytes(length):
        path.write_bytes(content)
        with a_record(path) as record:
            assert record.load() == b""


@pytest.mark.parametrize("content", [b"precious", bytes(1 << 20)], ids=["text", "an empty disk"])
def test_a_file_with_other_content(path: Path, content: bytes) -> None:
    """A name that was mistyped costs no data, and after the refusal nothing is open."""
    before = os.listdir("/proc/self/fd")
    path.write_bytes(content)
    with pytest.raises(CorruptImageError, match=f"{path} is not the record .* name another file"):
        DeviceRecord(path, 1, 2, (SIZE,))
    assert path.read_bytes() == content
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_link_is_not_followed(path: Path) -> None:
    """Where others may write, a link could lead to any file."""
    path.symlink_to(path.with_name("other"))
    with pytest.raises(OSError, match="Too many levels"), a_record(path):
        pass


def test_registers_that_do_not_fit(path: Path) -> None:
    """4094 bytes do, and the ones before stay if one more is refused."""
    with a_record(path) as record:
        record.save(b"x" * 4094)
        with pytest.raises(ValueError, match="registers of 4095 bytes must be at most 4094"):
            record.save(b"y" * 4095)
        assert record.load() == b"x" * 4094


def test_registers_are_old_or_new(path: Path) -> None:
    """A process that is killed while it saves leaves what was saved before."""
    with a_record(path) as record:
        record.save(b"old")
        flag = record._memory[24]
        record.save(b"new")
        record._memory[24] = flag  # the last store of `save`
        assert record.load() == b"old"


def test_a_corrupt_record(path: Path) -> None:
    """A length that cannot be is found."""
    with a_record(path) as record:
        record._memory[64:66] = b"\xff\xff"
        with pytest.raises(CorruptImageError, match=r"has 65535 bytes of registers, .* remove"):
            record.load()


# --- each step of a queue -------------------------------------------------------------------------


class KilledError(BaseException):
    """The process is dead."""


class Fuse:
    """Kills the process before a certain store."""

    def __init__(self, patch: pytest.MonkeyPatch, steps: int) -> None:
        self.left = steps
        for owner, name in (
            (QueueRecord, "_put"),
            (QueueRecord, "_mark"),
            (Virtqueue, "_write"),
        ):
            patch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, function: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object) -> object:
            if not self.left:
                raise KilledError
            self.left -= 1
            return function(*arguments)

        return counted


def open_queue(cache: MapCache, ring: Ring, record: QueueRecord) -> Virtqueue:
    features = EVENT_IDX if ring.events else 0
    return Virtqueue(cache, 0, size=SIZE, features=features, record=record, **ring.at())


@pytest.mark.parametrize("events", [False, True], ids=["flags", "event index"])
def test_a_kill_at_each_step(guest: MockDomain, cache: MapCache, path: Path, events: bool) -> None:
    """Whenever the process is killed, each request is used once, and none is lost."""
    steps = -1
    finished = False
    while not finished:
        steps += 1
        ring = Ring(guest, RING, SIZE, events=events)
        heads = [ring.chain(writable=[(DATA + 16 * n, 16)]) for n in range(SIZE)]
        with a_record(path) as record, pytest.MonkeyPatch.context() as patch:
            record.queues[0].start(size=SIZE, **ring.at())
            used: list[tuple[int, int]] = []
            Fuse(patch, steps)
            try:
                queue = open_queue(cache, ring, record.queues[0])
                for _ in range(2):
                    used += ring.used()
                    ring.offer(*heads[:3])
                    first, second, third = (queue.pop() for _ in range(3))
                    assert first is not None
                    assert second is not None
                    assert third is not None
                    assert queue.pop() is None
                    queue.push((second, 1), (third, 2))
                    queue.push((first, 3))
                finished = True
            except KilledError:
                pass
        with a_record(path) as record:
            queue = open_queue(cache, ring, record.queues[0])
            requests = queue.resume()
            while (request := queue.pop()) is not None:
                requests.append(request)
            queue.push(*((request, 4) for request in requests))
            # What was offered is used, each head as often as it was offered.
            found = sorted(head for head, _ in used + ring.used())
            assert found == sorted(heads[:3] * (ring.idx // 3))
            assert record.queues[0].settle(ring.idx) == []
    assert steps > 36  # six requests of six stores each


def test_a_ring_that_contradicts_the_record(guest: MockDomain, cache: MapCache, path: Path) -> None:
    """If the driver has written idx of the device area, the queue is broken."""
    ring = Ring(guest, RING, SIZE)
    with a_record(path) as record:
        record.queues[0].start(size=SIZE, **ring.at())
        ring.put_u16(ring.device + 2, 2)
        with pytest.raises(BrokenDriverError, match="idx 2 of its device area was not written"):
            open_queue(cache, ring, record.queues[0]).resume()


def test_a_queue_without_a_record(guest: MockDomain, cache: MapCache) -> None:
    """There is nothing to resume."""
    ring = Ring(guest, RING, SIZE)
    queue = Virtqueue(cache, 0, size=SIZE, **ring.at(), features=0)
    with pytest.raises(ValueError, match="queue 0: it has no record to resume from"):
        queue.resume()


# --- a device -------------------------------------------------------------------------------------


class Slow(VirtioDevice):
    """Requests end when the test says so; each writes this process's letter."""

    device_id = 42
    queue_sizes = (8, 8)

    def __init__(
        self,
        server: IoreqServer,
        letter: bytes,
        path: Path,
        *,
        features: int = 0,
        limit: int = 3,
        workers: int = 1,
    ) -> None:
        super().__init__(
            server, name="slow0", features=features, limit=limit, workers=workers, record=path
        )
        self.letter = letter
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)

    def prepare(self, request: Request) -> Job:
        def work(memory: Segments) -> int:
            self.begun.release()
            assert self.go.wait(20)
            memory[:1] = self.letter
            return 1

        return Job(request.writable, work, lambda moved: moved or 0)


@pytest.fixture
def driver(guest: MockDomain) -> MmioDriver:
    return MmioDriver(guest, BASE, Line())


def make(
    server: IoreqServer, driver: MmioDriver, path: Path, letter: bytes, **options: int
) -> Slow:
    """Return a device over virtio-mmio."""
    device = Slow(server, letter, path, **options)
    VirtioMmio(server, BASE, device, interrupt=driver.line)
    return device


@contextmanager
def killed(
    guest: MockDomain, driver: MmioDriver, path: Path, prepare: Callable[[Slow], object]
) -> Iterator[None]:
    """Have a process serve the driver until ``prepare`` returns, and kill it then."""
    with open_backend("mock", domain=guest) as backend:
        cache = MapCache(backend)
        server = IoreqServer(guest, cache)
        device = make(server, driver, path, b"1", workers=2)
        server.open()
        try:
            with server.serving():
                prepare(device)
            link = link_of(server)
            assert isinstance(link, MockIoreqServer)
            link.kill()
            assert device.record is not None
            device.record.close()  # as the kernel does; no store reaches it any longer
            yield
        finally:
            device.transport = VirtioMmioOfADeadProcess()
            device.go.set()
            device.close()
            server.close()
            cache.close(force=True)


class VirtioMmioOfADeadProcess:
    """Threads that the test cannot kill have no effect on the guest."""

    is_running = True

    def interrupt_queue(self, index: int) -> None: ...
    def interrupt_config(self) -> None: ...
    def needs_reset(self) -> None: ...
    def set_line(self) -> None: ...


@pytest.mark.parametrize("events", [False, True], ids=["flags", "event index"])
def test_the_next_process_goes_on(
    guest: MockDomain, cache: MapCache, path: Path, driver: MmioDriver, events: bool
) -> None:
    """Requests in flight are carried out again, waiting ones too; each is answered once."""
    rings = [Ring(guest, RING + 0x1000 * n, 8, events=events) for n in range(2)]
    heads = [rings[1].chain(writable=[(DATA + 16 * n, 16)]) for n in range(8)]

    def prepare(device: Slow) -> None:
        driver.start(*rings)
        rings[1].offer(*heads[:7])
        driver.kick(1)
        for _ in range(2):
            assert device.begun.acquire(timeout=20)

    with killed(guest, driver, path, prepare):
        rings[1].offer(heads[7])  # and its notification is lost
        server = IoreqServer(guest, cache, recover=True)
        with make(server, driver, path, b"2", limit=1, workers=2) as device:
            with server:
                device.resume()
                with server.serving():
                    assert driver.read(0x70) == 15
                    driver.write(0x30, 1)
                    assert driver.read(0x44) == 1
                    device.go.set()
                    used = driver.collect(rings[1], 8)
                    assert sorted(used) == [(head, 1) for head in heads]
                    assert [guest.read(DATA + 16 * n, 1) for n in range(8)] == [b"2"] * 8
                    rings[0].offer(rings[0].chain(writable=[(DATA, 16)]))
                    driver.kick()
                    assert driver.collect(rings[0], 1) == [(0, 1)]
                    ring = Ring(guest, RING, 8)
                    driver.start(ring)
                    assert device.record is not None
                    assert device.record.queues[1].addresses is None
                    driver.send(ring, ring.chain(writable=[(DATA, 16)]))
                    assert driver.collect(ring, 1) == [(0, 1)]
    assert (server.failures, cache.leases()) == (0, ())


@pytest.mark.parametrize("state", [State.READY, State.INPROCESS], ids=["new", "begun"])
def test_a_reset_while_no_process_serves(
    guest: MockDomain, cache: MapCache, path: Path, driver: MmioDriver, state: State
) -> None:
    """The next process carries it out; otherwise the driver would wait for ever."""
    with killed(guest, driver, path, begin(driver, Ring(guest, RING, 8))):
        (dead,) = guest.ioreq_servers.values()
        thread, seen = in_thread(lambda: driver.write(0x70, 0))
        while RequestSlot(dead.page, 0).state != State.READY:
            os.sched_yield()
        put_state(dead.page, 0, state)
        server = IoreqServer(guest, cache, recover=True)
        with make(server, driver, path, b"2") as device, server:
            device.resume()
            with server.serving():
                thread.join()
                assert seen == [None]
                assert (driver.read(0x70), server.failures) == (0, 0)


def test_an_orderly_end_is_no_other(
    guest: MockDomain, cache: MapCache, path: Path, driver: MmioDriver
) -> None:
    """A process that was asked to end leaves the record, and the next one goes on."""
    ring = Ring(guest, RING, 8)
    for number in range(3):
        server = IoreqServer(guest, cache)
        with make(server, driver, path, b"x") as device, server:
            device.go.set()
            device.resume()
            with server.serving():
                if not number:
                    driver.start(ring)
                driver.send(ring, ring.chain(writable=[(DATA, 16)]))
                assert driver.collect(ring, 1) == [(number, 1)]


def test_a_close_that_times_out(
    guest: MockDomain,
    cache: MapCache,
    path: Path,
    driver: MmioDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No other process takes over while a request of this one may still write."""
    server = IoreqServer(guest, cache)
    device = make(server, driver, path, b"1")
    monkeypatch.setattr(device._engine._table, "drain_timeout", 0.01)
    ring = Ring(guest, RING, 8)
    with server, server.serving():
        driver.start(ring)
        driver.send(ring, ring.chain(writable=[(DATA, 16)]))
        assert device.begun.acquire(timeout=20)
        with pytest.raises(TimeoutError):
            device.close()
        with pytest.raises(BlockingIOError):
            DeviceRecord(path, guest.domid, Slow.device_id, Slow.queue_sizes)
        device.go.set()
        device._engine.drain(20)
    device.close()
    with a_record(path, guest.domid, Slow.device_id, Slow.queue_sizes) as record:
        assert record.queues[0].settle(0) == [0]  # cancelled, so it is the next process's
    assert ring.used() == []


@pytest.mark.parametrize("register", [0x70, 0x44], ids=["of the device", "of a queue"])
def test_a_kill_while_a_reset_waits(
    guest: MockDomain, cache: MapCache, path: Path, driver: MmioDriver, register: int
) -> None:
    """The next process does not carry out again what the driver has given up."""
    ring = Ring(guest, RING, 8)

    def prepare(device: Slow) -> None:
        driver.start(ring)
        driver.send(ring, ring.chain(writable=[(DATA, 16)]))
        assert device.begun.acquire(timeout=20)
        device._engine._table.drain_timeout = 0.01
        driver.write(0x30, 0)
        driver.write(register, 0)
        assert (driver.read(0x70), driver.read(0x44)) == (15, 1)

    with killed(guest, driver, path, prepare):
        guest.write(DATA, b"#" * 16)
        server = IoreqServer(guest, cache, recover=True)
        with make(server, driver, path, b"2") as device, server, server.serving():
            device.resume()
            device.go.set()
            device._engine.drain(20)
            assert (driver.read(0x70), driver.read(0x44)) == (0, 0)
        assert guest.read(DATA, 16) == b"#" * 16


def test_a_record_without_a_driver(server: IoreqServer, path: Path, driver: MmioDriver) -> None:
    """Without a record, or with a new one, there is nothing to resume; features are kept."""
    with VirtioRng(server) as rng:
        rng.resume()
    for _ in range(2):
        with make(server, driver, path, b"x") as device:
            device.resume()
            assert device._queues == {}
            assert isinstance(device.transport, VirtioMmio)
            device.transport.region.release()


def begin(driver: MmioDriver, ring: Ring) -> Callable[[Slow], object]:
    return lambda device: driver.start(ring)


def test_a_driver_whose_ring_is_broken_by_then(
    guest: MockDomain, cache: MapCache, path: Path, driver: MmioDriver
) -> None:
    """The device needs a reset, and works after it."""
    ring = Ring(guest, RING, 8)
    with killed(guest, driver, path, begin(driver, ring)):
        ring.put_u16(ring.device + 2, 77)
        server = IoreqServer(guest, cache, recover=True)
        with make(server, driver, path, b"2") as device, server:
            device.resume()
            with server.serving():
                assert driver.read(0x70) == 15 | 0x40
                device.go.set()
                ring = Ring(guest, RING, 8)
                driver.start(ring)
                driver.send(ring, ring.chain(writable=[(DATA, 16)]))
                assert driver.collect(ring, 1) == [(0, 1)]


def test_a_kill_amid_a_reset(
    guest: MockDomain, cache: MapCache, path: Path, driver: MmioDriver
) -> None:
    """If no queue is in use, the status is that of a device that was reset."""

    def prepare(device: Slow) -> None:
        driver.start(Ring(guest, RING, 8))
        device.reset()  # and the transport has not saved it

    with killed(guest, driver, path, prepare):
        server = IoreqServer(guest, cache, recover=True)
        with make(server, driver, path, b"2") as device, server, server.serving():
            device.resume()
            assert driver.read(0x70) == 0


def test_a_line_that_was_left_high(
    guest: MockDomain, cache: MapCache, path: Path, driver: MmioDriver
) -> None:
    """A driver that has not set DRIVER_OK yet would otherwise get an interrupt without end."""

    def prepare(device: Slow) -> None:
        driver.begin(ALL_FEATURES & ~EVENT_IDX)
        device.transport.interrupt_config()

    with killed(guest, driver, path, prepare):
        assert driver.line.level
        server = IoreqServer(guest, cache, recover=True)
        with make(server, driver, path, b"2") as device, server:
            device.resume()
            assert not driver.line.level


def test_a_kill_amid_the_set_up(
    guest: MockDomain, cache: MapCache, path: Path, driver: MmioDriver
) -> None:
    """The steps that were done are kept; the driver goes on."""
    ring = Ring(guest, RING, 8)
    with killed(guest, driver, path, lambda _: driver.begin(ALL_FEATURES & ~EVENT_IDX)):
        server = IoreqServer(guest, cache, recover=True)
        with make(server, driver, path, b"2") as device, server, server.serving():
            device.go.set()
            driver.set_up(0, 8, **ring.at())
            driver.write(0x70, 15)
            driver.send(ring, ring.chain(writable=[(DATA, 16)]))
            assert driver.collect(ring, 1) == [(0, 1)]


def test_ends_between_any_two_writes_of_the_set_up(
    guest: MockDomain,
    cache: MapCache,
    path: Path,
    driver: MmioDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next process has what the driver has selected, and half of a queue's registers."""
    ring = Ring(guest, RING, 8)

    def write(register: int, value: int, size: int = 4) -> None:
        server = IoreqServer(guest, cache, recover=True)
        with make(server, driver, path, b"1"), server, server.serving():
            guest.mmio_write(BASE + register, value, size)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "write", write)
        patch.setattr(driver, "read", lambda _: 8)
        driver.begin(ALL_FEATURES & ~EVENT_IDX)
        driver.set_up(1, 8, **ring.at())
        driver.write(0x70, 15)
    server = IoreqServer(guest, cache, recover=True)
    with make(server, driver, path, b"2") as device, server:
        device.resume()
        assert (device.negotiated, [*device._queues]) == (ALL_FEATURES & ~EVENT_IDX, [1])
        device.go.set()
        with server.serving():
            ring.offer(ring.chain(writable=[(DATA, 16)]))
            driver.kick(1)
            assert driver.collect(ring, 1) == [(0, 1)]


def test_a_queue_that_was_stopped_stays_so(
    guest: MockDomain, cache: MapCache, path: Path, driver: MmioDriver
) -> None:
    """The next process does not touch its ring."""
    rings = [Ring(guest, RING + 0x1000 * n, 8) for n in range(2)]

    def prepare(device: Slow) -> None:
        driver.start(*rings)
        driver.write(0x30, 0)
        driver.write(0x44, 0)

    with killed(guest, driver, path, prepare):
        rings[0].offer(rings[0].chain(writable=[(DATA, 16)]))
        server = IoreqServer(guest, cache, recover=True)
        with make(server, driver, path, b"2") as device, server, server.serving():
            device.go.set()
            device.resume()
            assert driver.read(0x44) == 0
            assert list(device._queues) == [1]
    assert rings[0].used() == []


def test_features_that_are_not_offered_any_longer(
    guest: MockDomain, server: IoreqServer, path: Path, driver: MmioDriver
) -> None:
    """The driver cannot go on with another device, and the message says what to do."""
    with make(server, driver, path, b"1", features=1) as device, server, server.serving():
        assert driver.begin(ALL_FEATURES | 1)
    other = IoreqServer(guest, server.cache)
    with Slow(other, b"2", path) as device:
        with pytest.raises(ValueError, match=r"has accepted features 0x130000001, and .*before"):
            VirtioMmio(other, BASE, device, interrupt=driver.line)


def test_registers_of_another_transport(
    server: IoreqServer, path: Path, driver: MmioDriver
) -> None:
    """They are not taken for those of virtio-mmio."""
    with Slow(server, b"1", path) as device:
        assert device.record is not None
        device.record.save(b"PCI")
        with pytest.raises(CorruptImageError, match="has 3 bytes of registers, but virtio-mmio"):
            VirtioMmio(server, BASE, device, interrupt=driver.line)
