"""VirtioPci after a kill: the next process goes on with the same driver."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.devicemodel.pcidriver import BDF
from tests.devicemodel.virtio_kit import ALL_FEATURES, EVENT_IDX, Ring
from tests.devicemodel.virtio_pci_kit import DATA, RING, Slow, VirtioPciDriver
from tests.kit import in_thread, link_of, put_state
from xenmapcache import CorruptImageError, MapCache, MockDomain, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import VirtioPci
from xenmapcache.ioreq import RequestSlot, State
from xenmapcache.mock.ioreq_server import MockIoreqServer


class Dead:
    """The transport of threads that the test cannot kill: they have no effect on the guest."""

    is_running = True

    def interrupt_queue(self, index: int) -> None: ...
    def interrupt_config(self) -> None: ...
    def needs_reset(self) -> None: ...
    def set_line(self) -> None: ...


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "slow0.record"


@contextmanager
def serving(
    guest: MockDomain, path: Path, driver: VirtioPciDriver, *, features: int = 1
) -> Iterator[tuple[IoreqServer, Slow]]:
    """Have a process serve the driver, with what the process before has left."""
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache, recover=True)
        with Slow(server, features=features, record=path) as device:
            VirtioPci(server, BDF, device, interrupt_pin=1).plug()
            with server, pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    link_of(server), "inject_msi", lambda *message: driver.messages.put(message)
                )
                device.resume()
                with server.serving():
                    yield server, device
                    device.go.set()


@contextmanager
def killed(guest: MockDomain, path: Path, driver: VirtioPciDriver, ring: Ring) -> Iterator[None]:
    """Have a process be killed with one request in flight, and one that waits."""
    backend = open_backend("mock", domain=guest)
    cache = MapCache(backend)
    server = IoreqServer(guest, cache)
    device = Slow(server, record=path)
    VirtioPci(server, BDF, device, interrupt_pin=1).plug()
    server.open()
    try:
        with server.serving():
            driver.find()
            driver.start(ring)
            ring.offer(ring.chain(writable=[(DATA, 1)]))
            driver.kick()
            assert device.begun.acquire(timeout=20)
        link = link_of(server)
        assert isinstance(link, MockIoreqServer)
        link.kill()
        assert device.record is not None
        device.record.close()
        yield
    finally:
        device.transport = Dead()
        device.go.set()
        device.close()
        server.close()
        cache.close(force=True)
        backend.close()


def test_the_next_process_goes_on(guest: MockDomain, path: Path) -> None:
    """After a kill the driver goes on, as if it had only waited: BARs, vectors, and requests."""
    driver, ring = VirtioPciDriver(guest), Ring(guest, RING, 8)
    with killed(guest, path, driver, ring):
        with serving(guest, path, driver) as (server, device):
            assert driver.status == 15
            driver.put(0x16, 0, 2)
            found = [driver.get(offset, 2) for offset in (0x10, 0x18, 0x1A, 0x1C, 0x20)]
            assert found == [0, 8, 1, 1, RING & 0xFFFF]
            assert driver.message() == 1  # for what may have been lost
            device.go.set()
            assert driver.message() == 1
            assert ring.used() == [(0, 1)]
            ring.offer(ring.chain(writable=[(DATA, 1)]))
            driver.kick()
            assert driver.message() == 1
            assert ring.used() == [(1, 1)]
            assert server.failures == 0


@pytest.mark.parametrize("state", [State.READY, State.INPROCESS], ids=["new", "begun"])
def test_a_reset_while_no_process_serves(guest: MockDomain, path: Path, state: State) -> None:
    """The next process carries it out; otherwise the driver would wait for ever."""
    driver, ring = VirtioPciDriver(guest), Ring(guest, RING, 8)
    with killed(guest, path, driver, ring):
        (dead,) = guest.ioreq_servers.values()
        thread, seen = in_thread(lambda: driver.put(0x14, 0, 1))
        while RequestSlot(dead.page, 0).state != State.READY:
            os.sched_yield()
        put_state(dead.page, 0, state)
        with serving(guest, path, driver) as (server, device):
            device.go.set()
            thread.join()
            assert seen == [None]
            assert (driver.status, server.failures) == (0, 0)
            driver.start(ring := Ring(guest, RING, 8))
            ring.offer(ring.chain(writable=[(DATA, 1)]))
            driver.kick()
            while not (used := ring.used()):  # the first messages may be older
                assert driver.message() == 1
            assert used == [(0, 1)]


def test_a_process_that_ends_in_order(guest: MockDomain, path: Path) -> None:
    """The record stays, and the next process goes on; before the driver begins, too."""
    driver, ring = VirtioPciDriver(guest), Ring(guest, RING, 8)
    with serving(guest, path, driver):
        driver.find()
        assert driver.begin(ALL_FEATURES & ~EVENT_IDX)
    with serving(guest, path, driver) as (_, device):
        assert (driver.status, device.negotiated) == (11, ALL_FEATURES & ~EVENT_IDX)
        driver.start(ring)
        driver.write(0x3C, 9, 1)  # the last write is to configuration space
    with serving(guest, path, driver) as (_, device):
        assert (driver.read(0x3C, 1), driver.message()) == (9, 1)
        device.go.set()
        ring.offer(ring.chain(writable=[(DATA, 1)]))
        driver.kick()
        assert driver.message() == 1


def test_a_line_that_was_left_high(guest: MockDomain, path: Path) -> None:
    """A driver that has not set DRIVER_OK yet would otherwise get an interrupt without end."""
    driver = VirtioPciDriver(guest)
    with serving(guest, path, driver) as (_, device):
        driver.find(msix=False)
        assert driver.begin(ALL_FEATURES & ~EVENT_IDX)
        device.transport.interrupt_config()
        assert guest.line_level("intx", BDF, 0)
    assert guest.line_level("intx", BDF, 0)
    with serving(guest, path, driver):
        assert not guest.line_level("intx", BDF, 0)


def test_taken_away_after_the_end(guest: MockDomain, cache: MapCache, path: Path) -> None:
    """A device that was closed has no record any longer; to unplug it does no harm."""
    server = IoreqServer(guest, cache)
    with Slow(server, record=path) as device:
        transport = VirtioPci(server, BDF, device)
        transport.plug()
        with server:
            pass
    assert device.record is None
    device.close()
    transport.unplug()
    assert transport.function.config.read(4, 2) == 0


def test_killed_amid_a_reset(guest: MockDomain, path: Path) -> None:
    """No queue is in use any longer: the device is as after the reset, and keeps its place."""
    driver, ring = VirtioPciDriver(guest), Ring(guest, RING, 8)
    with serving(guest, path, driver) as (_, device):
        driver.find()
        driver.start(ring)
        assert device.record is not None
        device.record.clear()
    with serving(guest, path, driver) as (_, device):
        assert (driver.status, device.negotiated) == (0, 0)
        driver.start(ring)
        assert driver.status == 15


def test_killed_while_a_reset_waits(
    guest: MockDomain, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver reads the status until it is 0: the next process ends the reset for it."""
    driver, ring = VirtioPciDriver(guest), Ring(guest, RING, 8)
    with serving(guest, path, driver) as (_, device):
        driver.find()
        driver.start(ring)
        ring.offer(ring.chain(writable=[(DATA, 1)]))
        driver.kick()
        assert device.begun.acquire(timeout=20)
        monkeypatch.setattr(device._engine._table, "drain_timeout", 0.01)
        driver.put(0x14, 0, 1)
        assert driver.status == 15
        monkeypatch.undo()
    with serving(guest, path, driver) as (_, device):
        assert (driver.status, device.negotiated, device._queues) == (0, 0, {})
        driver.start(Ring(guest, RING, 8))
        assert (driver.status, ring.used()) == (15, [])


def test_ends_between_any_two_writes_of_the_set_up(guest: MockDomain, path: Path) -> None:
    """The next process has what the driver has selected, and half of a queue's registers."""
    driver, ring = VirtioPciDriver(guest), Ring(guest, RING, 4)
    features = ALL_FEATURES & ~EVENT_IDX
    writes = [(0x14, status, 1) for status in (0, 1, 3)]
    for half in (0, 1):
        writes += [(0x08, half, 4), (0x0C, features >> 32 * half & 0xFFFFFFFF, 4)]
    writes += [(0x14, 11, 1), (0x10, 0, 2), (0x16, 1, 2), (0x18, 4, 2), (0x1A, 2, 2)]
    for offset, address in (0x20, ring.descriptors), (0x28, ring.driver), (0x30, ring.device):
        writes += [(offset, address, 4), (offset + 4, 0, 4)]
    writes += [(0x1C, 1, 2), (0x14, 15, 1)]
    with serving(guest, path, driver):
        driver.find()
    for write in writes:
        with serving(guest, path, driver):
            driver.put(*write)
    with serving(guest, path, driver) as (_, device):
        assert (driver.status, device.negotiated, [*device._queues]) == (15, features, [1])
        device.go.set()
        ring.offer(ring.chain(writable=[(DATA, 1)]))
        driver.kick(1)
        while driver.message() != 2 or not ring.u16(ring.device + 2):
            pass
        assert ring.used() == [(0, 1)]


def test_ends_before_the_driver_is_ready(guest: MockDomain, path: Path) -> None:
    """The next process uses no buffer, and does not interrupt, before DRIVER_OK."""
    driver, ring = VirtioPciDriver(guest), Ring(guest, RING, 8)
    with serving(guest, path, driver):
        driver.find()
        assert driver.begin(ALL_FEATURES & ~EVENT_IDX)
        driver.set_up(0, ring, 1)
        ring.offer(ring.chain(writable=[(DATA, 1)]))
    with serving(guest, path, driver) as (_, device):
        device.go.set()
        device._engine.drain()
        assert (ring.used(), driver.messages.qsize()) == ([], 0)
        driver.put(0x14, 15, 1)
        driver.kick()
        assert driver.message() == 1
        assert ring.used() == [(0, 1)]


def test_unplug_forgets_the_driver(guest: MockDomain, path: Path) -> None:
    """The next process begins with a new function."""
    driver = VirtioPciDriver(guest)
    with serving(guest, path, driver) as (_, device):
        driver.find()
        assert driver.begin(ALL_FEATURES)
        assert isinstance(device.transport, VirtioPci)
        device.transport.unplug()
    with serving(guest, path, driver):
        assert (driver.read(0x10), driver.read(0x04, 2)) == (0, 0)
        driver.find()
        assert driver.status == 0


def test_records_that_do_not_suit(guest: MockDomain, server: IoreqServer, path: Path) -> None:
    """Other features, and another transport's registers: each is named with a remedy."""
    driver = VirtioPciDriver(guest)
    with serving(guest, path, driver):
        driver.find()
        assert driver.begin(ALL_FEATURES | 1)
    with pytest.raises(ValueError, match="features 0x130000001, and .* offers 0x130000000"):
        with serving(guest, path, driver, features=0):
            pass
    with serving(guest, path, driver) as (_, device):
        pass
    with Slow(IoreqServer(guest, device._server.cache), record=path) as device:
        assert device.record is not None
        device.record.save(b"another")
        with pytest.raises(CorruptImageError, match="has 7 bytes of registers, but virtio-pci"):
            VirtioPci(device._server, BDF, device)
