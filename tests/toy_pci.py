"""A hand-made PCI function, just good enough to be driven by the mock's PCI driver."""

from __future__ import annotations

from xenmapcache.devicemodel import IoreqServer, Region
from xenmapcache.devicemodel.regions import Device

COMMAND, PIN = 0x04, 0x3D


class ToyFunction:
    """A PCI function: configuration space with write masks, BARs, capabilities, an MSI-X table.

    Attributes:
        config: its configuration space; a test may change any byte.
        masks: which bits of it a guest can write.
        writes: ``(offset, size, value)`` of each write to it, in order.
    """

    def __init__(self, server: IoreqServer, bdf: str, ident: int, class_code: int) -> None:
        self.server = server
        self.config = bytearray(256)
        self.masks = bytearray(256)
        self.writes: list[tuple[int, int, int]] = []
        self._bars: dict[int, tuple[int, int, Device]] = {}
        self._regions: dict[int, Region] = {}
        self._last_link, self._next_capability = 0x34, 0x40
        self.put(0, ident, 4)
        self.put(8, class_code << 8, 4)
        self.masks[COMMAND : COMMAND + 2] = b"\x07\x04"
        server.claim_pci(bdf, self)

    def put(self, offset: int, value: int, size: int) -> None:
        """Set bytes of configuration space."""
        self.config[offset : offset + size] = value.to_bytes(size, "little")

    def get(self, offset: int, size: int) -> int:
        """Return bytes of configuration space."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def add_bar(self, number: int, size: int, device: Device, flags: int = 0) -> None:
        """Add a BAR; ``flags`` are the lowest bits of its register."""
        offset, width = 0x10 + 4 * number, 8 if flags & 5 == 4 else 4
        self.put(offset, flags, width)
        self._bars[number] = (flags, size, device)
        ones = (1 << 8 * width) - size
        self.masks[offset : offset + width] = ones.to_bytes(width, "little")

    def add_capability(self, number: int, body: bytes) -> int:
        """Add a capability, and return its offset."""
        offset = self._next_capability
        self.config[offset : offset + 2 + len(body)] = bytes((number, 0)) + body
        self.config[self._last_link] = offset
        self.config[6] |= 0x10
        self._last_link, self._next_capability = offset + 1, offset + 2 + len(body) + 3 & 0xFC
        return offset

    def read(self, offset: int, size: int) -> int:
        return self.get(offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))
        for index, byte in enumerate(value.to_bytes(size, "little"), offset):
            mask = self.masks[index]
            self.config[index] = self.config[index] & ~mask | byte & mask
        for number in self._bars:
            self._place(number)

    def _place(self, number: int) -> None:
        """Claim a BAR's range if it is decoded, and release it if not."""
        flags, size, device = self._bars[number]
        is_io, width = flags & 1, 8 if flags & 5 == 4 else 4
        address = self.get(0x10 + 4 * number, width) & ~(3 if is_io else 15)
        wanted = address if address and self.config[COMMAND] & (1 if is_io else 2) else None
        region = self._regions.get(number)
        if (region.start if region else None) == wanted:
            return
        if region is not None:
            self._regions.pop(number).release()
        if wanted is not None:
            claim = self.server.claim_ports if is_io else self.server.claim_mmio
            self._regions[number] = claim(wanted, size, device)


class ToyMsix:
    """An MSI-X table in a BAR of its own; it raises interrupts as its entries say."""

    def __init__(self, function: ToyFunction, bar: int, entries: int) -> None:
        self.function = function
        self.table = bytearray(0x1000)
        function.add_bar(bar, 0x1000, self)
        body = (
            bytes((entries - 1, 0))
            + bar.to_bytes(4, "little")
            + (0x800 | bar).to_bytes(4, "little")
        )
        self.control = function.add_capability(0x11, body) + 2
        function.masks[self.control + 1] = 0xC0

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.table[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.table[offset : offset + size] = value.to_bytes(size, "little")

    def fire(self, entry: int) -> bool:
        """Raise an interrupt; return whether that was allowed. Xen's pirqs ignore the masks."""
        place = 16 * entry
        data = self.read(place + 8, 4)
        enabled, masked = (self.function.config[self.control + 1] & bit for bit in (0x80, 0x40))
        allowed = bool(enabled and not (data & 0xFF and (masked or self.table[place + 12] & 1)))
        if allowed:
            self.function.server.inject_msi(self.read(place, 8), data)
        return allowed
