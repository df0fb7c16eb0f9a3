"""An ioreq server whose end, or whose Xen, comes in the middle: nobody is left waiting unsaid."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.descriptors import open_files
from tests.fake_xen.child import in_child
from tests.kit import in_thread, link_of, wait_for_requests
from xenmapcache import (
    FaultError,
    MapCache,
    MockDomain,
    MockHypervisor,
    XenCallError,
    open_backend,
)
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.ioreq import BufferedRing, Request, RequestKind, RequestSlot, State

PORT, VGA, ONES = 0x510, 0xA0000, 0xFFFFFFFF


@pytest.fixture
def guest() -> MockDomain:
    guest = MockHypervisor().create_domain(memory="1M", holes=[(VGA, 0x20000)], vcpus=3)
    guest.vcpu_timeout = 20.0
    return guest


@pytest.fixture
def server(guest: MockDomain) -> Iterator[IoreqServer]:
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        yield IoreqServer(guest, cache, buffered=True)


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
    # The nested close serves the other two, whose handlers close it again.
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


@pytest.mark.slow
def test_nobody_can_be_told(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no vCPU can be notified any more, the server is destroyed, and that is raised."""
    server.claim_ports(PORT, 4)
    server.open()
    guest.vcpu_timeout = 0.01
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
        os.eventfd_read(server._runtime.wake_fileno())


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
    """A channel that this server has not bound is skipped."""
    ports = iter([12345])
    with server:
        monkeypatch.setattr(link_of(server), "pending", lambda: next(ports, None))
        assert server.process_pending() == 0


def test_a_buffered_handler_that_raises(
    guest: MockDomain, server: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged and counted; the buffered requests after it are carried out."""
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
    """The request for whose sake it was carried out is carried out by the close."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    server.claim_mmio(VGA, 0x1000).write(lambda offset, size, value: server.close())
    server.open()
    server.process_pending()
    mock = guest.ioreq_servers[server.id]
    assert mock.ring is not None
    thread, seen = in_thread(lambda: guest.port_in(PORT))
    wait_for_event(server)
    assert BufferedRing(mock.ring).append(Request(None, RequestKind.MMIO, False, VGA, 7, 1))
    server.process_pending()
    thread.join()
    assert (seen, server.failures) == ([5], 0)
    assert guest.ioreq_servers == {}


def test_an_invalidate_behind_an_interrupted_buffered_write(
    guest: MockDomain, server: IoreqServer
) -> None:
    """It waits until it is carried out: pages that the guest gave up are never served."""
    guest.write(0x5000, b"old")
    assert server.cache.read(0x5000, 3) == b"old"

    def interrupt(offset: int, size: int, value: int) -> None:
        raise KeyboardInterrupt

    server.claim_mmio(VGA, 0x1000).write(interrupt)
    with server:
        server.process_pending()
        assert server.cache.read(0x5000, 3) == b"old"
        ring = guest.ioreq_servers[server.id].ring
        assert ring is not None
        assert BufferedRing(ring).append(Request(None, RequestKind.MMIO, False, VGA, 1, 4))
        thread, _ = in_thread(lambda: guest.balloon_out(0x5000, 0x1000))
        wait_for_requests(server)
        with pytest.raises(KeyboardInterrupt):
            while True:
                server.process_pending()
        assert server.invalidations == 0
        while not server.invalidations:
            server.process_pending()
        thread.join()
        with pytest.raises(FaultError):
            server.cache.read(0x5000, 3)


def test_buffered_writes_behind_an_interrupted_one(guest: MockDomain, server: IoreqServer) -> None:
    """Xen sends one event for several, so those that are left are looked for."""
    written: list[int] = []

    def write(offset: int, size: int, value: int) -> None:
        written.append(value)
        if value == 0:
            raise KeyboardInterrupt

    server.claim_mmio(VGA, 0x1000).write(write)
    with server:
        server.process_pending()
        mock = guest.ioreq_servers[server.id]
        assert mock.ring is not None
        first = Request(None, RequestKind.MMIO, False, VGA, 0, 1)
        assert BufferedRing(mock.ring).append(first)
        assert mock.send_buffered(first._replace(data=1))
        with pytest.raises(KeyboardInterrupt):
            server.process_pending()
        server.process_pending()
        assert written == [0, 1]


def test_a_request_that_a_buffered_handler_has_served(
    guest: MockDomain, server: IoreqServer
) -> None:
    """A handler that serves may carry out the request for whose sake it was called: once."""
    reads: list[int] = []
    others: list[tuple[threading.Thread, list[object]]] = []

    def read(offset: int, size: int) -> int:
        reads.append(offset)
        return 5

    def interrupt(offset: int, size: int) -> int:
        raise KeyboardInterrupt

    def write(offset: int, size: int, value: int) -> None:
        others.append(in_thread(lambda: guest.port_in(PORT + 4, vcpu=1)))
        wait_for_event(server)
        with pytest.raises(KeyboardInterrupt):
            server.process_pending()
        server.process_pending()  # looks at every vCPU

    server.claim_ports(PORT, 4).read(read)
    server.claim_ports(PORT + 4, 4).read(interrupt)
    server.claim_mmio(VGA, 0x1000).write(write)
    with server:
        server.process_pending()
        ring = guest.ioreq_servers[server.id].ring
        assert ring is not None
        thread, seen = in_thread(lambda: guest.port_in(PORT, vcpu=0))
        wait_for_event(server)
        assert BufferedRing(ring).append(Request(None, RequestKind.MMIO, False, VGA, 1, 1))
        while not seen:
            server.process_pending()
        thread.join()
    others[0][0].join()
    assert (seen, reads, others[0][1], guest.crashed) == ([5], [0], [ONES], "")


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


def test_buffered_writes_come_before_the_last_quiesce(
    guest: MockDomain, server: IoreqServer
) -> None:
    """A transfer that a buffered write starts while it is closed is still told to end."""
    order: list[str] = []
    server.claim_mmio(VGA, 0x1000).write(lambda offset, size, value: order.append("write"))
    server.on_quiesce(lambda: order.append("quiesce"))
    with server:
        server.process_pending()
        guest.mmio_write(VGA, 1, 1, buffered=True)
    assert order == ["write", "quiesce"]


def test_a_handler_that_serves_on_after_an_interrupt(
    guest: MockDomain, server: IoreqServer
) -> None:
    """Its own vCPU is not given up when it serves the others again, and gets its answer."""

    def interrupt(offset: int, size: int) -> int:
        raise KeyboardInterrupt

    others: list[tuple[threading.Thread, list[object]]] = []

    def read(offset: int, size: int) -> int:
        others.append(in_thread(lambda: guest.port_in(PORT + 4, vcpu=1)))
        wait_for_event(server)
        with pytest.raises(KeyboardInterrupt):
            server.process_pending()
        server.process_pending()
        return 5

    server.claim_ports(PORT, 4).read(read)
    server.claim_ports(PORT + 4, 4).read(interrupt)
    with server:
        server.process_pending()
        first, seen = in_thread(lambda: guest.port_in(PORT, vcpu=0))
        wait_for_event(server)
        while not seen:
            server.process_pending()
        first.join()
        others[0][0].join()
    ones = others[0][1]
    assert (seen, ones, server.failures, guest.crashed) == ([5], [ONES], 0, "")


def test_mappings_go_before_an_invalidate_is_given_up(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close that is interrupted answers INVALIDATE after the mappings have gone."""
    states: list[int] = []
    server.open()
    link = link_of(server)
    thread, _ = in_thread(lambda: guest.balloon_out(0x5000, 0x1000))
    wait_for_requests(server)
    invalidate = server.cache.invalidate

    def noted() -> None:
        states.append(RequestSlot(link.page, 0).state)
        invalidate()

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MapCache, "invalidate", lambda _: noted())
    monkeypatch.setattr(link, "disable", interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.close()
    thread.join()
    assert states == [State.INPROCESS]


def test_serving_again_after_what_ended_it(guest: MockDomain, server: IoreqServer) -> None:
    """The stop of a thread that had ended by itself does not end the next one."""
    server.claim_ports(PORT, 4).read(lambda offset, size: 5)
    with server:
        link = link_of(server)
        with pytest.MonkeyPatch.context() as patch:
            asked = threading.Event()

            def fail() -> None:
                asked.set()
                raise XenCallError("pending", 1, errno.EIO)

            patch.setattr(link, "pending", fail)
            with pytest.raises(XenCallError), server.serving():
                assert asked.wait(20)
        with server.serving():
            assert guest.port_in(PORT) == 5


def test_a_cache_is_emptied_once_xen_asks(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the guest gives up before the server is enabled is told by nobody: it goes after."""
    enabled: list[bool] = []
    invalidate = MapCache.invalidate

    def noted(cache: MapCache) -> object:
        enabled.append(any(each.enabled for each in guest.ioreq_servers.values()))
        return invalidate(cache)

    with monkeypatch.context() as patch:
        patch.setattr(MapCache, "invalidate", noted)
        server.open()
    server.close()
    assert enabled == [True]


def test_asyncio_leaves_nothing_behind(server: IoreqServer) -> None:
    """When it has ended no descriptor is open, and the loop takes no stop that is for another."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        gc.collect()  # what other tests have left
        files = open_files()
        task = asyncio.create_task(server.serve_async())
        await asyncio.sleep(0)
        server.stop()
        await task
        assert open_files() <= files
        assert not loop.remove_reader(server._runtime.wake_fileno())

    with server:
        asyncio.run(main())


def test_one_that_cannot_be_told_keeps_no_other_waiting(
    guest: MockDomain, server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close that is interrupted answers each vCPU, though Xen fails for one of them."""
    server.claim_ports(PORT, 4)
    server.open()
    link = link_of(server)
    threads = [in_thread(lambda v=v: guest.port_in(PORT, vcpu=v)) for v in range(3)]  # type: ignore[misc] # mypy cannot infer it
    wait_for_requests(server, 3)
    notify, told = link.notify, []

    def fail_once(port: int) -> None:
        notify(port)
        told.append(port)
        if len(told) == 1:
            raise XenCallError("notify", 1, errno.EIO)

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(link, "notify", fail_once)
    monkeypatch.setattr(link, "disable", interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.close()
    for thread, _ in threads:
        thread.join()
    assert [seen for _, seen in threads] == [[ONES]] * 3


def test_pci_functions_of_other_segments(guest: MockDomain, server: IoreqServer) -> None:
    """Xen is told of the segment, too: its number is more than a bus, a device and a function."""
    server.claim_pci("0001:00:05.0").read(lambda offset, size: 5)
    with server, server.serving():
        assert guest.pci_read("0001:00:05.0", 0) == 5
        assert guest.pci_read("0000:00:05.0", 0) == ONES
