"""IoreqServer: carries out what a guest's vCPUs do to the devices that a program models."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from operator import call
from typing import Self, TypeVar

from ..cache import MapCache
from ..errors import ClosedError
from ..events import Event, ServerClosed, ServerOpened
from ..ioreq import Fence, RequestKind
from ..stream import Observation, Observer, announce, now
from . import claims, loops, saving
from .connection import Connection
from .dispatch import Dispatcher
from .ending import Ending
from .gate import Gate, Transfer
from .interrupts import RaisesInterrupts
from .link import HypervisorLink, IoreqDomain
from .opening import agreed_type, architecture_of, check_options, check_pair, connect
from .regions import Device, Region, RegionTable
from .report import Tally
from .runtime import Runtime

Callback = TypeVar("Callback", bound=Callable[[], object])


class IoreqServer(RaisesInterrupts):
    """An ioreq server of a domain, and the devices that it serves. Also a context manager.

    The constructor only describes the server. It goes live with ``with server:`` (or
    :meth:`open`): the server is created, its page mapped and enabled, an event channel is bound
    for every vCPU, and the regions are claimed. The end of the block answers all that is
    pending and destroys the server.

    Every request is answered. If a handler raises, its request is logged, a read gives all ones,
    and the server continues. Xen sends INVALIDATE when the guest gives up memory. The answer
    follows after the callbacks of :meth:`on_quiesce` and ``cache.invalidate()`` have returned.
    Follows ``xendevicemodel.h`` and ``hvm/ioreq.h``.

    Args:
        domain: a domid, for root in Dom0; or a :class:`MockDomain`.
        cache: of that domain's memory. It stays yours to close, after the server.
        buffered: take buffered requests too (Xen sends some for a standard VGA). An Arm guest has
            none.
        restrict: once it is open, give up this process's rights to all other domains
            permanently (``xentoolcore_restrict_all``). Open everything else before.
        recover: take over ioreq servers of the domain whose process has died without destroying
            them. The first round carries out the requests that wait there. Use it only where no
            other device model of this domain starts at the same moment.
        guest_type: ``"hvm"``, ``"pvh"`` or ``"pv"``, if Xen's toolstack does not tell.
        quiesce_timeout: how long :meth:`close`, or a signal, waits for a handler or callback that
            runs, in seconds. Then the server is closed without it.
        answer_timeout: how long :meth:`close` waits until the vCPUs of a paused domain have taken
            their answers, in seconds.
        binding: ``"cffi"`` or ``"ctypes"``; None takes cffi if it is installed.

    Attributes:
        domid: the domain's number.
        cache: as given.

    Synchronization: claims, interrupts, ``stop`` and ``close`` may be called in any thread.
    Handlers and callbacks run one at a time, in the thread that serves.
    """

    def __init__(
        self,
        domain: int | IoreqDomain,
        cache: MapCache,
        *,
        buffered: bool = False,
        restrict: bool = False,
        recover: bool = False,
        guest_type: str | None = None,
        quiesce_timeout: float = 10.0,
        answer_timeout: float = 5.0,
        binding: str | None = None,
    ) -> None:
        check_pair(domain, cache)
        check_options(guest_type, quiesce_timeout, answer_timeout)
        architecture = architecture_of(domain, buffered=buffered)
        domid = domain if isinstance(domain, int) else domain.domid
        self.cache = cache
        self._restrict = restrict
        self._stated_type = guest_type
        self._connect = partial(connect, domain, buffered, recover=recover, binding=binding)
        self._tally = Tally()
        self._dispatcher = Dispatcher(RegionTable(), cache)
        self._gate = Gate()
        runtime = Runtime(
            f"IoreqServer of domain {domid}",
            self._dispatcher,
            quiesce_timeout,
            partial(Ending, domid, cache, answer_timeout),
            cache.stream,
        )
        super().__init__(domid, runtime, architecture)
        announce(self.observe)

    def __repr__(self) -> str:
        return repr(self._runtime)

    # --- what it has done -------------------------------------------------------------

    @property
    def id(self) -> int:
        """Xen's number of the server; ClosedError if it is not open."""
        return self._runtime.open_connection().link.id

    @property
    def nr_vcpus(self) -> int:
        """How many vCPUs the guest can have, those that are offline included.

        ClosedError if the server is not open; UnsupportedOperationError if Xen's libraries are
        older than 4.15.
        """
        return self._runtime.open_connection().link.nr_vcpus()

    @property
    def fence(self) -> Fence:
        """A full memory fence for rings in guest memory; None where the processors keep the order.

        ClosedError if the server is not open.
        """
        return self._runtime.open_connection().link.fence

    @property
    def requests(self) -> int:
        """How many requests were answered, INVALIDATE included."""
        return self._tally.requests

    @property
    def buffered_requests(self) -> int:
        """How many of them were writes through the buffered ring, for which no vCPU waits."""
        return self._tally.buffered_requests

    @property
    def invalidations(self) -> int:
        """How many of them were INVALIDATE."""
        return self._dispatcher.invalidations

    @property
    def failures(self) -> int:
        """How many requests and callbacks failed. The log has them, or their number."""
        return self._tally.failures

    @property
    def lost_answers(self) -> int:
        """How many answers no vCPU took before the server was destroyed."""
        return self._tally.lost_answers

    def observe(self, observer: Observer) -> Observation:
        """Have a function called with each RequestHandled and Quiesced of this server.

        The first event is ServerOpened. When the server is closed, ServerClosed is the last one,
        but for those of handlers that still run.
        It is called between rounds, when the server's lock is free; all else is as of
        :meth:`MapCache.observe`, which tells of the cache.

        Raises:
            TypeError: it cannot be called.
        """
        return self._dispatcher.stream.attach(observer, self._snapshot)

    def _snapshot(self) -> list[Event]:
        opened: Event = ServerOpened(now(), self.domid, f"IoreqServer of domain {self.domid}")
        return [opened, ServerClosed(now())] if self._runtime.closed else [opened]

    # --- life -----------------------------------------------------------------------

    def open(self) -> None:
        """Go live; on an error nothing is left behind.

        Raises:
            BackendUnavailableError: no library, no Xen, or no permission.
            UnsupportedOperationError: Xen has no ioreq servers, its libraries are older than
                4.11, or an Arm host gives no memory fence.
            XenCallError: Xen refused; for example the domain has eight servers, or is a PV guest.
            ClosedError: it was opened before, or a signal handler has closed it.
            ValueError: the toolstack contradicts ``guest_type``.
        """
        try:
            with self._runtime.lock:
                self._open(self._runtime)
        finally:
            self._runtime.deliver()

    def _open(self, runtime: Runtime) -> None:
        if runtime.closed or runtime.connection is not None:
            raise ClosedError(f"{self!r}: it opens once; make another server")
        links: list[HypervisorLink] = []
        try:
            # One step: no interrupt comes between the making of the link and its keeping.
            links.extend(map(call, (self._connect,)))
            self._go_live(links[0])
        except BaseException as error:
            closed = runtime.is_closed()  # by a signal handler
            if runtime.is_open():
                self.close()
            elif links:
                links[0].close()
            atexit.unregister(runtime.close)  # a handler may have closed it before it was there
            if closed and isinstance(error, Exception):
                raise ClosedError(f"{self!r}: it was closed while it opened") from error
            raise

    def _go_live(self, link: HypervisorLink) -> None:
        runtime, regions = self._runtime, self._dispatcher.regions
        connection = Connection(
            link, self._dispatcher, self._tally, self.domid, self.cache, runtime.give_up
        )
        runtime.connection = connection
        if runtime.is_closed():  # by a signal handler, which found no connection
            runtime.connection = None
            raise ClosedError("closed before it had a connection")
        connection.inheritance.report(self.domid)
        # Without it an unplanned exit would leave vCPUs blocked for ever.
        atexit.register(runtime.close)
        stated = self._stated_type
        self._guest_type = agreed_type(self.domid, link.guest_type, stated)
        link.enable()
        # Until now nobody has told the cache what the guest gave up.
        self.cache.invalidate()
        connection.bind()
        connection.bind_ring()
        for region in list(regions):  # a signal handler may close the server
            link.claim(region.kind, *region.xen_range)
        if self._restrict:
            link.restrict()
        if connection.closed:
            raise ClosedError(f"{self!r}: it was closed while it opened")

    def close(self) -> None:
        """Get no further requests, carry out those that wait, and destroy the server. Idempotent.

        The callbacks of :meth:`on_quiesce` are called a last time, because no INVALIDATE reaches
        the cache afterwards. A handler may call it; :meth:`stop` is kinder. SIGINT and SIGTERM
        wait until it is done.

        If a handler or callback runs in another thread for longer than ``quiesce_timeout``, the
        server is closed without it: mappings are dropped, each vCPU reads all ones, and the log
        names what still runs.

        Raises:
            XenCallError: Xen failed; the server is closed all the same.
        """
        # A callback may wait for a transfer that waits for resume().
        self._gate.end()
        self._runtime.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what it answers for ----------------------------------------------------------

    def claim_ports(self, first: int, count: int, device: Device | None = None) -> Region:
        """Answer for ports, from ``first`` up to and without ``first + count``.

        Args:
            first: the first port.
            count: how many.
            device: has ``read(offset, size)`` and/or ``write(offset, size, value)``; or
                give the region its handlers with its decorators.

        Raises:
            ValueError: ports outside of 0..0xffff, or some are claimed by this server.
            TypeError: a device without either method, or a class.
            UnsupportedOperationError: the guest is an Arm guest, which has device memory only.
            XenCallError: Xen refused.
        """
        return self._claim(RequestKind.PORT, *claims.ports(first, count), device)

    def claim_mmio(self, address: int, length: int, device: Device | None = None) -> Region:
        """Answer for accesses to guest-physical addresses without RAM.

        Args:
            address: the first byte.
            length: in bytes; the range is half-open.
            device: as for :meth:`claim_ports`.

        Raises:
            ValueError: the guest has RAM there. A live Xen does not show that at once.
            TypeError, ValueError, XenCallError: as :meth:`claim_ports`.
        """
        return self._claim(RequestKind.MMIO, *claims.mmio(self.cache, address, length), device)

    def claim_pci(self, bdf: str, device: Device | None = None) -> Region:
        """Answer for the configuration space of a PCI function.

        Args:
            bdf: as ``"0000:00:05.0"``.
            device: as for :meth:`claim_ports`; offsets are in configuration space.

        Raises:
            TypeError, ValueError, UnsupportedOperationError, XenCallError: as
                :meth:`claim_ports`.
        """
        return self._claim(RequestKind.PCI_CONFIG, *claims.pci_function(bdf), device)

    def _claim(self, kind: RequestKind, start: int, length: int, device: object) -> Region:
        claims.check_kind(self.domid, self._architecture, kind)
        region = Region(kind, start, length, device, self._release)
        claims.claim(self._runtime, self._dispatcher.regions, region)
        return region

    def _release(self, region: Region) -> None:
        claims.release(self._runtime, self._dispatcher.regions, region)

    def on_quiesce(self, callback: Callback) -> Callback:
        """Have ``callback()`` called before an INVALIDATE drops the mappings; a decorator.

        It is the last moment for DMA that is under way: finish it, and release its leases.
        The guest's vCPU waits, so be quick. If it raises, that is logged. :meth:`close` and
        :meth:`suspend` call it, too. It must not wait for a thread that claims, releases,
        resumes or closes, because those wait for it; nor, while the server is
        :attr:`suspended`, for a transfer.

        It may be ``async def``. Only :meth:`serve_async` can await it: it does so for each
        INVALIDATE and at its own end, and handles no other request until then.

        Raises:
            TypeError: it cannot be called.
        """
        if not callable(callback):
            raise TypeError(f"callback {callback!r} cannot be called")
        self._dispatcher.callbacks.append(callback)
        return callback

    # --- saving the guest -----------------------------------------------------------------

    def suspend(self) -> None:
        """Prepare for ``xl save``: finish transfers, and hold new ones back.

        Call it before the guest is saved. The callbacks of :meth:`on_quiesce` are called, and
        :meth:`transfer` lets nobody through until :meth:`resume`. Requests are answered as
        before, because the guest has to run until it has suspended itself.

        Raises:
            TimeoutError: a transfer is still under way after ``quiesce_timeout`` seconds.
            ClosedError: the server is not open.
        """
        saving.suspend(self._runtime, self._gate, self.cache)

    def resume(self) -> None:
        """Let transfers through again, after ``xl save -c`` or a save that failed."""
        saving.resume(self._runtime, self._gate, self.cache)

    @property
    def suspended(self) -> bool:
        """Whether transfers are held back: from :meth:`suspend` to :meth:`resume`.

        A callback of :meth:`on_quiesce` asks it, because it must not wait for a transfer that
        is held back. If the server is closed in between, it stays so.
        """
        return self._gate.is_shut

    def transfer(self) -> Transfer:
        """Return a context manager for a transfer in a thread of its own.

        It waits while the guest is saved. Take leases inside of it, and only there. Entering it
        raises ClosedError if the server is closed before ``resume``.
        """
        return Transfer(self._gate)

    # --- serving ----------------------------------------------------------------------

    def fileno(self) -> int:
        """Return what becomes readable when :meth:`process_pending` has something to do."""
        return self._runtime.fileno()

    def process_pending(self) -> int:
        """Do one round without waiting: answer what is pending.

        One round handles at most one request of each vCPU, and the buffered requests that
        were in the ring when it began.

        Returns:
            How many requests were answered.

        Raises:
            XenCallError: Xen failed; for example the domain is gone.
            ClosedError: the server is not open.
            TypeError: a callback of :meth:`on_quiesce` is ``async def``.
        """
        self._runtime.check_sync("process_pending")
        self._runtime.open_connection()
        answered = self._runtime.round()
        if answered is None:
            self._runtime.open_connection()
        return answered or 0

    def serve_forever(self, *, on_end: Callable[[], object] | None = None) -> int | None:
        """Answer requests until the guest ends, :meth:`stop`, :meth:`close`, SIGINT or SIGTERM.

        The end of the guest is noticed in about a second. A guest that reboots ends as well: its
        successor is another domain.

        In the main thread the two signals end it between two rounds. A second one interrupts
        a handler that does not return. If that does not help either, the server is closed
        after ``quiesce_timeout`` seconds, as :meth:`close` does.

        Args:
            on_end: is called in this thread if the guest has ended; what it raises is passed on.

        Returns:
            The signal's number, or None if no signal ended it.

        Raises:
            XenMapCacheError, TypeError, or RuntimeError inside a block of :meth:`serving`.
        """
        self._runtime.check_sync("serve_forever")
        return loops.serve_forever(self._runtime, on_end)

    def serving(
        self, *, on_end: Callable[[], object] | None = None
    ) -> AbstractContextManager[Self]:
        """Serve in a thread of its own for a ``with`` block.

        Args:
            on_end: as for :meth:`serve_forever`; it is called in that thread.

        Raises:
            ClosedError: at the start, the server is not open.
            XenMapCacheError: at the end, what ended that thread.
            TypeError, RuntimeError: as :meth:`serve_forever`.
        """
        self._runtime.check_sync("serving")
        return loops.ServingThread(self, self._runtime, on_end)

    async def serve_async(self, *, on_end: Callable[[], object] | None = None) -> int | None:
        """Answer requests in the running event loop, as :meth:`serve_forever`, or until cancelled.

        Handlers and ``on_end`` run in the loop's thread, between other callbacks. SIGINT is left to
        asyncio.

        Args, returns, raises: as :meth:`serve_forever`.
        """
        return await loops.serve_async(self._runtime, on_end)

    def stop(self) -> None:
        """End :meth:`serve_forever` or :meth:`serve_async`, or the next one. From any thread."""
        self._runtime.wake()
