"""What tests share.

Of the cache: what they do to it, and count. Of the device kit: the guest's side, and a look at the
server's inside.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from xenmapcache import Backend, MapCache, MockDomain
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.connection import Connection
from xenmapcache.devicemodel.link import HypervisorLink
from xenmapcache.ioreq import SLOT_SIZE, STATE_MASK, STATE_OFFSET, Request, RequestSlot, State

BUCKET = 1 << 16
"""The size of the buckets of caches that :func:`connected` and the fixture ``cache`` make."""


def maps(domain: MockDomain) -> int:
    """Return how often a backend has mapped memory of a guest."""
    return sum(call.name == "map" for call in domain.calls)


def heat(cache: MapCache, address: int) -> None:
    """Have a bucket without holes found without a look at anything else, from now on."""
    cache.read(address, 1)  # maps it
    cache.read(address, 1)  # lets it in
    assert address >> 16 in cache._table.generation.readable


def reballoon(domain: MockDomain, address: int, length: int = 0x1000) -> None:
    """Let the guest give pages up and get new frames for them."""
    domain.balloon_out(address, length)
    domain.balloon_in(address, length)


def connected(domain: MockDomain, backend: Backend, on_stale: str = "warn") -> MapCache:
    """Return a cache that the guest's invalidations reach."""
    cache = MapCache(backend, bucket_shift=16, on_stale=on_stale)  # type: ignore[arg-type] # from parametrize
    domain.on_invalidate(cache.invalidate)
    return cache


class Memory:
    """A device of 4 KiB of registers that remembers each access."""

    def __init__(self) -> None:
        self.bytes = bytearray(4096)
        self.accesses: list[tuple[str, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.accesses.append(("read", offset, size))
        return int.from_bytes(self.bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.accesses.append(("write", offset, size))
        self.bytes[offset : offset + size] = value.to_bytes(size, "little")


def connection_of(server: IoreqServer) -> Connection:
    """Return the connection of an open server."""
    connection = server._runtime.connection
    assert connection is not None
    return connection


def link_of(server: IoreqServer) -> HypervisorLink:
    """Return the hypervisor's side of an open server."""
    return connection_of(server).link


def put_state(page: memoryview, vcpu: int, state: State) -> None:
    """Change the state of a slot against all rules."""
    position = vcpu * SLOT_SIZE + STATE_OFFSET
    page[position] = page[position] & ~STATE_MASK | state


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Have a vCPU do something, and collect what it sees."""
    seen: list[object] = []
    thread = threading.Thread(target=lambda: seen.append(work()))
    thread.start()
    return thread, seen


def wait_for_requests(server: IoreqServer, count: int = 1, vcpus: int = 4) -> None:
    """Wait until ``count`` vCPUs have sent a request; their events stay where they are."""
    page = link_of(server).page
    while sum(RequestSlot(page, vcpu).state == State.READY for vcpu in range(vcpus)) < count:
        os.sched_yield()


def wait_for_the_log(server: IoreqServer) -> None:
    """Wait until the round that answered last has ended: a round logs after its answers."""
    with server._runtime.lock:
        pass


def ask(guest: MockDomain, server: IoreqServer, request: Request) -> int | None:
    """Put anything into the page, and wait for the answer."""
    mock = guest.ioreq_servers[server.id]
    mock.send(0, request)
    return mock.wait(0, 20)
