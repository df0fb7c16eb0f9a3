"""DriverQueue: the driver's side of a virtio split queue, in a mock guest's memory."""

# Theory of operation
#
# A queue is three areas of guest memory (virtio 1.2, section 2.7):
#
#   descriptors   16 bytes each: address, length, flags, next
#   driver area   flags, index, heads of chains that the driver has added; used_event
#   device area   flags, index, heads of chains that the device has used, each with the number of
#                 bytes that it has written; avail_event
#
# A chain is in flight from `add` until `collect` finds it in the device area. Its descriptors and
# its memory are free again then. Everything that the device has written is checked before it is
# believed, because the device is what is tested.
#
# No interrupt is lost: a wait first tells the device that interrupts are wanted, then looks at the
# device area, and sleeps only if nothing new is there. With EVENT_IDX the device interrupts when it
# passes an index. If it has passed that index before the driver has written it, it never will.

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from typing import NoReturn, Protocol

from ..errors import DeviceError, QueueFullError
from .heap import GuestHeap

INDIRECT_DESC, EVENT_IDX = 1 << 28, 1 << 29
"""Features, as bits."""
NEXT, WRITE, INDIRECT = 1, 2, 4
"""Flags of a descriptor."""

_NO_NOTIFY = _NO_INTERRUPT = 1
_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("<II")
_INDEX_MASK = 0xFFFF

Part = tuple[int, int]
"""Address and length of memory of the guest."""


class Transport(Protocol):
    """What a queue needs of a virtio transport."""

    @property
    def status(self) -> int:
        """The device's status register."""

    def notify(self, queue: int) -> None:
        """Tell the device that a queue has new chains."""

    def wait(self, queue: int, timeout: float) -> None:
        """Wait for an interrupt of a queue, and acknowledge it; TimeoutError if none comes."""


class Chain:
    """What :meth:`DriverQueue.add` has given to the device.

    Attributes:
        head: its first descriptor.
        done: whether the device has used it.
        written: how many bytes the device says that it has written.
        parts: the content of each writable part, when it is done; empty for memory that is not of
            the driver's heap.
    """

    def __init__(self, head: int, writable: Sequence[Part], owned: list[int]) -> None:
        self.head = head
        self.done = False
        self.written = 0
        self.parts: list[bytes] = []
        self.writable = writable
        self.owned = owned
        self.descriptors: list[int] = []

    def __repr__(self) -> str:
        state = f"done, {self.written} bytes written" if self.done else "in flight"
        return f"<Chain {self.head}, {state}>"

    @property
    def data(self) -> bytes:
        """The content of all writable parts."""
        return b"".join(self.parts)


class DriverQueue:
    """A split queue, as a guest's driver has it. Made by :meth:`.VirtioDriver.start`.

    Args:
        heap: where the queue and its chains are.
        transport: of the device.
        index: the queue's number.
        size: how many descriptors.
        features: what was negotiated.

    Attributes:
        index: as given.
        size: as given.
        descriptors: the address of the descriptor table.
        driver_area: the address of what the driver writes.
        device_area: the address of what the device writes.
        in_flight: chains that the device has not used, by their heads.

    Synchronization: one thread at a time.
    """

    def __init__(
        self, heap: GuestHeap, transport: Transport, index: int, size: int, features: int
    ) -> None:
        self.index = index
        self.size = size
        self.in_flight: dict[int, Chain] = {}
        self._heap = heap
        self._domain = heap.domain
        self._transport = transport
        self._features = features
        lengths = _DESCRIPTOR.size * size, 6 + 2 * size, 6 + _USED.size * size
        self.descriptors, self.driver_area, self.device_area = (
            heap.store(bytes(length)) for length in lengths
        )
        self._free = list(range(size))
        self._added = self._kicked = self._collected = 0

    def __repr__(self) -> str:
        return f"<DriverQueue {self.index}, {len(self.in_flight)} of {self.size} in flight>"

    # --- from the driver to the device ---------------------------------------------------------

    def add(
        self,
        readable: Sequence[bytes | Part] = (),
        writable: Sequence[int | Part] = (),
        *,
        indirect: bool = False,
    ) -> Chain:
        """Give a chain to the device; :meth:`kick` tells it.

        Args:
            readable: what the device reads: bytes, which are put into the heap, or address and
                length of memory of the caller.
            writable: what it writes: lengths of memory of the heap, or as above.
            indirect: put the descriptors into a table of their own.

        Raises:
            QueueFullError: not enough descriptors are free.
            ValueError: the chain has no part, or indirect tables were not negotiated.
            MemoryError: the heap is full.
        """
        count = len(readable) + len(writable)
        if not count:
            raise ValueError("a chain must have at least one part")
        if indirect and not self._features & INDIRECT_DESC:
            raise ValueError(
                "indirect=True needs the feature INDIRECT_DESC, which was not negotiated"
            )
        needed = 1 if indirect else count
        if needed > len(self._free):
            raise QueueFullError(
                f"{self!r}: {needed} descriptors are wanted, and {len(self._free)} are free"
            )
        owned: list[int] = []
        try:
            reads = [self._readable(part, owned) for part in readable]
            writes = [self._writable(part, owned) for part in writable]
            table = [(*part, 0) for part in reads] + [(*part, WRITE) for part in writes]
            if indirect:
                content = b"".join(_linked(table, range(count)))
                owned.append(self._heap.store(content))
                table = [(owned[-1], len(content), INDIRECT)]
        except BaseException:
            self._free_memory(owned)
            raise
        chain = Chain(self._free[0], writes, owned)
        chain.descriptors, self._free = self._free[:needed], self._free[needed:]
        for index, entry in zip(chain.descriptors, _linked(table, chain.descriptors), strict=True):
            self.write_descriptor(index, entry)
        self.in_flight[chain.head] = chain
        self.publish(chain.head)
        return chain

    def _readable(self, part: bytes | Part, owned: list[int]) -> Part:
        if isinstance(part, tuple):
            return part
        owned.append(self._heap.store(part))
        return owned[-1], len(part)

    def _writable(self, part: int | Part, owned: list[int]) -> Part:
        if isinstance(part, tuple):
            return part
        owned.append(self._heap.allocate(part))
        return owned[-1], part

    def write_descriptor(self, index: int, entry: bytes) -> None:
        """Write 16 bytes of the descriptor table; a test may write any."""
        self._domain.write(self.descriptors + _DESCRIPTOR.size * index, entry)

    def publish(self, head: int) -> None:
        """Put a head into the driver area; a test may put any there."""
        place = self.driver_area + 4 + 2 * (self._added % self.size)
        self._domain.write(place, head.to_bytes(2, "little"))
        self._added = self._added + 1 & _INDEX_MASK
        self._domain.write(self.driver_area + 2, self._added.to_bytes(2, "little"))

    def kick(self) -> bool:
        """Notify the device of new chains, unless it has asked for no notification.

        Returns:
            Whether it was notified.
        """
        previous, self._kicked = self._kicked, self._added
        if self._features & EVENT_IDX:
            event = self._read(self.device_area + 4 + _USED.size * self.size)
            passed = self._added - event - 1 & _INDEX_MASK
            wanted = passed < (self._added - previous & _INDEX_MASK)
        else:
            wanted = not self._read(self.device_area) & _NO_NOTIFY
        if wanted:
            self._transport.notify(self.index)
        return wanted

    # --- from the device to the driver ------------------------------------------------------------

    def collect(self) -> list[Chain]:
        """Take back what the device has used, in its order.

        Raises:
            DeviceError: the device area contradicts what was added.
        """
        used = self._read(self.device_area + 2)
        new = used - self._collected & _INDEX_MASK
        if new > len(self.in_flight):
            raise DeviceError(
                f"{self!r}: the used index went from {self._collected} to {used}, which is more "
                "than what is in flight"
            )
        return [self._collect_one() for _ in range(new)]

    def _collect_one(self) -> Chain:
        place = self.device_area + 4 + _USED.size * (self._collected % self.size)
        head, written = _USED.unpack(self._domain.read(place, _USED.size))
        chain = self.in_flight.get(head)
        if chain is None:
            raise DeviceError(f"{self!r}: the device has used {head}, which is not in flight")
        room = sum(length for _, length in chain.writable)
        if written > room:
            raise DeviceError(
                f"{self!r}: the device says that it has written {written} bytes, but chain {head} "
                f"has room for {room}"
            )
        del self.in_flight[head]
        self._collected = self._collected + 1 & _INDEX_MASK
        chain.parts = [
            self._domain.read(*part) if part[0] in chain.owned else b"" for part in chain.writable
        ]
        chain.written = written
        chain.done = True
        self._free += chain.descriptors
        self._free_memory(chain.owned)
        return chain

    def wait(self, chain: Chain, timeout: float = 10.0, *, poll: bool = False) -> Chain:
        """Wait until the device has used a chain, and return it.

        Others that it has used are collected, too.

        Args:
            chain: of this queue.
            timeout: in seconds.
            poll: look at the device area all the time, with interrupts suppressed, instead of
                waiting for interrupts.

        Raises:
            TimeoutError: it was not used in time, or it was and no interrupt was raised.
            DeviceError: as :meth:`collect`.
        """
        end = time.monotonic() + timeout
        while True:
            if poll:
                self.suppress_interrupts()
            else:
                self.want_interrupt()
            found = self.collect()
            if chain.done:
                return chain
            if found:
                continue  # the event index has to follow them before the driver sleeps
            try:
                self._sleep(end - time.monotonic(), poll)
            except TimeoutError:
                self._time_out(chain, timeout)

    def _sleep(self, timeout: float, poll: bool) -> None:
        if timeout <= 0:  # also if interrupts come all the time
            raise TimeoutError
        if poll:
            os.sched_yield()
        else:
            self._transport.wait(self.index, timeout)

    def _time_out(self, chain: Chain, timeout: float) -> NoReturn:
        self.collect()
        missing = "raised an interrupt for" if chain.done else "used"
        raise TimeoutError(
            f"{self!r}: in {timeout} s the device has not {missing} {chain!r}; its status is "
            f"{self._transport.status:#x}"
        ) from None

    def want_interrupt(self, after: int = 1) -> None:
        """Have the device raise an interrupt.

        Args:
            after: how many chains it uses first, counted from the last one that was collected; it
                knows that only with the feature EVENT_IDX.
        """
        self._domain.write(self.driver_area, bytes(2))
        if self._features & EVENT_IDX:
            event = self._collected + after - 1 & _INDEX_MASK
            self._domain.write(self.driver_area + 4 + 2 * self.size, event.to_bytes(2, "little"))

    def suppress_interrupts(self) -> None:
        """Ask the device for no interrupts. It may raise them all the same."""
        if self._features & EVENT_IDX:
            # The flag must stay 0 then. This index is half of all indexes away.
            self.want_interrupt(after=0x8000)
        else:
            self._domain.write(self.driver_area, _NO_INTERRUPT.to_bytes(2, "little"))

    def release(self) -> None:
        """Free the queue's memory, and that of chains in flight, after a reset of the device."""
        for chain in self.in_flight.values():
            self._free_memory(chain.owned)
        self.in_flight.clear()
        self._free_memory([self.descriptors, self.driver_area, self.device_area])

    def _free_memory(self, addresses: list[int]) -> None:
        for address in addresses:
            self._heap.free(address)

    def _read(self, address: int) -> int:
        return int.from_bytes(self._domain.read(address, 2), "little")


def _linked(table: Sequence[tuple[int, int, int]], indexes: Sequence[int]) -> list[bytes]:
    """Return descriptors, each but the last with the index of the next one."""
    following = [*indexes[1:], 0]
    last = len(table) - 1
    return [
        _DESCRIPTOR.pack(address, length, flags | NEXT * (number < last), following[number])
        for number, (address, length, flags) in enumerate(table)
    ]
