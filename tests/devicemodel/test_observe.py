"""IoreqServer.observe: each request and each quiesce, told between rounds."""

from __future__ import annotations

import asyncio
import os
import threading
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from tests.kit import connection_of, in_thread, wait_for_requests
from xenmapcache import MapCache, MockDomain
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.connection import Connection
from xenmapcache.devicemodel.dispatch import Job
from xenmapcache.events import (
    Event,
    Invalidated,
    Quiesced,
    RequestHandled,
    ServerClosed,
    ServerOpened,
)
from xenmapcache.ioreq import Request, RequestKind
from xenmapcache.stream import new_hooks

PORT = 0x510


def handled(events: list[Event]) -> list[RequestHandled]:
    return [each for each in events if isinstance(each, RequestHandled)]


def test_requests(guest: MockDomain, live: IoreqServer) -> None:
    """Whose, which, how long, and which region; of one that failed, why."""
    got: SimpleQueue[Event] = SimpleQueue()

    def broken(offset: int, size: int) -> int:
        raise ValueError("broken")

    live.claim_ports(0x600, 4).read(broken)
    with live.observe(got.put):
        guest.port_in(PORT + 1, 2, vcpu=1)
        guest.port_in(0x600, 1)
        opened = got.get(timeout=20)
        first, second = handled([got.get(timeout=20), got.get(timeout=20)])
    assert isinstance(opened, ServerOpened)
    assert opened[1:] == (guest.domid, f"IoreqServer of domain {guest.domid}")
    assert first[1:6] == (1, RequestKind.PORT, True, PORT + 1, 2)
    assert first.duration > 0
    assert first.failure is None
    assert first.region is not None
    assert second.failure == "ValueError: broken"
    assert second.region is not None


def test_an_invalidation(guest: MockDomain, cache: MapCache, server: IoreqServer) -> None:
    """The callbacks' time and failures; observers hold no lock of the server's."""
    got: list[Event] = []

    @server.on_quiesce
    def broken() -> None:
        raise ValueError("broken")

    def observe(each: Event) -> None:
        got.append(each)
        assert not server._runtime.lock._is_owned()  # type: ignore[attr-defined] # as the guard

    with server:
        server.observe(observe)
        cache.observe(observe)
        got.clear()
        sender = threading.Thread(target=guest.send_invalidate)
        sender.start()
        while server.invalidations == 0:
            server.process_pending()
        sender.join()
        request = [each for each in handled(got) if each.kind == RequestKind.INVALIDATE]
        assert len(request) == 1
        assert request[0].failure is not None
        assert [each.failures for each in got if isinstance(each, Quiesced)] == [1]
        assert len([each for each in got if isinstance(each, Invalidated)]) == 1
    assert [each.failures for each in got if isinstance(each, Quiesced)] == [1, 1]
    assert not server._dispatcher.stream.guards


@pytest.mark.usefixtures("device")
def test_buffered_requests(guest: MockDomain, server: IoreqServer) -> None:
    """Their vCPU is -1: Xen does not tell whose they are."""
    got: list[Event] = []
    server.observe(got.append)
    with server:
        guest.mmio_write(0xA0000, 7, 1, buffered=True)
        while not handled(got):
            server.process_pending()
    assert handled(got)[0].vcpu == -1


def ends(events: list[Event]) -> list[type[Event]]:
    return [type(each) for each in events if isinstance(each, ServerOpened | ServerClosed)]


def test_a_server_that_is_closed(guest: MockDomain, server: IoreqServer) -> None:
    """It is told once, after all else; who observes it later is told at once."""
    got: list[Event] = []
    later: list[Event] = []
    server.observe(got.append)
    with server:
        guest.mmio_write(0xA0000, 7, 1, buffered=True)
    server.close()
    assert ends(got) == [ServerOpened, ServerClosed]
    assert isinstance(got[-1], ServerClosed)
    with server.observe(later.append):
        server.close()
    assert ends(later) == [ServerOpened, ServerClosed]


def test_a_server_that_never_opened(server: IoreqServer) -> None:
    """Closing it is told, too."""
    got: list[Event] = []
    server.observe(got.append)
    server.close()
    assert ends(got) == [ServerOpened, ServerClosed]


def test_a_server_that_is_given_up(guest: MockDomain, cache: MapCache) -> None:
    """Its end is told although a handler never returns."""
    got: SimpleQueue[Event] = SimpleQueue()
    hold = threading.Event()
    server = IoreqServer(guest, cache, quiesce_timeout=0.05)
    server.claim_ports(PORT, 4).read(lambda *_: int(hold.wait(60)))
    server.observe(got.put)
    server.open()
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    thread, _ = in_thread(lambda: guest.port_in(PORT))
    while connection_of(server).current is None:
        os.sched_yield()
    server.close()
    assert ends([got.get(timeout=20), got.get(timeout=20)]) == [ServerOpened, ServerClosed]
    hold.set()
    thread.join()
    serving.join()


def test_new_servers_are_announced(guest: MockDomain, cache: MapCache) -> None:
    found: list[object] = []
    new_hooks.append(found.append)
    try:
        server = IoreqServer(guest, cache)
    finally:
        new_hooks.pop()
    assert found == [server.observe]


def test_an_awaited_quiesce(guest: MockDomain, server: IoreqServer) -> None:
    """Its failures, and the request, which is answered when the callback has ended."""
    got: list[Event] = []

    @server.on_quiesce
    async def broken() -> None:
        await asyncio.sleep(0)
        raise ValueError("broken")

    async def main() -> None:
        def invalidate() -> None:
            guest.send_invalidate()
            server.stop()

        thread, _ = in_thread(invalidate)
        await server.serve_async()
        thread.join()

    with server, server.observe(got.append):
        asyncio.run(main())
    (request,) = handled(got)
    assert (request.kind, request.vcpu) == (RequestKind.INVALIDATE, 0)
    assert next(each.failures for each in got if isinstance(each, Quiesced)) == 1


def test_a_request_that_was_given_up(guest: MockDomain, server: IoreqServer) -> None:
    """A handler that was cut off is told once, with what the log says."""
    got: list[Event] = []
    region = server.claim_ports(PORT, 4)

    @region.read
    def read(offset: int, size: int) -> int:
        raise KeyboardInterrupt

    with server, server.observe(got.append):
        thread, seen = in_thread(lambda: guest.port_in(PORT))
        wait_for_requests(server)
        with pytest.raises(KeyboardInterrupt):
            while True:
                server.process_pending()
        while not seen:
            server.process_pending()
        thread.join()
    assert len(handled(got)) == 1


def test_a_request_that_cannot_be_carried_out(
    server: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After too many attempts it is told once, with the failure that the log has."""
    got: list[Event] = []
    monkeypatch.setattr(Connection, "answer", lambda *_: None)
    with server, server.observe(got.append):
        job = Job(Request(2, RequestKind.PORT, True, PORT, 0, 4))
        job.attempts = 100
        channel: Any = SimpleNamespace(slot=SimpleNamespace(vcpu=2))
        for _ in range(2):
            connection_of(server)._abandon(channel, job)
        server._dispatcher.stream.deliver()
        (told,) = handled(got)
    assert told.vcpu == 2
    assert "given up before it was carried out" in str(told.failure)
