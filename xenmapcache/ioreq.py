"""``struct ioreq``: how Xen asks a device model to carry out what a vCPU did.

Follows ``xen/include/public/hvm/ioreq.h``: the pages that Xen and the device model
share, byte by byte. Everything is little-endian.
"""

from __future__ import annotations

import enum
import re
import struct
from collections.abc import Callable
from typing import NamedTuple

SLOT_SIZE = 32
"""Bytes of one vCPU's request in the page of synchronous requests."""
STATE_OFFSET = 30
DATA_OFFSET = 8
STATE_MASK = 0x0F
RING_SLOTS = 511
RING_SLOT_SIZE = 8
RING_START = 8
POINTER_MASK = 0xFFFF_FFFF
_RING_ADDRESS_BITS = 20
BUS_OFFSET = 32
"""A PCI_CONFIG request's address is ``bdf << BUS_OFFSET | offset``."""

IOREQ = struct.Struct("<QQIIIHBB")
"""addr, data, count, size, vp_eport, padding, state and flags, type."""
DATA = struct.Struct("<Q")
RING_POINTERS = struct.Struct("<II")
"""read_pointer, write_pointer."""
RING_POINTER = struct.Struct("<I")
RING_SLOT = struct.Struct("<II")
"""type, flags and address in 32 bits; data."""

_BDF = re.compile(
    r"(?:([0-9a-f]{1,4}):)?([0-9a-f]{1,2}):([01]?[0-9a-f])\.([0-7])", re.ASCII | re.IGNORECASE
)
_DATA_IS_POINTER, _READ, _BACKWARD = 0x10, 0x20, 0x40

Fence = Callable[[], object] | None
"""Keeps the loads and stores before it before those after it; None where the processor does."""


class State(enum.IntEnum):
    """Where a vCPU's request is. The only legal changes are in :data:`TRANSITIONS`."""

    NONE = 0
    READY = 1
    INPROCESS = 2
    RESPONSE_READY = 3


class RequestKind(enum.IntEnum):
    """What a request is about."""

    PORT = 0
    """A port was read or written (``in``, ``out``, and their string forms)."""
    MMIO = 1
    """The guest accessed an address without RAM."""
    PCI_CONFIG = 2
    """A PCI function's configuration space was read or written."""
    TIMEOFFSET = 7
    """The guest has set its clock. A device model has nothing to do."""
    INVALIDATE = 8
    """The guest's memory has changed: all mappings have to be dropped."""


class Request(NamedTuple):
    """What a vCPU asks for, and waits for. Immutable.

    Attributes:
        vcpu: its number; None for a buffered request, for which no vCPU waits.
        kind: a :class:`RequestKind`, or a number that this package does not know.
        is_read: whether data goes to the guest.
        address: port number, guest-physical address, or ``bdf << 32 | offset``.
        data: what is written; or, if ``data_is_ptr``, the guest-physical address of it.
        size: bytes of one item: 1, 2, 4 or 8.
        count: how many items, more than one for string instructions.
        data_is_ptr: whether the data lies in guest memory.
        df: whether addresses go down (the direction flag).
    """

    vcpu: int | None
    kind: int
    is_read: bool
    address: int
    data: int
    size: int
    count: int = 1  # type: ignore[assignment] # the header's name; it hides tuple.count
    data_is_ptr: bool = False
    df: bool = False

    def __str__(self) -> str:
        who = "buffered" if self.vcpu is None else f"vCPU {self.vcpu}"
        try:
            kind = RequestKind(self.kind).name
        except ValueError:
            kind = f"type {self.kind}"
        what = "read" if self.is_read else "write"
        amount = f"{self.count} x {self.size}" if self.count != 1 else f"{self.size}"
        data = f", data at {self.data:#x}" if self.data_is_ptr else ""
        if not self.data_is_ptr and not self.is_read:
            data = f", data {self.data:#x}"
        down = ", backward" if self.df else ""
        return f"{who}: {kind} {what} of {amount} bytes at {self.address:#x}{data}{down}"

    @property
    def all_ones(self) -> int:
        """What a read gives if no device answers, as on a real bus."""
        return (1 << 8 * min(self.size, 8)) - 1


class ProtocolError(RuntimeError):
    """The shared page contradicts the protocol, or a state would change against its rules."""


# --- one request at a time: the slot of a vCPU -----------------------------------------
#
# All transitions of a slot are in this table and nowhere else. Xen makes the first and the
# last, the device model the two between them. Xen ends a guest whose slot goes astray.
#
# The other side runs on another processor, which may see loads and stores out of order:
#
#   a state is loaded    then the fence, then what the state says is there
#   a state is stored    after the fence, and that after what the state will say is there

TRANSITIONS: dict[str, tuple[State, State]] = {
    "send": (State.NONE, State.READY),
    "begin": (State.READY, State.INPROCESS),
    "answer": (State.INPROCESS, State.RESPONSE_READY),
    "take": (State.RESPONSE_READY, State.NONE),
}


class RequestSlot:
    """A vCPU's slot in the page of synchronous requests, seen from either side.

    Args:
        page: of synchronous requests.
        vcpu: whose slot.
        fence: orders the slot's state and its fields.

    Attributes:
        vcpu: whose it is.

    Synchronization: a slot belongs to one side at a time, as its state says.
    """

    __slots__ = ("_base", "_fence", "_page", "_position", "vcpu")

    def __init__(self, page: memoryview, vcpu: int, fence: Fence = None) -> None:
        self.vcpu = vcpu
        self._page = page
        self._fence = fence
        self._base = vcpu * SLOT_SIZE
        self._position = self._base + STATE_OFFSET

    def __repr__(self) -> str:
        return f"<slot of vCPU {self.vcpu}, state {self.state}>"

    @property
    def state(self) -> int:
        """Where the request is: a :class:`State`, or a number that no protocol has."""
        state = self._page[self._position] & STATE_MASK
        if self._fence is not None:
            self._fence()
        return state

    @property
    def port(self) -> int:
        """The vCPU's event channel (``vp_eport``): 0 if there is no such vCPU."""
        port: int = IOREQ.unpack_from(self._page, self._base)[4]
        return port

    def request(self) -> Request:
        """Return the request that the slot holds."""
        address, data, count, size, _, _, flags, kind = IOREQ.unpack_from(self._page, self._base)
        return Request(
            self.vcpu,
            kind,
            bool(flags & _READ),
            address,
            data,
            size,
            count,
            bool(flags & _DATA_IS_POINTER),
            bool(flags & _BACKWARD),
        )

    def send(self, request: Request) -> None:
        """Put a request in, as Xen does: all but ``vp_eport``, which stays.

        Raises:
            ProtocolError: the slot holds a request already.
        """
        self._check("send")
        flags = _READ * request.is_read | _DATA_IS_POINTER * request.data_is_ptr
        IOREQ.pack_into(
            self._page,
            self._base,
            request.address,
            request.data,
            request.count,
            request.size,
            self.port,
            0,
            flags | _BACKWARD * request.df,
            request.kind,
        )
        self._move("send")

    def begin(self) -> None:
        """Take the request on, as a device model does before it carries it out.

        Raises:
            ProtocolError: no request is ready.
        """
        self._move("begin")

    def answer(self, data: int) -> None:
        """Put the answer in; the vCPU has then to be notified.

        Raises:
            ProtocolError: the request was not begun, or was answered before.
        """
        self._check("answer")
        DATA.pack_into(self._page, self._base + DATA_OFFSET, data & 0xFFFF_FFFF_FFFF_FFFF)
        self._move("answer")

    def take(self) -> int:
        """Take the answer out and return it, as Xen does.

        Raises:
            ProtocolError: there is no answer.
        """
        self._check("take")
        data: int = DATA.unpack_from(self._page, self._base + DATA_OFFSET)[0]
        self._move("take")
        return data

    def _check(self, step: str) -> None:
        if self.state != TRANSITIONS[step][0]:
            raise ProtocolError(
                f"vCPU {self.vcpu}: {step} needs state {TRANSITIONS[step][0].name}, "
                f"not {self.state}"
            )

    def _move(self, step: str) -> None:
        before, after = TRANSITIONS[step]
        byte = self._page[self._position]
        if byte & STATE_MASK != before:
            raise ProtocolError(
                f"vCPU {self.vcpu}: {step} needs state {before.name}, not {byte & STATE_MASK}"
            )
        if self._fence is not None:
            self._fence()
        self._page[self._position] = byte & ~STATE_MASK | after


# --- requests for which no vCPU waits: the ring ----------------------------------------


class BufferedRing:
    """The page of buffered requests, seen from either side.

    A request takes one entry of the ring, and a quad-word takes two. Both pointers only ever
    grow, modulo 2**32; an entry's place is its pointer modulo :data:`RING_SLOTS`.

    Args:
        page: of buffered requests.
        fence: orders the pointers and the entries.

    Synchronization: Xen appends, one thread of the device model consumes.
    """

    __slots__ = ("_fence", "_page")

    def __init__(self, page: memoryview, fence: Fence = None) -> None:
        self._page = page
        self._fence = fence

    @property
    def read_pointer(self) -> int:
        """The number of the entry that is consumed next."""
        pointer: int = RING_POINTERS.unpack_from(self._page)[0]
        return pointer

    @property
    def write_pointer(self) -> int:
        """The number of the entry that is appended next."""
        return self._pointers()[1]

    def peek(self) -> Request | None:
        """Return the next request and leave it in the ring; None if the ring is empty.

        Raises:
            ProtocolError: half a quad-word, or pointers further apart than the ring is long.
        """
        read, write = self._pointers()
        entries = write - read & POINTER_MASK
        if not entries:
            return None
        if entries > RING_SLOTS:
            raise ProtocolError(
                f"buffered ring: the pointers {read:#x} and {write:#x} are {entries} entries "
                f"apart; the ring has {RING_SLOTS}"
            )
        head, data = self._entry(read)
        size = 1 << (head >> 10 & 3)
        if size == 8:
            if entries == 1:
                raise ProtocolError("buffered ring: it ends after half of a quad-word")
            data |= self._entry(read + 1 & POINTER_MASK)[1] << 32
        return Request(None, head & 0xFF, bool(head & 0x200), head >> 12, data, size)

    def consume(self, request: Request) -> None:
        """Give the room of the next request back to Xen."""
        self._move_pointer(0, self.read_pointer + _entries_of(request) & POINTER_MASK)

    def discard(self) -> None:
        """Empty a ring that :meth:`peek` cannot read."""
        self._move_pointer(0, self.write_pointer)

    def append(self, request: Request) -> bool:
        """Append a request, as Xen does; False if it does not fit the ring or its form."""
        if request.address >> _RING_ADDRESS_BITS or request.data_is_ptr or request.count != 1:
            return False
        read, write = self._pointers()
        entries = _entries_of(request)
        if (write - read & POINTER_MASK) + entries > RING_SLOTS:
            return False
        head = request.kind | 0x200 * request.is_read | request.address << 12
        head |= (request.size.bit_length() - 1) << 10
        for entry in range(entries):
            data = request.data >> 32 * entry & 0xFFFFFFFF
            place = RING_START + (write + entry & POINTER_MASK) % RING_SLOTS * RING_SLOT_SIZE
            RING_SLOT.pack_into(self._page, place, head, data)
        self._move_pointer(4, write + entries & POINTER_MASK)
        return True

    def _pointers(self) -> tuple[int, int]:
        """Load both pointers, and after that nothing that is older."""
        read, write = RING_POINTERS.unpack_from(self._page)
        if self._fence is not None:
            self._fence()
        return read, write

    def _move_pointer(self, position: int, pointer: int) -> None:
        """Store a pointer, when all loads and stores of entries are done."""
        if self._fence is not None:
            self._fence()
        RING_POINTER.pack_into(self._page, position, pointer)

    def _entry(self, number: int) -> tuple[int, int]:
        place = RING_START + number % RING_SLOTS * RING_SLOT_SIZE
        head, data = RING_SLOT.unpack_from(self._page, place)
        return head, data


def _entries_of(request: Request) -> int:
    return 2 if request.size == 8 else 1


def is_idle(page: memoryview, ring: memoryview | None) -> bool:
    """Return whether no request waits at a server, and no answer for its vCPU."""
    if ring is not None and BufferedRing(ring).read_pointer != BufferedRing(ring).write_pointer:
        return False
    return all(
        page[place] & STATE_MASK == State.NONE
        for place in range(STATE_OFFSET, len(page), SLOT_SIZE)
    )


# --- PCI functions ------------------------------------------------------------------------


def parse_bdf(bdf: str) -> tuple[int, int, int, int]:
    """Return segment, bus, device and function of a PCI function: ``0000:00:05.0``, ``00:05.0``.

    Raises:
        ValueError: ``bdf`` has another form.
    """
    match = _BDF.fullmatch(bdf) if isinstance(bdf, str) else None
    if match is None:
        raise ValueError(f"{bdf!r} must name a PCI function, as 0000:00:05.0 or 00:05.0")
    segment, bus, device, function = (int(part or "0", 16) for part in match.groups())
    return segment, bus, device, function


def bdf_number(bdf: str) -> int:
    """Return a PCI function as the number that stands in PCI_CONFIG requests."""
    segment, bus, device, function = parse_bdf(bdf)
    return segment << 16 | bus << 8 | device << 3 | function


def bdf_text(number: int) -> str:
    """Return the number of a PCI function as people write it: ``0000:00:05.0``."""
    return f"{number >> 16:04x}:{number >> 8 & 0xFF:02x}:{number >> 3 & 0x1F:02x}.{number & 7}"
