"""``struct ioreq``: how Xen asks a device model to carry out what a vCPU did.

Follows ``xen/include/public/hvm/ioreq.h``: the pages that Xen and the device model
share, byte by byte. Everything is little-endian.
"""

from __future__ import annotations

import enum
import re
import struct
from typing import NamedTuple

SLOT_SIZE = 32
"""Bytes of one vCPU's request in the page of synchronous requests."""
STATE_OFFSET = 30
DATA_OFFSET = 8
STATE_MASK = 0x0F
RING_SLOTS = 511
RING_SLOT_SIZE = 8
RING_START = 8
_RING_ADDRESS_BITS = 20
BUS_OFFSET = 32
"""A PCI_CONFIG request's address is ``bdf << BUS_OFFSET | offset``."""

IOREQ = struct.Struct("<QQIIIHBB")
"""addr, data, count, size, vp_eport, padding, state and flags, type."""
DATA = struct.Struct("<Q")
RING_POINTERS = struct.Struct("<II")
"""read_pointer, write_pointer."""
RING_SLOT = struct.Struct("<II")
"""type, flags and address in 32 bits; data."""

_BDF = re.compile(
    r"(?:([0-9a-f]{1,4}):)?([0-9a-f]{1,2}):([01]?[0-9a-f])\.([0-7])", re.ASCII | re.IGNORECASE
)
_DATA_IS_POINTER, _READ, _BACKWARD = 0x10, 0x20, 0x40


class State(enum.IntEnum):
    """Of a slot. It only ever goes from one to the next, or Xen ends the guest."""

    NONE = 0
    READY = 1
    INPROCESS = 2
    RESPONSE_READY = 3


class RequestKind(enum.IntEnum):
    """What a request is about."""

    PORT = 0
    """A port was read or written (``in``, ``out``, and their string forms)."""
    MMIO = 1
    """Memory was accessed that is none."""
    PCI_CONFIG = 2
    """A PCI function's configuration space was."""
    TIMEOFFSET = 7
    """The guest has set its clock; nothing need be done."""
    INVALIDATE = 8
    """The guest's memory has changed: all mappings have to go."""


class Request(NamedTuple):
    """What a vCPU did, and waits to see done. Immutable.

    Attributes:
        vcpu: which; None for a buffered request, for which nobody waits.
        kind: a :class:`RequestKind`, or a number that this package does not know.
        is_read: whether data goes to the guest.
        address: port number, guest-physical address, or ``bdf << 32 | offset``.
        data: what is written; or, if ``is_pointer``, the guest-physical address of it.
        size: bytes of one item: 1, 2, 4 or 8.
        items: how many, more than one for string instructions.
        is_pointer: whether the data lies in guest memory.
        is_backward: whether addresses go down (the direction flag).
    """

    vcpu: int | None
    kind: int
    is_read: bool
    address: int
    data: int
    size: int
    items: int = 1
    is_pointer: bool = False
    is_backward: bool = False

    def __str__(self) -> str:
        who = "buffered" if self.vcpu is None else f"vCPU {self.vcpu}"
        try:
            kind = RequestKind(self.kind).name
        except ValueError:
            kind = f"type {self.kind}"
        what = "read" if self.is_read else "write"
        amount = f"{self.items} x {self.size}" if self.items != 1 else f"{self.size}"
        data = f", data at {self.data:#x}" if self.is_pointer else ""
        if not self.is_pointer and not self.is_read:
            data = f", data {self.data:#x}"
        down = ", backward" if self.is_backward else ""
        return f"{who}: {kind} {what} of {amount} bytes at {self.address:#x}{data}{down}"

    @property
    def all_ones(self) -> int:
        """What a read of nothing gives, as on a real bus."""
        return (1 << 8 * min(self.size, 8)) - 1


def decode(page: memoryview, vcpu: int) -> Request:
    """Read a vCPU's request out of the page of synchronous requests."""
    address, data, items, size, _, _, flags, kind = IOREQ.unpack_from(page, vcpu * SLOT_SIZE)
    return Request(
        vcpu,
        kind,
        bool(flags & _READ),
        address,
        data,
        size,
        items,
        bool(flags & _DATA_IS_POINTER),
        bool(flags & _BACKWARD),
    )


def encode(page: memoryview, vcpu: int, request: Request) -> None:
    """Write a request into a vCPU's slot as Xen does, all but its state, which stays."""
    base = vcpu * SLOT_SIZE
    _, _, _, _, port, padding, state, _ = IOREQ.unpack_from(page, base)
    flags = (
        (state & STATE_MASK)
        | _READ * request.is_read
        | _DATA_IS_POINTER * request.is_pointer
        | _BACKWARD * request.is_backward
    )
    IOREQ.pack_into(
        page,
        base,
        request.address,
        request.data,
        request.items,
        request.size,
        port,
        padding,
        flags,
        request.kind,
    )


def port_of(page: memoryview, vcpu: int) -> int:
    """Return the event channel of a vCPU (``vp_eport``): 0 where there is no such vCPU."""
    port: int = IOREQ.unpack_from(page, vcpu * SLOT_SIZE)[4]
    return port


def state_of(page: memoryview, vcpu: int) -> int:
    """Return the state of a vCPU's slot."""
    return page[vcpu * SLOT_SIZE + STATE_OFFSET] & STATE_MASK


def set_state(page: memoryview, vcpu: int, state: State) -> None:
    """Change the state of a vCPU's slot, and nothing else in it."""
    position = vcpu * SLOT_SIZE + STATE_OFFSET
    page[position] = page[position] & ~STATE_MASK | state


def answer(page: memoryview, vcpu: int, data: int) -> None:
    """Put the answer to a request into its slot; the vCPU has then to be notified.

    Program order is enough on x86: data first, state last.
    """
    DATA.pack_into(page, vcpu * SLOT_SIZE + DATA_OFFSET, data & 0xFFFF_FFFF_FFFF_FFFF)
    set_state(page, vcpu, State.RESPONSE_READY)


def next_buffered(ring: memoryview) -> Request | None:
    """Read the next request of the buffered page, without taking it out; None if there is none."""
    read, write = RING_POINTERS.unpack_from(ring)
    if read == write:
        return None
    head, data = _ring_slot(ring, read)
    size = 1 << (head >> 10 & 3)
    if size == 8:
        data |= _ring_slot(ring, read + 1 & 0xFFFFFFFF)[1] << 32
    return Request(None, head & 0xFF, bool(head & 0x200), head >> 12, data, size)


def take_buffered(ring: memoryview, request: Request) -> None:
    """Give the room of the next request of the buffered page back to Xen."""
    read, _ = RING_POINTERS.unpack_from(ring)
    slots = 2 if request.size == 8 else 1
    struct.pack_into("<I", ring, 0, (read + slots) & 0xFFFFFFFF)


def put_buffered(ring: memoryview, request: Request) -> bool:
    """Append a request to the buffered page, as Xen does; False if it is full or too far up."""
    if request.address >> _RING_ADDRESS_BITS or request.is_pointer or request.items != 1:
        return False
    read, write = RING_POINTERS.unpack_from(ring)
    slots = 2 if request.size == 8 else 1
    if (write - read & 0xFFFFFFFF) + slots > RING_SLOTS:
        return False
    head = request.kind | 0x200 * request.is_read | request.address << 12
    head |= (request.size.bit_length() - 1) << 10
    for slot in range(slots):
        data = request.data >> 32 * slot & 0xFFFFFFFF
        position = RING_START + (write + slot & 0xFFFFFFFF) % RING_SLOTS * RING_SLOT_SIZE
        RING_SLOT.pack_into(ring, position, head, data)
    struct.pack_into("<I", ring, 4, (write + slots) & 0xFFFFFFFF)
    return True


def _ring_slot(ring: memoryview, number: int) -> tuple[int, int]:
    head, data = RING_SLOT.unpack_from(ring, RING_START + number % RING_SLOTS * RING_SLOT_SIZE)
    return head, data


def parse_bdf(bdf: str) -> tuple[int, int, int, int]:
    """Return segment, bus, device and function of a PCI function: ``0000:00:05.0``, ``00:05.0``.

    Raises:
        ValueError: that is none.
    """
    match = _BDF.fullmatch(bdf) if isinstance(bdf, str) else None
    if match is None:
        raise ValueError(f"{bdf!r} is no PCI function: write 0000:00:05.0 or 00:05.0")
    segment, bus, device, function = (int(part or "0", 16) for part in match.groups())
    return segment, bus, device, function


def bdf_number(bdf: str) -> int:
    """Return a PCI function as the number that stands in PCI_CONFIG requests."""
    segment, bus, device, function = parse_bdf(bdf)
    return segment << 16 | bus << 8 | device << 3 | function
