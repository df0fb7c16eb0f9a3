"""An ioreq server of the mock: the pages it shares with its device model, and its events.

Both sides are here: what a device model is offered (as by libxendevicemodel and
libxenevtchn), and what the mock's vCPUs do with it (as Xen does).
"""

from __future__ import annotations

import errno as _errno
import mmap
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from ..address import PAGE_SIZE
from ..errors import XenCallError
from ..ioreq import (
    BUS_OFFSET,
    IOREQ,
    SLOT_SIZE,
    Request,
    RequestKind,
    State,
    encode,
    port_of,
    put_buffered,
    set_state,
    state_of,
)

if TYPE_CHECKING:
    from .instructions import Instructions

_BUFFERED_PORT = 9
_FIRST_VCPU_PORT = 10
MAX_RANGES = 256
"""As many as Xen lets a server claim of each kind."""
_LOCAL = 100  # local port = remote port + this


class MockIoreqServer:
    """An ioreq server as Xen keeps it. Made by :meth:`MockDomain.open_ioreq_server`.

    Attributes:
        id: its number in the domain.
        enabled: whether it gets requests.
        destroyed: whether it is gone: closed, or its domain has ended.
        page: the synchronous requests, 32 bytes a vCPU.
        ring: the buffered requests, or None.

    Synchronization: the device model's side is for one thread; vCPUs are others.
    """

    def __init__(self, domain: Instructions, number: int, buffered: bool) -> None:
        self.id = number
        self.enabled = False
        self.destroyed = False
        self._domain = domain
        pages = memoryview(mmap.mmap(-1, 2 * PAGE_SIZE))
        self.page = pages[PAGE_SIZE:]
        self.ring = pages[:PAGE_SIZE] if buffered else None
        self._claims: list[tuple[RequestKind, int, int]] = []
        # As /dev/xen/evtchn: a port number of 4 bytes for each event; a port that was
        # read out of it stays masked until it is unmasked.
        self._events, self._events_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._masked: set[int] = set()
        self._missed: set[int] = set()
        self._bound: set[int] = set()
        self._lock = threading.Lock()
        self._told = [threading.Event() for _ in range(domain.vcpus)]

    # --- the device model's side --------------------------------------------------

    def enable(self) -> None:
        """Get requests from now on; every vCPU then has an event channel in the page."""
        self._check_alive("enable")
        for vcpu in range(self._domain.vcpus):
            IOREQ.pack_into(
                self.page, vcpu * SLOT_SIZE, 0, 0, 0, 0, _FIRST_VCPU_PORT + vcpu, 0, 0, 0
            )
        self.enabled = True

    def disable(self) -> None:
        """Get no more requests. Those that were sent wait for their answers as before."""
        self.enabled = False

    def buffered_port(self) -> int:
        """Return the event channel of the buffered page."""
        return _BUFFERED_PORT

    def bind(self, remote_port: int) -> int:
        """Connect to an event channel; as Xen does, this raises an event at once."""
        self._domain.enter_ioreq_call("bind")
        ports = {_FIRST_VCPU_PORT + vcpu for vcpu in range(self._domain.vcpus)}
        if remote_port not in ports | {_BUFFERED_PORT}:
            raise XenCallError("mock_bind", self._domain.domid, _errno.EINVAL, "no such port")
        port = remote_port + _LOCAL
        self._bound.add(port)
        self._raise(port)
        return port

    def claim(self, kind: RequestKind, first: int, last: int) -> None:
        """Take over a range, its ends included."""
        self._check_alive("claim")
        self._domain.enter_ioreq_call("claim")
        if sum(kind == each for each, _, _ in self._claims) == MAX_RANGES:
            raise XenCallError("mock_claim", self._domain.domid, _errno.ENOSPC, "too many ranges")
        if any(k == kind and first <= e and s <= last for k, s, e in self._claims):
            raise XenCallError("mock_claim", self._domain.domid, _errno.EEXIST, "claimed before")
        self._claims.append((kind, first, last))

    def unclaim(self, kind: RequestKind, first: int, last: int) -> None:
        """Give a range back."""
        self._check_alive("unclaim")
        self._claims.remove((kind, first, last))

    def fileno(self) -> int:
        """Return what to poll for events."""
        return self._events

    def pending(self) -> int | None:
        """Return the next port that has an event, now masked; None if there is none."""
        try:
            return int.from_bytes(os.read(self._events, 4), "little")
        except BlockingIOError:
            return None

    def unmask(self, port: int) -> None:
        """Let a port have events again."""
        with self._lock:
            self._masked.discard(port)
            missed = port in self._missed
            self._missed.discard(port)
        if missed:
            self._raise(port)

    def notify(self, port: int) -> None:
        """Raise an event at the other end: the vCPU looks at its slot."""
        if port not in self._bound:
            raise XenCallError("mock_notify", self._domain.domid, _errno.EINVAL, "not bound")
        if port != _BUFFERED_PORT + _LOCAL:
            self._told[port - _LOCAL - _FIRST_VCPU_PORT].set()

    def restrict(self) -> None:
        """Give up rights to other domains; the mock has none to give up."""

    def inject_msi(self, address: int, data: int) -> None:
        """Note a message-signalled interrupt in ``domain.interrupts``."""
        self._domain.interrupts.append(("msi", (address, data)))

    def set_isa_irq(self, irq: int, level: bool) -> None:
        """Note the level of an interrupt line in ``domain.interrupts``."""
        self._domain.interrupts.append(("isa", (irq, level)))

    def set_pci_intx(self, function: tuple[int, int, int, int], pin: int, level: bool) -> None:
        """Note the level of a PCI function's pin in ``domain.interrupts``."""
        self._domain.interrupts.append(("intx", (*function, pin, level)))

    def close(self) -> None:
        """Destroy it. As on Xen, a vCPU that waits and was not notified is stuck."""
        self.destroy()
        with self._lock:
            if self._events_in >= 0:
                os.close(self._events_in)
                os.close(self._events)
                self._events_in = -1

    def destroy(self) -> None:
        """Send nothing more, and take no answers; also when the domain ends."""
        self.enabled = False
        self.destroyed = True
        if self._domain.ioreq_servers.get(self.id) is self:
            del self._domain.ioreq_servers[self.id]

    def _check_alive(self, call: str) -> None:
        if self.destroyed:
            raise XenCallError(f"mock_{call}", self._domain.domid, _errno.ENOENT, "it is gone")

    # --- Xen's side -----------------------------------------------------------------

    def takes(self, request: Request) -> bool:
        """Tell whether a request is for it: it lies in one claimed range as a whole."""
        first, last = request.address, request.address + request.size - 1
        if request.kind == RequestKind.MMIO:
            extent = request.size * (request.items - 1)
            first, last = (first - extent, last) if request.is_backward else (first, last + extent)
        elif request.kind == RequestKind.PCI_CONFIG:
            first = last = request.address >> BUS_OFFSET
        return self.enabled and any(
            kind == request.kind and start <= first and last <= end
            for kind, start, end in _merged(self._claims)
        )

    def send(self, vcpu: int, request: Request) -> None:
        """Put a request into a vCPU's slot and tell the device model."""
        self._check(vcpu, {State.NONE}, "a vCPU has one request at a time")
        encode(self.page, vcpu, request)
        set_state(self.page, vcpu, State.READY)
        self._raise(port_of(self.page, vcpu) + _LOCAL)

    def send_buffered(self, request: Request) -> bool:
        """Put a request into the ring, for which no vCPU waits; False if it does not fit."""
        if self.ring is None or not put_buffered(self.ring, request):
            return False
        self._raise(_BUFFERED_PORT + _LOCAL)
        return True

    def wait(self, vcpu: int, patience: float) -> int | None:
        """Block as a vCPU does until it is notified of an answer, and return the data.

        Returns:
            None if the server was destroyed before the answer was seen.

        Raises:
            TimeoutError: nobody has answered.
            RuntimeError: the device model broke the protocol; Xen would end the guest.
        """
        end = time.monotonic() + patience
        while True:
            if not self._told[vcpu].wait(end - time.monotonic()):
                raise TimeoutError(
                    f"vCPU {vcpu} of mock domain {self._domain.domid} is stuck: ioreq server "
                    f"{self.id} has not answered in {patience} s. Does another thread serve it "
                    "(server.serving(), serve_forever())?"
                )
            self._told[vcpu].clear()
            if self.destroyed:
                return None
            self._check(
                vcpu, {State.READY, State.INPROCESS, State.RESPONSE_READY}, "the state went astray"
            )
            if state_of(self.page, vcpu) == State.RESPONSE_READY:
                data: int = IOREQ.unpack_from(self.page, vcpu * SLOT_SIZE)[1]
                set_state(self.page, vcpu, State.NONE)
                return data

    def _check(self, vcpu: int, states: set[State], what: str) -> None:
        state, port = state_of(self.page, vcpu), port_of(self.page, vcpu)
        if state not in states or port != _FIRST_VCPU_PORT + vcpu:
            self._domain.crashed = f"vCPU {vcpu}: {what} (state {state}, vp_eport {port})"
            raise RuntimeError(f"Xen would crash the domain: {self._domain.crashed}")

    def _raise(self, port: int) -> None:
        with self._lock:
            if port not in self._bound or self._events_in < 0:
                return
            if port in self._masked:
                self._missed.add(port)
                return
            self._masked.add(port)
            os.write(self._events_in, port.to_bytes(4, "little"))


def _merged(claims: list[tuple[RequestKind, int, int]]) -> list[tuple[RequestKind, int, int]]:
    """Return claims with neighbours made one, as Xen's range sets do."""
    merged: deque[tuple[RequestKind, int, int]] = deque()
    for kind, first, last in sorted(claims):
        if merged and merged[-1][0] == kind and merged[-1][2] + 1 == first:
            first = merged.pop()[1]
        merged.append((kind, first, last))
    return list(merged)
