"""MmioTransport: how a mock guest's driver reaches a virtio device over MMIO (version 2)."""

from __future__ import annotations

from typing import Literal

from ..errors import DeviceError
from .domain import MockDomain

MAGIC, VERSION = 0x74726976, 2

_MAGIC, _VERSION, _DEVICE_ID = 0x000, 0x004, 0x008
_DEVICE_FEATURES, _DRIVER_FEATURES = (0x014, 0x010), (0x024, 0x020)
"""The registers that select a half, and that hold it."""
_SELECT, _MAX_SIZE, _SIZE, _READY, _NOTIFY = 0x030, 0x034, 0x038, 0x044, 0x050
_INTERRUPT, _ACKNOWLEDGE, _STATUS = 0x060, 0x064, 0x070
_ADDRESSES = (0x080, 0x090, 0x0A0)
_GENERATION, _CONFIG = 0x0FC, 0x100
_MAX_QUEUES = 1024


class MmioTransport:
    """A virtio device in memory; a :class:`.Transport` for :class:`.VirtioDriver`.

    Args:
        domain: the guest.
        address: of the device's registers.
        irq: its ISA interrupt line, or of an arm64 guest its SPI.
        vcpu: the vCPU that does all accesses; None takes the one whose code the thread runs.

    Attributes:
        device_id: 1 for a network device, 2 for a disk, and so on.

    Raises:
        DeviceError: no modern virtio device answers there.

    Synchronization: one thread at a time.
    """

    def __init__(self, domain: MockDomain, address: int, irq: int, vcpu: int | None = None) -> None:
        self._domain = domain
        self._address = address
        self._irq = irq
        self._vcpu = vcpu
        found = self._read(_MAGIC), self._read(_VERSION)
        self.device_id = self._read(_DEVICE_ID)
        if found != (MAGIC, VERSION) or not self.device_id:
            raise DeviceError(
                f"no virtio device at {address:#x}: magic and version are {found[0]:#x} and "
                f"{found[1]}, and must be {MAGIC:#x} and {VERSION}; its id is {self.device_id}"
            )

    def _read(self, offset: int, size: int = 4) -> int:
        return self._domain.mmio_read(self._address + offset, size, vcpu=self._vcpu)

    def _write(self, offset: int, value: int, size: int = 4) -> None:
        self._domain.mmio_write(self._address + offset, value, size, vcpu=self._vcpu)

    # --- the device ------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        """The device's status register."""
        return self._read(_STATUS)

    @status.setter
    def status(self, value: int) -> None:
        self._write(_STATUS, value)

    def read_features(self, half: int) -> int:
        """Return the lower (0) or upper (1) 32 feature bits that the device offers."""
        select, register = _DEVICE_FEATURES
        self._write(select, half)
        return self._read(register)

    def write_features(self, half: int, features: int) -> None:
        """Accept features of the lower (0) or upper (1) 32 bits."""
        select, register = _DRIVER_FEATURES
        self._write(select, half)
        self._write(register, features)

    @property
    def generation(self) -> int:
        """A number that changes with the device's configuration."""
        return self._read(_GENERATION)

    def read_config(self, offset: int, size: int) -> int:
        """Read 1, 2 or 4 bytes of the device's configuration."""
        return self._read(_CONFIG + offset, size)

    def write_config(self, offset: int, value: int, size: int) -> None:
        """Write 1, 2 or 4 bytes of the device's configuration."""
        self._write(_CONFIG + offset, value, size)

    # --- queues and interrupts --------------------------------------------------------------------

    def queue_sizes(self) -> list[int]:
        """Return the largest size of each queue; the first that does not exist ends the list."""
        sizes: list[int] = []
        while len(sizes) < _MAX_QUEUES:
            self._write(_SELECT, len(sizes))
            size = self._read(_MAX_SIZE)
            if not size:
                break
            sizes.append(size)
        return sizes

    def prepare_interrupts(self, queues: int) -> None:
        """Do nothing: all queues share the device's line."""

    def start_queue(self, queue: int, size: int, addresses: tuple[int, int, int]) -> None:
        """Tell the device where a queue is, and enable it.

        Args:
            queue: its number.
            size: how many descriptors.
            addresses: of the descriptors, the driver area and the device area.
        """
        self._write(_SELECT, queue)
        self._write(_SIZE, size)
        for register, address in zip(_ADDRESSES, addresses, strict=True):
            self._write(register, address & 0xFFFFFFFF)
            self._write(register + 4, address >> 32)
        self._write(_READY, 1)

    def notify(self, queue: int) -> None:
        """Tell the device that a queue has new chains."""
        self._write(_NOTIFY, queue)

    def wait(self, queue: int, timeout: float) -> None:  # noqa: ARG002 - one line for all queues
        """Wait for an interrupt of the device, and acknowledge it.

        Raises:
            TimeoutError: none came in time.
        """
        kind: Literal["isa", "spi"] = "spi" if self._domain.machine == "arm64" else "isa"
        self._domain.wait_for_line(kind, self._irq, timeout=timeout)
        self._write(_ACKNOWLEDGE, self._read(_INTERRUPT))
