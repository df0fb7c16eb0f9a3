"""A virtqueue whose rings and buffers a guest has granted: nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.devicemodel.virtio_kit import Ring
from xenmapcache import GrantError, MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.address import PAGE_SIZE
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.virtio import BrokenDriverError, VirtioRng, Virtqueue
from xenmapcache.devicemodel.virtio.queue import ACCESS_PLATFORM, EVENT_IDX, INDIRECT_DESC
from xenmapcache.grants import GrantSource, grant_address

RING, SIZE, PAGES = 0x10000, 8, 64


@pytest.fixture
def guest() -> MockDomain:
    """A guest that has granted all of its pages, in order."""
    guest = MockHypervisor().create_domain(memory=PAGES * PAGE_SIZE)
    guest.grants.grant(0, PAGES)
    return guest


@pytest.fixture
def grants(guest: MockDomain) -> Iterator[GrantSource]:
    """Its grants."""
    with open_backend("mock", domain=guest) as backend, backend.open_grants() as grants:
        yield grants


@pytest.fixture
def ring(guest: MockDomain) -> Ring:
    """The driver's side."""
    return Ring(guest, RING, SIZE)


@pytest.fixture
def queue(guest: MockDomain, grants: GrantSource, ring: Ring) -> Iterator[Virtqueue]:
    """The device's side, which the driver has given addresses with bit 63."""
    with open_backend("mock", domain=guest) as backend, MapCache(backend, grants=grants) as cache:
        areas = ring.at(
            descriptors=device(ring.descriptors),
            driver=device(ring.driver),
            device=device(ring.device),
        )
        yield Virtqueue(cache, 0, size=SIZE, **areas, features=INDIRECT_DESC | EVENT_IDX)


def device(address: int) -> int:
    """Return what the driver calls a guest address towards the device."""
    return grant_address(8) + address


def test_a_request(guest: MockDomain, grants: GrantSource, ring: Ring, queue: Virtqueue) -> None:
    """It is popped, read, written and pushed, and no grant is mapped when the driver sees it."""
    guest.write(0x1000, b"header")
    head = ring.chain([(device(0x1000), 6)], [(device(0x3F00), 512)])
    ring.offer(head)
    request = queue.pop()
    assert request is not None
    assert request.readable.read() == b"header"
    with request.writable.lease("disk") as memory:
        assert grants.mapped == 2
        memory[:] = b"sector!!" * 64
    assert grants.mapped == 0
    queue.push((request, 512))
    assert ring.used() == [(head, 512)]
    assert guest.read(0x3F00, 512) == b"sector!!" * 64


def test_what_is_not_granted(
    guest: MockDomain, grants: GrantSource, ring: Ring, queue: Virtqueue
) -> None:
    """A buffer fails its request, and a ring breaks the queue; both name the reference."""
    guest.grants.revoke(8 + 3)
    ring.offer(ring.chain([], [(device(0x2F00), 512)]))
    request = queue.pop()
    assert request is not None
    with (
        pytest.raises(GrantError, match="references 10 to 11:"),
        request.writable.lease("disk"),
    ):
        pass
    assert grants.mapped == 0
    queue.push((request, 0))
    guest.grants.revoke(8 + RING // PAGE_SIZE)
    with pytest.raises(BrokenDriverError, match=f"reference {8 + RING // PAGE_SIZE}:"):
        queue.pop()


def test_a_device_says_that_it_takes_grants(guest: MockDomain, grants: GrantSource) -> None:
    """Linux grants its buffers only to a device that offers ACCESS_PLATFORM."""
    offered = []
    for given in (None, grants):
        with (
            open_backend("mock", domain=guest) as backend,
            MapCache(backend, grants=given) as cache,
        ):
            assert cache.grants is given
            with VirtioRng(IoreqServer(guest, cache)) as device:
                offered.append(device.features)
    assert offered[0] ^ offered[1] == ACCESS_PLATFORM
