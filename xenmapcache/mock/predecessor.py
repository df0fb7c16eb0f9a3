"""MockPredecessor: an ioreq server whose device model was killed, as its successor sees it."""

from __future__ import annotations

from typing import Protocol

from ..ioreq import SLOT_SIZE, RequestSlot


class KilledServer(Protocol):
    """An ioreq server of the mock, as Xen keeps it after its device model was killed."""

    id: int
    enabled: bool
    page: memoryview
    ring: memoryview | None

    def ring_bell(self, vcpu: int) -> None:
        """Have a vCPU look at its slot."""

    def destroy(self) -> None:
        """Send nothing more, and take no answers."""


class MockPredecessor:
    """An ioreq server whose device model was killed, as its successor sees it.

    Attributes:
        server: which it is.
        id, page, ring: the server's.
        ports: what :meth:`notify` takes, by vCPU.
    """

    def __init__(self, server: KilledServer) -> None:
        self.id = server.id
        self.page = server.page
        self.ring = server.ring
        self.ports = {
            vcpu: vcpu
            for vcpu in range(len(server.page) // SLOT_SIZE)
            if RequestSlot(server.page, vcpu).port
        }
        self.server = server
        self._disabled = False

    def disable(self) -> None:
        """Have it get no further requests. Can be repeated."""
        self.server.enabled = False
        self._disabled = True

    def notify(self, port: int) -> None:
        """Tell a vCPU to look."""
        self.server.ring_bell(port)

    def close(self, *, unmap: bool = True) -> None:  # noqa: ARG002 - as on live Xen
        """Destroy it, if it was disabled. Otherwise the next device model finds it as it was."""
        if self._disabled:
            self.server.destroy()
