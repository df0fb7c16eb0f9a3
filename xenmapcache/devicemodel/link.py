"""What an :class:`.server.IoreqServer` needs of the hypervisor: live Xen's, or the mock's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from ..ioreq import Fence, RequestKind


class Predecessor(Protocol):
    """An ioreq server whose process has died, seen from the server that takes over."""

    @property
    def id(self) -> int:
        """Its number in the domain."""

    @property
    def page(self) -> memoryview:
        """The synchronous requests."""

    @property
    def ring(self) -> memoryview | None:
        """The page of buffered requests, or None."""

    @property
    def ports(self) -> dict[int, int]:
        """The event channels at this end, by vCPU."""

    def disable(self) -> None:
        """Have it get no further requests. Can be repeated."""

    def notify(self, port: int) -> None:
        """Tell a vCPU to look."""

    def close(self, *, unmap: bool = True) -> None:
        """Release its channels, and its pages unless told otherwise; if disabled, destroy it.

        If it is still enabled, the next process finds it as it was. Can be repeated.
        """


class HypervisorLink(Protocol):
    """An ioreq server as the hypervisor keeps it, seen from its device model.

    Synchronization: for one thread at a time, but that any may raise an interrupt.
    """

    @property
    def id(self) -> int:
        """Its number in the domain."""

    @property
    def predecessors(self) -> Sequence[Predecessor]:
        """The servers whose process has died, if it was to recover them."""

    @property
    def guest_type(self) -> str | None:
        """``"hvm"``, ``"pvh"`` or ``"pv"``, as the toolstack says; None if it says nothing."""

    @property
    def paused(self) -> bool | None:
        """Whether the domain is paused, so that no vCPU takes its answer; None if unknown."""

    @property
    def page(self) -> memoryview:
        """The synchronous requests, one slot of 32 bytes a vCPU."""

    @property
    def ring(self) -> memoryview | None:
        """The page of buffered requests, or None."""

    @property
    def fence(self) -> Fence:
        """Orders loads and stores of the pages; None if the processors do."""

    def has_ended(self) -> bool:
        """Return whether Xen has destroyed the server, because its domain has ended."""

    def nr_vcpus(self) -> int:
        """Return how many vCPUs the domain can have."""

    def enable(self) -> None:
        """Get requests from now on; after it each vCPU's slot has its event channel."""

    def disable(self) -> None:
        """Get no further requests. Those that were sent still wait for their answers."""

    def buffered_port(self) -> int:
        """Return the event channel of the ring, for :meth:`bind`."""

    def bind(self, remote_port: int) -> int:
        """Connect to an event channel and return the port at this end."""

    def claim(self, kind: RequestKind, first: int, last: int) -> None:
        """Take over a range, both ends included; for PCI_CONFIG a function's number, twice."""

    def unclaim(self, kind: RequestKind, first: int, last: int) -> None:
        """Give a range back."""

    def fileno(self) -> int:
        """Return what becomes readable when there is an event."""

    def pending(self) -> int | None:
        """Return a port that has an event, and mask it; None if there is none. Never blocks."""

    def unmask(self, port: int) -> None:
        """Let a port have events again."""

    def notify(self, port: int) -> None:
        """Tell the other end of a port to look."""

    def restrict(self) -> None:
        """Give up this process's rights to other domains."""

    def inject_msi(self, address: int, data: int) -> None:
        """Raise a message-signalled interrupt."""

    def set_isa_irq(self, irq: int, level: bool) -> None:
        """Set the level of an ISA interrupt line."""

    def set_pci_intx(self, function: tuple[int, int, int, int], pin: int, level: bool) -> None:
        """Set the level of a PCI function's interrupt pin."""

    def set_irq_level(self, irq: int, level: bool) -> None:
        """Set the level of an SPI of an Arm guest."""

    def close(self, *, unmap: bool = True) -> None:
        """Destroy the server and release its channels, and its pages unless told otherwise.

        It closes the predecessors, too.

        Without ``unmap`` the pages stay readable and writable, for a thread that may still
        look at them, until :meth:`unmap` is called.
        """

    def unmap(self) -> None:
        """Release the pages that :meth:`close` has kept."""


@runtime_checkable
class IoreqDomain(Protocol):
    """A domain that can have ioreq servers of its own making, such as a MockDomain."""

    @property
    def domid(self) -> int:
        """Its number."""

    @property
    def machine(self) -> str:
        """The name of its :class:`.Architecture`."""

    def open_ioreq_server(self, *, buffered: bool, recover: bool) -> HypervisorLink:
        """Create one."""
