"""VirtioPci: what a driver finds, sets up and hears of, by MSI-X, by the pin, and by the window."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.devicemodel.pcidriver import BDF, MEMORY, claims_of
from tests.devicemodel.virtio_kit import ALL_FEATURES, EVENT_IDX, Line, Ring
from tests.devicemodel.virtio_pci_kit import (
    BAR,
    COMMON,
    DATA,
    DEVICE,
    ISR,
    NO_VECTOR,
    NOTIFY,
    RING,
    VENDOR_CAPABILITY,
    WINDOW,
    Slow,
    VirtioPciDriver,
)
from tests.effort import examples
from tests.kit import link_of
from xenmapcache import MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer, PciBus
from xenmapcache.devicemodel.virtio import VirtioPci, VirtioRng


@pytest.fixture
def slow(server: IoreqServer) -> Iterator[Slow]:
    with Slow(server) as slow:
        yield slow


@pytest.fixture
def served(server: IoreqServer, slow: Slow) -> Iterator[IoreqServer]:
    with server, server.serving():
        yield server
        slow.go.set()  # or the server's end would wait for its transfers


@pytest.fixture
def pci(served: IoreqServer, slow: Slow) -> VirtioPci:
    pci = VirtioPci(served, BDF, slow, class_code=0x018000, interrupt_pin=1)
    pci.plug()
    return pci


@pytest.fixture
def driver(
    guest: MockDomain, served: IoreqServer, pci: VirtioPci, monkeypatch: pytest.MonkeyPatch
) -> VirtioPciDriver:
    driver = VirtioPciDriver(guest)
    monkeypatch.setattr(
        link_of(served), "inject_msi", lambda *message: driver.messages.put(message)
    )
    driver.find()
    return driver


@pytest.fixture
def line(served: IoreqServer, monkeypatch: pytest.MonkeyPatch) -> Line:
    line = Line()
    monkeypatch.setattr(link_of(served), "set_pci_intx", lambda *setting: line(setting[-1]))
    return line


# --- what a driver finds --------------------------------------------------------------------------


def test_identity(driver: VirtioPciDriver) -> None:
    """A modern device of virtio's vendor, and one capability for each area."""
    assert driver.read(0) == (0x1040 + 42) << 16 | 0x1AF4
    assert driver.read(0x08) == 0x0180_0001
    assert driver.read(0x2C) == 0x1100_1AF4
    assert driver.read(0x3D, 1) == 1
    kinds = [driver.read(at + 3, 1) for at, n in driver.capabilities() if n == VENDOR_CAPABILITY]
    assert sorted(kinds) == [COMMON, NOTIFY, ISR, DEVICE, WINDOW]
    notify = next(at for at, n in driver.capabilities() if (n, driver.read(at + 3, 1)) == (9, 2))
    assert (driver.read(notify + 2, 1), driver.read(notify + 16)) == (20, 4)


def test_features_come_in_halves(driver: VirtioPciDriver, slow: Slow) -> None:
    """64 bits; further halves are 0 and cannot be accepted."""
    assert driver.features() == ALL_FEATURES | 1
    driver.put(0, 2, 4)
    driver.put(8, 2, 4)
    driver.put(0xC, 5, 4)
    assert (driver.get(4, 4), driver.get(0xC, 4)) == (0, 0)
    assert driver.begin(ALL_FEATURES)
    assert (driver.get(0xC, 4), slow.negotiated) == (1, ALL_FEATURES)


@pytest.mark.parametrize("features", [1, 1 << 32 | 1 << 40])
def test_features_that_are_refused(driver: VirtioPciDriver, features: int) -> None:
    """FEATURES_OK does not stay: without VERSION_1, or with what was not offered."""
    assert not driver.begin(features)
    assert driver.status == 3


def test_features_are_fixed_when_they_are_accepted(driver: VirtioPciDriver, slow: Slow) -> None:
    """What the driver writes then has no effect until a reset."""
    assert driver.begin(1 << 32)
    driver.put(8, 0, 4)
    driver.put(0xC, 1, 4)
    driver.put(0x14, 11, 1)
    assert (driver.get(0xC, 4), slow.negotiated) == (0, 1 << 32)
    driver.put(0x14, 0, 1)
    assert (driver.status, slow.negotiated) == (0, 0)


def test_bits_of_the_status(driver: VirtioPciDriver) -> None:
    """They are only added, and NEEDS_RESET is not the driver's."""
    driver.put(0x14, 1, 1)
    driver.put(0x14, 0xC2, 1)
    assert driver.status == 0x83


def test_the_configuration_space(driver: VirtioPciDriver, pci: VirtioPci, slow: Slow) -> None:
    """The device answers for it; its generation changes with the configuration."""
    assert (driver.get(1, 2, DEVICE), driver.get(4, 4, DEVICE)) == (0x0302, 5)
    driver.put(2, 7, 2, DEVICE)
    assert slow.written == [(2, 2, 7)]
    before = driver.get(0x15, 1)
    pci.interrupt_config()
    assert driver.get(0x15, 1) == before + 1


def test_areas_have_ends(driver: VirtioPciDriver, served: IoreqServer) -> None:
    """Isr has one byte, notifications are not read; both quietly. The common area has a line."""
    assert [driver.get(at, 4, ISR) for at in (1 * 4, 0xFFC)] == [0, 0]
    driver.put(0, 1, 1, ISR)
    assert driver.get(0, 4, NOTIFY) == 0
    assert served.failures == 0
    assert driver.get(0x38, 4) == 0xFFFFFFFF
    assert served.failures == 1


# --- queues ---------------------------------------------------------------------------------------


def test_each_queue_has_its_registers(driver: VirtioPciDriver) -> None:
    """They show the selected queue; halves of an address are written one by one."""
    assert driver.get(0x12, 2) == 2
    for index, size in enumerate((8, 4)):
        driver.put(0x16, index, 2)
        found = driver.get(0x18, 2), driver.get(0x1A, 2), driver.get(0x1C, 2), driver.get(0x1E, 2)
        assert found == (size, NO_VECTOR, 0, index)
        driver.put(0x18, 2, 2)
        driver.put(0x20, 0x1000 + index, 4)
        driver.put(0x24, 0x5, 4)
    driver.put(0x16, 0, 2)
    assert (driver.get(0x18, 2), driver.get(0x20, 8)) == (2, 0x5_0000_1000)
    driver.put(0x16, 1, 2)
    assert driver.get(0x20, 8) == 0x5_0000_1001


def test_a_queue_that_does_not_exist(driver: VirtioPciDriver, slow: Slow) -> None:
    """It has no entries and keeps nothing."""
    driver.begin(ALL_FEATURES)
    driver.put(0x16, 2, 2)
    for offset, size in ((0x18, 2), (0x1A, 2), (0x1C, 2), (0x20, 8)):
        driver.put(offset, 1, size)
    found = [driver.get(offset, 2) for offset in (0x18, 0x1A, 0x1C, 0x20)]
    assert found == [0, NO_VECTOR, 0, 0]
    driver.put(0x14, 15, 1)
    driver.put(8, 1, 4, NOTIFY)
    assert slow._queues == {}


def test_a_queue_is_started_once(guest: MockDomain, driver: VirtioPciDriver, slow: Slow) -> None:
    """After the features, with 1; then only its vector changes."""
    ring = Ring(guest, RING, 8)
    driver.put(0x14, 0, 1)
    driver.set_up(0, ring, 1)
    assert (driver.get(0x1C, 2), slow._queues) == (0, {})
    assert driver.begin(ALL_FEATURES)
    driver.put(0x1C, 2, 2)
    assert driver.get(0x1C, 2) == 0
    driver.set_up(0, ring, 1)
    started = slow._queues[0]
    driver.put(0x20, 0, 4)
    driver.put(0x18, 4, 2)
    driver.put(0x1A, 2, 2)
    driver.put(0x1C, 0, 2)
    driver.put(0x1C, 1, 2)
    found = [driver.get(offset, 2) for offset in (0x18, 0x1A, 0x1C, 0x20)]
    assert found == [8, 2, 1, RING & 0xFFFF]
    assert slow._queues == {0: started}


def test_a_notification_before_the_driver_is_ready(
    guest: MockDomain, driver: VirtioPciDriver, slow: Slow
) -> None:
    """It has no effect; the next one has."""
    ring = Ring(guest, RING, 8)
    assert driver.begin(ALL_FEATURES & ~EVENT_IDX)
    driver.set_up(0, ring, 1)
    ring.offer(ring.chain(writable=[(DATA, 1)]))
    driver.kick()
    assert slow._engine.transfers == ()
    driver.put(0x14, 15, 1)
    driver.kick()
    assert slow.begun.acquire(timeout=20)


# --- interrupts -----------------------------------------------------------------------------------


def test_each_queue_has_a_message(guest: MockDomain, driver: VirtioPciDriver, slow: Slow) -> None:
    """The vector of the queue that was used; isr and the pin are not touched."""
    slow.go.set()
    rings = [Ring(guest, RING, 8), Ring(guest, RING + 0x1000, 4)]
    driver.start(*rings)
    for index in (1, 0):
        rings[index].offer(rings[index].chain(writable=[(DATA, 1)]))
        driver.kick(index)
        assert driver.message() == index + 1
        assert rings[index].used() == [(0, 1)]
    assert (driver.get(0, 1, ISR), guest.interrupts) == (0, [])


def test_the_pin_without_msix(guest: MockDomain, pci: VirtioPci, slow: Slow, line: Line) -> None:
    """It rises with a bit of isr, and falls when the driver reads it."""
    driver = VirtioPciDriver(guest)
    driver.find(msix=False)
    slow.go.set()
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    ring.offer(ring.chain(writable=[(DATA, 1)]))
    driver.kick()
    line.wait()
    assert driver.get(0, 1, ISR) == 1
    assert (line.level, driver.get(0, 1, ISR)) == (False, 0)
    pci.interrupt_queue(0)
    pci.interrupt_config()
    assert (line.rises, driver.get(0, 1, ISR), line.level) == (2, 3, False)


def test_the_pin_falls_at_a_reset(
    guest: MockDomain, pci: VirtioPci, slow: Slow, line: Line
) -> None:
    """No bit of the former life is left."""
    driver = VirtioPciDriver(guest)
    driver.find(msix=False)
    pci.interrupt_queue(0)
    driver.put(0x14, 0, 1)
    assert (line.level, driver.get(0, 1, ISR)) == (False, 0)


def test_vectors_that_do_not_exist(driver: VirtioPciDriver, pci: VirtioPci) -> None:
    """They read back as none, and nothing is sent."""
    for offset in (0x10, 0x1A):
        driver.put(offset, 3, 2)
        assert driver.get(offset, 2) == NO_VECTOR
        driver.put(offset, 2, 2)
        assert driver.get(offset, 2) == 2
    driver.put(0x10, NO_VECTOR, 2)
    driver.put(0x1A, NO_VECTOR, 2)
    pci.interrupt_config()
    pci.interrupt_queue(0)
    assert driver.messages.empty()


def test_a_broken_driver_hears_of_it(
    guest: MockDomain, driver: VirtioPciDriver, slow: Slow
) -> None:
    """NEEDS_RESET, and the message of the configuration; a reset helps."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    ring.offer(8)
    driver.kick()
    assert driver.message() == 0
    assert driver.status == 15 | 0x40
    slow.go.set()
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    ring.offer(ring.chain(writable=[(DATA, 1)]))
    driver.kick()
    assert driver.message() == 1


def test_a_reset_that_times_out(
    guest: MockDomain,
    served: IoreqServer,
    driver: VirtioPciDriver,
    slow: Slow,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The status stays until the request has ended; the driver, which only reads, sees that."""
    monkeypatch.setattr(slow._engine._table, "drain_timeout", 0.01)
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    ring.offer(ring.chain(writable=[(DATA, 16)]))
    driver.kick()
    assert slow.begun.acquire(timeout=20)
    driver.put(0x14, 0, 1)
    driver.put(0x14, 0x80, 1)
    assert (driver.status, served.failures) == (15, 1)
    monkeypatch.undo()
    slow.go.set()
    slow._engine.drain(20)
    assert (driver.status, driver.get(0x1C, 2), slow._queues, ring.used()) == (0, 0, {}, [])
    driver.start(Ring(guest, RING, 8))
    assert (driver.status, served.failures) == (15, 1)


# --- the window -----------------------------------------------------------------------------------


class Window:
    """The areas by configuration space alone."""

    def __init__(self, driver: VirtioPciDriver) -> None:
        self.driver = driver
        self.at = next(
            at
            for at, number in driver.capabilities()
            if number == VENDOR_CAPABILITY and driver.read(at + 3, 1) == WINDOW
        )

    def aim(self, offset: int, size: int, bar: int = 4) -> None:
        self.driver.write(self.at + 4, bar, 1)
        self.driver.write(self.at + 8, offset)
        self.driver.write(self.at + 12, size)

    def get(self, offset: int, size: int, bar: int = 4) -> int:
        self.aim(offset, size, bar)
        return self.driver.read(self.at + 16, size if size in (1, 2) else 4)

    def put(self, offset: int, value: int, size: int, bar: int = 4) -> None:
        self.aim(offset, size, bar)
        self.driver.write(self.at + 16, value, size if size in (1, 2) else 4)


def test_the_window(driver: VirtioPciDriver) -> None:
    """The same registers by another way, without decoding."""
    window = Window(driver)
    driver.command(0)
    window.put(0x14, 1, 1)
    window.put(0, 1, 4)
    assert (window.get(0x14, 1), window.get(4, 4), window.get(0x12, 2)) == (1, 1, 2)
    driver.command(MEMORY)
    assert driver.status == 1


@pytest.mark.parametrize(
    ("offset", "size", "bar"),
    [(0x14, 1, 0), (0x14, 0, 4), (0x14, 3, 4), (0x12, 4, 4), (0x4000, 4, 4), (0xFFFFFFFC, 4, 4)],
)
def test_a_window_to_nowhere(
    driver: VirtioPciDriver, served: IoreqServer, offset: int, size: int, bar: int
) -> None:
    """Another BAR, another size, unaligned, or beyond the end: all ones, and no effect."""
    window = Window(driver)
    assert window.get(offset, size, bar) == (1 << 8 * (size if size in (1, 2) else 4)) - 1
    window.put(offset, 0x01010101 if size != 1 else 1, size, bar)
    assert (driver.status, served.failures) == (0, 0)


# --- life -----------------------------------------------------------------------------------------


def test_unplug_and_plug_again(
    guest: MockDomain, driver: VirtioPciDriver, pci: VirtioPci, slow: Slow
) -> None:
    """No claim is left, the device is reset; it can be found and used again."""
    driver.start(Ring(guest, RING, 8))
    pci.unplug()
    pci.unplug()
    assert (claims_of(guest), slow._queues, driver.read(0)) == (set(), {}, 0xFFFFFFFF)
    pci.plug()
    driver.find()
    slow.go.set()
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    ring.offer(ring.chain(writable=[(DATA, 1)]))
    driver.kick()
    assert driver.message() == 1


def test_it_shows_itself(driver: VirtioPciDriver, pci: VirtioPci) -> None:
    """By place, status and device."""
    assert repr(pci).startswith("<VirtioPci 0000:00:05.0, status 0x0, <Slow 'slow0' of domain 1")


def test_a_pvh_guest_has_messages_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bus, and without a pin, its driver gets random numbers."""
    guest = MockHypervisor().create_domain(memory="1M", type="pvh")
    guest.vcpu_timeout = 20.0
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        with VirtioRng(server) as rng, server, server.serving():
            PciBus(server).plug()
            pci = VirtioPci(server, BDF, rng)
            pci.plug()
            pci.interrupt_config()  # before the guest has MSI-X: there is nothing to raise
            driver = VirtioPciDriver(guest)
            monkeypatch.setattr(
                link_of(server), "inject_msi", lambda *message: driver.messages.put(message)
            )
            driver.find()
            ring = Ring(guest, RING, 8)
            driver.start(ring)
            ring.offer(ring.chain(writable=[(DATA, 64)]))
            driver.kick()
            assert driver.message() == 1
            assert ring.used() == [(0, 64)]
            assert guest.read(DATA, 64) != bytes(64)
            assert driver.read(0x3D, 1) == 0


# --- hostile --------------------------------------------------------------------------------------

COMMON_OFFSETS = st.sampled_from(
    [0, 4, 8, 0xC, 0x10, 0x14, 0x16, 0x18, 0x1A, 0x1C, 0x20, 0x24, 0x28, 0x30]
)
OFFSETS = st.one_of(COMMON_OFFSETS, st.integers(0, 0x3FFF))
WORDS = st.one_of(
    st.sampled_from([0, 1, 3, 7, 8, 11, 15, 0x40, 64, 0xFFFFFFFF, RING]), st.integers(0, 2**32 - 1)
)
ACCESSES = st.lists(
    st.tuples(st.booleans(), st.booleans(), OFFSETS, st.sampled_from([1, 2, 4, 4, 8]), WORDS),
    max_size=40,
)


@settings(
    max_examples=examples(100),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(ACCESSES, st.binary(max_size=256))
def test_random_accesses(
    caplog: pytest.LogCaptureFixture,
    accesses: list[tuple[bool, bool, int, int, int]],
    content: bytes,
) -> None:
    """Whatever a guest writes to the BAR and by the window, it is answered, and a reset helps."""
    guest = MockHypervisor().create_domain(memory="1M")
    guest.write(RING, content)
    guest.vcpu_timeout = 20.0
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        with VirtioRng(server) as rng, server, server.serving():
            pci = VirtioPci(server, BDF, rng, interrupt_pin=1)
            pci.plug()
            driver = VirtioPciDriver(guest)
            driver.find(msix=False)
            window = Window(driver)
            for is_read, by_window, offset, size, value in accesses:
                value &= (1 << 8 * size) - 1
                if by_window and size < 8 and is_read:
                    window.get(offset, size)
                elif by_window and size < 8:
                    window.put(offset, value, size)
                elif is_read:
                    guest.mmio_read(BAR + offset, size)
                else:
                    guest.mmio_write(BAR + offset, value, size)
            rng._engine.drain()
            driver.put(0x14, 0, 1)
            assert (driver.status, driver.get(0, 1, ISR), rng._queues) == (0, 0, {})
            assert cache.leases() == ()
            assert "Traceback" not in caplog.text
            pci.unplug()
            assert claims_of(guest) == set()
