"""Vcpu: what a mock guest's vCPU can do to a device; each call blocks until it is answered.

Follows what Xen does with an instruction that it cannot carry out itself: the ioreq
server that has claimed the place gets a request; where no server has, reads give all
ones and writes are dropped.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import TypeVar

from ..address import as_int
from ..arch import ARCHITECTURES
from ..errors import FaultError
from ..ioreq import BUS_OFFSET, Request, RequestKind, bdf_number
from . import config_cycle
from .ioreq_server import Guest, MockIoreqServer

T = TypeVar("T")

_MAX_COUNT = 1 << 32
"""A request counts its items in 32 bits."""
_ALL_ONES = 0xFF


class Vcpu:
    """A vCPU of a :class:`.MockDomain`: ``guest.vcpu[1].port_in(0x700)``.

    Every call does what one instruction of the guest would. While the domain is paused, a call
    waits. All calls raise:

    - TimeoutError: no device model has answered in ``guest.vcpu_timeout`` seconds, or the domain is
      paused, or another instruction of this vCPU takes, for as long. A real vCPU waits for ever.
    - ValueError: no instruction has such a port, address, value, count or size; or the guest is an
      arm64 guest, which has neither ports nor a PCI bus.
    - ClosedError: a parent process has made the guest.

    Attributes:
        number: which vCPU it is, from 0.

    Synchronization: calls may be made in any threads. A vCPU does one instruction at a time.
    """

    def __init__(self, guest: Guest, number: int) -> None:
        self.number = number
        self._guest = guest
        self._busy = threading.Lock()

    def __repr__(self) -> str:
        return f"<Vcpu {self.number} of mock domain {self._guest.domid}>"

    def port_in(self, port: int, size: int = 4) -> int:
        """Read a port (``in``), of 1, 2 or 4 bytes."""
        return self._execute(self._request(RequestKind.PORT, True, port, 0, size))

    def port_out(self, port: int, value: int, size: int = 4) -> None:
        """Write a port (``out``)."""
        data = _check_fits(value, size)
        self._execute(self._request(RequestKind.PORT, False, port, data, size))

    def port_in_string(
        self, port: int, address: int, count: int, size: int = 4, *, backward: bool = False
    ) -> None:
        """Read a port many times into memory (``rep ins``).

        Args:
            port: the port.
            address: guest-physical, of the first item.
            count: items.
            size: of an item: 1, 2 or 4 bytes.
            backward: go down in memory (the direction flag).
        """
        self._execute(self._string(RequestKind.PORT, True, port, address, count, size, backward))

    def port_out_string(
        self, port: int, address: int, count: int, size: int = 4, *, backward: bool = False
    ) -> None:
        """Write a port many times from memory (``rep outs``); as :meth:`port_in_string`."""
        self._execute(self._string(RequestKind.PORT, False, port, address, count, size, backward))

    def mmio_read(self, address: int, size: int = 4) -> int:
        """Load 1, 2, 4 or 8 bytes; from memory if there is some."""
        request = self._request(RequestKind.MMIO, True, address, 0, size)
        self._wait_unpaused()
        with contextlib.suppress(FaultError):
            return int.from_bytes(self._guest.p2m.read(request.address, request.size), "little")
        return self._execute(request)

    def mmio_write(
        self, address: int, value: int, size: int = 4, *, buffered: bool = False
    ) -> None:
        """Store 1, 2, 4 or 8 bytes; to memory if there is some.

        Args:
            address: guest-physical.
            value: what to store.
            size: bytes.
            buffered: let the server's ring take it, without waiting, as Xen does for
                the memory of a standard VGA.
        """
        data = _check_fits(value, size)
        request = self._request(RequestKind.MMIO, False, address, data, size)
        self._wait_unpaused()
        with contextlib.suppress(FaultError):
            self._guest.p2m.write(request.address, data.to_bytes(request.size, "little"))
            return
        server = self.server_of(request)
        if not (buffered and server and server.send_buffered(request._replace(vcpu=None))):
            self._execute(request)

    def mmio_read_string(
        self, mmio: int, address: int, count: int, size: int = 4, *, backward: bool = False
    ) -> None:
        """Copy from a device to memory (``rep movs``); as :meth:`port_in_string`."""
        self._execute(self._string(RequestKind.MMIO, True, mmio, address, count, size, backward))

    def mmio_write_string(
        self, mmio: int, address: int, count: int, size: int = 4, *, backward: bool = False
    ) -> None:
        """Copy from memory to a device (``rep movs``); as :meth:`port_in_string`."""
        self._execute(self._string(RequestKind.MMIO, False, mmio, address, count, size, backward))

    def mmio_fill(
        self, mmio: int, value: int, count: int, size: int = 4, *, backward: bool = False
    ) -> None:
        """Store one value many times (``rep stos``); as :meth:`port_in_string`."""
        data = _check_fits(value, size)
        request = self._string(RequestKind.MMIO, False, mmio, data, count, size, backward)
        self._execute(request._replace(data_is_ptr=False))

    def pci_read(self, bdf: str, offset: int, size: int = 4) -> int:
        """Read a PCI function's configuration space.

        Args:
            bdf: as ``"0000:00:05.0"``.
            offset: in bytes.
            size: 1, 2 or 4 bytes.
        """
        address = bdf_number(bdf) << BUS_OFFSET | as_int("offset", offset)
        return self._execute(self._request(RequestKind.PCI_CONFIG, True, address, 0, size))

    def pci_write(self, bdf: str, offset: int, value: int, size: int = 4) -> None:
        """Write a PCI function's configuration space; as :meth:`pci_read`."""
        address = bdf_number(bdf) << BUS_OFFSET | as_int("offset", offset)
        data = _check_fits(value, size)
        self._execute(self._request(RequestKind.PCI_CONFIG, False, address, data, size))

    def send_invalidate(self) -> None:
        """Ask every enabled ioreq server to drop its mappings, and wait for all of them."""
        servers = [each for each in list(self._guest.ioreq_servers.values()) if each.enabled]
        request = Request(self.number, RequestKind.INVALIDATE, False, 0, (1 << 64) - 1, 4)

        def send() -> None:
            for server in servers:
                server.send(self.number, request)
            for server in servers:
                server.wait(self.number, self._guest.vcpu_timeout)

        self._exclusive(send)

    # --- how an instruction is carried out ------------------------------------------

    def server_of(self, request: Request) -> MockIoreqServer | None:
        """Return the ioreq server that gets a request; None if no server has claimed the place."""
        for _, server in sorted(self._guest.ioreq_servers.items(), reverse=True):
            if server.takes(request):
                return server
        return None

    def _request(
        self, kind: RequestKind, is_read: bool, address: int, data: int, size: int, count: int = 1
    ) -> Request:
        """Return a request, if an instruction can make it."""
        address, size = as_int("address", address), as_int("size", size)
        count = as_int("count", count)
        if kind != RequestKind.MMIO and ARCHITECTURES[self._guest.machine].mmio_only:
            raise ValueError(
                f"mock domain {self._guest.domid} is an {self._guest.machine} guest, without ports "
                "and without a PCI bus; use mmio_read and mmio_write"
            )
        sizes = (1, 2, 4) if kind != RequestKind.MMIO else (1, 2, 4, 8)
        if size not in sizes:
            raise ValueError(f"size {size} must be one of {sizes}")
        if kind == RequestKind.PORT and not 0 <= address <= 0xFFFF:
            raise ValueError(f"port {address:#x} must be in 0..0xffff")
        if not 0 <= address < 1 << 64:
            raise ValueError(f"address {address:#x} must be in 0..{(1 << 64) - 1:#x}")
        if not 0 < count < _MAX_COUNT:
            raise ValueError(f"count {count} must be in 1..{_MAX_COUNT - 1}")
        return Request(self.number, kind, is_read, address, data, size, count)

    def _string(
        self,
        kind: RequestKind,
        is_read: bool,
        place: int,
        data: int,
        count: int,
        size: int,
        backward: bool,
    ) -> Request:
        data = as_int("address", data)
        if not 0 <= data < 1 << 64:
            raise ValueError(f"address {data:#x} must be in 0..{(1 << 64) - 1:#x}")
        request = self._request(kind, is_read, place, data, size, count)
        return request._replace(data_is_ptr=True, df=backward)

    def _execute(self, request: Request) -> int:
        """Carry out an instruction and return what was read."""
        return self._exclusive(partial(self._carry_out, request))

    def _carry_out(self, request: Request) -> int:
        self._guest.pci_cf8 = config_cycle.selected(request, self._guest.pci_cf8)
        request = config_cycle.translated(request, self._guest.pci_cf8)
        server = self.server_of(request)
        if server is None:
            if request.data_is_ptr and request.is_read:
                length = request.size * request.count
                low = request.data - (length - request.size if request.df else 0)
                self._guest.p2m.fill(low, length, _ALL_ONES)
            return request.all_ones
        server.send(self.number, request)
        data = server.wait(self.number, self._guest.vcpu_timeout)
        # If its server has gone, the vCPU goes on with what stood in the request.
        return (request.data if data is None else data) & request.all_ones

    def _exclusive(self, work: Callable[[], T]) -> T:
        """Do one instruction, when the one before has ended and the domain is not paused."""
        self._wait_unpaused()
        timeout = min(max(0.0, self._guest.vcpu_timeout), threading.TIMEOUT_MAX)
        acquired: list[bool] = []
        try:
            # One step in C: after an interrupt the list says whether the lock was acquired.
            acquired.extend(map(partial(self._busy.acquire, timeout=timeout), (True,)))
            if not acquired[0]:
                raise TimeoutError(
                    f"vCPU {self.number} of mock domain {self._guest.domid} is busy with another "
                    "instruction"
                )
            return work()
        finally:
            if acquired and acquired[0]:
                self._busy.release()

    def _wait_unpaused(self) -> None:
        self._guest.p2m.frames.check_process()
        if not self._guest.gate.wait(self._guest.vcpu_timeout):
            raise TimeoutError(
                f"vCPU {self.number} of mock domain {self._guest.domid} cannot start an "
                f"instruction: the domain is {' and '.join(self._guest.gate.reasons)}"
            )


running_vcpu: ContextVar[Vcpu | None] = ContextVar("running_vcpu", default=None)
"""The vCPU whose code a thread runs; see :meth:`.MockDomain.spawn`."""


def _check_fits(value: int, size: int) -> int:
    number = as_int("value", value)
    if not 0 <= number < 1 << 8 * max(0, min(as_int("size", size), 8)):
        raise ValueError(f"value {number:#x} must fit {size} bytes")
    return number


class HasVcpus:
    """The methods of :class:`Vcpu` as methods of a domain, with an argument ``vcpu=``.

    By default ``vcpu=`` is the vCPU whose code the thread runs (:meth:`.MockDomain.spawn`), or 0.

    Attributes:
        vcpu: the vCPUs.
    """

    vcpu: tuple[Vcpu, ...]

    def vcpu_at(self, number: int | None) -> Vcpu:
        """Return a vCPU: by its number, or for None the one whose code this thread runs, or 0.

        Raises:
            ValueError: the domain has no vCPU of that number.
        """
        if number is None:
            running = running_vcpu.get()
            return running if running in self.vcpu else self.vcpu[0]
        if not 0 <= as_int("vcpu", number) < len(self.vcpu):
            raise ValueError(f"vCPU {number} must be in 0..{len(self.vcpu) - 1}")
        return self.vcpu[number]

    def port_in(self, port: int, size: int = 4, *, vcpu: int | None = None) -> int:
        """Read a port (``in``), of 1, 2 or 4 bytes; see :class:`.Vcpu`."""
        return self.vcpu_at(vcpu).port_in(port, size)

    def port_out(self, port: int, value: int, size: int = 4, *, vcpu: int | None = None) -> None:
        """Write a port (``out``); see :class:`.Vcpu`."""
        self.vcpu_at(vcpu).port_out(port, value, size)

    def port_in_string(
        self,
        port: int,
        address: int,
        count: int,
        size: int = 4,
        *,
        backward: bool = False,
        vcpu: int | None = None,
    ) -> None:
        """Read a port many times into memory (``rep ins``); see :class:`.Vcpu`."""
        self.vcpu_at(vcpu).port_in_string(port, address, count, size, backward=backward)

    def port_out_string(
        self,
        port: int,
        address: int,
        count: int,
        size: int = 4,
        *,
        backward: bool = False,
        vcpu: int | None = None,
    ) -> None:
        """Write a port many times from memory (``rep outs``); see :class:`.Vcpu`."""
        self.vcpu_at(vcpu).port_out_string(port, address, count, size, backward=backward)

    def mmio_read(self, address: int, size: int = 4, *, vcpu: int | None = None) -> int:
        """Load 1, 2, 4 or 8 bytes; from memory if there is some; see :class:`.Vcpu`."""
        return self.vcpu_at(vcpu).mmio_read(address, size)

    def mmio_write(
        self,
        address: int,
        value: int,
        size: int = 4,
        *,
        buffered: bool = False,
        vcpu: int | None = None,
    ) -> None:
        """Store 1, 2, 4 or 8 bytes; to memory if there is some; see :class:`.Vcpu`."""
        self.vcpu_at(vcpu).mmio_write(address, value, size, buffered=buffered)

    def mmio_read_string(
        self,
        mmio: int,
        address: int,
        count: int,
        size: int = 4,
        *,
        backward: bool = False,
        vcpu: int | None = None,
    ) -> None:
        """Copy from a device to memory (``rep movs``); see :class:`.Vcpu`."""
        self.vcpu_at(vcpu).mmio_read_string(mmio, address, count, size, backward=backward)

    def mmio_write_string(
        self,
        mmio: int,
        address: int,
        count: int,
        size: int = 4,
        *,
        backward: bool = False,
        vcpu: int | None = None,
    ) -> None:
        """Copy from memory to a device (``rep movs``); see :class:`.Vcpu`."""
        self.vcpu_at(vcpu).mmio_write_string(mmio, address, count, size, backward=backward)

    def mmio_fill(
        self,
        mmio: int,
        value: int,
        count: int,
        size: int = 4,
        *,
        backward: bool = False,
        vcpu: int | None = None,
    ) -> None:
        """Store one value many times (``rep stos``); see :class:`.Vcpu`."""
        self.vcpu_at(vcpu).mmio_fill(mmio, value, count, size, backward=backward)

    def pci_read(self, bdf: str, offset: int, size: int = 4, *, vcpu: int | None = None) -> int:
        """Read a PCI function's configuration space; see :class:`.Vcpu`."""
        return self.vcpu_at(vcpu).pci_read(bdf, offset, size)

    def pci_write(
        self, bdf: str, offset: int, value: int, size: int = 4, *, vcpu: int | None = None
    ) -> None:
        """Write a PCI function's configuration space; see :class:`.Vcpu`."""
        self.vcpu_at(vcpu).pci_write(bdf, offset, value, size)
