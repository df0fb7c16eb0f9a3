"""IoreqServer: carries out what a guest's vCPUs do to the devices that a program models."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Container, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Self, TypeVar

from ..address import as_int, check_range
from ..cache import MapCache
from ..errors import ClosedError
from ..ioreq import (
    BUS_OFFSET,
    SLOT_SIZE,
    Request,
    RequestKind,
    State,
    answer,
    bdf_number,
    decode,
    next_buffered,
    parse_bdf,
    port_of,
    set_state,
    state_of,
    take_buffered,
)
from .link import IoreqDomain, Link
from .regions import Device, Region, Regions

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger("xenmapcache.devicemodel")

Callback = TypeVar("Callback", bound=Callable[[], object])

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PORTS = 1 << 16
_PCI_CONFIG_SIZE = 4096
_ISA_IRQS, _PINS = 16, 4
_PATIENCE = 0.1
"""How long a vCPU may take, in seconds, to see its last answer. A paused one does not."""


class IoreqServer:
    """An ioreq server of a domain, and the devices behind it. Also a context manager.

    Making one only describes it. It goes live with ``with server:`` (or :meth:`open`):
    created, its page mapped, enabled, an event channel bound for every vCPU, and what was
    claimed is claimed. Leaving answers all that is pending and destroys it.

    Every request is answered: a handler that raises is logged with its request, its read
    gives all ones, and the server goes on. INVALIDATE, which Xen sends when the guest gives
    up memory, is answered after the callbacks of :meth:`on_quiesce` and then
    ``cache.invalidate()`` have returned. Follows ``xendevicemodel.h`` and ``hvm/ioreq.h``.

    Args:
        domain: a domid, for root in Dom0 on x86; or a :class:`MockDomain`.
        cache: of that domain's memory. It stays yours to close, after the server.
        buffered: take buffered requests too (Xen sends some for a standard VGA).
        restrict: once it is open, give up this process's rights to all other domains, for
            good (``xentoolcore_restrict_all``). Open everything else before.
        recover: first clear away ioreq servers of the domain whose process has died without
            destroying them: their vCPUs go on, reading all ones. Only where no other
            device model of this domain starts at the same moment.
        binding: ``"cffi"`` or ``"ctypes"``; None takes cffi if it is there.

    Attributes:
        requests: how many requests were answered, INVALIDATE included.
        invalidations: how many of them were INVALIDATE.
        failures: how many could not be carried out as the guest asked; each was logged.

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
        binding: str | None = None,
    ) -> None:
        if isinstance(domain, bool) or not isinstance(domain, int | IoreqDomain):
            raise TypeError(f"domain must be a domid or a MockDomain, not {domain!r}")
        if not isinstance(cache, MapCache):
            raise TypeError(f"cache must be a MapCache, not {type(cache).__name__}")
        domid = domain if isinstance(domain, int) else domain.domid
        mapped = getattr(cache.backend, "domid", domid)
        mock = getattr(cache.backend, "domain", domain)  # two may have one number
        if mapped != domid or mock is not domain:
            raise ValueError(f"the cache maps domain {mapped}, the server is for domain {domid}")
        self.domid = domid
        self.cache = cache
        self.requests = 0
        self.invalidations = 0
        self.failures = 0
        self._domain = domain
        self._buffered = buffered
        self._restrict = restrict
        self._recover = recover
        self._binding = binding
        self._regions = Regions()
        self._quiesce: list[Callable[[], object]] = []
        self._link: Link | None = None
        self._closed = False
        self._pid = os.getpid()
        self._vcpus: dict[int, int] = {}  # by local port
        self._ring_port = -1
        self._interrupted = False
        self._serving: set[int] = set()  # vCPUs whose handler runs: it may serve others
        self._lock = threading.RLock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self._wake)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._link else "not open"
        return f"<IoreqServer of domain {self.domid}, {state}>"

    # --- life -----------------------------------------------------------------------

    @property
    def id(self) -> int:
        """Xen's number of the server; ClosedError if it is not open."""
        return self._open_link().id

    def open(self) -> None:
        """Go live; on an error nothing is left behind.

        Raises:
            BackendUnavailableError: no library, no Xen, or no permission.
            UnsupportedOperationError: not on x86, or Xen's libraries are older than 4.11.
            XenCallError: Xen refused; for example the domain has eight servers, or is a PV guest.
            ClosedError: it was opened before.
        """
        with self._lock:
            if self._closed or self._link is not None:
                raise ClosedError(f"{self!r}: make another one to open it again")
            self._link = link = self._connect()
            # Without it an exit that nobody planned would leave vCPUs stuck for ever.
            atexit.register(self.close)
            try:
                link.enable()
                # Until now nobody has told the cache what the guest gave up.
                self.cache.invalidate()
                for vcpu, port in self._unbound(link):
                    self._vcpus[link.bind(port)] = vcpu
                if link.ring is not None:
                    self._ring_port = link.bind(link.buffered_port())
                for region in self._regions:
                    link.claim(region.kind, *_ends(region))
                if self._restrict:
                    link.restrict()
            except BaseException:
                self.close()
                raise

    def _connect(self) -> Link:
        if not isinstance(self._domain, int):
            return self._domain.open_ioreq_server(buffered=self._buffered)
        from .xen import XenLink

        return XenLink(
            self._domain, buffered=self._buffered, recover=self._recover, binding=self._binding
        )

    def _unbound(self, link: Link) -> list[tuple[int, int]]:
        """Return ``(vCPU, event channel)`` of those that are not connected."""
        bound = set(self._vcpus.values())
        return [
            (vcpu, port)
            for vcpu in range(len(link.page) // SLOT_SIZE)
            if vcpu not in bound and (port := port_of(link.page, vcpu))
        ]

    def close(self) -> None:
        """Get no more requests, carry out those that wait, and destroy the server. Idempotent.

        The callbacks of :meth:`on_quiesce` are called, too: after it nobody tells the cache what
        the guest gives up. A handler may call it; :meth:`stop` is kinder. SIGINT and SIGTERM
        wait until it is done.

        Raises:
            XenCallError: Xen failed; the server is closed all the same.
        """
        if os.getpid() != self._pid:
            return  # the server is the parent's
        with self._lock, _signals(self._wake) as caught:
            link = self._link
            if link is None:
                self._closed = True
            else:
                self._close(link)
        for number in caught:
            os.kill(self._pid, number)

    def _close(self, link: Link) -> None:
        errors: list[Exception] = []
        try:
            for step in (
                link.disable,
                lambda: self._bind_rest(link),
                lambda: self._settle(link, errors, set()),
                lambda: self._drain(link),
                self._call_quiesce,
            ):
                try:
                    if self._link is link:  # or a handler has closed it
                        step()
                except Exception as error:
                    errors.append(error)
        finally:
            if self._link is link:
                self._destroy(link, errors)
        if errors:
            raise errors[0]

    def _bind_rest(self, link: Link) -> None:
        """Connect to who waits, after an :meth:`open` that failed before it was connected."""
        for vcpu, port in self._unbound(link):
            self._vcpus[link.bind(port)] = vcpu

    def _settle(self, link: Link, errors: list[Exception], but: Container[int]) -> None:
        """Look at every vCPU but some, whether there was an event or not, and let it go on."""
        for port, vcpu in list(self._vcpus.items()):
            try:
                if self._link is link and vcpu not in but:
                    self._serve(link, port, vcpu)
                if self._link is link and vcpu not in but:
                    self._answer_anyway(link, port, vcpu)
            except Exception as error:
                errors.append(error)

    def _answer_anyway(self, link: Link, port: int, vcpu: int) -> None:
        """Answer what a handler that was interrupted, or closes, has left."""
        state = state_of(link.page, vcpu)
        if state in (State.READY, State.INPROCESS):
            request = decode(link.page, vcpu)
            if request.kind == RequestKind.INVALIDATE:
                self.cache.invalidate()
            self._fail(request, "it was given up before it was carried out")
            answer(link.page, vcpu, _nothing(request))
        if state:
            link.notify(port)  # it may have been answered, and not told

    def _destroy(self, link: Link, errors: list[Exception]) -> None:
        """Destroy the server, after an answer to whoever still waits: who is closing, say."""
        try:
            for port, vcpu in self._vcpus.items():
                try:
                    self._answer_anyway(link, port, vcpu)
                except Exception as error:
                    errors.append(error)
            # Destroyed before it looks, a vCPU would not find its answer.
            end = time.monotonic() + _PATIENCE
            while time.monotonic() < end and any(
                state_of(link.page, vcpu) == State.RESPONSE_READY for vcpu in self._vcpus.values()
            ):
                time.sleep(0.001)
        finally:
            self._closed = True
            try:
                link.close()
            finally:
                self._link = None
                self._regions = Regions()  # which know this server: a cycle
                os.eventfd_write(self._wake, 1)
                atexit.unregister(self.close)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_link(self) -> Link:
        if os.getpid() != self._pid:
            raise ClosedError(f"this ioreq server belongs to process {self._pid}, which forked")
        if self._link is None:
            raise ClosedError(f"{self!r}: use it inside `with server:`")
        return self._link

    # --- what it answers for ----------------------------------------------------------

    def claim_ports(self, first: int, count: int, device: Device | None = None) -> Region:
        """Answer for ports ``first .. first + count``.

        Args:
            first: the first port.
            count: how many.
            device: has ``read(offset, size)`` and/or ``write(offset, size, value)``; or
                give the region its handlers with its decorators.

        Raises:
            ValueError: those are no ports, or some are claimed by this server.
            TypeError: a device without either method.
            XenCallError: Xen refused.
        """
        first, count = as_int("first", first), as_int("count", count)
        if not (first >= 0 < count and first + count <= _PORTS):
            raise ValueError(f"ports {first:#x}..{first + count:#x} are not within 0..{_PORTS:#x}")
        return self._claim(RequestKind.PORT, first, count, device)

    def claim_mmio(self, address: int, length: int, device: Device | None = None) -> Region:
        """Answer for accesses to guest-physical addresses where there is no memory.

        Args:
            address: the first byte.
            length: in bytes; the range is half-open.
            device: as for :meth:`claim_ports`.

        Raises:
            TypeError, ValueError, XenCallError: as :meth:`claim_ports`.
        """
        address, length = check_range(address, length)
        return self._claim(RequestKind.MMIO, address, length, device)

    def claim_pci(self, bdf: str, device: Device | None = None) -> Region:
        """Answer for the configuration space of a PCI function.

        Args:
            bdf: as ``"0000:00:05.0"``.
            device: as for :meth:`claim_ports`; offsets are in configuration space.

        Raises:
            TypeError, ValueError, XenCallError: as :meth:`claim_ports`.
        """
        start = bdf_number(bdf) << BUS_OFFSET
        return self._claim(RequestKind.PCI_CONFIG, start, _PCI_CONFIG_SIZE, device)

    def _claim(self, kind: RequestKind, start: int, length: int, device: object) -> Region:
        region = Region(kind, start, length, device, self._release)
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self!r} can claim no more")
            self._regions.add(region)
            if self._link is not None:
                try:
                    self._link.claim(kind, *_ends(region))
                except BaseException:
                    self._regions.remove(region)
                    raise
        return region

    def _release(self, region: Region) -> None:
        with self._lock:
            self._regions.remove(region)
            if self._link is not None:
                try:
                    self._link.unclaim(region.kind, *_ends(region))
                except BaseException:
                    self._regions.add(region)
                    raise

    def on_quiesce(self, callback: Callback) -> Callback:
        """Have ``callback()`` called before an INVALIDATE drops the mappings; a decorator.

        It is the last moment for DMA that is under way: finish it, and release its leases.
        The guest's vCPU waits, so be quick. One that raises is logged. It is called by
        :meth:`close`, too. It must not wait for a thread that claims, releases or closes:
        those wait for it.

        Raises:
            TypeError: it cannot be called.
        """
        if not callable(callback):
            raise TypeError(f"callback {callback!r} cannot be called")
        self._quiesce.append(callback)
        return callback

    # --- interrupts -------------------------------------------------------------------

    def inject_msi(self, address: int, data: int) -> None:
        """Raise a message-signalled interrupt, as the guest has programmed it.

        Raises:
            ValueError: that is no address, or no data of 4 bytes.
            XenCallError: Xen refused.
            ClosedError: the server is not open.
        """
        if as_int("address", address) >> 64 or as_int("data", data) >> 32:
            raise ValueError(f"no message: address {address:#x}, data {data:#x}")
        self._open_link().inject_msi(address, data)

    def set_isa_irq(self, irq: int, level: bool) -> None:
        """Set the level of an ISA interrupt line, 0 to 15 (HVM guests); as :meth:`inject_msi`."""
        if not 0 <= as_int("irq", irq) < _ISA_IRQS:
            raise ValueError(f"irq {irq} is not in 0..{_ISA_IRQS - 1}")
        self._open_link().set_isa_irq(irq, level)

    def set_pci_intx(self, bdf: str, pin: int, level: bool) -> None:
        """Set a PCI function's interrupt pin, 0 (INTA) to 3 (HVM guests); as :meth:`inject_msi`."""
        if not 0 <= as_int("pin", pin) < _PINS:
            raise ValueError(f"pin {pin} is not in 0..{_PINS - 1}")
        self._open_link().set_pci_intx(parse_bdf(bdf), pin, level)

    # --- serving ----------------------------------------------------------------------

    def fileno(self) -> int:
        """Return what becomes readable when :meth:`process_pending` has something to do."""
        return self._open_link().fileno()

    def process_pending(self) -> int:
        """Answer what is there, without waiting; so many events at most as there are channels.

        Returns:
            How many requests were answered.

        Raises:
            XenCallError: Xen failed; for example the domain is gone.
            ClosedError: the server is not open.
        """
        self._open_link()  # before a lock that a parent's thread may have held at the fork
        answered = self.requests
        with self._lock:
            link = self._open_link()
            try:
                if self._interrupted:  # its event is gone
                    self._drain(link)
                    errors: list[Exception] = []
                    self._settle(link, errors, self._serving)
                    if errors:
                        raise errors[0]
                    self._interrupted = False
                # A guest that never stops must not keep a foreign loop from its other work.
                for _ in range(len(self._vcpus) + 1):
                    port = link.pending() if self._link is link else None  # or a handler closed it
                    if port is None:
                        break
                    # Before the slot is looked at: what comes after that is a new event.
                    link.unmask(port)
                    if port == self._ring_port:
                        self._drain(link)
                    elif port in self._vcpus:
                        self._serve(link, port, self._vcpus[port])
            except BaseException:
                self._interrupted = True
                raise
            return self.requests - answered

    def serve_forever(self) -> int | None:
        """Answer requests until :meth:`stop` or :meth:`close`, or SIGINT or SIGTERM.

        In the main thread the two signals end it between two requests; a second one
        interrupts the handler that does not return.

        Returns:
            The signal's number, or None if no signal ended it.

        Raises:
            XenMapCacheError: as :meth:`process_pending`.
        """
        with _signals(self._wake) as caught:
            poller = select.poll()
            poller.register(self._wake, select.POLLIN)
            poller.register(self.fileno(), select.POLLIN)
            while True:
                events = poller.poll()
                if self._closed or any(fd == self._wake for fd, _ in events):
                    self._awake()
                    return caught[0] if caught else None
                self.process_pending()

    def stop(self) -> None:
        """End :meth:`serve_forever` or :meth:`serve_async`, or the next one. From any thread."""
        if os.getpid() == self._pid:  # a forked child has the same descriptor
            os.eventfd_write(self._wake, 1)

    def _awake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    @contextlib.contextmanager
    def serving(self) -> Iterator[Self]:
        """Serve in a thread of its own for a ``with`` block.

        Raises:
            XenMapCacheError: at the end, what ended that thread.
        """
        ended: list[BaseException] = []

        def serve() -> None:
            try:
                self.serve_forever()
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=serve, name=f"ioreq server of domain {self.domid}")
        thread.start()
        try:
            yield self
        finally:
            self.stop()
            thread.join()
            self._awake()  # where it had ended before
            if ended:
                raise ended[0]

    async def serve_async(self) -> None:
        """Answer requests in the running event loop until :meth:`stop`, SIGTERM, or cancelled.

        Handlers run in the loop's thread, between other callbacks.

        Raises:
            XenMapCacheError: as :meth:`process_pending`.
        """
        import asyncio

        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def serve() -> None:
            try:
                if not self._closed:
                    self.process_pending()
            except BaseException as error:
                if done.done() or not isinstance(error, Exception):
                    raise
                done.set_exception(error)

        def end() -> None:
            self._awake()
            if not done.done():
                done.set_result(None)

        # One of its own: a number that close() gives back may soon be another server's.
        fd = os.dup(self.fileno())
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, fd)
            loop.add_reader(fd, serve)
            stack.callback(loop.remove_reader, fd)
            loop.add_reader(self._wake, end)
            stack.callback(loop.remove_reader, self._wake)
            stack.enter_context(_sigterm_in(loop, end))
            await done

    # --- requests ---------------------------------------------------------------------

    def _serve(self, link: Link, port: int, vcpu: int) -> None:
        """Answer a vCPU's request, whatever happens; events without one are passed over."""
        page = link.page
        if state_of(page, vcpu) != State.READY:
            return
        # What the vCPU wrote before comes before. Should that be interrupted, the request waits
        # on; a handler may have served it, or closed the server.
        self._drain(link)
        if self._link is not link or state_of(page, vcpu) != State.READY:
            return
        request = decode(page, vcpu)
        set_state(page, vcpu, State.INPROCESS)
        data = _nothing(request)
        self._serving.add(vcpu)
        try:
            data = self._perform(request)
        except Exception:
            self._fail(request, "failed")
        finally:
            self._serving.discard(vcpu)
            if self._link is link:  # or the handler has closed it, with an answer
                self.requests += 1
                answer(page, vcpu, data)
                link.notify(port)

    def _drain(self, link: Link) -> None:
        """Carry out the buffered requests."""
        ring = link.ring
        while ring is not None and self._link is link:
            request = next_buffered(ring)
            if request is None:
                return
            take_buffered(ring, request)  # before its handler, which may serve or close
            self.requests += 1
            try:
                self._perform(request)
            except Exception:
                self._fail(request, "failed")

    def _fail(self, request: Request, what: str) -> None:
        """Count and log what was not done, with the exception that is being handled."""
        self.failures += 1
        handled = sys.exc_info()[0] is not None
        logger.error("domain %d: %s: %s", self.domid, request, what, exc_info=handled)

    def _perform(self, request: Request) -> int:
        """Carry out a request and return its data."""
        kind = request.kind
        if kind == RequestKind.INVALIDATE:
            self._invalidate()
            return request.data
        if kind == RequestKind.TIMEOFFSET:
            return request.data
        if kind not in (RequestKind.PORT, RequestKind.MMIO, RequestKind.PCI_CONFIG):
            raise ValueError("a kind of request that this package does not know")
        if request.size not in (1, 2, 4, 8):
            raise ValueError(f"size {request.size} is none of 1, 2, 4, 8")
        if request.is_pointer:
            self._move(request)
            return request.data
        data = request.data
        for number in range(request.items):
            data = self._access(request, number, data)
        return data

    def _access(self, request: Request, number: int, data: int) -> int:
        """Do one item of a request; return what was read, or what was written."""
        kind, size = RequestKind(request.kind), request.size
        address = request.address
        if number and kind is RequestKind.MMIO:  # a port stays where it is
            address += -number * size if request.is_backward else number * size
        region = self._regions.find(kind, address, size)
        if region is None:
            raise LookupError(f"no region of this server holds {size} bytes at {address:#x}")
        if request.is_read:
            return region.do_read(address - region.start, size)
        region.do_write(address - region.start, size, data & request.all_ones)
        return data

    def _move(self, request: Request) -> None:
        """Move data between a device and guest memory, through the cache."""
        size, length = request.size, request.size * request.items
        low = request.data - (length - size if request.is_backward else 0)
        places = range(0, length, size)
        if request.is_backward:
            places = places[::-1]
        if not request.is_read:
            block = self.cache.read(low, length)
            for number, place in enumerate(places):
                value = int.from_bytes(block[place : place + size], "little")
                self._access(request, number, value)
            return
        # A handler that raises leaves all ones where it and those after it would have come.
        items = bytearray(b"\xff" * length)
        try:
            for number, place in enumerate(places):
                value = self._access(request, number, 0)
                items[place : place + size] = value.to_bytes(size, "little")
        finally:
            self.cache.write(low, items)

    def _invalidate(self) -> None:
        self.invalidations += 1
        try:
            self._call_quiesce()
        finally:
            self.cache.invalidate()

    def _call_quiesce(self) -> None:
        for callback in self._quiesce:
            try:
                callback()
            except Exception:
                self.failures += 1
                logger.exception("domain %d: on_quiesce: %r failed", self.domid, callback)


def _nothing(request: Request) -> int:
    """Return the data of an answer where nothing could be done."""
    return request.all_ones if request.is_read and not request.is_pointer else request.data


def _ends(region: Region) -> tuple[int, int]:
    """Return what Xen is told of a region: its first and last, or a PCI function's number."""
    if region.kind is RequestKind.PCI_CONFIG:
        bdf = region.start >> BUS_OFFSET
        return bdf, bdf
    return region.start, region.end - 1


def _is_default(number: signal.Signals) -> bool:
    """Tell whether this thread may handle a signal that nobody handles yet."""
    return threading.current_thread() is threading.main_thread() and signal.getsignal(number) in (
        signal.SIG_DFL,
        signal.default_int_handler,
    )


@contextlib.contextmanager
def _signals(wake: int) -> Iterator[list[int]]:
    """Have signals that nobody handles wake a descriptor; yields those that came."""
    caught: list[int] = []

    pid = os.getpid()

    def handle(number: int, _: FrameType | None) -> None:
        # Forked off by a handler: nobody handles it here.
        if os.getpid() != pid:  # pragma: no cover - ends a process that then cannot tell; tested
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if caught:
            raise KeyboardInterrupt(f"{signal.Signals(number).name} came twice")
        caught.append(number)
        os.eventfd_write(wake, 1)

    before = {number: signal.signal(number, handle) for number in _SIGNALS if _is_default(number)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_ending: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}


@contextlib.contextmanager
def _sigterm_in(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> Iterator[None]:
    """Have SIGTERM end this one and all others of an event loop, if nobody handles it."""
    if loop not in _ending and not _is_default(signal.SIGTERM):
        yield
        return
    ends = _ending.setdefault(loop, [])

    def end_all() -> None:
        for each in list(ends):
            each()

    if not ends:
        loop.add_signal_handler(signal.SIGTERM, end_all)
    ends.append(end)
    try:
        yield
    finally:
        ends.remove(end)
        if not ends:
            del _ending[loop]
            loop.remove_signal_handler(signal.SIGTERM)
