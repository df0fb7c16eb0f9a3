"""INVALIDATE: callbacks first, then the mappings go, then the answer."""

from __future__ import annotations

import pytest

from tests.kit import (
    in_thread,
    link_of,
    wait_for_requests,
    wait_for_the_log,
)
from xenmapcache import (
    DmaDirection,
    FaultError,
    MapCache,
    MockDomain,
)
from xenmapcache.devicemodel import IoreqServer


def test_invalidate_drops_what_is_mapped(
    guest: MockDomain, cache: MapCache, live: IoreqServer
) -> None:
    """A page that was given up and came back is read again, with nothing done by the model."""
    guest.write(0x5000, b"old")
    assert cache.read(0x5000, 3) == b"old"
    guest.balloon_out(0x5000, 0x1000)
    guest.balloon_in(0x5000, 0x1000)
    assert cache.read(0x5000, 3) == b"\0\0\0"
    assert live.invalidations == guest.invalidations == 1


def test_a_burst(
    guest: MockDomain, cache: MapCache, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Hundreds of requests are one flush each; each DMA lease is warned of once."""
    device = cache.map_device(0xF0000, 0x1000, owner="vga")
    leases = [cache.map_dma(0x8000 * n, 512, owner=f"disk{n}") for n in range(3)]
    guest.balloon_out(0x20_0000, 0xC0_0000)
    assert live.invalidations == guest.invalidations == 37
    assert cache.stats().invalidations == 37 + 1  # one when it was opened
    wait_for_the_log(live)
    warned = [r.getMessage() for r in caplog.records if "still held" in r.getMessage()]
    assert sorted(
        owner in text for text in warned for owner in ("'disk0'", "'disk1'", "'disk2'")
    ) == ([False] * 6 + [True] * 3)
    assert not device.stale
    for lease in (device, *leases):
        lease.release()


def test_quiesce_comes_before(
    guest: MockDomain, cache: MapCache, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback finishes its DMA before mappings go: no lease is stale, and nothing is lost."""
    leases = [cache.map_dma(0x5000, 4, owner="disk0", direction=DmaDirection.FROM_DEVICE)]
    order: list[str] = []

    @live.on_quiesce
    def finish() -> None:
        order.append(f"quiesce {live.cache.stats().invalidations - 1}")
        while leases:
            lease = leases.pop()
            lease.view[:] = b"data"
            lease.release()

    guest.send_invalidate()
    guest.send_invalidate()
    assert order == ["quiesce 0", "quiesce 1"]
    assert guest.read(0x5000, 4) == b"data"
    assert cache.stats().stale_dma_released == 0
    assert not caplog.records


def test_quiesce_that_raises(
    guest: MockDomain, cache: MapCache, live: IoreqServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged; the others are called, the mappings go, and the vCPU goes on."""
    called = []

    @live.on_quiesce
    def broken() -> None:
        raise OSError("cannot drain")

    live.on_quiesce(lambda: called.append(1))
    guest.send_invalidate()
    assert called == [1]
    assert cache.stats().invalidations == 2
    wait_for_the_log(live)
    assert "on_quiesce: <function test_quiesce_that_raises" in caplog.text
    assert "cannot drain" in caplog.text
    assert live.failures == 1


def test_invalidate_with_a_closed_cache(
    guest: MockDomain, cache: MapCache, live: IoreqServer
) -> None:
    """The vCPU goes on all the same, and the mistake is counted."""
    cache.close()
    guest.send_invalidate()
    assert live.failures == 1


def test_the_lost_dma_with_a_server(
    guest: MockDomain, live: IoreqServer, cache: MapCache, caplog: pytest.LogCaptureFixture
) -> None:
    """A lease that is held over the guest's ballooning writes to a page that is gone."""
    lease = cache.map_dma(0x5000, 4, owner="disk0", direction=DmaDirection.FROM_DEVICE)
    guest.balloon_out(0x5000, 0x1000)
    guest.balloon_in(0x5000, 0x1000)
    lease.view[:] = b"lost"
    lease.release()
    assert guest.read(0x5000, 4) == bytes(4)
    assert "released stale: DMA lease of 'disk0'" in caplog.text


def test_a_cache_that_was_filled_before(guest: MockDomain, cache: MapCache) -> None:
    """Nobody told it what the guest gave up before the server was open: it starts again."""
    guest.write(0x5000, b"old")
    assert cache.read(0x5000, 3) == b"old"
    guest.balloon_out(0x5000, 0x1000)
    guest.balloon_in(0x5000, 0x1000)
    with IoreqServer(guest, cache):
        assert cache.read(0x5000, 3) == b"\0\0\0"


def test_an_interrupted_callback(guest: MockDomain, cache: MapCache, server: IoreqServer) -> None:
    """Mappings go before the answer, though a callback is ended by KeyboardInterrupt."""
    guest.write(0x5000, b"old")

    @server.on_quiesce
    def interrupted() -> None:
        if server.invalidations:
            raise KeyboardInterrupt

    with server:
        assert cache.read(0x5000, 3) == b"old"
        thread, _ = in_thread(lambda: guest.balloon_out(0x5000, 0x1000))
        wait_for_requests(server)
        with pytest.raises(KeyboardInterrupt):
            while True:
                server.process_pending()
        thread.join()
        with pytest.raises(FaultError):
            cache.read(0x5000, 3)
        server._dispatcher.callbacks.clear()


def test_an_invalidate_that_is_given_up(
    guest: MockDomain, cache: MapCache, server: IoreqServer
) -> None:
    """A server that cannot be closed in order drops the mappings before it answers."""
    with server:
        guest.write(0x5000, b"old")
        assert cache.read(0x5000, 3) == b"old"
        thread, _ = in_thread(lambda: guest.balloon_out(0x5000, 0x1000))
        wait_for_requests(server)
        link = link_of(server)

        def interrupt() -> None:
            raise KeyboardInterrupt

        link.disable = interrupt  # type: ignore[method-assign] # for this test alone
        with pytest.raises(KeyboardInterrupt):
            server.close()
        thread.join()
    with pytest.raises(FaultError):
        cache.read(0x5000, 3)


def test_quiesce_on_close(guest: MockDomain, cache: MapCache, server: IoreqServer) -> None:
    """After close nobody tells the cache anything: DMA is finished before."""
    leases = [cache.map_dma(0x5000, 4, owner="disk0")]

    @server.on_quiesce
    def finish() -> None:
        while leases:
            leases.pop().release()

    with server:
        assert leases
    assert cache.leases() == ()
