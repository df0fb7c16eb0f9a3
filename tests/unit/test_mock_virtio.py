"""A mock guest's virtio driver over PCI and MMIO: features, queues, notifications, interrupts."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.kit import in_thread
from tests.toy_virtio import (
    CONFIG,
    EVENT_IDX,
    INDIRECT_DESC,
    VERSION_1,
    ToyVirtio,
    ToyVirtioMmio,
    ToyVirtioPci,
)
from xenmapcache import DeviceError, MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.errors import QueueFullError
from xenmapcache.mock import DriverQueue, GuestHeap, PciDriver, VirtioDriver

PCI, MMIO, IRQ = "0000:00:05.0", 0xFE00_0000, 7
ALL = INDIRECT_DESC | EVENT_IDX


@pytest.fixture
def guest() -> MockDomain:
    return MockHypervisor().create_domain(memory="1M", vcpus=2)


@pytest.fixture
def server(guest: MockDomain) -> Iterator[IoreqServer]:
    """An open server, which a thread serves."""
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        with (server := IoreqServer(guest, cache)), server.serving():
            yield server
        assert not server.failures


@pytest.fixture
def device(server: IoreqServer) -> ToyVirtioPci:
    return ToyVirtioPci(server)


@pytest.fixture
def driver(guest: MockDomain, device: ToyVirtioPci) -> VirtioDriver:
    return VirtioDriver.over_pci(PciDriver(guest).find(PCI))


@pytest.fixture
def queue(driver: VirtioDriver) -> DriverQueue:
    driver.start()
    return driver.queues[0]


def pair(guest: MockDomain, server: IoreqServer, transport: str) -> tuple[ToyVirtio, VirtioDriver]:
    """Return a device and its driver."""
    if transport == "mmio":
        return ToyVirtioMmio(server, MMIO, IRQ), VirtioDriver.over_mmio(guest, MMIO, IRQ)
    device = ToyVirtioPci(server, entries=0 if transport == "intx" else 3)
    function = PciDriver(guest).find(PCI)
    pirq = 300 if transport == "pirq" else None
    return device, VirtioDriver.over_pci(function, msix=transport != "intx", pirq=pirq)


# --- all transports ----------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [0, INDIRECT_DESC, EVENT_IDX, ALL])
@pytest.mark.parametrize("transport", ["msix", "pirq", "intx", "mmio"])
def test_data_goes_to_the_device_and_back(
    guest: MockDomain, server: IoreqServer, transport: str, wanted: int
) -> None:
    """More chains than the queue has descriptors, by interrupt and by polling, and no leak."""
    device, driver = pair(guest, server, transport)
    driver.start(wanted)
    assert device.driver_features == driver.features == VERSION_1 | wanted
    used = driver.heap.used
    for number in range(20):
        chain = driver.queues[0].add(
            [b"abc", b"", bytes([number])], [2, 5], indirect=bool(wanted & INDIRECT_DESC)
        )
        assert driver.queues[0].kick()
        assert driver.queues[0].wait(chain, poll=number % 3 == 2) is chain
        assert (chain.written, chain.parts[0], chain.data[:4]) == (
            4,
            bytes([number]) + b"c",
            bytes([number]) + b"cba",
        )
    assert (driver.heap.used, driver.status) == (used, 0xF)
    driver.reset()
    assert (driver.heap.used, driver.status, device.value) == (0, 0, 0)


@pytest.mark.parametrize("transport", ["msix", "intx", "mmio"])
def test_a_waiter_sleeps_until_the_interrupt(
    guest: MockDomain, server: IoreqServer, transport: str
) -> None:
    """The device answers later, in another thread, while the driver waits."""
    device, driver = pair(guest, server, transport)
    device.lazy = True
    driver.start()
    queue = driver.queues[0]
    chain = queue.add([b"later"], [5])
    queue.kick()
    thread, seen = in_thread(lambda: queue.wait(chain, 20).data)
    while not guest._waiters:
        os.sched_yield()
    device.run(0)
    thread.join()
    assert seen == [b"retal"]
    assert not device.interrupt  # the driver has acknowledged it


@pytest.mark.parametrize("transport", ["msix", "mmio"])
def test_the_configuration_is_read_and_written(
    guest: MockDomain, server: IoreqServer, transport: str
) -> None:
    """In accesses as wide as fields may be, and again if it has changed in between."""
    device, driver = pair(guest, server, transport)
    accesses: list[tuple[int, int]] = []
    get_config = device.get_config

    def changing(offset: int, size: int) -> int:
        if not accesses:
            device.generation = 1
            device.config[0] = 9
        accesses.append((offset, size))
        return get_config(offset, size)

    device.get_config = changing  # type: ignore[method-assign] # for this test alone
    assert driver.read_config(0, 7) == b"\x09\x02\x03\x04\x05\x06\x07"
    assert accesses == [(0, 4), (4, 2), (6, 1)] * 2
    assert driver.read_config(1, 2) == b"\x02\x03"
    assert accesses[-2:] == [(1, 1), (2, 1)]
    driver.write_config(2, 0xAABB, 2)
    assert device.config[2:4] == b"\xbb\xaa"


def test_a_configuration_that_never_rests_is_named(
    driver: VirtioDriver, device: ToyVirtioPci
) -> None:
    """The driver gives up after 100 tries."""
    get_config = device.get_config

    def changing(offset: int, size: int) -> int:
        device.generation = (device.generation + 1) & 0xFF
        return get_config(offset, size)

    device.get_config = changing  # type: ignore[method-assign] # for this test alone
    with pytest.raises(DeviceError, match="configuration has changed 100 times"):
        driver.read_config(0, 1)


# --- starting ------------------------------------------------------------------------------------


REFUSALS: dict[str, tuple[Callable[[ToyVirtio], object], str]] = {
    "legacy": (lambda device: setattr(device, "features", 5), "offers 0x5, without VERSION_1"),
    "features": (lambda device: setattr(device, "refused", 8), "accept the features 0x130000000"),
    "queues": (lambda device: setattr(device, "sizes", ()), "it has no queue"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_device_that_cannot_be_driven_is_given_up(
    driver: VirtioDriver, device: ToyVirtioPci, name: str
) -> None:
    """The error gives the reason, and the device is told with FAILED."""
    spoil, message = REFUSALS[name]
    spoil(device)
    with pytest.raises(DeviceError, match=f"virtio device of id 18: .*{message}"):
        driver.start()
    assert device.value & 0x80


def test_a_reset_is_waited_for(driver: VirtioDriver, device: ToyVirtioPci) -> None:
    """Until the device says that it has ended, or the time is over."""
    driver.start()
    device.slow_resets = 5
    driver.reset()
    assert device.slow_resets == 0
    driver.start()
    device.slow_resets = 1 << 30
    with pytest.raises(TimeoutError, match="its reset has not ended in 0 s; its status is 0xf"):
        driver.reset(0)
    assert driver.queues


def test_a_queue_that_is_not_available_is_left_out(server: IoreqServer, guest: MockDomain) -> None:
    """Others keep their numbers, and are as long as wanted, or as the device can."""
    device = ToyVirtioPci(server, sizes=(16, 0, 4))
    driver = VirtioDriver.over_pci(PciDriver(guest).find(PCI))
    driver.start(queue_size=8)
    assert {number: queue.size for number, queue in driver.queues.items()} == {0: 8, 2: 4}
    assert [queue.enabled for queue in device.queues] == [1, 0, 1]
    assert (driver.device_id, repr(driver.queues[2])) == (18, "<DriverQueue 2, 0 of 4 in flight>")
    for queue in driver.queues.values():
        chain = queue.add([b"x"], [1])
        queue.kick()
        queue.wait(chain)
    assert device.notified == [0, 2]


def test_each_queue_has_a_vector_of_its_own(server: IoreqServer, guest: MockDomain) -> None:
    """The first is for the configuration; a table that is too short is shared by the last ones."""
    for entries, vectors in ((4, [1, 2, 3]), (3, [1, 2, 2]), (1, [0, 0, 0])):
        bdf = f"0000:00:{entries:02x}.0"
        device = ToyVirtioPci(server, bdf, sizes=(8, 8, 8), entries=entries)
        driver = VirtioDriver.over_pci(PciDriver(guest).find(bdf), GuestHeap(guest))
        driver.start()
        assert [queue.vector for queue in device.queues] == vectors
        assert device.vector == 0
        chain = driver.queues[2].add([b"x"], [1])
        driver.queues[2].kick()
        assert driver.queues[2].wait(chain).done
        driver.transport.device.disable()  # type: ignore[attr-defined] # it is a PciTransport


def test_a_device_that_takes_no_vector_is_named(driver: VirtioDriver, device: ToyVirtioPci) -> None:
    """It answers with another number."""
    device.set = lambda name, value: (  # type: ignore[method-assign] # for this test alone
        None if name == "queue_vector" else ToyVirtio.set(device, name, value)
    )
    with pytest.raises(DeviceError, match="it does not take MSI-X entry 1"):
        driver.start()


def test_what_is_no_virtio_device_is_refused(guest: MockDomain, server: IoreqServer) -> None:
    """By its id, its capabilities, or its magic."""
    device = ToyVirtioPci(server)
    kinds = device.function.config
    function = PciDriver(guest).find(PCI)
    for offset in [each for number, each in function.capabilities() if number == 9][1:3]:
        kinds[offset + 3] = 5  # common configuration, twice
    with pytest.raises(DeviceError, match="it has no virtio capability of type 1"):
        VirtioDriver.over_pci(function)
    function.device_id = 0x1001
    with pytest.raises(DeviceError, match="1af4:1001.*has ids 0x1041 to 0x107f"):
        VirtioDriver.over_pci(function)
    with pytest.raises(DeviceError, match="no virtio device at 0xfe000000: .* are 0xffffffff"):
        VirtioDriver.over_mmio(guest, MMIO, IRQ)
    ToyVirtioMmio(server, MMIO, IRQ).ident = 0
    with pytest.raises(DeviceError, match="must be 0x74726976 and 2; its id is 0"):
        VirtioDriver.over_mmio(guest, MMIO, IRQ)


def test_registers_outside_of_a_capability_are_refused(driver: VirtioDriver) -> None:
    """The driver trusts the length that the capability says."""
    with pytest.raises(DeviceError, match="4 bytes at 0x4 are not within its virtio capability"):
        driver.transport.read_config(4, 4)


def test_a_device_without_a_configuration_works(guest: MockDomain, server: IoreqServer) -> None:
    """Some kinds have none; reading it is refused then."""
    device = ToyVirtioPci(server)
    function = PciDriver(guest).find(PCI)
    (offset,) = [each for each in range(0x40, 0xF0) if device.function.get(each + 8, 4) == CONFIG]
    device.function.config[offset + 3] = 9
    driver = VirtioDriver.over_pci(function)
    driver.start()
    with pytest.raises(DeviceError, match="virtio capability of type 4, None"):
        driver.read_config(0, 1)


def test_a_line_that_many_queues_share_ends_the_search(
    guest: MockDomain, server: IoreqServer
) -> None:
    """A device that says that each queue exists is not asked for ever."""
    device = ToyVirtioMmio(server, MMIO, IRQ)
    driver = VirtioDriver.over_mmio(guest, MMIO, IRQ)
    device.get = lambda name: 1  # type: ignore[method-assign] # for this test alone
    assert driver.transport.queue_sizes() == [1] * 1024


# --- chains ---------------------------------------------------------------------------------


def test_a_full_queue_is_named(queue: DriverQueue, device: ToyVirtioPci) -> None:
    """Direct chains take a descriptor for each part, indirect ones take one."""
    device.lazy = True
    for _ in range(2):
        queue.add([b"x"] * 3, indirect=True)
        queue.add([b"x"] * 3)
    assert repr(queue) == "<DriverQueue 0, 4 of 8 in flight>"
    with pytest.raises(QueueFullError, match="1 descriptors are wanted, and 0 are free"):
        queue.add([b"x"])


def test_what_no_chain_can_be_is_refused(driver: VirtioDriver, device: ToyVirtioPci) -> None:
    """No parts, or an indirect table that was not negotiated."""
    driver.start(0)
    with pytest.raises(ValueError, match="a chain must have at least one part"):
        driver.queues[0].add()
    with pytest.raises(ValueError, match="needs the feature INDIRECT_DESC"):
        driver.queues[0].add([b"x"], indirect=True)


def test_a_chain_that_does_not_fit_the_heap_takes_nothing(queue: DriverQueue) -> None:
    """Its other parts are free again, and so are its descriptors."""
    used = queue._heap.used
    with pytest.raises(MemoryError):
        queue.add([b"x"], [1 << 30])
    assert (queue._heap.used, queue._free) == (used, [*range(8)])


def test_memory_of_the_caller_is_used_where_it_is(guest: MockDomain, queue: DriverQueue) -> None:
    """Its address and length are what the device gets, and the driver does not free it."""
    guest.write(0xF0000, b"caller")
    used = queue._heap.used
    chain = queue.add([(0xF0000, 6)], [(0xF1000, 3), 3])
    queue.kick()
    queue.wait(chain)
    assert guest.read(0xF1000, 3) == b"rel"
    assert chain.parts == [b"", b"lac"]
    assert queue._heap.used == used


def test_chains_come_back_in_the_devices_order(queue: DriverQueue, device: ToyVirtioPci) -> None:
    """All that were used are collected, also by a wait for one of them."""
    device.lazy = True
    first, second, third = (queue.add([text], [1]) for text in (b"1", b"2", b"3"))
    assert (repr(first), queue.collect()) == ("<Chain 0, in flight>", [])
    device.run(0)
    queue.wait(third)
    assert [first.data, second.data, third.data] == [b"1", b"2", b"3"]
    fourth = queue.add([b"4"], [1])
    device.run(0)
    assert queue.collect() == [fourth]
    assert repr(fourth) == f"<Chain {fourth.head}, done, 1 bytes written>"


def test_a_reset_frees_chains_in_flight(driver: VirtioDriver, device: ToyVirtioPci) -> None:
    """And the driver can start again with the same memory."""
    device.lazy = True
    driver.start()
    driver.queues[0].add([b"x"], [5], indirect=True)
    address = driver.queues[0].descriptors
    driver.start()
    assert driver.queues[0].descriptors == address
    assert not driver.queues[0].in_flight


# --- devices that break the rules ----------------------------------------------------------------


def put_used(guest: MockDomain, queue: DriverQueue, index: int, head: int, length: int) -> None:
    """Write the first entry of the device area, and its index."""
    guest.write(queue.device_area + 2, struct.pack("<HII", index, head, length))


@pytest.mark.parametrize(
    ("index", "head", "length", "message"),
    [
        (2, 0, 0, "used index went from 0 to 2, which is more than what is in flight"),
        (0xFFFF, 0, 0, "used index went from 0 to 65535"),
        (1, 1, 0, "the device has used 1, which is not in flight"),
        (1, 0xFFFFFFFF, 0, "the device has used 4294967295"),
        (1, 0, 6, "it has written 6 bytes, but chain 0 has room for 5"),
    ],
)
def test_a_used_ring_that_contradicts_the_driver_is_named(
    guest: MockDomain,
    queue: DriverQueue,
    device: ToyVirtioPci,
    index: int,
    head: int,
    length: int,
    message: str,
) -> None:
    """The index, a head, or a length that cannot be."""
    device.lazy = True
    queue.add([b"x"], [2, 3])
    put_used(guest, queue, index, head, length)
    with pytest.raises(DeviceError, match=message):
        queue.collect()


@pytest.mark.parametrize("poll", [False, True])
def test_a_device_that_does_not_answer_is_named(
    queue: DriverQueue, device: ToyVirtioPci, poll: bool
) -> None:
    """With the chain and the device's status."""
    device.lazy = True
    chain = queue.add([b"x"], [1])
    device.value |= 0x40
    with pytest.raises(TimeoutError, match="has not used <Chain 0, in flight>; its status is 0x4f"):
        queue.wait(chain, 0.01, poll=poll)


def test_a_missing_interrupt_is_named(
    driver: VirtioDriver, queue: DriverQueue, device: ToyVirtioPci
) -> None:
    """The device has used the chain while the driver slept, and has raised none."""
    device.lazy = True
    device.raise_for = lambda queue: None  # type: ignore[method-assign] # for this test alone
    chain = queue.add([b"x"], [1])

    def sleep(queue: int, timeout: float) -> None:
        device.run(queue)
        raise TimeoutError

    driver.transport.wait = sleep  # type: ignore[method-assign] # it takes no time
    with pytest.raises(TimeoutError, match="has not raised an interrupt for <Chain 0, done, 1 by"):
        queue.wait(chain, 5)


def test_a_line_that_stays_high_does_not_hang_the_driver(
    guest: MockDomain, server: IoreqServer
) -> None:
    """Each look finds an interrupt and nothing used, and the wait ends all the same."""
    device, driver = pair(guest, server, "mmio")
    device.lazy = True
    driver.start()
    chain = driver.queues[0].add([b"x"], [1])
    device.lower = lambda bits: None  # type: ignore[method-assign] # for this test alone
    server.set_isa_irq(IRQ, True)
    with pytest.raises(TimeoutError, match="has not used <Chain 0, in flight>"):
        driver.queues[0].wait(chain, 0.02)


def test_an_event_index_follows_what_was_collected(
    guest: MockDomain, driver: VirtioDriver, queue: DriverQueue, device: ToyVirtioPci
) -> None:
    """A chain that was used just before the index was written does not hide the next one."""
    device.lazy = True
    queue.suppress_interrupts()
    first, second = queue.add([b"1"], [1]), queue.add([b"2"], [1])
    want_interrupt, wait = queue.want_interrupt, driver.transport.wait

    def use_one_before() -> None:
        guest.write(queue.driver_area + 2, b"\1\0")
        device.run(0)
        guest.write(queue.driver_area + 2, b"\2\0")
        queue.want_interrupt = want_interrupt  # type: ignore[method-assign] # once is enough
        want_interrupt()

    def use_the_other(queue: int, timeout: float) -> None:
        device.run(queue)
        wait(queue, 0)

    queue.want_interrupt = use_one_before  # type: ignore[assignment, method-assign] # for this test
    driver.transport.wait = use_the_other  # type: ignore[method-assign] # for this test alone
    assert queue.wait(second, 5).data == b"2"
    assert (first.data, len(guest.interrupts)) == (b"1", 1)


# --- notifications, both ways ---------------------------------------------------------------------


def test_a_device_that_wants_no_notification_gets_none(
    guest: MockDomain, driver: VirtioDriver, device: ToyVirtioPci
) -> None:
    """By its flag, without the event index."""
    driver.start(0)
    queue = driver.queues[0]
    guest.write(queue.device_area, b"\x01\0")
    queue.add([b"x"])
    assert not queue.kick()
    guest.write(queue.device_area, bytes(2))
    queue.add([b"x"])
    assert queue.kick()
    assert device.notified == [0]


def test_a_device_says_after_which_chain_it_wants_a_notification(
    guest: MockDomain, queue: DriverQueue, device: ToyVirtioPci
) -> None:
    """By its event index; the flag means nothing then."""
    device.lazy = True
    guest.write(queue.device_area, b"\x01\0")
    guest.write(queue.device_area + 4 + 8 * queue.size, b"\x02\0")
    kicks = []
    for _ in range(4):
        queue.add([b"x"])
        kicks.append(queue.kick())
    assert kicks == [False, False, True, False]
    assert not queue.kick()


@pytest.mark.parametrize("features", [0, ALL])
def test_interrupts_can_be_suppressed(
    guest: MockDomain, driver: VirtioDriver, device: ToyVirtioPci, features: int
) -> None:
    """By the flag or by the event index, until they are wanted again."""
    driver.start(features)
    queue = driver.queues[0]

    def interrupts(chains: int) -> int:
        before = len(guest.interrupts)
        for _ in range(chains):
            queue.add([b"x"])
            queue.kick()
        return len(guest.interrupts) - before

    queue.suppress_interrupts()
    assert interrupts(3) == 0
    queue.collect()
    queue.want_interrupt()
    assert interrupts(3) == (1 if features else 3)
    queue.collect()
    queue.want_interrupt(after=3)
    assert interrupts(3) == (1 if features else 3)


def test_indexes_wrap_around(queue: DriverQueue, device: ToyVirtioPci) -> None:
    """After 65,536 chains all of it still works."""
    for each in (*device.queues, queue):
        for name in ("seen", "used", "signalled", "_added", "_kicked", "_collected"):
            if hasattr(each, name):
                setattr(each, name, 0xFFFD)
    for address in (queue.driver_area, queue.device_area):
        queue._domain.write(address + 2, b"\xfd\xff")
    queue._domain.write(queue.device_area + 4 + 8 * queue.size, b"\xfd\xff")
    for number in range(6):
        chain = queue.add([bytes([number])], [1])
        assert queue.kick()
        assert queue.wait(chain).data == bytes([number])
    assert queue._collected == 3


# --- the heap -------------------------------------------------------------------------------


def test_the_heap_uses_freed_memory_again(guest: MockDomain) -> None:
    """Ranges do not overlap, are aligned, and a free one is found wherever it is."""
    heap = GuestHeap(guest, 0x1008, 0x100)
    first, second, third = heap.allocate(0x18, 8), heap.allocate(0x20), heap.allocate(0, 1)
    assert (first, second, third, heap.used) == (0x1008, 0x1020, 0x1040, 0x39)
    heap.free(second)
    assert heap.allocate(0x10) == second
    heap.free(first)
    assert heap.allocate(0x10, 8) == first
    assert heap.store(b"text") == 0x1030
    assert guest.read(0x1030, 4) == b"text"


def test_a_heap_has_an_end(guest: MockDomain) -> None:
    """The error says how much is in use; freeing what is not allocated is refused."""
    heap = GuestHeap(guest, 0x1000, 0x100)
    heap.allocate(0x100)
    with pytest.raises(MemoryError, match="has no 0x1 bytes in one piece; 0x100 bytes are in use"):
        heap.allocate(1)
    heap.free(0x1000)
    for address in (0x1000, 0x1010, 0x1100):
        with pytest.raises(ValueError, match=f"nothing is allocated at {address:#x}"):
            heap.free(address)
