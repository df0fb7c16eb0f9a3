"""VirtioMmio: the registers, what a driver may do when, the line, and random accesses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.devicemodel.virtio_kit import ALL_FEATURES, Line, MmioDriver, Ring
from tests.effort import examples
from xenmapcache import MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import VirtioMmio, VirtioRng

BASE, RING, DATA = 0xFE00_0000, 0x10000, 0x40000
WORDS = st.one_of(
    st.sampled_from([0, 1, 3, 7, 8, 11, 15, 0x40, 64, 0xFFFFFFFF, RING]), st.integers(0, 2**32 - 1)
)
OFFSETS = st.one_of(
    st.sampled_from([0x10, 0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x90, 0xA0]),
    st.integers(0, 0x1FF),
)
ACCESSES = st.lists(
    st.tuples(st.booleans(), OFFSETS, st.sampled_from([4, 4, 4, 1, 2, 8]), WORDS), max_size=40
)


@pytest.fixture
def rng(server: IoreqServer) -> Iterator[VirtioRng]:
    with VirtioRng(server) as rng:
        yield rng


@pytest.fixture
def mmio(server: IoreqServer, rng: VirtioRng, line: Line) -> Iterator[VirtioMmio]:
    mmio = VirtioMmio(server, BASE, rng, interrupt=line)
    with server, server.serving():
        yield mmio


@pytest.fixture
def driver(guest: MockDomain, mmio: VirtioMmio, line: Line) -> MmioDriver:
    return MmioDriver(guest, BASE, line)


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (0x00, 0x74726976),
        (0x04, 2),
        (0x08, 4),
        (0x0C, 0x004D4358),
        (0x34, 64),
        (0x44, 0),
        (0x60, 0),
        (0x70, 0),
        (0xB0, 0xFFFFFFFF),
        (0xB4, 0xFFFFFFFF),
        (0xB8, 0xFFFFFFFF),
        (0xBC, 0xFFFFFFFF),
        (0xFC, 0),
        (0x14, 0),
        (0x18, 0),
    ],
)
def test_what_a_driver_finds(driver: MmioDriver, register: int, value: int) -> None:
    """The identification, the first queue, no shared memory; registers to write read as 0."""
    assert driver.read(register) == value


def test_accesses_of_another_size(driver: MmioDriver) -> None:
    """Registers have 4 bytes: anything else reads 0 and changes nothing."""
    assert [driver.read(0, 1), driver.read(0, 2), driver.read(0, 8), driver.read(2)] == [0] * 4
    driver.write(0x70, 1, 1)
    driver.write(0x80, 1, 8)
    driver.write(0x72, 1)
    assert driver.read(0x70) == 0


def test_a_half_of_the_features_that_does_not_exist(driver: MmioDriver, rng: VirtioRng) -> None:
    """There are 64 bits: further ones are 0, and cannot be accepted."""
    driver.write(0x14, 2)
    assert driver.read(0x10) == 0
    driver.write(0x24, 2)
    driver.write(0x20, 0xFFFFFFFF)
    assert driver.begin(ALL_FEATURES)
    assert rng.negotiated == ALL_FEATURES


def test_features_are_fixed_when_they_are_accepted(driver: MmioDriver, rng: VirtioRng) -> None:
    """What the driver writes after FEATURES_OK has no effect until a reset."""
    assert driver.begin(1 << 32)
    driver.write(0x24, 0)
    driver.write(0x20, 1 << 29)
    driver.write(0x70, 11)
    assert rng.negotiated == 1 << 32
    driver.write(0x70, 0)
    assert rng.negotiated == 0


def test_bits_of_the_status(driver: MmioDriver) -> None:
    """They are only added; NEEDS_RESET is not the driver's; 0 takes all of them away."""
    driver.write(0x70, 1)
    driver.write(0x70, 2)
    driver.write(0x70, 0xFFFFFF40)
    assert driver.read(0x70) == 3
    driver.write(0x70, 0x80)
    assert driver.read(0x70) == 0x83
    driver.write(0x70, 0x100)
    assert driver.read(0x70) == 0


def test_a_queue_that_does_not_exist(driver: MmioDriver, rng: VirtioRng) -> None:
    """It has no entries, and what is written for it has no effect."""
    assert driver.begin(ALL_FEATURES)
    driver.set_up(1, 64, RING, RING + 0x1000, RING + 0x2000)
    assert (driver.read(0x34), driver.read(0x44)) == (0, 0)
    driver.write(0x44, 0)
    assert (rng._queues, driver.read(0x70)) == ({}, 11)


def test_a_queue_before_the_features(driver: MmioDriver, rng: VirtioRng) -> None:
    """It cannot be used before FEATURES_OK, and only 1 and 0 mean something."""
    driver.set_up(0, 64, RING, RING + 0x1000, RING + 0x2000)
    assert driver.read(0x44) == 0
    assert driver.begin(ALL_FEATURES)
    driver.set_up(0, 64, RING, RING + 0x1000, RING + 0x2000)
    assert driver.read(0x44) == 1
    driver.write(0x44, 2)
    assert driver.read(0x44) == 1
    assert rng._queues[0].size == 64


def test_a_queue_in_use_is_not_changed(
    guest: MockDomain, driver: MmioDriver, rng: VirtioRng
) -> None:
    """Its size and addresses stay until it is stopped."""
    ring = Ring(guest, RING, 8)
    driver.start(ring)
    driver.set_up(0, 4, 0, 0, 0)
    driver.send(ring, ring.chain(writable=[(DATA, 8)]))
    assert driver.collect(ring, 1) == [(0, 8)]
    driver.write(0x44, 0)
    assert driver.read(0x44) == 0
    other = Ring(guest, RING + 0x1000, 8)
    driver.set_up(0, 8, **other.addresses)
    driver.send(other, other.chain(writable=[(DATA, 8)]))
    assert driver.collect(other, 1) == [(0, 8)]


def test_a_notification_before_the_driver_is_ready(guest: MockDomain, driver: MmioDriver) -> None:
    """Nothing is popped before DRIVER_OK."""
    ring = Ring(guest, RING, 8)
    assert driver.begin(ALL_FEATURES)
    driver.set_up(0, 8, **ring.addresses)
    ring.offer(ring.chain(writable=[(DATA, 8)]))
    driver.kick()
    assert ring.used() == []
    driver.write(0x70, 15)
    driver.kick()
    assert driver.collect(ring, 1) == [(0, 8)]


def test_the_generation_of_the_configuration(driver: MmioDriver, mmio: VirtioMmio) -> None:
    """A driver that reads several fields sees that they have changed in between."""
    before = driver.read(0xFC)
    mmio.interrupt_config()
    assert driver.read(0xFC) == before + 1


def test_the_line(driver: MmioDriver, mmio: VirtioMmio, line: Line) -> None:
    """It is high until each bit is acknowledged, and low after a reset."""
    mmio.interrupt_queue(0)
    mmio.interrupt_config()
    assert (line.level, driver.read(0x60)) == (True, 3)
    driver.write(0x64, 1)
    assert (line.level, driver.read(0x60)) == (True, 2)
    driver.write(0x64, 2)
    assert (line.level, driver.read(0x60)) == (False, 0)
    mmio.needs_reset()
    assert (line.level, driver.read(0x60), driver.read(0x70)) == (True, 2, 0x40)
    driver.write(0x70, 0)
    assert (line.level, driver.read(0x60), driver.read(0x70)) == (False, 0, 0)


def test_an_interrupt_amid_an_acknowledgement(
    driver: MmioDriver, mmio: VirtioMmio, monkeypatch: pytest.MonkeyPatch, line: Line
) -> None:
    """A bit that is raised right before the line is lowered is not lost."""
    levels: list[bool] = []
    hooks: list[Callable[[], None]] = []

    def slow_line(level: bool) -> None:
        while not level and hooks:
            hooks.pop()()
        levels.append(level)
        line(level)

    monkeypatch.setattr(mmio, "_line", slow_line)
    mmio.interrupt_queue(0)
    hooks.append(lambda: mmio.interrupt_queue(0))
    driver.write(0x64, 1)
    assert levels == [True, True, False, True]
    assert driver.read(0x60) == 1


def test_its_text_and_its_end(mmio: VirtioMmio, guest: MockDomain, driver: MmioDriver) -> None:
    """The text has the place, the status and the device; a released region is unplugged."""
    driver.write(0x70, 3)
    assert repr(mmio) == (
        "<VirtioMmio at <MMIO region 0xfe000000..0xfe000200>, status 0x3, "
        "<VirtioRng 'rng0' of domain 1: 0 queues>>"
    )
    mmio.region.release()
    assert driver.read(0) == 0xFFFFFFFF


@settings(max_examples=examples(100), deadline=None)
@given(accesses=ACCESSES, content=st.binary(max_size=64))
def test_random_accesses(accesses: list[tuple[bool, int, int, int]], content: bytes) -> None:
    """Whatever a guest reads and writes, it gets numbers of that size, and a reset helps."""
    guest = MockHypervisor().create_domain(memory="1M")
    guest.write(RING, content)
    line = Line()
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        server = IoreqServer(guest, cache)
        with VirtioRng(server) as rng, server:
            mmio = VirtioMmio(server, BASE, rng, interrupt=line)
            for is_read, offset, size, value in accesses:
                if is_read:
                    assert 0 <= mmio.read(offset, size) < 1 << 8 * size
                else:
                    mmio.write(offset, size, value)
            rng._engine.drain()
            assert cache.leases() == ()
            assert line.level is (mmio.read(0x60, 4) != 0)
            mmio.write(0x70, 4, 0)
            assert (mmio.read(0x70, 4), line.level, rng._queues) == (0, False, {})
