"""A server from open to close."""

from __future__ import annotations

import errno
import threading

import pytest

from tests.kit import (
    Memory,
    in_thread,
    wait_for_requests,
)
from xenmapcache import (
    ClosedError,
    MapCache,
    MockDomain,
    XenCallError,
)
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.ioreq import RequestKind
from xenmapcache.mock.ioreq_server import MockIoreqServer

PORT, MMIO, VGA, PCI = 0x510, 0xF000_0000, 0xA0000, "0000:00:05.0"


def test_pending_requests_are_answered_on_close(guest: MockDomain, server: IoreqServer) -> None:
    """Closing carries out what waits; after it nobody answers for the ports."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    with server:
        threads = [in_thread(lambda v=v: guest.port_in(PORT, vcpu=v)) for v in range(4)]  # type: ignore[misc] # mypy cannot infer it
        wait_for_requests(server, 4)
    for thread, _ in threads:
        thread.join()
    assert [seen for _, seen in threads] == [[5]] * 4
    assert guest.ioreq_servers == {}
    assert guest.port_in(PORT) == 0xFFFFFFFF


@pytest.mark.parametrize("call", ["create_ioreq_server", "claim"])
def test_an_open_that_fails(
    guest: MockDomain, server: IoreqServer, device: Memory, call: str
) -> None:
    """Nothing is left behind: no server, no claim."""
    guest.inject_fault(call, errno=errno.EPERM)
    with pytest.raises(XenCallError) as caught, server:
        pass
    assert caught.value.errno == errno.EPERM
    assert guest.ioreq_servers == {}
    with pytest.raises(ClosedError, match="with server"):
        server.fileno()


def test_outside_of_its_life(server: IoreqServer) -> None:
    """Before open and after close it says so; close is idempotent; it opens once."""
    for call in (server.process_pending, server.fileno, lambda: server.inject_msi(0, 0)):
        with pytest.raises(ClosedError, match="not open"):
            call()
    with server:
        with pytest.raises(ClosedError, match="make another server"):
            server.open()
    server.close()
    with pytest.raises(ClosedError, match="closed"):
        server.process_pending()
    with pytest.raises(ClosedError, match="make another server"):
        server.open()
    with pytest.raises(ClosedError, match="cannot claim"):
        server.claim_ports(PORT, 1)


def test_closed_before_it_was_opened(server: IoreqServer) -> None:
    """That is not an error, and it cannot be opened any more."""
    server.close()
    with pytest.raises(ClosedError):
        server.open()


def test_no_server_for_that(guest: MockDomain, cache: MapCache) -> None:
    """A wrong type of domain or cache is refused, and so is a cache of another domain."""
    for domain in ("3", None, True, 3.0):
        with pytest.raises(TypeError, match="domain must be"):
            IoreqServer(domain, cache)  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(TypeError, match="cache must be"):
        IoreqServer(guest, cache.backend)  # type: ignore[arg-type] # wrong on purpose
    with pytest.raises(ValueError, match="the cache maps domain 1, but the server is for domain 7"):
        IoreqServer(7, cache)


def test_as_many_servers_as_xen_has(guest: MockDomain, cache: MapCache) -> None:
    """The ninth is refused; numbers are used again."""
    servers = [IoreqServer(guest, cache) for _ in range(9)]
    for server in servers[:8]:
        server.open()
    with pytest.raises(XenCallError, match="ENOSPC.*it has 8"):
        servers[8].open()
    servers[3].close()
    servers[8].open()
    assert servers[8].id == 3
    for server in servers:
        server.close()


def test_buffered_writes_are_carried_out_on_close(
    guest: MockDomain, server: IoreqServer, device: Memory
) -> None:
    """Nobody waits for them, but they are no less what the guest did."""
    with server:
        for number in range(5):
            guest.mmio_write(VGA + number, 1, 1, buffered=True)
    assert device.accesses == [("write", number, 1) for number in range(5)]


def test_an_open_that_fails_with_a_request_waiting(
    guest: MockDomain, server: IoreqServer, device: Memory
) -> None:
    """A vCPU that was quicker than the binding of its channel is answered all the same."""
    mock_bind = MockIoreqServer.bind
    asked: list[tuple[threading.Thread, list[object]]] = []

    def bind(self: MockIoreqServer, port: int) -> int:
        if not asked:
            self.claim(RequestKind.PORT, PORT, PORT + 3)
            asked.append(in_thread(lambda: guest.port_in(PORT, vcpu=3)))
            wait_for_requests(server)
            raise XenCallError("bind", 1, errno.ENOMEM)
        return mock_bind(self, port)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MockIoreqServer, "bind", bind)
        with pytest.raises(XenCallError, match="bind failed"):
            server.open()
    ((thread, seen),) = asked
    thread.join()
    assert seen == [0]
    assert guest.ioreq_servers == {}


def test_a_guest_that_has_ended(guest: MockDomain, server: IoreqServer) -> None:
    """It takes its servers with it; closing ours is not an error."""
    with server:
        guest.destroy()
        with pytest.raises(XenCallError) as caught:
            server.claim_ports(0x700, 4)
        assert caught.value.errno == errno.ENOENT
