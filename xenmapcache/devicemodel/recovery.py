"""Ioreq servers whose process has died: what waits there is handed over to a new server.

Xen keeps such a server, and continues to send it requests. The order is a rule:

1. Bind every event channel. The kernel has closed those of a dead process, so others can bind
   them. Those of a process that lives are refused, and then nothing is touched.
2. Open the new server, and claim its ranges. Until step 3, a request may reach either server.
   So there is no moment at which a write finds no server, and is dropped.
3. Disable the old server, in the new one's first round. A vCPU that is answered while its server
   is enabled sends its next request to the same server, and would be stuck in it.
4. Carry out what waits, with the new server's handlers: first the old ring, then the old slots.
5. Destroy the old server when each vCPU has taken its answer.

What a slot's state says:

  READY           not begun: carried out as any other request
  INPROCESS       begun by the dead process. Nobody can know how far its handler came.
                  A read is carried out again, because no vCPU has seen a value, and because what
                  the handler changed in memory died with the process. An INVALIDATE is, too. A
                  write is carried out again only where the region says so (`repeatable`):
                  elsewhere it may have reached a disk or a network, so it counts as done.
  RESPONSE_READY  answered; the vCPU is notified again

A request that the dead process had taken out of the ring is not carried out again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from ..errors import XenCallError
from ..ioreq import SLOT_SIZE, BufferedRing, Fence, RequestSlot, State, is_idle
from ..logs import safely
from .channel import Channel
from .dispatch import Job
from .link import HypervisorLink, Predecessor

logger = logging.getLogger("xenmapcache.devicemodel")


class Channels(Protocol):
    """Event channels of this process."""

    def bind_interdomain(self, domid: int, remote_port: int) -> int:
        """Bind a channel."""

    def notify(self, port: int) -> None:
        """Notify the other end."""

    def close(self) -> None:
        """Unbind all of them."""


def bind_all(page: memoryview, domid: int, channels: Channels) -> dict[int, int]:
    """Bind the event channels of a server, if its process has died.

    Args:
        page: the server's synchronous page.
        domid: the domain.
        channels: a handle of its own, which unbinds all that it binds.

    Returns:
        The ports at this end, by vCPU; none if the process lives, or was never enabled.
    """
    ports: dict[int, int] = {}
    for vcpu in range(len(page) // SLOT_SIZE):
        if remote_port := RequestSlot(page, vcpu).port:
            try:
                ports[vcpu] = channels.bind_interdomain(domid, remote_port)
            except XenCallError:
                return {}
    return ports


class XenPredecessor:
    """A server on live Xen whose process has died; see :class:`.link.Predecessor`.

    Args:
        number: the server's.
        page, ring: its pages.
        ports: as :func:`bind_all` returned them.
        channels: which has bound them; closed with it.
        unmap: release the pages. Can be repeated.
        disable, destroy: what Xen does to the server.
    """

    def __init__(
        self,
        number: int,
        page: memoryview,
        ring: memoryview | None,
        *,
        ports: dict[int, int],
        channels: Channels,
        unmap: Callable[[], object],
        disable: Callable[[], object],
        destroy: Callable[[], object],
    ) -> None:
        self.id = number
        self.page = page
        self.ring = ring
        self.ports = ports
        self._disabled = self._destroyed = False
        self._channels = channels
        self._unmap = unmap
        self._disable = disable
        self._destroy = destroy

    def disable(self) -> None:
        """See :meth:`.link.Predecessor.disable`."""
        if not self._disabled:
            self._disable()
            self._disabled = True

    def notify(self, port: int) -> None:
        """See :meth:`.link.Predecessor.notify`."""
        self._channels.notify(port)

    def close(self, *, unmap: bool = True) -> None:
        """See :meth:`.link.Predecessor.close`."""
        try:
            if unmap:
                self._unmap()
            if self._disabled and not self._destroyed:
                self._destroy()
                self._destroyed = True
        finally:
            self._channels.close()


class Inheritance:
    """What a new server has taken over from dead processes. Empty unless it was to recover.

    Synchronization: under the new server's lock.
    """

    def __init__(self, link: HypervisorLink) -> None:
        self._found = [(each, *_waiting_at(each, link.fence)) for each in link.predecessors]

    @property
    def channels(self) -> list[Channel]:
        """The vCPUs of the old servers."""
        return [channel for _, channels, _ in self._found for channel in channels]

    @property
    def rings(self) -> list[BufferedRing]:
        """The rings of the old servers."""
        return [ring for _, _, ring in self._found if ring is not None]

    def report(self, domid: int) -> None:
        """Log which servers were found."""
        for each, channels, _ in self._found:
            safely(
                logger.warning,
                "domain %d: takes over ioreq server %d of a dead process; vCPUs that wait: %d",
                domid,
                each.id,
                sum(channel.slot.state != State.NONE for channel in channels),
            )

    def disable(self) -> None:
        """Have the old servers get no further requests. Can be repeated."""
        for each, _, _ in self._found:
            each.disable()

    def retire(self) -> None:
        """Destroy each old server at which nothing waits any longer.

        Nobody may keep a channel or ring of it, because its pages are unmapped.

        Raises:
            XenCallError: Xen refused.
        """
        for found in self._found[:]:
            predecessor = found[0]
            if is_idle(predecessor.page, predecessor.ring):
                self._found.remove(found)
                predecessor.close()


def _waiting_at(server: Predecessor, fence: Fence) -> tuple[list[Channel], BufferedRing | None]:
    """Return the vCPUs and the ring of a dead server; note what its process had begun."""
    channels = []
    for vcpu, port in server.ports.items():
        channel = Channel(RequestSlot(server.page, vcpu, fence), port, server)
        if channel.slot.state == State.INPROCESS:
            channel.job = Job(channel.slot.request(), half_done=True)
        channels.append(channel)
    return channels, BufferedRing(server.ring, fence) if server.ring is not None else None
