"""Which device of a PC a port or an address belongs to: by fixed ports, and by BARs."""

from __future__ import annotations

from bisect import bisect_right

from ..events import RequestKey
from ..ioreq import BUS_OFFSET, RequestKind

_PORTS = (
    (0x00, 0x10, "DMA controller"),
    (0x10, 0x14, "Xen platform device"),
    (0x20, 0x22, "interrupt controller"),
    (0x40, 0x44, "timer"),
    (0x60, 0x61, "keyboard"),
    (0x64, 0x65, "keyboard"),
    (0x70, 0x72, "clock"),
    (0x80, 0x90, "DMA page registers"),
    (0x92, 0x93, "system port A"),
    (0xA0, 0xA2, "interrupt controller"),
    (0xC0, 0xE0, "DMA controller"),
    (0x170, 0x178, "IDE"),
    (0x1CE, 0x1D2, "VGA (Bochs)"),
    (0x1F0, 0x1F8, "IDE"),
    (0x2F8, 0x300, "serial port"),
    (0x376, 0x377, "IDE"),
    (0x378, 0x380, "parallel port"),
    (0x3B0, 0x3E0, "VGA"),
    (0x3F0, 0x3F6, "floppy"),
    (0x3F6, 0x3F7, "IDE"),
    (0x3F7, 0x3F8, "floppy"),
    (0x3F8, 0x400, "serial port"),
    (0x510, 0x51C, "fw_cfg"),
    (0xAE00, 0xAE20, "PCI hotplug (ACPI)"),
    (0xAF00, 0xAF40, "CPU hotplug (ACPI)"),
    (0xAFE0, 0xAFE4, "general events (ACPI)"),
    (0xB000, 0xB040, "power management (ACPI)"),
    (0xCF8, 0xD00, "PCI configuration"),
)
_VGA = (0xA0000, 0xC0000)
_MAX_BARS = 1024
_BARS = range(0x10, 0x28, 4)
_PORT_BAR_BYTES, _MEMORY_BAR_BYTES = 1 << 8, 1 << 25
"""How far from its BAR an address is still taken for the device's; the size is not known."""
_PORT_LIMIT = 1 << 16


def bdf_name(bdf: int) -> str:
    """Return a PCI function's address: ``00:02.0``."""
    return f"{bdf >> 8:02x}:{bdf >> 3 & 31:02x}.{bdf & 7}"


class Platform:
    """Learns BARs from writes to configuration space. The sizes of BARs are not known.

    Synchronization: for one thread.
    """

    def __init__(self) -> None:
        self._bars: dict[int, int] = {}
        self._sorted: list[int] = []

    def learn(self, key: RequestKey) -> None:
        """Learn from a request, if it writes a base address."""
        if key.kind != RequestKind.PCI_CONFIG or not key.data:
            return
        bdf, offset = key.address >> BUS_OFFSET, key.address & 0xFFFF_FFFF
        base = key.data & ~(3 if key.data & 1 else 15)
        is_sizing = key.data >= 0xFFFF_0000
        if offset in _BARS and base and not is_sizing and len(self._bars) < _MAX_BARS:
            self._bars[base] = bdf
            self._sorted = sorted(self._bars)

    def device(self, kind: int, address: int) -> str:
        """Return the name of the device, as far as it is known; otherwise an empty string."""
        if kind == RequestKind.PCI_CONFIG:
            return f"PCI {bdf_name(address >> BUS_OFFSET)}"
        if kind == RequestKind.PORT:
            for start, end, name in _PORTS:
                if start <= address < end:
                    return name
        elif _VGA[0] <= address < _VGA[1]:
            return "VGA"
        place = bisect_right(self._sorted, address)
        base = self._sorted[place - 1] if place else 0
        room = _PORT_BAR_BYTES if address < _PORT_LIMIT else _MEMORY_BAR_BYTES
        if base and address - base < room and (base < _PORT_LIMIT) == (kind == RequestKind.PORT):
            return f"PCI {bdf_name(self._bars[base])}, BAR at {base:#x}"
        return ""
