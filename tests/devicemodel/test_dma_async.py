"""AsyncDmaEngine: transfers in the event loop, next to a server that runs there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from xenmapcache import ClosedError, MapCache, MockDomain, QueueFullError
from xenmapcache.devicemodel import AsyncDmaEngine, DmaStatus, DmaTransfer, IoreqServer
from xenmapcache.guest import Segments

RANGES = [(0x5000, 512), (0x8000, 512)]
DONE, FAILED, CANCELLED = DmaStatus.DONE, DmaStatus.FAILED, DmaStatus.CANCELLED


@contextlib.asynccontextmanager
async def serving(server: IoreqServer) -> AsyncIterator[None]:
    """Serve in the running loop."""
    with server:
        task = asyncio.create_task(server.serve_async())
        try:
            yield
        finally:
            server.stop()
            await task


class Blocked:
    """Work that does not return before it may, and writes then."""

    def __init__(self, data: bytes = b"data") -> None:
        self.data = data
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self.cancelled = False

    async def __call__(self, memory: Segments) -> int:
        self.begun.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        memory[: len(self.data)] = self.data
        return len(self.data)


def none(memory: Segments) -> None:
    """Do nothing."""


def test_transfers_run_at_the_same_time(
    guest: MockDomain, cache: MapCache, server: IoreqServer
) -> None:
    """Each gets its leases, awaits, and tells its end; plain functions do, too."""
    ended: list[tuple[int, DmaStatus, int | None, int]] = []

    def on_end(transfer: DmaTransfer) -> None:
        ended.append((transfer.number, transfer.status, transfer.result, len(cache.leases())))

    async def main() -> None:
        first = Blocked()
        async with serving(server), AsyncDmaEngine(server, name="nic0", concurrency=2) as engine:
            engine.submit(RANGES, "from-device", first, on_end=on_end)
            engine.submit(RANGES, "to-device", none, on_end=on_end)
            third = engine.submit(RANGES, "to-device", lambda _: first.go.set(), on_end=on_end)
            await engine.drain()
            assert third.status is DONE
            assert engine.transfers == ()
            assert engine.failures == 0
            assert repr(engine) == "<DMA engine 'nic0' of domain 1, 0 transfers under way>"

    asyncio.run(main())
    assert ended == [(2, DONE, None, 2), (3, DONE, None, 2), (1, DONE, 4, 0)]
    assert guest.read(0x5000, 4) == b"data"
    assert guest.dirty_gfns == {5}


def test_no_lease_is_held_while_mappings_are_dropped(
    guest: MockDomain, cache: MapCache, server: IoreqServer
) -> None:
    """An INVALIDATE waits for what was accepted; what is submitted since waits for it."""
    order: list[int] = []

    async def main() -> None:
        work = Blocked()
        async with serving(server), AsyncDmaEngine(server) as engine:
            before = cache.stats().invalidations
            engine.submit(RANGES, "from-device", work)
            await work.begun.wait()
            vcpu = asyncio.create_task(asyncio.to_thread(guest.send_invalidate))
            while engine._table._hold is None:
                await asyncio.sleep(0)
            engine.submit(
                RANGES, "to-device", lambda _: order.append(cache.stats().invalidations - before)
            )
            for _ in range(10):
                await asyncio.sleep(0)
            assert order == []
            work.go.set()
            await vcpu
            await engine.drain()

    asyncio.run(main())
    assert order == [1]
    assert cache.stats().stale_dma_released == 0


def test_a_group_is_waited_for_and_cancelled_alone(server: IoreqServer) -> None:
    """Transfers of another group go on."""

    async def main() -> None:
        one, two, work = object(), object(), Blocked()
        async with serving(server), AsyncDmaEngine(server, concurrency=2) as engine:
            other = engine.submit(RANGES, "from-device", work, group=two)
            await work.begun.wait()
            mine = engine.submit(RANGES, "from-device", none, group=one)
            await engine.drain(20, group=one)
            engine.cancel(group=one)
            assert (mine.status, other.status) == (DONE, DmaStatus.RUNNING)
            work.go.set()
            await engine.drain(20, group=two)
            assert other.status is DONE

    asyncio.run(main())


def test_a_reset(cache: MapCache, server: IoreqServer, caplog: pytest.LogCaptureFixture) -> None:
    """Work under way is cancelled where it awaits; what waits never begins; later ones run."""
    ended: list[int] = []

    def on_end(transfer: DmaTransfer) -> None:
        ended.append(transfer.number)

    async def main() -> None:
        work = Blocked()
        async with serving(server), AsyncDmaEngine(server, concurrency=1) as engine:
            running = engine.submit(RANGES, "from-device", work, on_end=on_end)
            waiting = engine.submit(RANGES, "from-device", work, on_end=on_end)
            await work.begun.wait()
            engine.cancel()
            later = engine.submit(RANGES, "from-device", none, on_end=on_end)
            await engine.drain()
            assert work.cancelled
            assert [each.status for each in (running, waiting, later)] == [
                CANCELLED,
                CANCELLED,
                DONE,
            ]
            assert isinstance(running.error, asyncio.CancelledError)

    asyncio.run(main())
    assert ended == [3]
    assert cache.leases() == ()
    assert not caplog.records


def test_what_work_raises_is_a_status(
    cache: MapCache, server: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The guest is told, and the runner goes on."""
    ended: list[DmaStatus] = []

    async def work(_: Segments) -> int:
        raise ZeroDivisionError("zero")

    async def main() -> None:
        async with serving(server), AsyncDmaEngine(server) as engine:
            for each in (work, none):
                engine.submit(RANGES, "from-device", each, on_end=lambda t: ended.append(t.status))
            await engine.drain()
            assert engine.failures == 1

    asyncio.run(main())
    assert ended == [FAILED, DONE]
    assert "ZeroDivisionError: zero" in caplog.text
    assert cache.leases() == ()


async def raise_interrupt(_: Segments) -> int:
    raise KeyboardInterrupt


async def cancel_itself(_: Segments) -> int:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("work", "status"), [(raise_interrupt, FAILED), (cancel_itself, CANCELLED)]
)
def test_what_ends_the_loop_ends_the_transfer(
    cache: MapCache,
    server: IoreqServer,
    work: Callable[[Segments], Awaitable[int]],
    status: DmaStatus,
) -> None:
    """The leases are released, and the exception goes on its way."""
    transfers: list[DmaTransfer] = []

    async def main() -> None:
        with server:
            engine = AsyncDmaEngine(server)
            transfers.append(engine.submit(RANGES, "from-device", work))
            (runner,) = engine._runners
            await runner

    with pytest.raises((KeyboardInterrupt, asyncio.CancelledError)):
        asyncio.run(main())
    assert transfers[0].status is status
    assert cache.leases() == ()


def test_close(server: IoreqServer) -> None:
    """It waits as long as it is told to, cancels the rest, and can be repeated."""

    async def main() -> None:
        work = Blocked()
        async with serving(server):
            engine = AsyncDmaEngine(server, name="nic0", limit=1, drain_timeout=0.01)
            transfer = engine.submit(RANGES, "from-device", work)
            with pytest.raises(QueueFullError, match="its limit is 1"):
                engine.submit(RANGES, "from-device", work)
            await work.begun.wait()
            with pytest.raises(TimeoutError, match=r"'nic0' of domain 1: drain: .* transfer 1 of"):
                await engine.close()
            await engine.close()
            assert transfer.status is CANCELLED
            with pytest.raises(ClosedError, match="it is closed"):
                engine.submit(RANGES, "from-device", none)

    asyncio.run(main())


def test_a_server_that_is_closed_first(server: IoreqServer) -> None:
    """What has not begun is cancelled, and holds nothing up."""

    async def main() -> None:
        with server:
            engine = AsyncDmaEngine(server)
            transfer = engine.submit(RANGES, "from-device", none)
        await engine.close()
        assert transfer.status is CANCELLED
        assert isinstance(transfer.error, ClosedError)

    asyncio.run(main())


def test_a_work_does_not_wait_for_itself(server: IoreqServer) -> None:
    """It may drain the engine that runs it."""

    async def main() -> None:
        async with serving(server), AsyncDmaEngine(server) as engine:

            async def work(_: Segments) -> None:
                await engine.drain(0.01)

            transfer = engine.submit(RANGES, "from-device", work)
            await engine.drain()
            assert transfer.status is DONE

    asyncio.run(main())


def test_an_engine_that_is_made_while_the_guest_is_saved(server: IoreqServer) -> None:
    """Its transfers wait for resume(), and the loop goes on."""

    async def main() -> None:
        with server:
            server.suspend()
            engine = AsyncDmaEngine(server)
            transfer = engine.submit(RANGES, "from-device", none)
            for _ in range(5):
                await asyncio.sleep(0)
            assert transfer.status is DmaStatus.WAITING
            server.resume()
            await engine.drain()
            assert transfer.status is DONE

    asyncio.run(main())


def test_wrong_use(server: IoreqServer) -> None:
    """Outside of a loop, and with no room for a transfer."""
    with pytest.raises(ValueError, match="concurrency must be at least 1 transfer, not 0"):
        AsyncDmaEngine(server, concurrency=0)
    engine = AsyncDmaEngine(server)
    with pytest.raises(RuntimeError, match="no running event loop"):
        engine.submit(RANGES, "from-device", none)
