"""What a mock guest's vCPUs can do to a device: each call blocks like a vCPU until it is answered.

Follows what Xen does with an instruction that it cannot carry out itself: the ioreq
server that has claimed the place gets a request; where nobody has, reads give all
ones and writes are dropped.
"""

from __future__ import annotations

import abc
import contextlib
import errno as _errno
import threading
from collections.abc import Iterator

from ..address import as_int
from ..errors import FaultError, XenCallError
from ..ioreq import BUS_OFFSET, Request, RequestKind, bdf_number
from .ioreq_server import MockIoreqServer

MAX_IOREQ_SERVERS = 8
"""As many as Xen allows a domain."""

_INVALIDATE = Request(0, RequestKind.INVALIDATE, False, 0, (1 << 64) - 1, 4)


class Instructions(abc.ABC):
    """The vCPUs of a :class:`.MockDomain`, and the ioreq servers that they wait for.

    Attributes:
        domid: the domain.
        vcpus: how many it has, numbered from 0.
        ioreq_servers: by id.
        interrupts: what device models raised, in order, as ``(kind, details)``.
        patience: how long a vCPU waits for an answer before it raises TimeoutError, in
            seconds. A real one waits for ever.
        crashed: why Xen would have ended the guest, or an empty string.
    """

    def __init__(self, domid: int, vcpus: int) -> None:
        if as_int("vcpus", vcpus) < 1:
            raise ValueError(f"vcpus {vcpus}: a guest has at least one")
        self.domid = domid
        self.vcpus = vcpus
        self.ioreq_servers: dict[int, MockIoreqServer] = {}
        self.interrupts: list[tuple[str, tuple[int, ...]]] = []
        self.patience = 10.0
        self.crashed = ""
        # One instruction at a time on each vCPU, whichever thread plays it.
        self._busy = [threading.Lock() for _ in range(vcpus)]

    @abc.abstractmethod
    def read(self, address: int, length: int) -> bytes:
        """Return what the guest sees."""

    @abc.abstractmethod
    def write(self, address: int, data: bytes) -> None:
        """Write as the guest does."""

    @abc.abstractmethod
    def enter_ioreq_call(self, call: str) -> None:
        """Apply armed faults to a call of a device model."""

    def port_in(self, port: int, size: int = 4, *, vcpu: int = 0) -> int:
        """Read a port (``in``), of 1, 2 or 4 bytes.

        Raises:
            TimeoutError: nobody has answered in :attr:`patience` seconds.
            ValueError: there is no such vCPU, port or size.
        """
        return self._do(vcpu, Request(vcpu, RequestKind.PORT, True, port, 0, size))

    def port_out(self, port: int, value: int, size: int = 4, *, vcpu: int = 0) -> None:
        """Write a port (``out``); errors as :meth:`port_in`."""
        self._do(vcpu, Request(vcpu, RequestKind.PORT, False, port, _fits(value, size), size))

    def port_in_string(
        self,
        port: int,
        address: int,
        count: int,
        size: int = 4,
        *,
        backward: bool = False,
        vcpu: int = 0,
    ) -> None:
        """Read a port many times into memory (``rep ins``); errors as :meth:`port_in`.

        Args:
            port: the port.
            address: guest-physical, of the first item.
            count: items.
            size: of an item: 1, 2 or 4 bytes.
            backward: go down in memory (the direction flag).
            vcpu: which.
        """
        self._do(
            vcpu,
            Request(vcpu, RequestKind.PORT, True, port, address, size, count, True, backward),
        )

    def port_out_string(
        self,
        port: int,
        address: int,
        count: int,
        size: int = 4,
        *,
        backward: bool = False,
        vcpu: int = 0,
    ) -> None:
        """Write a port many times from memory (``rep outs``); as :meth:`port_in_string`."""
        self._do(
            vcpu,
            Request(vcpu, RequestKind.PORT, False, port, address, size, count, True, backward),
        )

    def mmio_read(self, address: int, size: int = 4, *, vcpu: int = 0) -> int:
        """Load 1, 2, 4 or 8 bytes; from memory where there is some. Errors as :meth:`port_in`."""
        request = Request(vcpu, RequestKind.MMIO, True, address, 0, size)
        self._check(vcpu, request)
        with contextlib.suppress(FaultError):
            return int.from_bytes(self.read(address, size), "little")
        return self._do(vcpu, request)

    def mmio_write(
        self, address: int, value: int, size: int = 4, *, buffered: bool = False, vcpu: int = 0
    ) -> None:
        """Store 1, 2, 4 or 8 bytes; errors as :meth:`port_in`.

        Args:
            address: guest-physical.
            value: what.
            size: bytes.
            buffered: let the server's ring take it, without waiting, as Xen does for
                the memory of a standard VGA.
            vcpu: which.
        """
        data = _fits(value, size)
        request = Request(vcpu, RequestKind.MMIO, False, address, data, size)
        self._check(vcpu, request)
        with contextlib.suppress(FaultError):
            self.write(address, data.to_bytes(size, "little"))
            return
        server = self._server_of(request)
        if not (buffered and server and server.send_buffered(request._replace(vcpu=None))):
            self._do(vcpu, request)

    def mmio_read_string(
        self,
        mmio: int,
        address: int,
        count: int,
        size: int = 4,
        *,
        backward: bool = False,
        vcpu: int = 0,
    ) -> None:
        """Copy from a device to memory (``rep movs``); as :meth:`port_in_string`."""
        self._do(
            vcpu,
            Request(vcpu, RequestKind.MMIO, True, mmio, address, size, count, True, backward),
        )

    def mmio_write_string(
        self,
        mmio: int,
        address: int,
        count: int,
        size: int = 4,
        *,
        backward: bool = False,
        vcpu: int = 0,
    ) -> None:
        """Copy from memory to a device (``rep movs``); as :meth:`port_in_string`."""
        self._do(
            vcpu,
            Request(vcpu, RequestKind.MMIO, False, mmio, address, size, count, True, backward),
        )

    def mmio_fill(
        self,
        mmio: int,
        value: int,
        count: int,
        size: int = 4,
        *,
        backward: bool = False,
        vcpu: int = 0,
    ) -> None:
        """Store one value many times (``rep stos``); as :meth:`port_in_string`."""
        data = _fits(value, size)
        self._do(
            vcpu,
            Request(vcpu, RequestKind.MMIO, False, mmio, data, size, count, False, backward),
        )

    def pci_read(self, bdf: str, offset: int, size: int = 4, *, vcpu: int = 0) -> int:
        """Read a PCI function's configuration space; errors as :meth:`port_in`.

        Args:
            bdf: as ``"0000:00:05.0"``.
            offset: in bytes.
            size: 1, 2 or 4 bytes.
            vcpu: which.
        """
        address = bdf_number(bdf) << BUS_OFFSET | offset
        return self._do(vcpu, Request(vcpu, RequestKind.PCI_CONFIG, True, address, 0, size))

    def pci_write(self, bdf: str, offset: int, value: int, size: int = 4, *, vcpu: int = 0) -> None:
        """Write a PCI function's configuration space; as :meth:`pci_read`."""
        address = bdf_number(bdf) << BUS_OFFSET | offset
        data = _fits(value, size)
        self._do(vcpu, Request(vcpu, RequestKind.PCI_CONFIG, False, address, data, size))

    # --- Xen's side -----------------------------------------------------------------

    def open_ioreq_server(self, *, buffered: bool) -> MockIoreqServer:
        """Create an ioreq server, as libxendevicemodel does.

        Raises:
            XenCallError: the domain has eight, or a fault was armed.
        """
        self.enter_ioreq_call("create_ioreq_server")
        free = [number for number in range(MAX_IOREQ_SERVERS) if number not in self.ioreq_servers]
        if not free:
            raise XenCallError(
                "mock_create_ioreq_server",
                self.domid,
                _errno.ENOSPC,
                f"it has {MAX_IOREQ_SERVERS}, as many as Xen allows",
            )
        server = self.ioreq_servers[free[0]] = MockIoreqServer(self, free[0], buffered)
        return server

    def _broadcast_invalidate(self, vcpu: int) -> None:
        """Ask every enabled server to drop its mappings, and wait for all of them."""
        servers = [server for server in list(self.ioreq_servers.values()) if server.enabled]
        with self._on(vcpu):
            for server in servers:
                server.send(vcpu, _INVALIDATE)
            for server in servers:
                server.wait(vcpu, self.patience)

    def _server_of(self, request: Request) -> MockIoreqServer | None:
        for _, server in sorted(self.ioreq_servers.items(), reverse=True):
            if server.takes(request):
                return server
        return None

    def _check(self, vcpu: int, request: Request) -> None:
        """Refuse what no vCPU of the guest can do."""
        self._check_vcpu(vcpu)
        sizes = (1, 2, 4) if request.kind != RequestKind.MMIO else (1, 2, 4, 8)
        if request.size not in sizes:
            raise ValueError(f"size {request.size} is none of {sizes}")
        if request.kind == RequestKind.PORT and not 0 <= request.address <= 0xFFFF:
            raise ValueError(f"port {request.address:#x} is not in 0..0xffff")
        if request.address < 0 or request.items < 1:
            raise ValueError(f"no instruction does that: {request}")

    def _check_vcpu(self, vcpu: int) -> None:
        if not 0 <= vcpu < self.vcpus:
            raise ValueError(f"vCPU {vcpu} is not in 0..{self.vcpus - 1}")

    def _do(self, vcpu: int, request: Request) -> int:
        """Carry out an instruction and return what was read."""
        self._check(vcpu, request)
        with self._on(vcpu):
            server = self._server_of(request)
            if server is None:
                if request.is_pointer and request.is_read:
                    self._fill_with_ones(request)
                return request.all_ones
            server.send(vcpu, request)
            data = server.wait(vcpu, self.patience)
            # With its server gone, the vCPU goes on with what stood in the request.
            return (request.data if data is None else data) & request.all_ones

    def _fill_with_ones(self, request: Request) -> None:
        length = request.size * request.items
        low = request.data - (length - request.size if request.is_backward else 0)
        self.write(low, b"\xff" * length)

    @contextlib.contextmanager
    def _on(self, vcpu: int) -> Iterator[None]:
        self._check_vcpu(vcpu)
        if not self._busy[vcpu].acquire(timeout=self.patience):
            raise TimeoutError(
                f"vCPU {vcpu} of mock domain {self.domid} is busy with another instruction"
            )
        try:
            yield
        finally:
            self._busy[vcpu].release()


def _fits(value: int, size: int) -> int:
    if not 0 <= as_int("value", value) < 1 << 8 * size:
        raise ValueError(f"value {value:#x} does not fit {size} bytes")
    return value
