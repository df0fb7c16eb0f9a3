"""Virtqueue: the split ring of virtio 1.x, as a device sees it."""

# Theory of operation
#
# The driver owns two areas in guest memory, and the device one:
#
#   descriptors   size entries of 16 bytes: address, length, flags, next
#   driver area   flags, idx, ring[size] of heads, used_event       ("available ring")
#   device area   flags, idx, ring[size] of (head, bytes), avail_event   ("used ring")
#
# A head goes round like this:
#
#   free --driver: ring, idx--> available --pop--> in flight --push: ring, idx--> used
#
# Rules
#   1. Each access to the ring is a read or write through the cache. So an INVALIDATE needs no
#      step here: the next access maps what the guest has now. A lease would have to be taken
#      again after each INVALIDATE, and looked at before each access; a hit of the cache is a
#      look-up and a slice. A ring that the guest has given up is a broken driver.
#   2. idx and the events are 2 bytes at an even address, copied at once. A number that was read
#      is checked, kept here, and never read again: the driver may change it at any time.
#   3. Everything is bounded: idx is at most `size` ahead, a head is in flight once, a chain has
#      at most `size` descriptors, a table of indirect ones at most `size` entries and no table
#      in it, and a request at most `max_bytes`.
#
# Order of memory accesses
#   An entry is written before idx and has to be seen before it, and an entry that is read after
#   idx has to be as new as idx. x86 keeps the order of reads and the order of writes. Elsewhere
#   the server's fence stands there (`_keep_order`).
#   x86, too, may do a read before an older write. Two places need the other order, or one side
#   sleeps while the other one waits for it; `_flush` keeps it there:
#     - ask for notifications, then look whether something came in between
#     - publish idx, then look whether the driver wants an interrupt
#
# Notifications
#                          with EVENT_IDX                      without
#   kicks, while busy      not asked for: avail_event is old   used.flags = NO_NOTIFY
#   kicks, when empty      avail_event = next                  used.flags = 0
#   interrupts             when idx passes used_event          unless avail.flags has NO_INTERRUPT

from __future__ import annotations

import struct
from _thread import allocate_lock
from collections import deque

from ...address import as_int
from ...cache import DmaDirection, MapCache
from ...errors import XenMapCacheError
from ...ioreq import Fence
from .buffer import BrokenDriverError, GuestBuffer
from .record import QueueRecord

INDIRECT_DESC, EVENT_IDX, VERSION_1, ACCESS_PLATFORM = 1 << 28, 1 << 29, 1 << 32, 1 << 33
"""Features of every virtio device, as bits; the last one if guests may give grants."""
NEXT, WRITE, INDIRECT = 1, 2, 4
"""Flags of a descriptor."""
NO_NOTIFY = NO_INTERRUPT = 1
"""The flag of the device area, and that of the driver area."""
MAX_SIZE = 1 << 15
"""Most entries of a split ring."""
MAX_BYTES = 128 << 20
"""Most bytes of one request, unless the device says otherwise."""

_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("<II")
_AHEAD = 4
"""Descriptors that are read at once."""
_ADDRESS_END = 1 << 64
_WRAP = 0xFFFF


def _fence_of_x86() -> None:
    """Have what was written before be seen before what follows is read.

    Taking a lock is one locked instruction, which is a full fence on x86. The lock is new, so
    nobody waits for it.
    """
    allocate_lock().acquire(False)


class Request:
    """What a driver has made available: one chain of descriptors.

    Attributes:
        head: the number of its first descriptor; no other request in flight has it.
        readable: what the device may read.
        writable: what the device may write.
        queue: the number of the queue that it came from.
    """

    __slots__ = ("head", "queue", "readable", "writable")

    def __init__(
        self, head: int, readable: GuestBuffer, writable: GuestBuffer, *, queue: int = 0
    ) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.queue = queue

    def __repr__(self) -> str:
        return f"<request {self.head}: {self.readable!r}, {self.writable!r}>"


class Virtqueue:
    """A split virtqueue that a driver has set up.

    Args:
        cache: of the guest's memory.
        index: the queue's number, for messages.
        size: entries, a power of two up to 32768.
        descriptors, driver, device: guest-physical addresses of the three areas.
        features: what was negotiated; INDIRECT_DESC and EVENT_IDX count.
        fence: as of the server, for processors that reorder reads or writes; None on x86.
        max_bytes: most bytes of one request.
        record: keeps what is in flight for the next process, or None.

    Attributes:
        index, size: as given.
        in_flight: the requests that were popped and not pushed, by head.
        kept: those of them that wait until the device can carry them out, oldest first; the owner
            of the queue changes it.
        stopped: the driver has reset the device; the owner of the queue sets it and looks at it.
        notifies: the ring was empty at the last :meth:`pop`, so the driver notifies of the next
            request.

    Raises:
        BrokenDriverError: a number that the driver chose is against the rules.

    Synchronization: one thread at a time. After a BrokenDriverError, do not use it any longer.
    """

    def __init__(
        self,
        cache: MapCache,
        index: int,
        *,
        size: int,
        descriptors: int,
        driver: int,
        device: int,
        features: int,
        fence: Fence = None,
        max_bytes: int = MAX_BYTES,
        record: QueueRecord | None = None,
    ) -> None:
        self.index = index
        self.size = size
        if not 0 < size <= MAX_SIZE or size & size - 1:
            raise self._broken(f"its size {size} must be a power of two up to {MAX_SIZE}")
        for area, address, length, alignment in (
            ("descriptors", descriptors, 16 * size, 16),
            ("driver area", driver, 6 + 2 * size, 2),
            ("device area", device, 6 + 8 * size, 4),
        ):
            if address % alignment or address + length > _ADDRESS_END:
                raise self._broken(
                    f"its {area} at {address:#x} must be aligned to {alignment} bytes and end "
                    f"within {_ADDRESS_END:#x}"
                )
        self.in_flight: dict[int, Request] = {}
        self.kept: deque[Request] = deque()
        self.stopped = False
        self.notifies = False
        self._cache = cache
        self._descriptors, self._driver, self._device = descriptors, driver, device
        self._fence = fence
        self._flush = fence or _fence_of_x86
        self._max_bytes = max_bytes
        self._record = record
        self._indirect, self._events = bool(features & INDIRECT_DESC), bool(features & EVENT_IDX)
        self._next = self._seen = 0  # the next entry to pop; the driver's idx as it was read last
        self._used = 0  # idx of the device area
        self._signalled: int | None = None  # idx when the driver's wish was looked at last
        self._hushed = True  # NO_NOTIFY is set, or may be

    def __repr__(self) -> str:
        return f"<queue {self.index} of {self.size} entries, {len(self.in_flight)} in flight>"

    # --- requests -------------------------------------------------------------------------------

    def pop(self) -> Request | None:
        """Take the next request; None if there is none, and the driver will notify of the next.

        Raises:
            BrokenDriverError: what the driver has written is against the rules.
        """
        if not self._is_waiting():
            self._ask_for_notification()
            if not self._is_waiting():
                self.notifies = True
                return None
        self.notifies = False
        self._suppress_notifications()
        head = self._read_u16(self._driver + 4 + 2 * (self._next % self.size))
        request = self._chain(head)
        if self._record is not None:
            self._record.begin(head)
        self.in_flight[head] = request
        self._next = self._next + 1 & _WRAP
        return request

    def resume(self) -> list[Request]:
        """Continue where another process was killed, and return what it had in flight.

        Raises:
            BrokenDriverError: the ring contradicts the record.
            ValueError: the queue has no record.
        """
        record = self._record
        if record is None:
            raise ValueError(f"queue {self.index}: it has no record to resume from")
        idx = self._read_u16(self._device + 2)
        heads = record.settle(idx)
        if heads is None:
            raise self._broken(f"idx {idx} of its device area was not written by the device")
        self._used = idx
        self._next = self._seen = idx + len(heads) & _WRAP
        for head in heads:
            self.in_flight[head] = self._chain(head)
        return list(self.in_flight.values())

    def push(self, *completed: tuple[Request, int]) -> bool:
        """Give requests back to the driver.

        Args:
            completed: pairs of a request and the number of bytes that were written to it, from
                the start of ``request.writable`` on.

        Returns:
            Whether to interrupt the driver.

        Raises:
            BrokenDriverError: the device area cannot be written.
            ValueError: a request is not in flight.
        """
        record, first = self._record, self._used
        for request, written in completed:
            if self.in_flight.get(request.head) is not request:
                raise ValueError(f"queue {self.index}: {request!r} is not in flight")
            if record is not None:
                record.publish(request.head)
            entry = self._device + 4 + 8 * (self._used % self.size)
            self._write(entry, _USED.pack(request.head, as_int("written", written)))
            self._used = self._used + 1 & _WRAP
            if record is not None:  # it knows of one that was given back, not of two
                self._publish()
                record.end(request.head, self._used)
            del self.in_flight[request.head]
        if record is None and self._used != first:
            self._publish()
        return self._is_interrupt_wanted()

    def _publish(self) -> None:
        self._keep_order()  # the driver reads the entries after idx
        self._write(self._device + 2, self._used.to_bytes(2, "little"))

    # --- chains ---------------------------------------------------------------------------------

    def _chain(self, head: int) -> Request:
        """Return the request that begins with a descriptor."""
        if head in self.in_flight:
            raise self._broken(f"head {head} is in flight already")
        # A copy of a few descriptors from `start` on: those of a chain often follow each other.
        index, start, table, is_indirect = head, 0, b"", False
        ranges: tuple[list[tuple[int, int]], list[tuple[int, int]]] = [], []
        total = 0
        while True:
            if not start <= index < start + len(table) // 16:
                if is_indirect or index >= self.size:
                    count = len(table) // 16 if is_indirect else self.size
                    raise self._broken(f"descriptor {index} must be below {count}")
                start = index
                count = min(_AHEAD, self.size - index)
                table = self._read(self._descriptors + 16 * index, 16 * count)
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, 16 * (index - start))
            if flags & INDIRECT:
                if is_indirect:
                    raise self._broken(f"head {head}: a table of descriptors names another one")
                table, index = self._table(head, address, length, flags), 0
                start, is_indirect = 0, True
                continue
            writable = bool(flags & WRITE)
            if ranges[1] and not writable:
                raise self._broken(f"head {head}: a readable descriptor follows a writable one")
            ranges[writable].append((address, length))
            total += length
            if total > self._max_bytes:
                raise self._broken(f"head {head}: has more than {self._max_bytes} bytes")
            if not flags & NEXT:
                break
            if len(ranges[0]) + len(ranges[1]) >= self.size:
                raise self._broken(f"head {head}: has more than {self.size} descriptors")
            index = following
        return Request(
            head,
            GuestBuffer(self._cache, ranges[0], DmaDirection.TO_DEVICE),
            GuestBuffer(self._cache, ranges[1], DmaDirection.FROM_DEVICE),
            queue=self.index,
        )

    def _table(self, head: int, address: int, length: int, flags: int) -> bytes:
        """Return a copy of a table of indirect descriptors."""
        if not self._indirect:
            raise self._broken(f"head {head}: INDIRECT_DESC was not negotiated")
        if flags & NEXT:
            raise self._broken(f"head {head}: a descriptor has both INDIRECT and NEXT")
        if length % 16 or not 0 < length <= 16 * self.size:
            raise self._broken(
                f"head {head}: a table of {length} bytes must have 1 to {self.size} "
                "descriptors of 16 bytes"
            )
        return self._read(address, length)

    # --- notifications --------------------------------------------------------------------------

    def _is_waiting(self) -> bool:
        """Return whether the driver has made a request available."""
        if self._seen == self._next:
            self._seen = self._read_u16(self._driver + 2)
            self._keep_order()
        ahead = self._seen - self._next & _WRAP
        if ahead > self.size:
            raise self._broken(
                f"idx {self._seen} is {ahead} ahead, more than the {self.size} entries"
            )
        return ahead > 0

    def _ask_for_notification(self) -> None:
        if self._events:
            event = self._next.to_bytes(2, "little")
            self._write(self._device + 4 + 8 * self.size, event)
        elif self._hushed:
            self._write(self._device, b"\0\0")
            self._hushed = False
        self._flush()

    def _suppress_notifications(self) -> None:
        if not self._events and not self._hushed:
            self._write(self._device, NO_NOTIFY.to_bytes(2, "little"))
            self._hushed = True

    def _is_interrupt_wanted(self) -> bool:
        self._flush()
        if not self._events:
            return not self._read_u16(self._driver) & NO_INTERRUPT
        before, self._signalled = self._signalled, self._used
        if before is None:
            return True
        event = self._read_u16(self._driver + 4 + 2 * self.size)
        return (self._used - event - 1 & _WRAP) < (self._used - before & _WRAP)

    def _keep_order(self) -> None:
        """Have idx and the entries be read, or written, in the order of the program."""
        if self._fence is not None:
            self._fence()

    # --- guest memory ---------------------------------------------------------------------------

    def _read_u16(self, address: int) -> int:
        return int.from_bytes(self._read(address, 2), "little")

    def _read(self, address: int, length: int) -> bytes:
        try:
            return self._cache.read(address, length)
        except XenMapCacheError as error:
            raise self._broken(f"its memory cannot be read: {error}") from error

    def _write(self, address: int, data: bytes) -> None:
        try:
            self._cache.write(address, data)
        except XenMapCacheError as error:
            raise self._broken(f"its memory cannot be written: {error}") from error

    def _broken(self, text: str) -> BrokenDriverError:
        return BrokenDriverError(f"queue {self.index}: {text}")
