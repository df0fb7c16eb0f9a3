"""A server while it is open: the vCPUs' slots, the ring, and the event channels."""

# Theory of operation
#
# A request of a vCPU goes through the states of its slot (`ioreq.TRANSITIONS`). A connection
# makes two of the four steps, and keeps a Job for the slot while it does:
#
#   READY        a request is there. Its event may have come, or may still be on its way.
#   INPROCESS    begun. The job says how far it has come: not called, running, returned.
#   RESPONSE_READY   answered. The vCPU may not have been notified yet.
#
# One round (`process`) does this, and its order is a rule:
#
#   1. Read events, and unmask each port at once: what comes later is a new event.
#   2. Look at the slots. Only then look at the ring's write pointer, once: what a vCPU wrote
#      into the ring before its request is before that pointer.
#   3. Carry out the buffered requests up to that pointer, 511 at most. A guest that never stops
#      writing cannot keep a round from its end.
#   4. Carry out the requests of the slots. Log afterwards.
#
# Interrupts. A signal handler may raise between any two steps. `_unsettled` is set before the
# first step and cleared after the last. If a round finds it set, events may be lost, ports may
# be masked, and slots may be half-way. It then unmasks every port and looks at every slot:
#
#   INPROCESS, and no handler was called      it is carried out now
#   INPROCESS, and its handler has returned   its value is the answer
#   INPROCESS, and its handler was cut off    all ones; it is not called a second time
#   INPROCESS, and its handler still runs     left alone: this round was called by that handler
#   RESPONSE_READY                            notified again
#   a buffered request, consumed and not called   carried out now
#
# Which handlers run is known from the chain of jobs (`calls.py`).
#
# Threads. All of this happens under the server's lock, but for `give_up`: the watcher's thread
# calls it while a handler that never returns holds the lock. Who answers a begun request is
# decided by one `dict.setdefault` on the job. Pages stay mapped until that handler returns.
#
# Predecessors. After `recover`, the slots and rings of dead processes' servers are served as well
# (`recovery.py`). No event comes from them once they are disabled, so each round looks at all of
# them until they are destroyed.
#
# Processes. A child that a handler has forked shares the pages. It answers nothing.

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import cast

from ..cache import MapCache
from ..errors import ClosedError
from ..ioreq import (
    POINTER_MASK,
    RING_SLOTS,
    SLOT_SIZE,
    BufferedRing,
    ProtocolError,
    Request,
    RequestKind,
    RequestSlot,
    State,
)
from ..stream import now
from .calls import CallChain
from .channel import Channel
from .dispatch import Dispatcher, GuestError, Job
from .link import HypervisorLink
from .recovery import Inheritance
from .report import Tally

_MAX_ATTEMPTS = 3
"""How often a request is begun whose handler was never called."""
_SERVER = "server"


class Connection:
    """An ioreq server while it is open.

    Args:
        link: the hypervisor's side.
        dispatcher: what requests do.
        tally: counts on.
        domid: for messages.
        cache: whose leases the watcher names.
        give_up: is called if foreign code still runs at the watcher's deadline.

    Attributes:
        closed: there is nothing to serve any more.
        destroyed: Xen has destroyed the server.
        closer: the thread that closes it, or None.
        calls: the handlers and callbacks that run.
        channels: the vCPUs', by the port at this end.
        inheritance: what was taken over from dead processes.
        kept_pages: the pages are mapped although the server was destroyed.
        deferred: an INVALIDATE that :meth:`finish_deferred` will answer.
    """

    def __init__(
        self,
        link: HypervisorLink,
        dispatcher: Dispatcher,
        tally: Tally,
        domid: int,
        cache: MapCache,
        give_up: Callable[[], None],
    ) -> None:
        self.link = link
        self.closed = False
        self.destroyed = False
        self.closer: int | None = None
        self.deferred: Channel | None = None
        self.channels: dict[int, Channel] = {}
        self.kept_pages = False
        self.calls = CallChain(domid, cache, dispatcher, tally, give_up)
        self.dispatcher = dispatcher
        self.tally = tally
        self.inheritance = Inheritance(link)
        self._ring = BufferedRing(link.ring, link.fence) if link.ring is not None else None
        self._ring_port = -1
        self._ring_job: tuple[BufferedRing, Job] | None = None
        self._unsettled = False
        self._pid = os.getpid()

    @property
    def current(self) -> Job | None:
        """The job whose handler runs, or None."""
        return self.calls.current

    # --- event channels -----------------------------------------------------------------

    def bind(self) -> None:
        """Bind the event channels that are not bound yet, the ring's too."""
        bound = {channel.slot.vcpu for channel in self.channels.values()}
        for vcpu in range(len(self.link.page) // SLOT_SIZE):
            slot = RequestSlot(self.link.page, vcpu, self.link.fence)
            if vcpu not in bound and slot.port:
                port = self.link.bind(slot.port)
                self.channels[port] = Channel(slot, port, self.link)

    def bind_ring(self) -> None:
        """Bind the ring's event channel, if there is a ring."""
        if self._ring is not None:
            self._ring_port = self.link.bind(self.link.buffered_port())

    def all_channels(self) -> list[Channel]:
        """Return the vCPUs of the server, and of those that it has taken over."""
        return [*self.channels.values(), *self.inheritance.channels]

    def disable(self) -> None:
        """Get no further requests, here and at the servers of dead processes."""
        try:
            self.link.disable()
        finally:
            self.inheritance.disable()

    def is_busy(self, thread: int) -> bool:
        """Return whether another thread than this runs foreign code, or ends the connection."""
        if self.closed:
            return not self.destroyed
        runs_elsewhere = self.calls.current is not None and self.calls.thread != thread
        return runs_elsewhere or self.closer not in (None, thread)

    # --- rounds ---------------------------------------------------------------------------

    def process(self, *, defer: bool = False) -> int:
        """Do one round, without waiting. Under the server's lock.

        Args:
            defer: leave an INVALIDATE in :attr:`deferred`, for callbacks that are awaited.

        Returns:
            How many requests were answered or carried out.

        Raises:
            XenCallError: Xen failed; the next round makes up for it.
            ClosedError: this is a child of the process that opened the server.
        """
        if self.deferred is not None:
            return 0
        before = self.tally.requests
        outer, thread = self.calls.current, self.calls.thread
        unsettled = self._unsettled
        self._unsettled = True
        try:
            self.calls.thread = threading.get_ident()
            self.inheritance.disable()
            looked, ring_due = self._read_events(everything=unsettled)
            waiting = [c for c in looked if self._is_waiting(c, everything=unsettled)]
            if inherited := self.inheritance.channels:
                waiting += [c for c in inherited if self._is_waiting(c, everything=True)]
                ring_due = True
            if ring_due or waiting:
                self._drain()
            errors = self._serve_all(waiting, defer=defer)
            if errors:
                raise errors[0]
            if inherited and outer is None:  # or the outer round would look at unmapped pages
                self.inheritance.retire()
            if self.deferred is None:
                self._unsettled = outer is not None
        finally:
            self.calls.current, self.calls.thread = outer, thread
            if outer is None:
                self._end_round()
        return self.tally.requests - before

    def _end_round(self) -> None:
        """Log what failed, and release pages that were kept for this thread."""
        try:
            if self.calls.log.waiting and os.getpid() == self._pid:
                self.calls.report()
        finally:
            if self.kept_pages:
                self._unmap_kept_pages()

    def _read_events(self, *, everything: bool) -> tuple[list[Channel], bool]:
        """Return the channels to look at, and whether the ring is due; unmask their ports."""
        if everything:
            for bound in (*self.channels, self._ring_port):
                if bound >= 0:
                    self.link.unmask(bound)
            return list(self.channels.values()), True
        looked: list[Channel] = []
        ring_due = False
        for _ in range(len(self.channels) + 1):
            port = self.link.pending()
            if port is None:
                break
            self.link.unmask(port)
            if port == self._ring_port:
                ring_due = True
            elif (channel := self.channels.get(port)) is not None:
                looked.append(channel)
        return looked, ring_due

    def _is_waiting(self, channel: Channel, *, everything: bool) -> bool:
        """Return whether a slot needs this round; after an interrupt any state may."""
        state = channel.slot.state
        if state == State.READY:
            return True
        return everything and state != State.NONE and not self.calls.is_running(channel.job)

    def _may_go_on(self) -> bool:
        """Return whether this thread may still serve; ClosedError in a forked child."""
        if os.getpid() != self._pid:
            raise ClosedError(f"this ioreq server belongs to process {self._pid}, which forked")
        mine = self.closer in (None, threading.get_ident())
        return mine and not self.closed and self.deferred is None

    def _serve_all(self, waiting: list[Channel], *, defer: bool = False) -> list[Exception]:
        """Serve slots; an error about one does not keep the others waiting."""
        errors: list[Exception] = []
        for channel in waiting:
            if not self._may_go_on():
                break
            try:
                self._serve(channel, defer=defer)
            except Exception as error:
                errors.append(error)
        return errors

    def _serve(self, channel: Channel, *, defer: bool) -> None:
        """Bring a slot one step nearer to its answer, or to the end of it."""
        slot, state = channel.slot, channel.slot.state
        if state == State.READY:
            channel.job = Job(slot.request())
            slot.begin()
        elif state == State.RESPONSE_READY:
            channel.notify()
            return
        elif state != State.INPROCESS or self.calls.is_running(channel.job):
            return
        job = channel.job
        if job is None:  # begun by nobody here
            job = channel.job = Job(slot.request())
        if job.calls or job.attempts >= _MAX_ATTEMPTS:
            self._abandon(channel, job)
            return
        if defer and slot.request().kind == RequestKind.INVALIDATE:
            self.deferred = channel
            return
        try:
            self.calls.run(job, slot.vcpu)
        except BaseException:
            if job.has_begun() and os.getpid() == self._pid:
                self.answer(channel, job)
            raise
        if os.getpid() == self._pid:
            self.answer(channel, job)

    def _abandon(self, channel: Channel, job: Job) -> None:
        """Answer for a handler that was cut off: with its value, if it had returned."""
        request = job.request
        if request is not None and (job.running or job.attempts >= _MAX_ATTEMPTS):
            self.calls.log.note(job, GuestError("it was given up before it was carried out"))
            if self.dispatcher.stream.observations:
                self.calls.tell_handled(job, channel.slot.vcpu, now())
        self.answer(channel, job)

    def answer(self, channel: Channel, job: Job) -> None:
        """Answer and notify a vCPU, whatever else fails. Can be repeated."""
        try:
            self.dispatcher.finish(job)
        except Exception as error:
            self.calls.log.note(job, error)
        finally:
            self._tell(channel, job)

    def _tell(self, channel: Channel, job: Job) -> None:
        if self.closed:
            return  # the close has answered
        if channel.slot.state == State.INPROCESS:
            if job.answerer.setdefault("who", _SERVER) is not _SERVER:
                return
            if not job.counted:
                job.counted = True
                self.tally.requests += 1
            channel.slot.answer(self.dispatcher.result(job))
        channel.notify()

    # --- the ring ---------------------------------------------------------------------------

    def _drain(self) -> None:
        """Carry out the buffered requests that are in the rings now, and no later ones."""
        for ring in self.inheritance.rings:
            self._drain_ring(ring)
        if self._ring is not None:
            self._drain_ring(self._ring)

    def _drain_ring(self, ring: BufferedRing) -> None:
        end = ring.write_pointer
        self._redo(ring)
        while self._may_go_on():
            start = ring.read_pointer
            if start == end or self._has_passed(ring, start, end):
                return
            try:
                request = ring.peek()
            except ProtocolError as error:
                ring.discard()
                self.calls.log.note(Job(None), GuestError(str(error)))
                return
            job = Job(request, start)
            self._ring_job = (ring, job)
            ring.consume(cast(Request, request))  # there is one: the ring is not empty
            self._run_buffered(job)

    @staticmethod
    def _has_passed(ring: BufferedRing, start: int, end: int) -> bool:
        """Return whether a handler that served has consumed more than up to ``end``."""
        if end - start & POINTER_MASK <= RING_SLOTS:
            return False
        return ring.write_pointer - start & POINTER_MASK <= RING_SLOTS

    def _redo(self, ring: BufferedRing) -> None:
        """Carry out the request that an interrupted drain has consumed and not begun."""
        known, job = self._ring_job or (None, None)
        if job is None or known is not ring:
            return
        if job.calls or job.error or job.attempts >= _MAX_ATTEMPTS:
            return
        if ring.read_pointer != job.position and not self.calls.is_running(job):
            self._run_buffered(job)

    def _run_buffered(self, job: Job) -> None:
        if not job.counted:
            job.counted = True
            self.tally.requests += 1
            self.tally.buffered_requests += 1
        self.calls.run(job, -1)
        self._ring_job = None

    # --- the end ------------------------------------------------------------------------------

    def settle(self) -> None:
        """Carry out all that waits, after :meth:`HypervisorLink.disable`.

        Raises:
            XenCallError: a vCPU could not be notified.
        """
        outer, thread = self.calls.current, self.calls.thread
        self.deferred = None  # callbacks that are still awaited come too late
        try:
            self.calls.thread = threading.get_ident()
            self._drain()
            channels = [c for c in self.all_channels() if c.slot.state != State.NONE]
            errors = self._serve_all(channels)
            self._drain()
            if errors:
                raise errors[0]
        finally:
            self.calls.current, self.calls.thread = outer, thread

    # --- callbacks that are awaited -----------------------------------------------------------

    def finish_deferred(self) -> None:
        """Answer the INVALIDATE whose callbacks were awaited."""
        channel = self.deferred
        if channel is None or channel.job is None:
            return
        try:
            self.dispatcher.invalidations += 1
            began = now()
            self.answer(channel, channel.job)
            if self.dispatcher.stream.observations:
                self.calls.tell_handled(channel.job, channel.slot.vcpu, began)
        finally:
            self.deferred = None
            self._end_round()

    def _unmap_kept_pages(self) -> None:
        """Release the pages, in the thread that may have looked at them, and only once."""
        self.kept_pages = False
        self.link.unmap()
