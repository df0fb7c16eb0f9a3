"""VirtioDriver: a mock guest's driver for a virtio device, for tests of devices."""

# Theory of operation
#
# A driver takes a device through these steps (virtio 1.2, section 3.1), each of which it writes to
# the status register:
#
#   0 --ACKNOWLEDGE--> --DRIVER--> features --FEATURES_OK--> queues --DRIVER_OK--> running
#
# A device that does not accept the features clears FEATURES_OK. A running device that is broken, or
# that finds the driver broken, sets NEEDS_RESET. Writing 0 resets the device; the driver waits
# until it reads 0, and only then takes its memory back.

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Protocol

from ..errors import DeviceError
from .domain import MockDomain
from .heap import GuestHeap
from .pci_device import PciDevice
from .virtio_mmio import MmioTransport
from .virtio_pci import PciTransport
from .virtio_ring import EVENT_IDX, INDIRECT_DESC, DriverQueue
from .virtio_ring import Transport as RingTransport

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 0x40, 0x80
"""Bits of the status."""
VERSION_1 = 1 << 32
"""A feature that every modern device offers."""
RING_FEATURES = VERSION_1 | INDIRECT_DESC | EVENT_IDX
"""What this driver knows. Other features belong to a kind of device."""

_TRIES = 100
"""How often a configuration is read that changes all the time."""


class Transport(RingTransport, Protocol):
    """What a driver needs of a device: :class:`.PciTransport` or :class:`.MmioTransport`."""

    device_id: int

    @property
    def status(self) -> int:
        """The device's status register."""

    @status.setter
    def status(self, value: int) -> None: ...

    @property
    def generation(self) -> int:
        """A number that changes with the device's configuration."""

    def read_features(self, half: int) -> int:
        """Return the lower (0) or upper (1) 32 feature bits that the device offers."""

    def write_features(self, half: int, features: int) -> None:
        """Accept features of the lower (0) or upper (1) 32 bits."""

    def read_config(self, offset: int, size: int) -> int:
        """Read 1, 2 or 4 bytes of the device's configuration."""

    def write_config(self, offset: int, value: int, size: int) -> None:
        """Write 1, 2 or 4 bytes of the device's configuration."""

    def queue_sizes(self) -> list[int]:
        """Return the largest size of each queue."""

    def prepare_interrupts(self, queues: int) -> None:
        """Set interrupts up for a number of queues."""

    def start_queue(self, queue: int, size: int, addresses: tuple[int, int, int]) -> None:
        """Tell the device where a queue is, and enable it."""


class VirtioDriver:
    """A driver for one virtio device of a mock guest.

        driver = VirtioDriver.over_pci(PciDriver(guest).find("00:05.0"))
        driver.start()
        queue = driver.queues[0]
        chain = queue.add([header], [512, 1])
        queue.kick()
        queue.wait(chain)

    Args:
        transport: of the device.
        heap: where the driver's memory is. Drivers of one guest share a heap.

    Attributes:
        transport: as given; a test that misbehaves uses it directly.
        heap: as given.
        features: what was negotiated.
        queues: the device's queues by number, once it was started.

    Synchronization: one thread at a time. With MSI-X each queue may have a thread of its own.
    """

    def __init__(self, transport: Transport, heap: GuestHeap) -> None:
        self.transport = transport
        self.heap = heap
        self.features = 0
        self.queues: dict[int, DriverQueue] = {}

    @classmethod
    def over_pci(
        cls,
        device: PciDevice,
        heap: GuestHeap | None = None,
        *,
        msix: bool = True,
        pirq: int | None = None,
    ) -> VirtioDriver:
        """Return a driver for a PCI function.

        Args:
            device: the function.
            heap: None makes one of its own, at the guest's address 0x10000.
            msix: as of :class:`.PciTransport`.
            pirq: as of :class:`.PciTransport`.

        Raises:
            DeviceError: it is not a modern virtio device.
        """
        transport = PciTransport(device, msix=msix, pirq=pirq)
        return cls(transport, heap or GuestHeap(device.bus.domain))

    @classmethod
    def over_mmio(
        cls,
        domain: MockDomain,
        address: int,
        irq: int,
        heap: GuestHeap | None = None,
        *,
        vcpu: int | None = None,
    ) -> VirtioDriver:
        """Return a driver for a device with MMIO registers.

        Args:
            domain: the guest.
            address: of the registers.
            irq: the device's ISA interrupt line, or of an arm64 guest its SPI.
            heap: None makes one of its own, at the guest's address 0x10000.
            vcpu: as of :class:`.MmioTransport`.

        Raises:
            DeviceError: no modern virtio device answers there.
        """
        return cls(MmioTransport(domain, address, irq, vcpu), heap or GuestHeap(domain))

    @property
    def device_id(self) -> int:
        """The kind of device: 1 for a network device, 2 for a disk, and so on."""
        return self.transport.device_id

    @property
    def status(self) -> int:
        """The device's status register."""
        return self.transport.status

    def start(
        self, features: int = RING_FEATURES, *, queue_size: int = 256, timeout: float = 10.0
    ) -> None:
        """Reset the device, negotiate features, and start all of its queues.

        Args:
            features: what the driver wants, as bits; it gets what the device offers of it.
            queue_size: of each queue, if the device does not offer less.
            timeout: for the reset, in seconds.

        Raises:
            DeviceError: the device is not modern, does not accept the features, or has no queue.
            TimeoutError: it does not end its reset.
            MemoryError: the heap is full.
        """
        self.reset(timeout)
        transport = self.transport
        for bit in (ACKNOWLEDGE, DRIVER):
            transport.status = transport.status | bit
        offered = transport.read_features(0) | transport.read_features(1) << 32
        if not offered & VERSION_1:
            raise self._failed(f"it offers {offered:#x}, without VERSION_1")
        self.features = offered & (features | VERSION_1)
        for half in (0, 1):
            transport.write_features(half, self.features >> 32 * half & 0xFFFFFFFF)
        transport.status = transport.status | FEATURES_OK
        if not transport.status & FEATURES_OK:
            raise self._failed(f"it does not accept the features {self.features:#x}")
        sizes = transport.queue_sizes()
        if not any(sizes):
            raise self._failed("it has no queue")
        transport.prepare_interrupts(len(sizes))
        for index, largest in enumerate(sizes):
            if largest:
                self._start_queue(index, min(queue_size, largest))
        transport.status = transport.status | DRIVER_OK

    def _start_queue(self, index: int, size: int) -> None:
        queue = DriverQueue(self.heap, self.transport, index, size, self.features)
        self.queues[index] = queue
        addresses = queue.descriptors, queue.driver_area, queue.device_area
        self.transport.start_queue(index, size, addresses)

    def _failed(self, reason: str) -> DeviceError:
        """Give the device up, and return the error."""
        self.transport.status = self.transport.status | FAILED
        return DeviceError(f"virtio device of id {self.device_id}: {reason}")

    def reset(self, timeout: float = 10.0) -> None:
        """Reset the device, wait until it has ended that, and free the queues' memory.

        Raises:
            TimeoutError: the device does not end its reset; its memory stays allocated.
        """
        end = time.monotonic() + timeout
        self.transport.status = 0
        while status := self.transport.status:
            if time.monotonic() >= end:
                raise TimeoutError(
                    f"virtio device of id {self.device_id}: its reset has not ended in "
                    f"{timeout} s; its status is {status:#x}"
                )
            os.sched_yield()
        for index in list(self.queues):
            self.queues.pop(index).release()

    def read_config(self, offset: int, length: int) -> bytes:
        """Return bytes of the device's configuration, all of one generation.

        Raises:
            DeviceError: the configuration changes all the time.
        """
        for _ in range(_TRIES):
            before = self.transport.generation
            data = b"".join(self._config_fields(offset, offset + length))
            if self.transport.generation == before:
                return data
        raise DeviceError(
            f"virtio device of id {self.device_id}: its configuration has changed {_TRIES} times "
            "while it was read"
        )

    def _config_fields(self, offset: int, end: int) -> Iterator[bytes]:
        """Yield the configuration in accesses as wide as its fields may be."""
        while offset < end:
            size = next(each for each in (4, 2, 1) if not offset % each and offset + each <= end)
            yield self.transport.read_config(offset, size).to_bytes(size, "little")
            offset += size

    def write_config(self, offset: int, value: int, size: int) -> None:
        """Write 1, 2 or 4 bytes of the device's configuration."""
        self.transport.write_config(offset, value, size)
