"""GuestHeap: memory of a mock guest that its drivers allocate."""

from __future__ import annotations

import threading
from itertools import pairwise

from .domain import MockDomain


class GuestHeap:
    """A range of a guest's memory, from which drivers take pieces and return them.

    Args:
        domain: the guest.
        start: the range's address.
        length: in bytes.

    Attributes:
        domain: as given.

    Synchronization: any threads.
    """

    def __init__(self, domain: MockDomain, start: int = 0x10000, length: int = 0x80000) -> None:
        self.domain = domain
        # Of no length, they say where the range begins and ends.
        self._pieces = {start: 0, start + length: 0}
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """How many bytes are allocated."""
        return sum(self._pieces.values())

    def allocate(self, length: int, align: int = 16) -> int:
        """Return the address of a free range, which keeps what was in it.

        Args:
            length: in bytes; 0 takes 1 byte, so that each address is another one.
            align: the address is a multiple of it.

        Raises:
            MemoryError: no free range is that long.
        """
        length = max(1, length)
        with self._lock:
            for piece, following in pairwise(sorted(self._pieces)):
                address = -(-(piece + self._pieces[piece]) // align) * align
                if address + length <= following:
                    # The first piece may begin where the range does.
                    self._pieces[address] = self._pieces.get(address, 0) + length
                    return address
        raise MemoryError(
            f"the heap of {self.domain!r} has no {length:#x} bytes in one piece; {self.used:#x} "
            "bytes are in use; make a larger GuestHeap, or wait for buffers before adding more"
        )

    def store(self, data: bytes) -> int:
        """Allocate memory for bytes, write them there, and return the address."""
        address = self.allocate(len(data))
        self.domain.write(address, data)
        return address

    def free(self, address: int) -> None:
        """Return what :meth:`allocate` has returned.

        Raises:
            ValueError: nothing is allocated there.
        """
        with self._lock:
            if not self._pieces.get(address):
                raise ValueError(f"nothing is allocated at {address:#x}")
            if address == min(self._pieces):
                self._pieces[address] = 0
            else:
                del self._pieces[address]
