"""A hand-made virtio device, just good enough to be driven by the mock's virtio driver.

It runs in the server's thread and believes the driver. It answers each chain with what the chain
brought, backward.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tests.toy_pci import PIN, ToyFunction, ToyMsix
from xenmapcache import MapCache
from xenmapcache.devicemodel import IoreqServer

INDIRECT_DESC, EVENT_IDX, VERSION_1 = 1 << 28, 1 << 29, 1 << 32
BAR, COMMON, ISR, CONFIG, NOTIFY = 4, 0x000, 0x100, 0x200, 0x300
ADDRESSES = ("descriptors", "driver", "device")
PCI_REGISTERS = {
    0x00: "device_half",
    0x04: "offered",
    0x08: "driver_half",
    0x0C: "accepted",
    0x10: "vector",
    0x12: "count",
    0x14: "status",
    0x15: "generation",
    0x16: "selected",
    0x18: "queue_size",
    0x1A: "queue_vector",
    0x1C: "enabled",
    0x1E: "notify_offset",
}
MMIO_REGISTERS = {
    0x000: "magic",
    0x004: "version",
    0x008: "ident",
    0x010: "offered",
    0x014: "device_half",
    0x020: "accepted",
    0x024: "driver_half",
    0x030: "selected",
    0x034: "largest",
    0x038: "queue_size",
    0x044: "enabled",
    0x060: "interrupt",
    0x064: "acknowledged",
    0x070: "status",
    0x0FC: "generation",
}


class ToyQueue:
    """What a driver has said about a queue."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.enabled = self.seen = self.used = self.signalled = 0
        self.vector = 0xFFFF
        self.addresses = dict.fromkeys(ADDRESSES, 0)


class ToyVirtio:
    """A device with one queue for each of ``sizes``, and registers by name.

    Attributes:
        features: what it offers.
        accepted: what the driver has accepted, by half.
        status: the register; a bit of ``refused`` is never set.
        notified: the queues that the driver has notified, in order.
        lazy: a test calls :meth:`run`, instead of each notification.
        slow_resets: how often the status is read as before after a reset.
    """

    magic, version, ident, refused, vector = 0x74726976, 2, 18, 0, 0xFFFF

    def __init__(self, cache: MapCache, sizes: tuple[int, ...] = (8,)) -> None:
        self.cache = cache
        self.sizes = sizes
        self.features = VERSION_1 | INDIRECT_DESC | EVENT_IDX
        self.config = bytearray(b"\x01\x02\x03\x04\x05\x06\x07")
        self.notified: list[int] = []
        self.lazy = False
        self.slow_resets = self.generation = self.interrupt = 0
        self.reset()

    def reset(self) -> None:
        self.device_half = self.driver_half = self.selected = 0
        self.accepted = {0: 0, 1: 0}
        self.value = 0
        self.queues = [ToyQueue(size) for size in self.sizes]

    @property
    def driver_features(self) -> int:
        return self.accepted[1] << 32 | self.accepted[0]

    # --- registers, as both transports have them -----------------------------------------------

    def get(self, name: str) -> int:
        """Return a register."""
        exists = self.selected < len(self.queues)
        queue = self.queues[self.selected] if exists else ToyQueue(0)
        values = {
            "offered": self.features >> 32 * self.device_half & 0xFFFFFFFF,
            "count": len(self.queues),
            "largest": queue.size,
            "queue_size": queue.size,
            "queue_vector": queue.vector,
            "enabled": queue.enabled,
            "notify_offset": self.selected,
            "status": self.value,
        }
        if name == "status" and self.slow_resets:
            self.slow_resets -= 1
            return 0xF
        return values[name] if name in values else int(getattr(self, name))

    def set(self, name: str, value: int) -> None:
        """Write a register."""
        queue = self.queues[self.selected] if self.selected < len(self.queues) else ToyQueue(0)
        if name == "status":
            if not value:
                self.reset()
            self.value = value & ~self.refused
        elif name == "accepted":
            self.accepted[self.driver_half] = value
        elif name == "acknowledged":
            self.lower(value)
        elif name in ("queue_size", "queue_vector", "enabled"):
            setattr(queue, name.removeprefix("queue_"), value)
        else:
            setattr(self, name, value)

    def set_address(self, offset: int, value: int) -> None:
        """Write half of an address; ``offset`` is from the first one, 8 bytes each."""
        name, shift = ADDRESSES[offset // 8], 32 if offset & 4 else 0
        addresses = self.queues[self.selected].addresses
        addresses[name] = addresses[name] & ~(0xFFFFFFFF << shift) | value << shift

    def get_config(self, offset: int, size: int) -> int:
        return int.from_bytes(self.config[offset : offset + size], "little")

    # --- queues ---------------------------------------------------------------------------------

    def notify(self, number: int) -> None:
        self.notified.append(number)
        if not self.lazy:
            self.run(number)

    def run(self, number: int) -> None:
        """Answer all chains of a queue, and raise an interrupt if the driver wants one."""
        queue, read, write = self.queues[number], self.word, self.put_word
        driver, device = queue.addresses["driver"], queue.addresses["device"]
        while queue.seen != read(driver + 2):
            head = read(driver + 4 + 2 * (queue.seen % queue.size))
            entry = struct.pack("<II", head, self.answer(queue, head))
            self.cache.write(device + 4 + 8 * (queue.used % queue.size), entry)
            queue.seen, queue.used = queue.seen + 1 & 0xFFFF, queue.used + 1 & 0xFFFF
            write(device + 2, queue.used)
        write(device + 4 + 8 * queue.size, queue.seen)
        previous, queue.signalled = queue.signalled, queue.used
        if self.driver_features & EVENT_IDX:
            event = read(driver + 4 + 2 * queue.size)
            wanted = (queue.used - event - 1) & 0xFFFF < (queue.used - previous) & 0xFFFF
        else:
            wanted = not read(driver) & 1
        if wanted:
            self.raise_for(queue)

    def answer(self, queue: ToyQueue, head: int) -> int:
        """Write what a chain brought, backward; return how much was written."""
        chain = [*self.chain(queue.addresses["descriptors"], head)]
        data = b"".join(self.cache.read(*part) for part, flags in chain if not flags & 2)[::-1]
        written = 0
        for (address, length), flags in chain:
            if flags & 2 and data[written : written + length]:
                self.cache.write(address, data[written : written + length])
                written += len(data[written : written + length])
        return written

    def chain(self, table: int, index: int) -> Iterator[tuple[tuple[int, int], int]]:
        while True:
            entry = self.cache.read(table + 16 * index, 16)
            address, length, flags, index = struct.unpack("<QIHH", entry)
            if flags & 4:
                yield from self.chain(address, 0)
            else:
                yield (address, length), flags
            if not flags & 1:
                return

    def word(self, address: int) -> int:
        return int.from_bytes(self.cache.read(address, 2), "little")

    def put_word(self, address: int, value: int) -> None:
        self.cache.write(address, value.to_bytes(2, "little"))

    def raise_for(self, queue: ToyQueue) -> None:
        raise NotImplementedError

    def lower(self, bits: int) -> None:
        raise NotImplementedError


class ToyVirtioPci(ToyVirtio):
    """The device as a PCI function, with MSI-X unless ``entries`` is 0."""

    def __init__(
        self,
        server: IoreqServer,
        bdf: str = "0000:00:05.0",
        sizes: tuple[int, ...] = (8,),
        entries: int = 3,
    ) -> None:
        super().__init__(server.cache, sizes)
        self.server, self.bdf = server, bdf
        self.function = ToyFunction(server, bdf, 0x1052_1AF4, 0xFF0000)
        self.function.add_bar(BAR, 0x1000, self, flags=4)
        self.function.config[PIN] = 1
        for kind, offset, length in (
            (5, 0, 0),
            (1, COMMON, 0x38),
            (1, 0, 0),
            (3, ISR, 1),
            (4, CONFIG, 7),
        ):
            self.add(kind, offset, length)
        self.add(2, NOTIFY, 0x100, struct.pack("<I", 4))
        self.msix = ToyMsix(self.function, 1, entries) if entries else None

    def add(self, kind: int, offset: int, length: int, more: bytes = b"") -> int:
        body = struct.pack("<BBBxxxII", 16 + len(more), kind, BAR, offset, length) + more
        return self.function.add_capability(9, body)

    def read(self, offset: int, size: int) -> int:
        if offset >= CONFIG:
            return self.get_config(offset - CONFIG, size)
        if offset == ISR:
            value = self.interrupt
            self.lower(value)
            return value
        return self.get(PCI_REGISTERS[offset])

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= NOTIFY:
            assert offset == NOTIFY + 4 * value
            self.notify(value)
        elif offset >= CONFIG:
            self.config[offset - CONFIG : offset - CONFIG + size] = value.to_bytes(size, "little")
        elif 0x20 <= offset < 0x38:
            self.set_address(offset - 0x20, value)
        else:
            self.set(PCI_REGISTERS[offset], value)

    def raise_for(self, queue: ToyQueue) -> None:
        if self.msix and queue.vector != 0xFFFF:
            self.msix.fire(queue.vector)
        else:
            self.interrupt |= 1
            self.server.set_pci_intx(self.bdf, 0, True)

    def lower(self, bits: int) -> None:
        self.interrupt &= ~bits
        self.server.set_pci_intx(self.bdf, 0, False)


class ToyVirtioMmio(ToyVirtio):
    """The device with MMIO registers."""

    def __init__(
        self, server: IoreqServer, address: int, irq: int, sizes: tuple[int, ...] = (8,)
    ) -> None:
        super().__init__(server.cache, sizes)
        self.server, self.irq = server, irq
        server.claim_mmio(address, 0x200, self)

    def read(self, offset: int, size: int) -> int:
        if offset >= 0x100:
            return self.get_config(offset - 0x100, size)
        return self.get(MMIO_REGISTERS[offset])

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= 0x100:
            self.config[offset - 0x100 : offset - 0x100 + size] = value.to_bytes(size, "little")
        elif offset == 0x050:
            self.notify(value)
        elif 0x080 <= offset < 0x0B0:
            self.set_address((offset - 0x080) // 16 * 8 + offset % 8, value)
        else:
            self.set(MMIO_REGISTERS[offset], value)

    def raise_for(self, queue: ToyQueue) -> None:
        self.interrupt |= 1
        self.server.set_isa_irq(self.irq, True)

    def lower(self, bits: int) -> None:
        self.interrupt &= ~bits
        self.server.set_isa_irq(self.irq, False)
