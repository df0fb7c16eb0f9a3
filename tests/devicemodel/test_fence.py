"""A server uses the fence of its hypervisor's link: for slots, and for the ring."""

from __future__ import annotations

import pytest

from tests.kit import Memory, in_thread, link_of, wait_for_requests
from xenmapcache import MapCache, MockDomain
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.ioreq import DATA_OFFSET, RING_POINTERS, STATE_MASK, STATE_OFFSET, State
from xenmapcache.mock.ioreq_server import MockIoreqServer

MMIO, VGA = 0xF000_0000, 0xA0000


class Fence:
    """A fence that notes what the pages hold when it is called."""

    def __init__(self) -> None:
        self.link: MockIoreqServer | None = None
        self.slot: list[tuple[int, int]] = []
        self.ring: list[tuple[int, int]] = []

    def __call__(self) -> None:
        link = self.link
        if link is not None and link.ring is not None:
            page = link.page
            self.slot.append((page[STATE_OFFSET] & STATE_MASK, page[DATA_OFFSET]))
            self.ring.append(RING_POINTERS.unpack_from(link.ring))


@pytest.fixture
def fence(monkeypatch: pytest.MonkeyPatch) -> Fence:
    fence = Fence()
    monkeypatch.setattr(MockIoreqServer, "fence", fence)
    return fence


@pytest.fixture
def server(guest: MockDomain, cache: MapCache, fence: Fence) -> IoreqServer:
    return IoreqServer(guest, cache, buffered=True)


def test_a_request(guest: MockDomain, server: IoreqServer, fence: Fence) -> None:
    """After READY was seen, and before RESPONSE_READY is stored, with the data in its place."""
    device = Memory()
    device.bytes[0] = 7
    server.claim_mmio(MMIO, 16, device)
    with server:
        link = link_of(server)
        assert isinstance(link, MockIoreqServer)
        thread, seen = in_thread(lambda: guest.mmio_read(MMIO, 1))
        wait_for_requests(server)
        fence.link = link
        assert server.process_pending() == 1
        fence.link = None
        thread.join()
    assert seen == [7]
    assert fence.slot[0] == (State.READY, 0)
    assert fence.slot[-1] == (State.INPROCESS, 7)


def test_a_buffered_request(guest: MockDomain, server: IoreqServer, fence: Fence) -> None:
    """After the write pointer was loaded, and before the read pointer is stored."""
    device = Memory()
    server.claim_mmio(VGA, 16, device)
    with server:
        link = link_of(server)
        assert isinstance(link, MockIoreqServer)
        server.process_pending()  # the events of binding
        guest.mmio_write(VGA, 5, 1, buffered=True)
        fence.link = link
        assert server.process_pending() == 1
        fence.link = None
    assert device.bytes[0] == 5
    # Where the round ends was loaded, then the request; its room is given back after the third.
    assert fence.ring == [(0, 1), (0, 1), (0, 1)]
