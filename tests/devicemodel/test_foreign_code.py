"""Handlers and callbacks that hang, raise or have to be awaited: every vCPU is answered."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import FrameType

import pytest

from tests.kit import connection_of, in_thread, link_of, wait_for_requests, wait_for_the_log
from xenmapcache import MapCache, MockDomain
from xenmapcache.devicemodel import IoreqServer, dispatch, watch
from xenmapcache.devicemodel.dispatch import is_async
from xenmapcache.ioreq import RequestSlot, State

PORT, ONES = 0x510, 0xFFFFFFFF


class Hang:
    """A handler that does not return before it is told to."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.leave = threading.Event()

    def read(self, offset: int, size: int) -> int:
        self.entered.set()
        assert self.leave.wait(20)
        return 5

    def callback(self) -> None:
        self.entered.set()
        assert self.leave.wait(20)


@pytest.fixture
def hang() -> Iterator[Hang]:
    hang = Hang()
    yield hang
    hang.leave.set()


@pytest.fixture
def hasty(guest: MockDomain, cache: MapCache) -> IoreqServer:
    """A server that gives up soon."""
    return IoreqServer(guest, cache, quiesce_timeout=0.1)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_close_gives_up_a_handler_that_never_returns(
    guest: MockDomain,
    cache: MapCache,
    hasty: IoreqServer,
    hang: Hang,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Mappings go, every vCPU reads all ones, the server is gone, and the log names the handler."""
    hasty.claim_ports(PORT, 4, hang)
    cache.read(0x5000, 1)
    hasty.open()
    page = link_of(hasty).page
    server_thread = threading.Thread(target=hasty.serve_forever)
    server_thread.start()
    threads = [in_thread(lambda v=v: guest.port_in(PORT, vcpu=v)) for v in range(3)]  # type: ignore[misc] # mypy cannot infer it
    assert hang.entered.wait(20)
    invalidations = cache.stats().invalidations
    hasty.close()
    for thread, seen in threads:
        thread.join()
        assert seen == [ONES]
    assert guest.ioreq_servers == {}
    assert cache.stats().invalidations == invalidations + 1
    assert repr(hasty) == "<IoreqServer of domain 1, closed>"
    (text,) = [m for m in messages(caplog) if "foreign code still runs" in m]
    assert "Hang.read for vCPU" in text
    hang.leave.set()
    server_thread.join()
    assert all(RequestSlot(page, vcpu).state == State.NONE for vcpu in range(3))
    assert guest.crashed == ""
    hasty.close()


def test_close_gives_up_a_callback_in_another_thread(
    guest: MockDomain, hasty: IoreqServer, hang: Hang
) -> None:
    """A vCPU that balloons goes on although a callback hangs."""
    hasty.on_quiesce(hang.callback)
    hasty.open()
    server_thread = threading.Thread(target=hasty.serve_forever)
    server_thread.start()
    thread, _ = in_thread(lambda: guest.balloon_out(0x5000, 0x1000))
    assert hang.entered.wait(20)
    hasty.close()
    thread.join()
    hang.leave.set()
    server_thread.join()
    assert (guest.ioreq_servers, guest.crashed) == ({}, "")


def test_a_callback_that_hangs_in_close_is_given_up(
    guest: MockDomain, hasty: IoreqServer, hang: Hang
) -> None:
    """The thread that closes runs the callback, so the watcher destroys the server."""
    hasty.on_quiesce(hang.callback)
    hasty.open()
    closing, _ = in_thread(hasty.close)
    assert hang.entered.wait(20)
    while guest.ioreq_servers:
        time.sleep(0.001)
    hang.leave.set()
    closing.join()
    assert repr(hasty) == "<IoreqServer of domain 1, closed>"


def test_serving_ends_although_a_handler_hangs(
    guest: MockDomain, hasty: IoreqServer, hang: Hang
) -> None:
    """The end of the block waits for the quiesce timeout, and closes the server."""
    hasty.claim_ports(PORT, 4, hang)
    with hasty, hasty.serving():
        thread, seen = in_thread(lambda: guest.port_in(PORT))
        assert hang.entered.wait(20)
    thread.join()
    assert (seen, guest.ioreq_servers) == ([ONES], {})


def test_a_handler_that_runs_for_long_is_named(
    guest: MockDomain,
    cache: MapCache,
    server: IoreqServer,
    hang: Hang,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the first time and again and again, with the leases held, by a thread that ends."""
    monkeypatch.setattr(watch, "_FIRST_S", 0.01)
    monkeypatch.setattr(watch, "_NEXT_S", 0.01)
    server.claim_ports(PORT, 4, hang)
    with caplog.at_level(logging.WARNING), server, server.serving():
        lease = cache.map_dma(0x6000, 4096, owner="disk0")
        thread, seen = in_thread(lambda: guest.port_in(PORT))
        while sum("has run for" in text for text in messages(caplog)) < 2:
            time.sleep(0.001)
        hang.leave.set()
        thread.join()
        lease.release()
    assert seen == [5]
    text = next(text for text in messages(caplog) if "has run for" in text)
    assert text.startswith("domain 1: Hang.read for vCPU 0: PORT read of 4 bytes at 0x510 has run")
    assert "its vCPU waits; leases held: " in text
    assert "disk0" in text
    while any(_is_watched(frame) for frame in sys._current_frames().values()):
        time.sleep(0.001)


def _is_watched(top: FrameType) -> bool:
    """Tell whether a thread is a watcher's."""
    code = watch.Watcher._run.__code__
    return any(frame.f_code is code for frame, _ in traceback.walk_stack(top))


def test_no_thread_can_be_made(
    guest: MockDomain, live: IoreqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are answered without a watcher."""

    def start(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    watcher = connection_of(live).calls.watcher
    assert watcher._idle == [None]
    with monkeypatch.context() as patch:
        patch.setattr("_thread.start_new_thread", start)
        watcher.begin()
    assert watcher._idle == [None]  # the next one tries again
    assert guest.port_in(PORT) == 0


def test_a_log_handler_that_raises_stops_no_answer(
    guest: MockDomain, server: IoreqServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other callbacks run, the mappings go, and process_pending does not raise."""

    def refuse(_: logging.LogRecord) -> bool:
        raise RuntimeError("a filter with a bug")

    ran: list[str] = []
    server.on_quiesce(lambda: 1 // 0)
    server.on_quiesce(lambda: ran.append("second"))
    log = logging.getLogger("xenmapcache.devicemodel")
    with server:
        server.process_pending()
        ran.clear()
        thread, _ = in_thread(lambda: guest.balloon_out(0x5000, 0x1000))
        wait_for_requests(server)
        log.addFilter(refuse)
        try:
            while not ran:
                server.process_pending()
        finally:
            log.removeFilter(refuse)
        thread.join()
    assert ran[0] == "second"
    assert "a filter with a bug" in capsys.readouterr().err


def test_a_callback_that_registers_itself_again(guest: MockDomain, live: IoreqServer) -> None:
    """It is called once for each INVALIDATE, and not without end."""
    calls: list[int] = []

    def again() -> None:
        calls.append(1)
        if len(calls) < 100:
            live.on_quiesce(again)

    live.on_quiesce(again)
    guest.send_invalidate()
    assert len(calls) == 1
    connection_of(live).dispatcher.callbacks.clear()


def test_a_callback_that_closes_cache_and_server(
    guest: MockDomain, cache: MapCache, server: IoreqServer
) -> None:
    """The vCPU goes on, and the callback is not called by the close that it makes."""
    calls: list[int] = []

    @server.on_quiesce
    def end() -> None:
        calls.append(1)
        cache.close()
        server.close()

    server.open()
    thread, _ = in_thread(lambda: guest.balloon_out(0x5000, 0x1000))
    server.serve_forever()
    thread.join()
    assert (calls, guest.ioreq_servers) == ([1], {})


# --- callbacks that are awaited ---------------------------------------------------------


@pytest.mark.parametrize("method", ["serve_forever", "serving", "process_pending", "suspend"])
def test_only_asyncio_awaits_a_callback(server: IoreqServer, method: str) -> None:
    """The others refuse when they start, by name."""

    @server.on_quiesce
    async def drain() -> None:
        """Never awaited."""

    with server, pytest.raises(TypeError, match=f"{method}: .*drain.*only serve_async"):
        getattr(server, method)()


def test_a_callback_is_awaited_before_the_answer(
    guest: MockDomain, cache: MapCache, server: IoreqServer
) -> None:
    """No other request is handled until then; it is awaited at the end, too."""
    order: list[str] = []
    others: list[tuple[threading.Thread, list[object]]] = []
    server.claim_ports(PORT, 4).read(lambda offset, size: order.append("read") or 5)  # type: ignore[func-returns-value] # None, and so 5

    @server.on_quiesce
    async def drain() -> None:
        order.append("begin")
        if not others:
            others.append(in_thread(lambda: guest.port_in(PORT, vcpu=1)))
            while RequestSlot(link_of(server).page, 1).state != State.READY:
                await asyncio.sleep(0)
            for _ in range(20):
                await asyncio.sleep(0)
        order.append("end")

    guest.write(0x5000, b"old")

    def balloon() -> None:
        guest.balloon_out(0x5000, 0x1000)
        order.append("answered")
        others[0][0].join()
        server.stop()

    async def main() -> int | None:
        thread, _ = in_thread(balloon)
        ended = await server.serve_async()
        thread.join()
        return ended

    with server:
        cache.read(0x5000, 3)
        assert asyncio.run(main()) is None
    assert order[:2] == ["begin", "end"]
    assert sorted(order[2:4]) == ["answered", "read"]
    assert order[4:] == ["begin", "end"]
    assert others[0][1] == [5]
    assert (server.invalidations, server.failures) == (1, 0)


def test_an_awaited_callback_that_raises(
    guest: MockDomain, server: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; the mappings go and the vCPU goes on."""

    @server.on_quiesce
    async def drain() -> None:
        raise OSError("cannot drain")

    async def main() -> None:
        def balloon() -> None:
            guest.balloon_out(0x5000, 0x1000)
            server.stop()

        thread, _ = in_thread(balloon)
        await server.serve_async()
        thread.join()

    with server:
        asyncio.run(main())
    assert (server.invalidations, server.failures) == (1, 2)
    assert "cannot drain" in caplog.text


def test_a_close_while_a_callback_is_awaited(guest: MockDomain, server: IoreqServer) -> None:
    """Closed by another task of the loop: the vCPU goes on, and serve_async returns."""
    begun = asyncio.Event()

    @server.on_quiesce
    async def drain() -> None:
        begun.set()
        await asyncio.sleep(0.01)

    async def main() -> None:
        serving = asyncio.create_task(server.serve_async())
        thread, _ = in_thread(lambda: guest.balloon_out(0x5000, 0x1000))
        await begun.wait()
        server.close()
        await serving
        thread.join()

    server.open()
    asyncio.run(main())
    assert guest.ioreq_servers == {}


def test_what_has_to_be_awaited() -> None:
    """Coroutine functions and objects whose call is one; nothing else."""

    class Asynchronous:
        async def __call__(self) -> None:
            """Await me."""

    assert is_async(Asynchronous())
    assert not is_async(lambda: None)


def test_a_coroutine_that_nobody_awaits(
    guest: MockDomain, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A plain function that returns one has not done its work: it is a failure, by name."""

    async def drain() -> None:
        """Never awaited."""

    live.on_quiesce(lambda: drain())
    guest.send_invalidate()
    wait_for_the_log(live)
    assert "returned a coroutine; register it with `async def`" in caplog.text
    assert live.failures == 1
    connection_of(live).dispatcher.callbacks.clear()


def test_a_handler_that_raises_stop_iteration(guest: MockDomain, live: IoreqServer) -> None:
    """It is a failure like any other, and not the end of something."""

    def read(offset: int, size: int) -> int:
        raise StopIteration

    live.claim_ports(0x600, 4).read(read)
    assert guest.port_in(0x600) == ONES
    assert live.failures == 1


def test_the_entry_of_a_function() -> None:
    """An exception before the first line of a function is told from one in it."""
    job = dispatch.Job(None)

    def raises() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        job.call(raises)
    assert (job.calls, job.running) == (1, True)
