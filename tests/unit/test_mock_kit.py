"""The mock's drivers and the kit's devices, which were written apart, work together."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest

from xenmapcache import MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.pci import PciBus, PciFunction
from xenmapcache.devicemodel.virtio import VirtioBlock, VirtioMmio
from xenmapcache.devicemodel.virtio.pci import VirtioPci
from xenmapcache.mock import PciDriver, VirtioDriver
from xenmapcache.mock.virtio_driver import RING_FEATURES, VERSION_1
from xenmapcache.mock.virtio_ring import EVENT_IDX, INDIRECT_DESC

PCI, MMIO, IRQ = "0000:00:05.0", 0xFE00_0000, 7
IN, OUT, SECTOR = 0, 1, 512
CONTENT = random.Random(1).randbytes(256 * SECTOR)


@contextmanager
def a_disk(kind: str, transport: str) -> Iterator[tuple[MockDomain, VirtioDriver, int]]:
    """Yield a guest with a disk that is served, its driver, and the disk's file."""
    guest = MockHypervisor().create_domain(memory="16M", vcpus=2, type=kind)
    with ExitStack() as stack:
        backend = stack.enter_context(open_backend("mock", domain=guest))
        cache = stack.enter_context(MapCache(backend, bucket_shift=14))
        file = stack.enter_context(tempfile.TemporaryFile(buffering=0))
        file.write(CONTENT)
        server = IoreqServer(guest, cache)
        disk = stack.enter_context(VirtioBlock(server, file))
        if transport == "mmio":
            VirtioMmio(server, MMIO, disk, interrupt=partial(server.set_isa_irq, IRQ))
        else:
            VirtioPci(server, PCI, disk, interrupt_pin=int(transport == "intx")).plug()
        if kind == "pvh":
            PciBus(server).plug()
        stack.enter_context(server)
        stack.enter_context(server.serving())
        yield guest, driver_of(guest, transport), file.fileno()
        assert not server.failures


def give_up_memory(guest: MockDomain) -> None:
    for number in range(9):
        guest.balloon_out(0x800000 + 0x1000 * number, 0x1000)


def driver_of(guest: MockDomain, transport: str) -> VirtioDriver:
    if transport == "mmio":
        return VirtioDriver.over_mmio(guest, MMIO, IRQ)
    pirq = 300 if transport == "pirq" else None
    found = PciDriver(guest).scan()[-1]
    return VirtioDriver.over_pci(found, msix=transport != "intx", pirq=pirq)


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | INDIRECT_DESC, RING_FEATURES])
@pytest.mark.parametrize(
    ("kind", "transport"),
    [("hvm", "msix"), ("hvm", "pirq"), ("hvm", "intx"), ("hvm", "mmio"), ("pvh", "msix")],
)
def test_a_disk_is_read_and_written(kind: str, transport: str, features: int) -> None:
    """One request at a time and 16 together, while the guest gives up memory; and after a reset."""
    indirect = bool(features & INDIRECT_DESC)
    with a_disk(kind, transport) as (guest, driver, file):
        driver.start(features)
        assert driver.features == features
        assert driver.read_config(0, 8) == (256).to_bytes(8, "little")
        queue, data = driver.queues[0], b""
        for sector in range(0, 256, 32):
            parts = [struct.pack("<IIQ", IN, 0, sector)], [0x2000, 0x1000, 0x1000, 1]
            chain = queue.add(*parts, indirect=indirect)
            queue.kick()
            *content, status = queue.wait(chain, poll=sector % 64 == 32).parts
            assert status == b"\0"
            data += b"".join(content)
        assert data == CONTENT
        guest.spawn(1, give_up_memory, guest)
        chains = []
        for sector in range(16):
            parts = [struct.pack("<IIQ", OUT, 0, sector), bytes([sector]) * SECTOR], [1]
            chains.append(queue.add(*parts, indirect=indirect))
            queue.kick()
        assert [queue.wait(chain).data for chain in chains] == [b"\0"] * 16
        guest.join()
        assert os.pread(file, 16 * SECTOR, 0) == b"".join(bytes([n]) * SECTOR for n in range(16))
        used = driver.heap.used
        driver.start(features & ~EVENT_IDX)
        assert driver.heap.used == used
        driver.reset()
        assert (driver.heap.used, guest.line_level("intx", PCI, 0)) == (0, False)


def test_a_pvh_guest_reads_its_selection_back(
    mock_domain: MockDomain, ioreq_server: IoreqServer, pci_guest: PciDriver
) -> None:
    """Linux finds the bus only so; without a bus nobody answers."""
    mock_domain.port_out(0xCF8, 0x80000000)
    assert mock_domain.port_in(0xCF8) == 0xFFFFFFFF
    PciBus(ioreq_server).plug()
    mock_domain.port_out(0xCF8, 0x80000000)
    assert mock_domain.port_in(0xCF8) == 0x80000000
    (bridge,) = pci_guest.scan()
    assert (bridge.bdf, bridge.class_code, bridge.bars) == ("0000:00:00.0", 0x060000, {})


class Register:
    """Four bytes that are kept."""

    value = 0

    def read(self, offset: int, size: int) -> int:
        return self.value >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value


def test_the_kits_bars_and_messages_are_driven(
    mock_domain: MockDomain, ioreq_server: IoreqServer, pci_guest: PciDriver
) -> None:
    """All kinds of BARs, at two addresses each; MSI-X in both forms, and plain MSI."""
    function = PciFunction(ioreq_server, PCI, vendor=0x1AF4, device=0x1234, class_code=0xFF0000)
    registers = [Register() for _ in range(3)]
    function.add_bar(0, 0x20, registers[0], kind="io")
    function.add_bar(2, 0x1000, registers[1], kind="mmio32")
    function.add_bar(4, 0x4000, registers[2], kind="mmio64", prefetchable=True)
    msix, msi = function.add_msix(1, 2), function.add_msi()
    function.plug()
    (device,) = pci_guest.scan()
    assert {number: bar.kind for number, bar in device.bars.items()} == {
        0: "io",
        1: "mmio32",
        2: "mmio32",
        4: "mmio64",
    }
    device.enable()
    for number, moved in ((0, 0x2000), (2, 0xE8000000), (4, 0x40_00000000)):
        device.write_bar(number, 0, number)
        device.place_bar(number, moved)
        assert device.read_bar(number, 0) == number
    assert [register.value for register in registers] == [0, 2, 4]
    _, second = device.enable_msix(2)
    second.mask()
    msix.notify(1)
    assert not mock_domain.interrupts
    second.unmask()
    second.wait()
    device.disable_msix()
    first, _ = device.enable_msix(2, pirq=0x1FF)
    msix.notify(0)
    first.wait()
    assert mock_domain.interrupts[-1] == ("msi", 0x100_FEEFF000, 0x700)
    device.disable_msix()
    vector = device.enable_msi()
    vector.mask()
    msi.notify()
    assert len(mock_domain.interrupts) == 2
    vector.unmask()
    vector.wait()
