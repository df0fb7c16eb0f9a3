"""The driver's side of virtio: a ring in the guest's memory, registers, and an interrupt line."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import TypedDict

from tests.devicemodel.pcidriver import Memory
from xenmapcache.devicemodel.virtio import queue as rings

NEXT, WRITE, INDIRECT = rings.NEXT, rings.WRITE, rings.INDIRECT
EVENT_IDX = rings.EVENT_IDX
ALL_FEATURES = rings.VERSION_1 | rings.INDIRECT_DESC | EVENT_IDX
Ranges = Sequence[tuple[int, int]]


class Areas(TypedDict):
    """Where the areas of a ring are."""

    descriptors: int
    driver: int
    device: int


class Ring:
    """A driver's ring in guest memory. Descriptors are used in order, and again from the start."""

    def __init__(self, guest: Memory, base: int, size: int, *, events: bool = False) -> None:
        self.guest, self.size, self.events = guest, size, events
        self.descriptors, self.driver = base, base + 16 * size
        self.device = (self.driver + 6 + 2 * size + 3) & ~3
        self.free, self.idx, self.seen = 0, 0, 0
        guest.write(base, bytes(self.device + 6 + 8 * size - base))

    @property
    def addresses(self) -> dict[str, int]:
        """Where its areas are, by name."""
        return {"descriptors": self.descriptors, "driver": self.driver, "device": self.device}

    def at(self, **places: int) -> Areas:
        """Return the addresses, some of them replaced."""
        return Areas(
            descriptors=places.get("descriptors", self.descriptors),
            driver=places.get("driver", self.driver),
            device=places.get("device", self.device),
        )

    def u16(self, address: int) -> int:
        return int.from_bytes(self.guest.read(address, 2), "little")

    def put_u16(self, address: int, value: int) -> None:
        self.guest.write(address, value.to_bytes(2, "little"))

    def put(self, at: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Write a descriptor."""
        data = struct.pack("<QIHH", address, length, flags, following)
        self.guest.write(self.descriptors + 16 * at, data)

    def chain(self, readable: Ranges = (), writable: Ranges = (), table: int = 0) -> int:
        """Write a chain, in a table of indirect descriptors if there is an address for one."""
        parts = [(*each, 0) for each in readable] + [(*each, WRITE) for each in writable]
        head = self.free
        entries = []
        for number, (address, length, flags) in enumerate(parts):
            last = number == len(parts) - 1
            following = number + 1 if table else (head + number + 1) % self.size
            link = (0, 0) if last else (NEXT, following)
            entries.append(struct.pack("<QIHH", address, length, flags | link[0], link[1]))
        if table:
            self.guest.write(table, b"".join(entries))
            self.put(head, table, 16 * len(entries), INDIRECT)
            self.free = (head + 1) % self.size
        else:
            for number, entry in enumerate(entries):
                self.guest.write(self.descriptors + 16 * ((head + number) % self.size), entry)
            self.free = (head + len(entries)) % self.size
        return head

    def offer(self, *heads: int) -> None:
        """Make chains available."""
        for head in heads:
            self.put_u16(self.driver + 4 + 2 * (self.idx % self.size), head)
            self.idx = self.idx + 1 & 0xFFFF
        self.put_u16(self.driver + 2, self.idx)

    def wants_kick(self, count: int = 1) -> bool:
        """Return whether the device asks for a notification of the last ``count`` requests."""
        if not self.events:
            return not self.u16(self.device) & rings.NO_NOTIFY
        event = self.u16(self.device + 4 + 8 * self.size)
        return (self.idx - event - 1 & 0xFFFF) < count

    def ask_for_interrupt(self, ahead: int = 0) -> None:
        """Ask for an interrupt when ``ahead`` more requests than one are used."""
        self.put_u16(self.driver + 4 + 2 * self.size, self.seen + ahead & 0xFFFF)

    def used(self) -> list[tuple[int, int]]:
        """Return head and length of what was used since the last call."""
        found: list[tuple[int, int]] = []
        while self.seen != self.u16(self.device + 2):
            entry = self.guest.read(self.device + 4 + 8 * (self.seen % self.size), 8)
            found.append(struct.unpack("<II", entry))
            self.seen = self.seen + 1 & 0xFFFF
            if self.events:  # before idx is read again, or an interrupt could be missed
                self.ask_for_interrupt()
        return found


class Line:
    """An interrupt line, as a guest's interrupt controller sees it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.level = False
        self.rises = 0

    def __call__(self, level: bool) -> None:
        with self.changed:
            self.rises += level and not self.level
            self.level = level
            self.changed.notify_all()

    def wait(self) -> None:
        """Wait until it is high."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.level, 20)


class MmioDriver:
    """A driver of one device over virtio-mmio, with one vCPU."""

    def __init__(self, guest: Memory, base: int, line: Line) -> None:
        self.guest, self.base, self.line = guest, base, line

    def read(self, register: int, size: int = 4) -> int:
        return self.guest.mmio_read(self.base + register, size)

    def write(self, register: int, value: int, size: int = 4) -> None:
        self.guest.mmio_write(self.base + register, value, size)

    def features(self) -> int:
        found = 0
        for half in (0, 1):
            self.write(0x14, half)
            found |= self.read(0x10) << 32 * half
        return found

    def begin(self, features: int) -> bool:
        """Reset the device and agree on features; return whether it has accepted them."""
        self.write(0x70, 0)
        self.write(0x70, 1)
        self.write(0x70, 3)
        for half in (0, 1):
            self.write(0x24, half)
            self.write(0x20, features >> 32 * half & 0xFFFFFFFF)
        self.write(0x70, 11)
        return bool(self.read(0x70) & 8)

    def set_up(self, index: int, size: int, descriptors: int, driver: int, device: int) -> None:
        """Give the device a queue's addresses."""
        self.write(0x30, index)
        self.write(0x38, size)
        places = {0x80: descriptors, 0x90: driver, 0xA0: device}
        for register, address in places.items():
            self.write(register, address & 0xFFFFFFFF)
            self.write(register + 4, address >> 32)
        self.write(0x44, 1)

    def start(self, *rings: Ring) -> None:
        """Do all of it, up to DRIVER_OK."""
        events = all(ring.events for ring in rings)
        assert self.begin(ALL_FEATURES if events else ALL_FEATURES & ~EVENT_IDX)
        for index, ring in enumerate(rings):
            self.set_up(index, ring.size, **ring.addresses)
        self.write(0x70, 15)

    def kick(self, index: int = 0) -> None:
        self.write(0x50, index)

    def handle_interrupt(self) -> int:
        """Wait for an interrupt, acknowledge it, and return its bits."""
        self.line.wait()
        bits = self.read(0x60)
        self.write(0x64, bits)
        return bits

    def send(self, ring: Ring, *heads: int) -> None:
        """Make chains available, and notify the device if it asks for it."""
        ring.offer(*heads)
        if ring.wants_kick(len(heads)):
            self.kick()

    def collect(self, ring: Ring, count: int) -> list[tuple[int, int]]:
        """Wait, for interrupts alone, until the device has used requests."""
        found = ring.used()
        while len(found) < count:
            assert not self.handle_interrupt() & 2  # 0 is a spurious interrupt
            found += ring.used()
        return found
