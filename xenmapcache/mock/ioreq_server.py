"""An ioreq server of the mock: the pages it shares with its device model, and its events.

Both sides are here: what a device model is offered (as by libxendevicemodel and
libxenevtchn), and what the mock's vCPUs do with it (as Xen does).
"""

from __future__ import annotations

import errno as _errno
import mmap
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from operator import call
from typing import Protocol

from ..address import PAGE_SIZE
from ..binding.descriptor import Descriptor
from ..errors import XenCallError
from ..ioreq import (
    BUS_OFFSET,
    IOREQ,
    SLOT_SIZE,
    BufferedRing,
    Fence,
    Request,
    RequestKind,
    RequestSlot,
    State,
)
from .faults import FaultPlan
from .interrupts import InterruptedGuest, RecordsInterrupts
from .p2m import P2m
from .predecessor import MockPredecessor
from .waiting import Bell, Gate

_BUFFERED_PORT = 9
_FIRST_VCPU_PORT = 10
MAX_RANGES = 256
"""Xen lets a server claim this many of each kind."""
MAX_VCPUS = PAGE_SIZE // SLOT_SIZE
"""Each vCPU needs a slot in the page of synchronous requests."""
_LOCAL = 100  # local port = remote port + this

_call: Callable[[Callable[[], object]], object] = call


class Guest(InterruptedGuest, Protocol):
    """What ioreq servers and vCPUs need to know of their domain."""

    vcpus: int
    p2m: P2m
    faults: FaultPlan
    gate: Gate
    ioreq_servers: dict[int, MockIoreqServer]
    vcpu_timeout: float
    crashed: str
    pci_cf8: int


class MockIoreqServer(RecordsInterrupts):
    """An ioreq server as Xen keeps it. Made by :meth:`.MockDomain.open_ioreq_server`.

    Attributes:
        id: its number in the domain.
        enabled: whether it gets requests.
        destroyed: whether it is gone: closed, or its domain has ended.
        killed: whether the process of its device model has died.
        predecessors: the servers that it takes over, whose device models were killed.
        page: the synchronous requests, 32 bytes a vCPU.
        ring: the buffered requests, or None.

    Synchronization: the device model's side is for one thread; vCPUs are others.
    """

    fence: Fence = None  # an event goes through a lock or the kernel, which orders what was written
    _guest: Guest

    def __init__(
        self, guest: Guest, number: int, buffered: bool, abandoned: Sequence[MockIoreqServer] = ()
    ) -> None:
        super().__init__(guest)
        self.id = number
        self.enabled = False
        self.destroyed = False
        self.killed = False
        self.predecessors = [MockPredecessor(each) for each in abandoned]
        pages = memoryview(mmap.mmap(-1, 2 * PAGE_SIZE))
        self.page = pages[PAGE_SIZE:]
        self.ring = pages[:PAGE_SIZE] if buffered else None
        self._claims: list[tuple[RequestKind, int, int]] = []
        # As /dev/xen/evtchn: a port number of 4 bytes for each event; a port that was
        # read out of it stays masked until it is unmasked.
        self._events, self._events_in = _pipe()
        self._masked: set[int] = set()
        self._missed: set[int] = set()
        self._bound: set[int] = set()
        self._lock = (
            threading.RLock()
        )  # a signal handler may serve while its thread raises an event
        self._bells = [Bell() for _ in range(guest.vcpus)]
        self._sent: set[int] = set()  # vCPUs whose request was sent, and whose answer was not taken
        self._waiting: set[int] = set()

    def __repr__(self) -> str:
        states = {"destroyed": self.destroyed, "killed": self.killed, "enabled": self.enabled}
        state = next((name for name, is_so in states.items() if is_so), "not enabled")
        return f"<MockIoreqServer {self.id} of mock domain {self._guest.domid}, {state}>"

    # --- the device model's side --------------------------------------------------

    @property
    def guest_type(self) -> str:
        """The type of the domain: ``"hvm"``, ``"pvh"`` or ``"pv"``."""
        return self._guest.type

    @property
    def paused(self) -> bool:
        """Whether the domain is paused or suspended, so that no vCPU takes its answer."""
        return bool(self._guest.gate.reasons)

    def has_ended(self) -> bool:
        """Tell whether the server is gone, as it is when its domain has ended."""
        return self.destroyed

    def nr_vcpus(self) -> int:
        """Return how many vCPUs the domain has."""
        return self._guest.vcpus

    def enable(self) -> None:
        """Get requests from now on; every vCPU then has an event channel in the page."""
        self._check_alive("enable")
        for vcpu in range(self._guest.vcpus):
            IOREQ.pack_into(
                self.page, vcpu * SLOT_SIZE, 0, 0, 0, 0, _FIRST_VCPU_PORT + vcpu, 0, 0, 0
            )
        self.enabled = True

    def disable(self) -> None:
        """Get no further requests. Those that were sent wait for their answers as before."""
        if not self.killed:
            self.enabled = False

    def buffered_port(self) -> int:
        """Return the event channel of the buffered page."""
        return _BUFFERED_PORT

    def bind(self, remote_port: int) -> int:
        """Connect to an event channel; as Xen does, this raises an event at once."""
        self._check_connected("bind")
        self._guest.faults.apply("bind")
        ports = {_FIRST_VCPU_PORT + vcpu for vcpu in range(self._guest.vcpus)}
        if remote_port not in ports | {_BUFFERED_PORT}:
            raise self._refused("bind", _errno.EINVAL, "no such port")
        port = remote_port + _LOCAL
        self._bound.add(port)
        self._raise(port)
        return port

    def claim(self, kind: RequestKind, first: int, last: int) -> None:
        """Take over a range, its ends included."""
        self._check_alive("claim")
        self._guest.faults.apply("claim")
        if sum(kind == each for each, _, _ in self._claims) == MAX_RANGES:
            raise self._refused("claim", _errno.ENOSPC, "too many ranges")
        if any(k == kind and first <= e and s <= last for k, s, e in self._claims):
            raise self._refused("claim", _errno.EEXIST, "claimed before")
        self._claims.append((kind, first, last))

    def unclaim(self, kind: RequestKind, first: int, last: int) -> None:
        """Give a range back."""
        self._check_alive("unclaim")
        claimed = kind, first, last
        if claimed not in self._claims:
            raise self._refused("unclaim", _errno.ENOENT, "not claimed")
        self._claims.remove(claimed)

    def fileno(self) -> int:
        """Return what to poll for events."""
        if self._events.closed:
            raise self._refused("fileno", _errno.EBADF, "the ioreq server is closed")
        return self._events.fileno()

    def pending(self) -> int | None:
        """Return the next port that has an event, now masked; None if there is none."""
        try:
            return int.from_bytes(os.read(self.fileno(), 4), "little")
        except BlockingIOError:
            return None

    def unmask(self, port: int) -> None:
        """Let a port have events again."""
        with self._lock:
            self._masked.discard(port)
            if port in self._missed:
                self._missed.discard(port)
                self._raise(port)

    def notify(self, port: int) -> None:
        """Raise an event at the other end: the vCPU looks at its slot."""
        self._check_connected("notify")
        if port not in self._bound:
            raise self._refused("notify", _errno.EINVAL, "not bound")
        if port != _BUFFERED_PORT + _LOCAL:
            self._bells[port - _LOCAL - _FIRST_VCPU_PORT].ring()

    def restrict(self) -> None:
        """Give up rights to other domains; the mock has none to give up."""

    def close(self, *, unmap: bool = True) -> None:  # noqa: ARG002 - as on live Xen
        """Destroy it. As on Xen, a vCPU that waits and was not notified is stuck.

        Args:
            unmap: whether the pages go, too. The mock keeps them as long as they are used.
        """
        if not self.killed:
            self.destroy()
            self._disconnect()
            for each in self.predecessors:
                each.close()

    def unmap(self) -> None:
        """Release the pages, after ``close(unmap=False)``; nothing to do here."""

    def kill(self) -> None:
        """Let the process of the device model die, as by SIGKILL.

        Its event channels are closed. Xen keeps the server: enabled, with its claims, and with each
        request that it was sent. So vCPUs wait until another device model takes the server over.
        """
        self.killed = True
        self._bound.clear()
        self._disconnect()

    @property
    def is_abandoned(self) -> bool:
        """Whether its device model was killed, and no other one that lives has taken it over.

        A server that was never enabled has no event channels, so nobody can know.
        """
        if not self.killed or not RequestSlot(self.page, 0).port:
            return False
        live = [each for each in self._guest.ioreq_servers.values() if not each.killed]
        return not any(each.server is self for heir in live for each in heir.predecessors)

    def ring_bell(self, vcpu: int) -> None:
        """Have a vCPU look at its slot."""
        self._bells[vcpu].ring()

    def _disconnect(self) -> None:
        with self._lock:
            self._events_in.close()
            self._events.close()

    def destroy(self) -> None:
        """Send nothing more, and take no answers; also when the domain ends."""
        self.enabled = False
        self.destroyed = True
        if self._guest.ioreq_servers.get(self.id) is self:
            del self._guest.ioreq_servers[self.id]

    def _refused(self, name: str, errno: int, hint: str) -> XenCallError:
        return XenCallError(f"mock_{name}", self._guest.domid, errno, hint)

    def _check_connected(self, name: str) -> None:
        if self.killed:
            raise self._refused(name, _errno.EBADF, "the process of this device model was killed")

    def _check_alive(self, name: str) -> None:
        self._check_connected(name)
        if self.destroyed:
            raise self._refused(name, _errno.ENOENT, "the ioreq server was destroyed")

    # --- Xen's side -----------------------------------------------------------------

    def takes(self, request: Request) -> bool:
        """Tell whether a request is for it: it lies in one claimed range as a whole."""
        first, last = request.address, request.address + request.size - 1
        if request.kind == RequestKind.MMIO:
            extent = request.size * (request.count - 1)
            first, last = (first - extent, last) if request.df else (first, last + extent)
        elif request.kind == RequestKind.PCI_CONFIG:
            first = last = request.address >> BUS_OFFSET
        return self.enabled and any(
            kind == request.kind and start <= first and last <= end
            for kind, start, end in _merged(self._claims)
        )

    def send(self, vcpu: int, request: Request) -> None:
        """Put a request into a vCPU's slot and tell the device model.

        A request that Python has interrupted, by a signal or a timeout, is finished first: a real
        vCPU would still wait for its answer.
        """
        if vcpu in self._sent and RequestSlot(self.page, vcpu).state != State.NONE:
            self._raise(_FIRST_VCPU_PORT + vcpu + _LOCAL)  # perhaps it was not raised
            self._bells[vcpu].ring()  # perhaps the vCPU had been told, and did not look
            self.wait(vcpu, self._guest.vcpu_timeout)
        self._check(vcpu, {State.NONE}, "a vCPU has one request at a time")
        self._sent.add(vcpu)
        slot = RequestSlot(self.page, vcpu)
        slot.send(request)
        self._raise(slot.port + _LOCAL)

    def send_buffered(self, request: Request) -> bool:
        """Put a request into the ring, for which no vCPU waits; False if it does not fit."""
        if self.ring is None or not BufferedRing(self.ring).append(request):
            return False
        self._raise(_BUFFERED_PORT + _LOCAL)
        return True

    def wait(self, vcpu: int, timeout: float) -> int | None:
        """Block as a vCPU does until it is notified of an answer, and return the data.

        While the domain is paused, the vCPU does not look at its slot; its time does not run.

        Returns:
            None if the server was destroyed before the answer was seen.

        Raises:
            TimeoutError: the device model has not answered, or the domain stays paused.
            RuntimeError: the device model broke the protocol; Xen would end the guest.
        """
        try:
            self._waiting.add(vcpu)
            end = time.monotonic() + timeout
            while True:
                told = self._bells[vcpu].wait(end - time.monotonic())
                if self.paused:
                    self._wait_unpaused(vcpu, timeout)
                    end = time.monotonic() + timeout
                elif not told:
                    raise TimeoutError(
                        f"vCPU {vcpu} of mock domain {self._guest.domid} is stuck: ioreq server "
                        f"{self.id} has not answered in {timeout} s. The request is "
                        f"'{RequestSlot(self.page, vcpu).request()}'. Does another thread serve "
                        "it (server.serving(), serve_forever())?"
                    )
                if told and self.destroyed:
                    return None
                data = self._take(vcpu) if told else None
                if data is not None:
                    return data
        finally:
            self._waiting.discard(vcpu)

    def _wait_unpaused(self, vcpu: int, timeout: float) -> None:
        if not self._guest.gate.wait(timeout):
            raise TimeoutError(
                f"vCPU {vcpu} of mock domain {self._guest.domid} cannot go on: the domain was "
                f"{' and '.join(self._guest.gate.reasons)} for {timeout} s"
            )

    def _take(self, vcpu: int) -> int | None:
        """Take the answer out of a slot; None if there is none yet."""
        states = {State.READY, State.INPROCESS, State.RESPONSE_READY}
        self._check(vcpu, states, "the state went astray")
        slot = RequestSlot(self.page, vcpu)
        if slot.state != State.RESPONSE_READY:
            return None
        data = slot.take()
        self._sent.discard(vcpu)
        return data

    def _check(self, vcpu: int, states: set[State], rule: str) -> None:
        state, port = RequestSlot(self.page, vcpu).state, RequestSlot(self.page, vcpu).port
        if state not in states or port != _FIRST_VCPU_PORT + vcpu:
            self._guest.crashed = f"vCPU {vcpu}: {rule} (state {state}, vp_eport {port})"
            raise RuntimeError(f"Xen would crash the domain: {self._guest.crashed}")

    def _raise(self, port: int) -> None:
        with self._lock:
            if port not in self._bound or self._events_in.closed:
                return
            if port in self._masked:
                self._missed.add(port)
                return
            event = port.to_bytes(4, "little")
            # One step in C. Interrupted between the two, a port would stay masked permanently.
            steps: list[Callable[[], object]] = [
                partial(self._masked.add, port),
                partial(os.write, self._events_in.fileno(), event),
            ]
            deque(map(_call, steps), maxlen=0)


def _pipe() -> tuple[Descriptor, Descriptor]:
    """Return the two ends of a pipe that never blocks; both are closed when they are freed."""
    flags = [os.O_CLOEXEC | os.O_NONBLOCK]
    # One step in C: see binding.descriptor.own.
    reader, writer = map(select.epoll.fromfd, chain.from_iterable(map(os.pipe2, flags)))
    return reader, writer


def _merged(claims: list[tuple[RequestKind, int, int]]) -> list[tuple[RequestKind, int, int]]:
    """Return claims with neighbours made one, as Xen's range sets do."""
    merged: deque[tuple[RequestKind, int, int]] = deque()
    for kind, first, last in sorted(claims):
        if merged and merged[-1][0] == kind and merged[-1][2] + 1 == first:
            first = merged.pop()[1]
        merged.append((kind, first, last))
    return list(merged)
