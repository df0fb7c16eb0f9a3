"""An ioreq server whose end, or whose Xen, comes in the middle: nobody is left waiting unsaid."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.fake_xen.child import in_child
from tests.unit.test_ioreq_server import in_thread, wait_for_requests
from xenmapcache import MapCache, MockDomain, MockHypervisor, XenCallError, open_backend
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.link import Link
from xenmapcache.ioreq import Request, RequestKind, put_buffered

PORT, VGA, ONES = 0x510, 0xA0000, 0xFFFFFFFF


@pytest.fixture
def guest() -> MockDomain:
    guest = MockHypervisor().create_domain(memory="1M", holes=[(VGA, 0x20000)], vcpus=3)
    guest.patience = 20.0
    return guest


@pytest.fixture
def server(guest: MockDomain) -> Iterator[IoreqServer]:
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        yield IoreqServer(guest, cache, buffered=True)


def link_of(server: IoreqServer) -> Link:
    assert server._link is not None
    return server._link


def wait_for_event(server: IoreqServer) -> None:
    """Wait for an event, which comes after the request that it is about."""
    assert select.select([server.fileno()], [], [], 20)[0]


def fail(*_: object) -> None:
    raise XenCallError("x", 1, errno.EIO)


# --- closing ----------------------------------------------------------------------------


def test_a_handler_that_closes_while_it_is_closed(guest: MockDomain, server: IoreqServer) -> None:
    """What waits at close may close, too: each vCPU goes on, and what ends is ended once."""
    quiesced: list[int] = []
    server.on_quiesce(lambda: quiesced.append(1))

    def read(offset: int, size: int) -> int:
        server.close()
        return 5

    server.claim_ports(PORT, 4).read(read)
    server.open()
    threads = [in_thread(lambda v=v: guest.port_in(PORT, vcpu=v)) for v in range(3)]  # type: ignore[misc] # mypy cannot infer it
    wait_for_requests(server, 3)
    server.close()
    for thread, _ in threads:
        thread.join()
    # The nested close serves the other two, whose handlers close it once more.
    assert [seen for _, seen in threads] == [[ONES]] * 3
    assert (guest.ioreq_servers, quiesced) == ({}, [1])


def test_a_disable_that_fails(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest is done all the same, what waits is answered, and the error is raised."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    server.open()
    monkeypatch.setattr(link_of(server), "disable", fail)
    thread, seen = in_thread(lambda: guest.port_in(PORT))
    wait_for_requests(server)
    with pytest.raises(XenCallError):
        server.close()
    thread.join()
    assert seen == [5]
    assert guest.ioreq_servers == {}


def test_nobody_can_be_told(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no vCPU can be notified any more, the server is destroyed, and that is raised."""
    server.claim_ports(PORT, 4)
    server.open()
    guest.patience = 0.01
    with pytest.raises(TimeoutError):
        guest.port_in(PORT)
    monkeypatch.setattr(link_of(server), "notify", fail)
    with pytest.raises(XenCallError):
        server.close()
    assert repr(server) == "<IoreqServer of domain 1, closed>"
    assert guest.ioreq_servers == {}


def test_a_signal_that_comes_while_it_is_closed(guest: MockDomain, server: IoreqServer) -> None:
    """It waits until the server is closed, and is not lost."""
    server.open()
    server.on_quiesce(lambda: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            server.close()
    finally:
        signal.signal(signal.SIGINT, before)
    assert guest.ioreq_servers == {}
    assert server.failures == 0


def test_a_childs_stop_writes_nothing(server: IoreqServer) -> None:
    """A forked child, whose descriptor is the parent's, cannot end the parent's serving."""
    stopped: Callable[[], object] = server.stop
    assert in_child(lambda: stopped() is None) == 0
    with pytest.raises(BlockingIOError):
        os.eventfd_read(server._wake)


# --- claims -----------------------------------------------------------------------------


def test_claims_of_a_server_that_is_not_open(server: IoreqServer) -> None:
    """They are given back without Xen, and can be taken again."""
    server.claim_ports(PORT, 4).release()
    server.claim_ports(PORT, 8)


def test_a_release_that_xen_refuses(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The region is still answered for, and can be given back later."""
    region = server.claim_ports(PORT, 4)
    region.read(lambda offset, size: 5)
    with server, server.serving():
        with monkeypatch.context() as patch:
            patch.setattr(link_of(server), "unclaim", fail)
            with pytest.raises(XenCallError):
                region.release()
        assert guest.port_in(PORT) == 5
        region.release()
        assert guest.port_in(PORT) == ONES


def test_a_request_for_what_was_given_back(
    guest: MockDomain, server: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A region that goes while a vCPU waits for it: all ones, and the log says why."""
    region = server.claim_ports(PORT, 4)
    with server:
        server.process_pending()
        thread, seen = in_thread(lambda: guest.port_in(PORT))
        wait_for_event(server)
        region.release()
        assert server.process_pending() == 1
        thread.join()
    assert seen == [ONES]
    assert "no region of this server holds 4 bytes at 0x510" in caplog.text


# --- serving ----------------------------------------------------------------------------


def test_a_vcpu_that_cannot_be_told_twice(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process_pending tries again to tell it, and raises while that fails."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    with server:
        server.process_pending()
        thread, seen = in_thread(lambda: guest.port_in(PORT))
        wait_for_event(server)
        with monkeypatch.context() as patch:
            patch.setattr(link_of(server), "notify", fail)
            for _ in range(3):
                with pytest.raises(XenCallError):
                    server.process_pending()
        assert seen == []
        server.process_pending()
        thread.join()
    assert (seen, server.requests) == ([5], 1)


def test_an_event_of_nobody(server: IoreqServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that this server has not bound is passed over."""
    ports = iter([12345])
    with server:
        monkeypatch.setattr(link_of(server), "pending", lambda: next(ports, None))
        assert server.process_pending() == 0


def test_a_buffered_handler_that_raises(
    guest: MockDomain, server: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged and counted; the buffered requests behind it are carried out."""
    written: list[int] = []

    def write(offset: int, size: int, value: int) -> None:
        written.append(value)
        if value == 1:
            raise RuntimeError("out of paper")

    server.claim_mmio(VGA, 0x1000).write(write)
    with server:
        for value in range(3):
            guest.mmio_write(VGA, value, 1, buffered=True)
        assert server.process_pending() == 3
    assert (written, server.failures) == ([0, 1, 2], 1)
    assert "out of paper" in caplog.text


def test_a_buffered_handler_that_closes(guest: MockDomain, server: IoreqServer) -> None:
    """The request for whose sake it was carried out is answered with all ones."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    server.claim_mmio(VGA, 0x1000).write(lambda offset, size, value: server.close())
    server.open()
    server.process_pending()
    mock = guest.ioreq_servers[server.id]
    assert mock.ring is not None
    thread, seen = in_thread(lambda: guest.port_in(PORT))
    wait_for_event(server)
    assert put_buffered(mock.ring, Request(None, RequestKind.MMIO, False, VGA, 7, 1))
    server.process_pending()
    thread.join()
    assert seen == [ONES]
    assert guest.ioreq_servers == {}


# --- asyncio ----------------------------------------------------------------------------


def test_an_interrupted_loop(guest: MockDomain, server: IoreqServer) -> None:
    """A KeyboardInterrupt in a handler ends the loop, and the vCPU gets its answer."""

    def read(offset: int, size: int) -> int:
        raise KeyboardInterrupt

    server.claim_ports(PORT, 4).read(read)
    with server:
        thread, seen = in_thread(lambda: guest.port_in(PORT))
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(server.serve_async())
        thread.join()
    assert seen == [ONES]


def test_a_signal_and_a_stop_at_once(server: IoreqServer) -> None:
    """Either ends it, and the other one that comes with it does no harm."""
    failures: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context))
        task = asyncio.create_task(server.serve_async())
        await asyncio.sleep(0)
        signal.raise_signal(signal.SIGTERM)
        server.stop()
        await task

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with server:
        asyncio.run(main())
    assert failures == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_asyncio_leaves_a_programs_own_handler_alone(server: IoreqServer) -> None:
    """Where SIGTERM is handled already, serve_async goes on, and the handler is called."""
    seen: list[int] = []

    async def main() -> None:
        task = asyncio.create_task(server.serve_async())
        await asyncio.sleep(0)
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        assert seen == [signal.SIGTERM]
        assert not task.done()
        server.stop()
        await task

    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with server:
            asyncio.run(main())
    finally:
        signal.signal(signal.SIGTERM, before)
