"""Ioreq servers whose process has died: their vCPUs are answered, and they are destroyed.

Xen keeps such a server, and goes on sending it requests. The order is a rule:

1. Bind every event channel. The kernel has closed those of a dead process, so others can bind
   them. Those of a process that lives are refused, and then nothing is touched.
2. Disable the server. A vCPU that is answered while its server is enabled sends its next
   request to the same server, and would be stuck in it.
3. Answer what waits, and wait until each vCPU has taken its answer.
4. Destroy the server.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from ..errors import XenCallError
from ..ioreq import SLOT_SIZE, Fence, RequestSlot, State

logger = logging.getLogger("xenmapcache.devicemodel")

_TAKE_S = 1.0
"""How long a vCPU of a domain that runs may take to see its answer."""


class Channels(Protocol):
    """Event channels of this process."""

    def bind_interdomain(self, domid: int, remote_port: int) -> int:
        """Bind a channel."""

    def notify(self, port: int) -> None:
        """Notify the other end."""


def release_vcpus(
    page: memoryview,
    fence: Fence,
    domid: int,
    channels: Channels,
    disable: Callable[[], None],
    paused: Callable[[], bool | None],
    timeout: float,
) -> tuple[int, int] | None:
    """Answer what waits at an abandoned server.

    Args:
        page: the server's synchronous page.
        fence: orders its states and fields.
        domid: the domain.
        channels: a handle of its own, which unbinds all that it binds.
        disable: lets the server get no further requests.
        paused: returns whether the domain is paused; None if nobody knows.
        timeout: how long answers wait for paused vCPUs, in seconds.

    Returns:
        How many vCPUs waited, and how many did not take their answer in time; None if the
        server is not abandoned.

    Raises:
        XenCallError: Xen failed.
    """
    bound: dict[int, RequestSlot] = {}
    for vcpu in range(len(page) // SLOT_SIZE):
        slot = RequestSlot(page, vcpu, fence)
        if remote_port := slot.port:
            try:
                bound[channels.bind_interdomain(domid, remote_port)] = slot
            except XenCallError:
                return None
    if not bound:
        return None
    disable()
    answered: set[int] = set()
    start = time.monotonic()
    while waiting := [port for port, slot in bound.items() if slot.state != State.NONE]:
        for port in waiting:
            if bound[port].state != State.RESPONSE_READY or port not in answered:
                answered.add(port)
                _answer(bound[port])
                channels.notify(port)
        waited = time.monotonic() - start
        if waited >= timeout or (waited >= _TAKE_S and paused() is False):
            break
        time.sleep(0.001 if waited < 0.1 else 0.02)
    return len(answered), len(waiting)


def _answer(slot: RequestSlot) -> None:
    """Answer with all ones, unless the dead process had put its answer in."""
    if slot.state == State.READY:
        slot.begin()
    if slot.state == State.INPROCESS:
        slot.answer(slot.request().all_ones)
