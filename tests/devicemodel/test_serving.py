"""The loops: a foreign one, a thread, asyncio."""

from __future__ import annotations

import asyncio
import errno
import select
import threading

import pytest

from tests.kit import (
    Memory,
    connection_of,
    in_thread,
    link_of,
)
from xenmapcache import (
    MapCache,
    MockDomain,
    XenCallError,
)
from xenmapcache.devicemodel import IoreqServer

PORT, MMIO, VGA, PCI = 0x510, 0xF000_0000, 0xA0000, "0000:00:05.0"


def test_a_foreign_loop(guest: MockDomain, server: IoreqServer, device: Memory) -> None:
    """Select on the server, then process_pending, which tells how many it answered."""
    with server:
        thread, _ = in_thread(lambda: [guest.port_in(PORT) for _ in range(100)])
        answered = 0
        while answered < 100:
            assert select.select([server], [], [], 20)[0]
            answered += server.process_pending()
        thread.join()
    assert answered == server.requests == 100


def test_a_guest_that_never_stops_asking(server: IoreqServer, device: Memory) -> None:
    """One call of process_pending returns however many events there are."""
    with server:
        link = link_of(server)
        port = next(iter(connection_of(server).channels))
        link.pending = lambda: port  # type: ignore[method-assign] # for this test alone
        assert server.process_pending() == 0


def test_stop_before_serving(server: IoreqServer) -> None:
    """It is not forgotten; it ends one serving, and not the next."""
    with server:
        server.stop()
        assert server.serve_forever() is None
        thread, _ = in_thread(server.serve_forever)
        thread.join(0.05)
        assert thread.is_alive()
        server.stop()
        thread.join()


def test_close_ends_serving(guest: MockDomain, server: IoreqServer, device: Memory) -> None:
    """From another thread."""
    server.open()
    thread, seen = in_thread(server.serve_forever)
    guest.port_in(PORT)  # or it might not have begun
    server.close()
    thread.join()
    assert seen == [None]


def test_what_ends_the_thread_is_raised(
    guest: MockDomain, server: IoreqServer, device: Memory
) -> None:
    """A failure of Xen's own in the serving thread comes out of the with block."""
    failed = threading.Event()

    def fail(port: int) -> None:
        failed.set()
        raise XenCallError("xenevtchn_unmask", 1, errno.EIO)

    with server:
        link = link_of(server)
        server.process_pending()  # the events of binding
        link.unmask = fail  # type: ignore[method-assign] # for this test alone
        with pytest.raises(XenCallError, match="xenevtchn_unmask failed"), server.serving():
            thread, seen = in_thread(lambda: guest.port_in(PORT))
            assert failed.wait(20)
    thread.join()
    assert seen == [0]


def test_asyncio(guest: MockDomain, server: IoreqServer, device: Memory) -> None:
    """It serves in the loop, next to other tasks, until stop or cancel."""
    device.bytes[0] = 9

    async def ask() -> int:
        return await asyncio.to_thread(guest.port_in, PORT, 1)

    async def main() -> None:
        task = asyncio.create_task(server.serve_async())
        assert await asyncio.gather(*(ask() for _ in range(10))) == [9] * 10
        server.stop()
        await task
        task = asyncio.create_task(server.serve_async())
        assert await ask() == 9
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with server:
        asyncio.run(main())


def test_asyncio_ends_with_what_fails(server: IoreqServer) -> None:
    """An error of the server ends serve_async with it."""

    async def main() -> None:
        task = asyncio.create_task(server.serve_async())
        await asyncio.sleep(0)
        link = link_of(server)
        link.pending = lambda: (_ for _ in ()).throw(XenCallError("x", 1, errno.EIO))  # type: ignore[method-assign] # for this test alone
        link.unmask(110)
        with pytest.raises(XenCallError):
            await asyncio.wait_for(task, 20)

    with server:
        asyncio.run(main())


def test_close_and_another_one_in_one_loop(guest: MockDomain, cache: MapCache) -> None:
    """A server that is closed in the loop does not take the next one's descriptors with it."""

    async def main() -> None:
        first = IoreqServer(guest, cache)
        first.open()
        task = asyncio.create_task(first.serve_async())
        await asyncio.sleep(0)
        first.close()
        with IoreqServer(guest, cache) as second:
            other = asyncio.create_task(second.serve_async())
            await asyncio.wait_for(task, 20)
            await asyncio.sleep(0)
            second.stop()
            await asyncio.wait_for(other, 20)

    asyncio.run(main())


def test_both_errors_are_seen(guest: MockDomain, server: IoreqServer) -> None:
    """What ended the serving thread is raised, with what it did to the body as its context."""
    with server:
        link = link_of(server)

        failed = threading.Event()

        def fail() -> int | None:
            failed.set()
            raise XenCallError("xenevtchn_pending", 1, errno.EIO)

        link.pending = fail  # type: ignore[method-assign] # for this test alone
        with pytest.raises(XenCallError) as caught, server.serving():
            assert failed.wait(20)
            raise TimeoutError("the guest is stuck")
    assert isinstance(caught.value.__context__, TimeoutError)
