"""MSI and MSI-X: which message a vector sends, and which vectors are pending."""

# Theory of operation
#
# A device notifies a vector in any thread, while a vCPU writes the masks in the thread that
# serves. A vector that may not be sent becomes pending, and the write that allows it sends it.
#
# Order. `notify` makes the vector pending, and then sends it if that is allowed. A write stores
# the mask, and then sends what is pending and allowed. Both hold one lock. So the second of them
# sees what the first one stored, and no vector is lost.
#
# The lock is held during the call to Xen, because a guest that has masked a vector counts on it
# that no message comes after the mask write has returned: Linux moves an interrupt to another
# CPU like that, and a message for the former CPU would be lost. The call is one hypercall that
# does not wait, and it takes no lock of the server. So no thread that holds this lock waits for
# one that wants it. The lock is reentrant, because a signal handler may notify, too. For the same
# reason the pending vectors are a set, which one step in C changes.
#
# A vector stops being pending after Xen has accepted its message. If Xen refuses it, for example
# because the guest has programmed an address of no interrupt controller, it stays pending and is
# tried again when the guest has written. If a signal handler raises in between, the message is
# sent a second time; it is never lost.
#
# Xen's pirqs. A Linux guest whose interrupts Xen routes to event channels (an HVM guest with
# XENFEAT_hvm_pirqs) programs vector 0, and the number of a pirq in the address. It masks such an
# interrupt by its event channel and never unmasks it here. So the mask bits of such a message
# are ignored, as QEMU does (`xen_is_pirq_msi`). Data of 0 is not such a message: an entry has it
# before the guest has written all of it, and a pirq's data has a delivery mode.

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable

from ...address import as_int
from ...cache.locked import locked
from ...errors import XenCallError
from ...logs import safely
from ..dispatch import GuestError
from ..server import IoreqServer

logger = logging.getLogger("xenmapcache.devicemodel")

_VECTOR = 0xFF
"""Of the data: the interrupt vector."""


class MessageInterrupts(ABC):
    """The vectors of a PCI function that are sent as messages.

    Args:
        server: of the guest.
        name: of the function, for messages.
        vectors: how many there are.

    Attributes:
        vectors: as given.

    Synchronization: any thread.
    """

    def __init__(self, server: IoreqServer, name: str, vectors: int) -> None:
        self.vectors = vectors
        self._server = server
        self._name = name
        self._lock = threading.RLock()
        self._pending: set[int] = set()
        self._reported = False

    @property
    @abstractmethod
    def enabled(self) -> bool:
        """Whether the guest has enabled it; until then, nothing is sent."""

    @abstractmethod
    def _message(self, vector: int) -> tuple[int, int] | None:
        """Return the address and the data of a vector's message; None if it is masked."""

    @abstractmethod
    def reset(self) -> None:
        """Disable it, and forget what the guest has programmed and what is pending."""

    @property
    @abstractmethod
    def state_length(self) -> int:
        """How many bytes :meth:`save` returns."""

    @abstractmethod
    def save(self) -> bytes:
        """Return what the guest has programmed, and what is pending."""

    @abstractmethod
    def restore(self, data: bytes) -> None:
        """Have what was saved. Nothing is sent before the guest writes or the device notifies."""

    def notify(self, vector: int = 0) -> None:
        """Send the message of a vector, as soon as the guest allows it.

        While the guest has masked it, or has not enabled messages, the vector is pending.

        If Xen refuses the message, the vector is pending, too. The log says so once.

        Raises:
            ValueError: there is no such vector.
            ClosedError: the server is not open; the vector is pending.
        """
        if not 0 <= as_int("vector", vector) < self.vectors:
            raise ValueError(f"{self._name}: vector {vector} must be in 0..{self.vectors - 1}")
        refused = locked(self._lock, self._add_and_send, vector)
        if refused and not self._reported:
            self._reported = True
            safely(logger.warning, "domain %d: %s", self._server.domid, refused)

    def _add_and_send(self, vector: int) -> str | None:
        self._pending.add(vector)
        return self._send([vector])

    def _pending_bits(self) -> int:
        """Return the pending vectors, one bit for each."""
        return sum(1 << vector for vector in tuple(self._pending))

    def _set_pending(self, bits: int) -> None:
        self._pending.update(vector for vector in range(self.vectors) if bits >> vector & 1)

    def _send_allowed(self, vectors: Iterable[int]) -> None:
        """Send those of the vectors that are pending and allowed, for a write of the guest.

        Raises:
            GuestError: Xen has refused a message.
        """
        refused = self._send(vectors)
        if refused:
            raise GuestError(refused)

    def _send(self, vectors: Iterable[int]) -> str | None:
        """Send those of the vectors that are pending and allowed; return what Xen has refused."""
        refused = None
        for vector in self._pending.intersection(vectors) if self.enabled else ():
            message = self._message(vector)
            if message is None:
                continue
            try:
                self._server.inject_msi(*message)
            except XenCallError as error:
                refused = f"{self._name}: vector {vector} was not sent: {error}"
            else:
                self._pending.discard(vector)
        return refused


def is_pirq(data: int) -> bool:
    """Return whether a message's data is that of a pirq of Xen, whose mask bits mean nothing."""
    return data != 0 and not data & _VECTOR
