"""PciDevice: a PCI function as a mock guest's driver sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from ..errors import DeviceError
from .domain import MockDomain

COMMAND, STATUS, BARS, CAPABILITIES, PIN = 0x04, 0x06, 0x10, 0x34, 0x3D
IO, MEMORY, MASTER, INTX_DISABLE = 0x1, 0x2, 0x4, 0x400
"""Bits of the command register."""
HAS_CAPABILITIES = 0x10
"""A bit of the status register."""
MSI, MSIX = 0x05, 0x11
"""Numbers of capabilities."""
MSI_ENABLE, MSI_VECTORS_USED, MSI_64BIT, MSI_MASKS = 0x1, 0x70, 0x80, 0x100
MSIX_ENABLE, MSIX_MASK_ALL = 0x8000, 0x4000
"""Bits of their control registers."""

_BARS_OF_HEADER = {0: 6, 1: 2}
_MAX_CAPABILITIES = 48
"""Configuration space holds 48 of 4 bytes each, so a longer list has a loop."""
_ENTRY_SIZE = 16
_MASKED = 1


class Bus(Protocol):
    """What a function needs of a :class:`.PciDriver`."""

    domain: MockDomain
    vcpu: int | None

    def read_config(self, bdf: str, offset: int, size: int = 4) -> int:
        """Read configuration space."""

    def write_config(self, bdf: str, offset: int, value: int, size: int = 4) -> None:
        """Write configuration space."""

    def allocate(self, bar: PciBar) -> int:
        """Return an address for a BAR."""

    def message(self, pirq: int | None) -> tuple[int, int]:
        """Return address and data for an interrupt message."""


@dataclass
class PciBar:
    """A base address register.

    Attributes:
        number: 0 to 5, the first of its registers.
        kind: ``"io"``, ``"mmio32"`` or ``"mmio64"``.
        size: in bytes.
        prefetchable: as the device says.
        address: where it is; 0 until it has an address.
    """

    number: int
    kind: Literal["io", "mmio32", "mmio64"]
    size: int
    prefetchable: bool
    address: int = 0

    @property
    def offset(self) -> int:
        """Where it is in configuration space."""
        return BARS + 4 * self.number


class PciDevice:
    """A PCI function, found and sized. Made by :meth:`.PciDriver.scan`.

    Attributes:
        bdf: as ``"0000:00:05.0"``.
        vendor_id: 16 bits.
        device_id: 16 bits.
        class_code: 24 bits.
        bars: its BARs, by number.

    Synchronization: one thread at a time.
    """

    def __init__(self, bus: Bus, bdf: str) -> None:
        self.bus = bus
        self.bdf = bdf
        self.vendor_id = self.read_config(0, 2)
        self.device_id = self.read_config(2, 2)
        self.class_code = self.read_config(8) >> 8
        self.bars = {bar.number: bar for bar in self._sized()}

    def __repr__(self) -> str:
        name = f"{self.vendor_id:04x}:{self.device_id:04x}"
        return f"<PciDevice {self.bdf} {name}, class {self.class_code:06x}>"

    def read_config(self, offset: int, size: int = 4) -> int:
        """Read its configuration space; see :meth:`.PciDriver.read_config`."""
        return self.bus.read_config(self.bdf, offset, size)

    def write_config(self, offset: int, value: int, size: int = 4) -> None:
        """Write its configuration space; see :meth:`.PciDriver.read_config`."""
        self.bus.write_config(self.bdf, offset, value, size)

    def set_command(self, *, on: int = 0, off: int = 0) -> int:
        """Set and clear bits of the command register; return what it was."""
        command = self.read_config(COMMAND, 2)
        self.write_config(COMMAND, command & ~off | on, 2)
        return command

    # --- base address registers ------------------------------------------------------------

    def _sized(self) -> Iterator[PciBar]:
        command = self.set_command(off=IO | MEMORY)
        number, end = 0, _BARS_OF_HEADER.get(self.read_config(0x0E, 1) & 0x7F, 0)
        while number < end:
            bar = self._size(number)
            if bar is not None:
                yield bar
            number += 2 if bar is not None and bar.kind == "mmio64" else 1
        self.write_config(COMMAND, command, 2)

    def _size(self, number: int) -> PciBar | None:
        """Return a BAR without an address; None if the function does not have it."""
        offset = BARS + 4 * number
        before, ones = self._probe(offset)
        if not ones:
            return None
        is_io = bool(before & 1)
        mask = ones & (0xFFFC if is_io else 0xFFFFFFF0)
        is_64 = not is_io and before & 6 == 4
        if is_64:
            mask |= self._probe(offset + 4)[1] << 32
        size = mask & -mask
        top = 1 << 16 if is_io else 1 << 64 if is_64 else 1 << 32
        if not size or mask & top - 1 != top - size:
            raise DeviceError(
                f"{self.bdf}: BAR {number} keeps {mask:#x} of all ones; the upper bits must be "
                "set and the lower ones clear, so that they tell a size"
            )
        kind: Literal["io", "mmio32", "mmio64"] = "io" if is_io else "mmio64" if is_64 else "mmio32"
        return PciBar(number, kind, size, not is_io and bool(before & 8))

    def _probe(self, offset: int) -> tuple[int, int]:
        """Return what a register holds, and what it keeps of all ones; restore it."""
        before = self.read_config(offset)
        self.write_config(offset, 0xFFFFFFFF)
        ones = self.read_config(offset)
        self.write_config(offset, before)
        return before, ones

    def place_bar(self, number: int, address: int) -> None:
        """Give a BAR an address, with decoding off while it is written.

        Raises:
            DeviceError: there is no such BAR, or it does not keep the address.
        """
        bar = self._bar(number)
        command = self.set_command(off=IO | MEMORY)
        halves = [address & 0xFFFFFFFF, address >> 32][: 2 if bar.kind == "mmio64" else 1]
        for index, half in enumerate(halves):
            self.write_config(bar.offset + 4 * index, half)
        kept = [self.read_config(bar.offset + 4 * index) for index in range(len(halves))]
        kept[0] &= ~(3 if bar.kind == "io" else 0xF)
        if kept != halves:
            raise DeviceError(f"{self.bdf}: BAR {number} does not keep address {address:#x}")
        bar.address = address
        self.write_config(COMMAND, command, 2)

    def enable(self) -> None:
        """Give BARs addresses, and turn on decoding and bus mastering.

        Raises:
            DeviceError: no addresses are left, or a BAR does not keep its address.
        """
        on = 0
        for bar in self.bars.values():
            on |= IO if bar.kind == "io" else MEMORY
            if not bar.address:
                self.place_bar(bar.number, self.bus.allocate(bar))
        self.set_command(on=on)
        self.set_command(on=MASTER)

    def disable(self) -> None:
        """Turn off decoding and bus mastering. The BARs keep their addresses."""
        self.set_command(off=IO | MEMORY | MASTER)

    def read_bar(self, number: int, offset: int, size: int = 4) -> int:
        """Read from a BAR's range: 1, 2 or 4 bytes, or 8 if it is in memory.

        Raises:
            DeviceError: the function does not have that BAR, or it has no address.
        """
        bar, domain = self._placed(number), self.bus.domain
        access = domain.port_in if bar.kind == "io" else domain.mmio_read
        return access(bar.address + offset, size, vcpu=self.bus.vcpu)

    def write_bar(self, number: int, offset: int, value: int, size: int = 4) -> None:
        """Write to a BAR's range; as :meth:`read_bar`."""
        bar, domain = self._placed(number), self.bus.domain
        access = domain.port_out if bar.kind == "io" else domain.mmio_write
        access(bar.address + offset, value, size, vcpu=self.bus.vcpu)

    def _bar(self, number: int) -> PciBar:
        if number not in self.bars:
            raise DeviceError(f"{self.bdf}: it has no BAR {number}; it has {sorted(self.bars)}")
        return self.bars[number]

    def _placed(self, number: int) -> PciBar:
        bar = self._bar(number)
        if not bar.address:
            raise DeviceError(f"{self.bdf}: BAR {number} has no address; call enable() first")
        return bar

    # --- capabilities and interrupts ----------------------------------------------------------

    def capabilities(self) -> list[tuple[int, int]]:
        """Return the number and the offset of each capability, in the function's order.

        Raises:
            DeviceError: the list has a loop.
        """
        found: list[tuple[int, int]] = []
        if not self.read_config(STATUS, 2) & HAS_CAPABILITIES:
            return found
        offset = self.read_config(CAPABILITIES, 1) & 0xFC
        while offset:
            if len(found) == _MAX_CAPABILITIES:
                raise DeviceError(f"{self.bdf}: the list of capabilities has a loop: {found[:4]}")
            found.append((self.read_config(offset, 1), offset))
            offset = self.read_config(offset + 1, 1) & 0xFC
        return found

    def find_capability(self, number: int) -> int:
        """Return the offset of the first capability of a number.

        Raises:
            DeviceError: the function does not have it.
        """
        for each, offset in self.capabilities():
            if each == number:
                return offset
        raise DeviceError(f"{self.bdf}: it has no capability {number:#x}")

    @property
    def msix_size(self) -> int:
        """How many entries its MSI-X table has; DeviceError if it has none."""
        return (self.read_config(self.find_capability(MSIX) + 2, 2) & 0x7FF) + 1

    def enable_msix(self, vectors: int, *, pirq: int | None = None) -> list[MsiVector]:
        """Enable MSI-X, and program the first entries of its table.

        Args:
            vectors: how many entries.
            pirq: for the form that Linux has on Xen where it takes interrupts as event channels:
                vector 0, and a pirq, this one for the first entry, in the address. The entries
                stay masked then. None for ordinary interrupt vectors.

        Raises:
            DeviceError: the function has no MSI-X, or fewer entries.
        """
        control = self.find_capability(MSIX) + 2
        size = self.msix_size
        if not 1 <= vectors <= size:
            raise DeviceError(f"{self.bdf}: {vectors} MSI-X vectors must be 1 to {size}")
        self.write_config(control, MSIX_ENABLE | MSIX_MASK_ALL, 2)
        table = self.read_config(control + 2)
        places = [(table & 7, (table & ~7) + _ENTRY_SIZE * number) for number in range(size)]
        for bar, offset in places:
            self.write_bar(bar, offset + 12, _MASKED)
        self.set_command(on=INTX_DISABLE)
        self.write_config(control, MSIX_ENABLE, 2)
        programmed = []
        for number, place in enumerate(places[:vectors]):
            programmed.append(self._program(place, None if pirq is None else pirq + number))
            if pirq is None:
                programmed[-1].unmask()
        return programmed

    def _program(self, place: tuple[int, int], pirq: int | None) -> MsiVector:
        """Write the message of an entry of the MSI-X table."""
        bar, offset = place
        address, data = self.bus.message(pirq)
        for index, value in enumerate((address & 0xFFFFFFFF, address >> 32, data)):
            self.write_bar(bar, offset + 4 * index, value)
        return MsiVector(self, address, data, partial(self.write_bar, bar, offset + 12))

    def enable_msi(self, *, pirq: int | None = None) -> MsiVector:
        """Enable plain MSI with one message, as Linux mostly does.

        Args:
            pirq: as of :meth:`enable_msix`; a mask stays set then.

        Raises:
            DeviceError: the function has no MSI, or has 32 bits for an address of 64.
        """
        start = self.find_capability(MSI)
        control = self.read_config(start + 2, 2)
        is_64 = bool(control & MSI_64BIT)
        address, data = self.bus.message(pirq)
        if address >> 32 and not is_64:
            raise DeviceError(f"{self.bdf}: MSI address {address:#x} does not fit its 32 bits")
        masks = start + (0x10 if is_64 else 0x0C)
        set_mask = partial(self.write_config, masks) if control & MSI_MASKS else None
        vector = MsiVector(self, address, data, set_mask)
        if set_mask:
            vector.mask()
        self.write_config(start + 4, address & 0xFFFFFFFF)
        if is_64:
            self.write_config(start + 8, address >> 32)
        self.write_config(start + (0x0C if is_64 else 0x08), data, 2)
        self.set_command(on=INTX_DISABLE)
        self.write_config(start + 2, control & ~MSI_VECTORS_USED | MSI_ENABLE, 2)
        if set_mask and pirq is None:
            vector.unmask()
        return vector

    def disable_msi(self) -> None:
        """Disable plain MSI, and allow INTx again."""
        self.write_config(self.find_capability(MSI) + 2, 0, 2)
        self.set_command(off=INTX_DISABLE)

    def disable_msix(self) -> None:
        """Disable MSI-X, and allow INTx again."""
        self.write_config(self.find_capability(MSIX) + 2, 0, 2)
        self.set_command(off=INTX_DISABLE)

    def wait_for_intx(self, timeout: float = 10.0) -> None:
        """Wait until the function's interrupt pin is raised.

        Raises:
            DeviceError: it has no pin.
            TimeoutError: it was not raised in time.
        """
        pin = self.read_config(PIN, 1)
        if not 1 <= pin <= 4:
            raise DeviceError(f"{self.bdf}: it has no interrupt pin, because its pin is {pin}")
        self.bus.domain.wait_for_line("intx", self.bdf, pin - 1, timeout=timeout)


class MsiVector:
    """A message that a function was programmed with, by MSI-X or plain MSI.

    Attributes:
        address: of the message, 64 bits.
        data: of the message.

    Synchronization: as its :class:`PciDevice`; :meth:`wait` is for any thread.
    """

    def __init__(
        self, device: PciDevice, address: int, data: int, set_mask: Callable[[int], object] | None
    ) -> None:
        self.address = address
        self.data = data
        self._device = device
        self._set_mask = set_mask

    def __repr__(self) -> str:
        return f"<MsiVector {self.address:#x}, {self.data:#x} of {self._device!r}>"

    def mask(self) -> None:
        """Hold its interrupts back; DeviceError if the function has no mask for it."""
        self._write_mask(_MASKED)

    def unmask(self) -> None:
        """Have its interrupts raised, one that is pending at once; as :meth:`mask`."""
        self._write_mask(0)

    def _write_mask(self, value: int) -> None:
        if self._set_mask is None:
            raise DeviceError(f"{self._device.bdf}: its MSI capability has no mask bits")
        self._set_mask(value)

    def wait(self, timeout: float = 10.0) -> None:
        """Wait for its interrupt.

        Raises:
            TimeoutError: it was not raised in time.
        """
        domain = self._device.bus.domain
        domain.wait_for_interrupt("msi", self.address, self.data, timeout=timeout)
