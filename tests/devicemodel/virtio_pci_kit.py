"""A virtio device whose requests wait, and the driver's side of virtio-pci."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

from tests.devicemodel.pcidriver import BDF, MASTER, MEMORY, Machine, PciDriver
from tests.devicemodel.virtio_kit import ALL_FEATURES, EVENT_IDX, Ring
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import Job, Request, VirtioDevice
from xenmapcache.guest import Segments

MSIX, VENDOR_CAPABILITY = 0x11, 0x09
COMMON, ISR, DEVICE, NOTIFY, WINDOW = 1, 3, 4, 2, 5
BAR, TABLE = 0x1000_0000, 0x1001_0000
RING, DATA = 0x10000, 0x40000
MESSAGE = 0xFEE0_0000
NO_VECTOR = 0xFFFF


class Slow(VirtioDevice):
    """A device whose requests end when the test says so. Two queues of 8 and 4."""

    device_id = 42
    queue_sizes = (8, 4)
    config = b"\x01\x02\x03\x04\x05"

    def __init__(
        self, server: IoreqServer, *, features: int = 1, record: Path | None = None
    ) -> None:
        super().__init__(server, name="slow0", features=features, record=record)
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)
        self.written: list[tuple[int, int, int]] = []

    def prepare(self, request: Request) -> Job:
        def work(memory: Segments) -> int:
            self.begun.release()
            assert self.go.wait(20)
            return 1

        return Job(request.writable, work, lambda moved: 0 if moved is None else moved)

    def write_config(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


class VirtioPciDriver(PciDriver):
    """The driver of one device over virtio-pci, with one vCPU. It asks where each area is."""

    def __init__(self, guest: Machine, bdf: str = BDF, bar: int = BAR) -> None:
        super().__init__(guest, bdf)
        self.bar, self.table = bar, bar + TABLE - BAR
        self.areas: dict[int, int] = {}
        self.messages: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

    def find(self, *, msix: bool = True) -> None:
        """Place the BARs, look the areas up, and enable MSI-X with a message for each vector."""
        self.place_bar(4, self.bar)
        self.place_bar(1, self.table)
        self.command(MEMORY | MASTER)
        for at, number in self.capabilities():
            if number == VENDOR_CAPABILITY:
                assert self.read(at + 4, 1) in (4, 0)
                self.areas[self.read(at + 3, 1)] = self.bar + self.read(at + 8)
        if msix:
            at = self.capability(MSIX)
            for vector in range((self.read(at + 2, 2) & 0x7FF) + 1):
                self.guest.mmio_write(self.table + 16 * vector, MESSAGE, 8)
                self.guest.mmio_write(self.table + 16 * vector + 8, 0x40 + vector, 8)
            self.write(at + 2, 0x8000, 2)

    def get(self, offset: int, size: int, area: int = COMMON) -> int:
        return self.guest.mmio_read(self.areas[area] + offset, size)

    def put(self, offset: int, value: int, size: int, area: int = COMMON) -> None:
        self.guest.mmio_write(self.areas[area] + offset, value, size)

    @property
    def status(self) -> int:
        return self.get(0x14, 1)

    def features(self) -> int:
        found = 0
        for half in (0, 1):
            self.put(0, half, 4)
            found |= self.get(4, 4) << 32 * half
        return found

    def begin(self, features: int) -> bool:
        """Reset the device and agree on features; return whether it has accepted them."""
        for status in (0, 1, 3):
            self.put(0x14, status, 1)
        for half in (0, 1):
            self.put(8, half, 4)
            self.put(0xC, features >> 32 * half & 0xFFFFFFFF, 4)
        self.put(0x14, 11, 1)
        return bool(self.status & 8)

    def set_up(self, index: int, ring: Ring, vector: int) -> None:
        """Give the device a queue."""
        self.put(0x16, index, 2)
        self.put(0x18, ring.size, 2)
        self.put(0x1A, vector, 2)
        places = {0x20: ring.descriptors, 0x28: ring.driver, 0x30: ring.device}
        for offset, address in places.items():
            self.put(offset, address & 0xFFFFFFFF, 4)
            self.put(offset + 4, address >> 32, 4)
        self.put(0x1C, 1, 2)

    def start(self, *rings: Ring) -> None:
        """Do all of it, up to DRIVER_OK: vector 0 for the configuration, one for each queue."""
        assert self.begin(ALL_FEATURES & ~EVENT_IDX)
        self.put(0x10, 0, 2)
        for index, ring in enumerate(rings):
            self.set_up(index, ring, index + 1)
        self.put(0x14, 15, 1)

    def kick(self, index: int = 0) -> None:
        self.put(0x16, index, 2)
        self.put(4 * self.get(0x1E, 2), index, 2, NOTIFY)

    def message(self) -> int:
        """Wait for a message, and return the vector that it was programmed for."""
        address, data = self.messages.get(timeout=20)
        assert address == MESSAGE
        return data - 0x40
