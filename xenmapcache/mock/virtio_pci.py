"""PciTransport: how a mock guest's driver reaches a virtio device over PCI (modern)."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import DeviceError
from .pci_device import MsiVector, PciDevice

VENDOR_SPECIFIC = 0x09
"""The number of a capability; virtio says in several where its registers are."""
COMMON, NOTIFY, ISR, DEVICE = 1, 2, 3, 4
"""What such a capability is about."""
NO_VECTOR = 0xFFFF

_DEVICE_FEATURES, _DRIVER_FEATURES = (0x00, 0x04), (0x08, 0x0C)
"""The registers that select a half, and that hold it."""
_CONFIG_VECTOR, _QUEUES, _STATUS, _GENERATION = 0x10, 0x12, 0x14, 0x15
_SELECT, _SIZE, _VECTOR, _ENABLE, _NOTIFY_OFFSET = 0x16, 0x18, 0x1A, 0x1C, 0x1E
_ADDRESSES = 0x20
_FIRST_ID = 0x1040


class _Place(NamedTuple):
    """Where registers are: the BAR, the offset in it, and how many bytes."""

    bar: int
    offset: int
    length: int


class PciTransport:
    """A virtio device as a PCI function; a :class:`.Transport` for :class:`.VirtioDriver`.

    Args:
        device: the function; it is enabled if it is not.
        msix: whether to use MSI-X, with a vector for each queue if the table has that many
            entries; else the interrupt pin.
        pirq: program MSI-X with Xen's pirqs from this one on; see :meth:`.PciDevice.enable_msix`.

    Attributes:
        device: as given.
        device_id: 1 for a network device, 2 for a disk, and so on.
        vectors: the MSI-X vectors; the first one is for changes of the configuration.

    Raises:
        DeviceError: it is not a modern virtio device.

    Synchronization: one thread at a time; :meth:`wait` with MSI-X may be called in one for each
    queue.
    """

    def __init__(self, device: PciDevice, *, msix: bool = True, pirq: int | None = None) -> None:
        self.device = device
        self.device_id = device.device_id - _FIRST_ID
        if not 0 < self.device_id < 0x40:
            raise DeviceError(f"{device!r}: a modern virtio device has ids 0x1041 to 0x107f")
        device.enable()
        self.vectors: list[MsiVector] = []
        self._msix = msix
        self._pirq = pirq
        self._places: dict[int, _Place] = {}
        self._multiplier = 0
        self._notify_offsets: dict[int, int] = {}
        for number, offset in device.capabilities():
            if number == VENDOR_SPECIFIC:
                self._add_place(offset)
        for kind in (COMMON, NOTIFY, ISR):
            if kind not in self._places:
                raise DeviceError(f"{device!r}: it has no virtio capability of type {kind}")

    def _add_place(self, offset: int) -> None:
        kind = self.device.read_config(offset + 3, 1)
        if kind not in (COMMON, NOTIFY, ISR, DEVICE) or kind in self._places:
            return  # of several the first one counts
        bar = self.device.read_config(offset + 4, 1)
        self._places[kind] = _Place(
            bar, self.device.read_config(offset + 8), self.device.read_config(offset + 12)
        )
        if kind == NOTIFY:
            self._multiplier = self.device.read_config(offset + 16)

    def _read(self, kind: int, offset: int, size: int) -> int:
        bar, start = self._check(kind, offset, size)
        return self.device.read_bar(bar, start, size)

    def _write(self, kind: int, offset: int, value: int, size: int) -> None:
        bar, start = self._check(kind, offset, size)
        self.device.write_bar(bar, start, value, size)

    def _check(self, kind: int, offset: int, size: int) -> tuple[int, int]:
        """Return BAR and offset of registers."""
        place = self._places.get(kind)
        if place is None or offset + size > place.length:
            raise DeviceError(
                f"{self.device!r}: {size} bytes at {offset:#x} are not within its virtio "
                f"capability of type {kind}, {place}"
            )
        return place.bar, place.offset + offset

    # --- the device ------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        """The device's status register."""
        return self._read(COMMON, _STATUS, 1)

    @status.setter
    def status(self, value: int) -> None:
        self._write(COMMON, _STATUS, value, 1)

    def read_features(self, half: int) -> int:
        """Return the lower (0) or upper (1) 32 feature bits that the device offers."""
        select, register = _DEVICE_FEATURES
        self._write(COMMON, select, half, 4)
        return self._read(COMMON, register, 4)

    def write_features(self, half: int, features: int) -> None:
        """Accept features of the lower (0) or upper (1) 32 bits."""
        select, register = _DRIVER_FEATURES
        self._write(COMMON, select, half, 4)
        self._write(COMMON, register, features, 4)

    @property
    def generation(self) -> int:
        """A number that changes with the device's configuration."""
        return self._read(COMMON, _GENERATION, 1)

    def read_config(self, offset: int, size: int) -> int:
        """Read 1, 2 or 4 bytes of the device's configuration."""
        return self._read(DEVICE, offset, size)

    def write_config(self, offset: int, value: int, size: int) -> None:
        """Write 1, 2 or 4 bytes of the device's configuration."""
        self._write(DEVICE, offset, value, size)

    # --- queues and interrupts --------------------------------------------------------------------

    def queue_sizes(self) -> list[int]:
        """Return the largest size of each queue; 0 if a queue is not available."""
        sizes = []
        for queue in range(self._read(COMMON, _QUEUES, 2)):
            self._write(COMMON, _SELECT, queue, 2)
            sizes.append(self._read(COMMON, _SIZE, 2))
        return sizes

    def prepare_interrupts(self, queues: int) -> None:
        """Program MSI-X vectors: one for the configuration, and one for each queue."""
        if not self._msix:
            return
        wanted = min(self.device.msix_size, queues + 1)
        self.vectors = self.device.enable_msix(wanted, pirq=self._pirq)
        self._set_vector(_CONFIG_VECTOR, 0)

    def _entry_of(self, queue: int) -> int:
        """Return a queue's entry of the MSI-X table; the last ones share one if it is short."""
        return min(queue + 1, len(self.vectors) - 1)

    def _set_vector(self, register: int, entry: int) -> None:
        self._write(COMMON, register, entry, 2)
        if self._read(COMMON, register, 2) != entry:
            raise DeviceError(f"{self.device!r}: it does not take MSI-X entry {entry}")

    def start_queue(self, queue: int, size: int, addresses: tuple[int, int, int]) -> None:
        """Tell the device where a queue is, and enable it.

        Args:
            queue: its number.
            size: how many descriptors.
            addresses: of the descriptors, the driver area and the device area.
        """
        self._write(COMMON, _SELECT, queue, 2)
        self._write(COMMON, _SIZE, size, 2)
        for number, address in enumerate(addresses):
            register = _ADDRESSES + 8 * number
            self._write(COMMON, register, address & 0xFFFFFFFF, 4)
            self._write(COMMON, register + 4, address >> 32, 4)
        if self.vectors:
            self._set_vector(_VECTOR, self._entry_of(queue))
        # Read once, because a notification must not select a queue: each may have a thread.
        self._notify_offsets[queue] = self._read(COMMON, _NOTIFY_OFFSET, 2) * self._multiplier
        self._write(COMMON, _ENABLE, 1, 2)

    def notify(self, queue: int) -> None:
        """Tell the device that a queue has new chains."""
        self._write(NOTIFY, self._notify_offsets[queue], queue, 2)

    def wait(self, queue: int, timeout: float) -> None:
        """Wait for an interrupt of a queue, and acknowledge it.

        Raises:
            TimeoutError: none came in time.
        """
        if self.vectors:
            self.vectors[self._entry_of(queue)].wait(timeout)
            return
        self.device.wait_for_intx(timeout)
        self._read(ISR, 0, 1)  # which lowers the pin
