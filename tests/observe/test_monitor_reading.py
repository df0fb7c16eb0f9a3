"""Reading without locks: what a cache and a server show while other threads change them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.kit import ask, in_thread
from xenmapcache import Backend, MapCache, MockDomain, MockHypervisor, open_backend
from xenmapcache.cache.registry import LeaseRegistry
from xenmapcache.devicemodel import IoreqServer
from xenmapcache.devicemodel.dispatch import Job
from xenmapcache.ioreq import Request, RequestKind
from xenmapcache.mapping import Mapping
from xenmapcache.observe import reading as module
from xenmapcache.observe.reading import Watchable, Watched, process_started_ns, tried
from xenmapcache.observe.snapshot import (
    MAX_BYTES,
    MAX_FRAMES,
    MAX_TEXT,
    CacheState,
    ServerState,
    Snapshot,
)
from xenmapcache.stream import now


def read(*watched: Watchable) -> Snapshot:
    """Read some caches and servers, and check that the answer is accepted."""
    found = module.read_process([Watched(each, id) for each in watched], 1)
    line = found.to_json()
    assert len(line) <= MAX_BYTES
    assert Snapshot.from_json(line) == found
    return found


def cache_state(cache: MapCache) -> CacheState:
    (found,) = read(cache).caches
    return found


def server_state(server: IoreqServer) -> ServerState:
    (found,) = read(server).servers
    return found


def test_the_counters_are_those_of_stats(backend: Backend) -> None:
    """After all that changes them; and what is mapped, without a look at hints."""
    cache = MapCache(backend, bucket_shift=16, max_resident="256k", on_stale="warn")
    view = next(cache.views(0, 1))
    for address in range(0, 0x90000, 0x10000):
        cache.read(address, 8)
        cache.read(address, 8)
    with pytest.raises(Exception, match="no page"):
        cache.read(0xA0000, 1)
    leases = [cache.map_dma(0, 16, owner="a"), cache.map_device(0x1000, 16, owner="b")]
    cache.invalidate()
    leases[0].release()
    leases[0] = cache.map_dma(0, 16, owner="c")
    with cache.window(0x2000, 0x3000):
        found = cache_state(cache)
        assert found.stats == cache.stats()
        assert found.stats.windows == found.stats.stale_dma_released == 1
    cache.invalidate()
    assert cache_state(cache).stats == cache.stats()
    del view
    cache.close(force=True)
    found = cache_state(cache)
    assert found.stats == cache.stats()
    assert found.closed
    assert found.leases == ()


def test_reservations_are_not_resident(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a bucket is mapped, its room is taken, and nothing is mapped yet."""
    cache.read(0, 1)
    seen = []
    map_pages = cache.backend.map

    def observed(gfn: int, count: int, *, writable: bool) -> Mapping:
        seen.append(cache_state(cache).stats)
        return map_pages(gfn, count, writable=writable)

    monkeypatch.setattr(cache.backend, "map", observed)
    cache.read(0x10000, 1)
    (stats,) = seen
    assert stats is not None
    assert (stats.maps, stats.unmaps, stats.resident_bytes) == (1, 0, 0x10000)


def test_unmapped_memory_is_not_resident(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although its account is there until the lock is taken the next time."""
    cache.read(0, 1)
    cache.invalidate()
    assert len(cache._budget.accounts) == 1
    stats = cache_state(cache).stats
    assert stats is not None
    assert (stats.maps, stats.unmaps, stats.resident_bytes) == (1, 1, 0)


def test_a_lease(cache: MapCache) -> None:
    """Its age goes by the clock of the events; its origin is cut, if that is too deep."""
    before = now()
    lease = cache.map_dma(0xFFF, 2, owner="disk", direction="to-device")
    lease._record.origin = tuple(map(str, range(100)))
    lease._record.thread.name, name = "x" * 2000, lease._record.thread.name
    try:
        (found,) = cache_state(cache).leases
    finally:
        lease._record.thread.name = name
    assert (found.id, found.owner, found.kind) == (lease.id, "disk", "dma")
    assert (found.start, found.end, found.direction) == (0xFFF, 0x1001, "to-device")
    assert before - 1000 <= found.taken_ns <= now()  # a float of seconds has fewer digits
    assert not found.stale
    assert found.thread == "x" * (MAX_TEXT - 3) + "..."
    assert found.origin == tuple(map(str, range(100 - MAX_FRAMES, 100)))
    cache.invalidate()
    assert cache_state(cache).leases[0].stale
    lease.release()


def test_too_many_leases_are_counted(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest ones are shown."""
    monkeypatch.setattr(module, "MAX_LEASES", 3)
    other = MapCache(cache.backend)
    for _ in range(5):
        cache.map_dma(0, 1, owner="disk")
    other.map_dma(0, 1, owner="disk")
    first, second = read(cache, other).caches
    assert [lease.id for lease in first.leases] == [each.id for each in cache.leases()[:3]]
    assert (first.leases_omitted, second.leases_omitted) == (2, 1)
    assert not first.incomplete
    for each in (cache, other):
        each.close(force=True)


@pytest.mark.parametrize("letter", ["x", '"', "\x1b", "\N{GRINNING FACE}"])
def test_an_answer_has_room_for_so_much(cache: MapCache, letter: str) -> None:
    """Whatever the texts are. Leases without room are counted; other caches are shown."""
    for _ in range(1000):
        cache.map_dma(0, 1, owner=letter * MAX_TEXT)
    cache.map_dma(0, 1, owner="short")
    other = MapCache(cache.backend)
    other.map_dma(0, 1, owner=letter * MAX_TEXT)
    first, second = read(cache, other).caches
    assert 300 < len(first.leases) == 1001 - first.leases_omitted
    assert second.leases_omitted == 1 - len(second.leases)
    for each in (cache, other):
        each.close(force=True)


def test_too_many_caches_are_counted(
    cache: MapCache, domain: MockDomain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And servers."""
    server = IoreqServer(domain, cache)
    monkeypatch.setattr(module, "MAX_WATCHED", 2)
    found = read(cache, cache, cache, server, server, server)
    assert (len(found.caches), len(found.servers), found.omitted) == (2, 2, 2)
    monkeypatch.setattr(module, "MAX_BYTES", 0)
    found = module.read_process([Watched(each, id) for each in (cache, server)], 1)
    assert (len(found.caches), len(found.servers), found.omitted) == (0, 0, 2)


# --- what other threads change --------------------------------------------------------


def changed(times: int, error: Exception) -> Callable[..., Any]:
    """Return a function that fails N times, and then returns its argument."""
    left = [error] * times

    def function(value: object) -> object:
        if left:
            raise left.pop()
        return value

    return function


@pytest.mark.parametrize(
    "text", ["dictionary changed size during iteration", "deque mutated during iteration"]
)
def test_a_copy_is_tried_again(text: str) -> None:
    """Up to a limit. Other errors are raised."""
    assert tried(changed(5, RuntimeError(text)), 7) == 7
    assert tried(changed(1000, RuntimeError(text)), 7) is None
    with pytest.raises(RuntimeError, match="other"):
        tried(changed(1, RuntimeError("other")), 7)


def test_a_part_that_cannot_be_read(cache: MapCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer says so; the other parts are there."""
    lease = cache.map_dma(0, 1, owner="disk")

    def fail(*_: object) -> None:
        raise RuntimeError("dictionary changed size during iteration")

    with monkeypatch.context() as patch:
        patch.setattr(LeaseRegistry, "held", fail)
        found = cache_state(cache)
        assert (found.leases, found.leases_omitted, found.incomplete) == ((), 0, True)
        assert found.stats is not None
    with monkeypatch.context() as patch:
        patch.setattr(LeaseRegistry, "stale_held", fail)
        found = cache_state(cache)
        assert (len(found.leases), found.stats, found.incomplete) == (1, None, True)
    lease.release()


@pytest.mark.slow
def test_threads_that_lease_all_the_time(cache: MapCache) -> None:
    """Every answer is well-formed, and no thread fails."""
    stop = threading.Event()

    def work() -> int:
        count = 0
        while not stop.is_set():
            with cache.map_dma(0, 1, owner="disk"):
                cache.read(0x10000 * (count % 8), 1)
            count += 1
        return count

    threads = [in_thread(work) for _ in range(3)]
    for _ in range(200):
        found = cache_state(cache)
        assert len(found.leases) <= 3
    stop.set()
    for thread, _ in threads:
        thread.join()
    assert all(counts for _, counts in threads)


# --- servers --------------------------------------------------------------------------


@pytest.fixture
def guest() -> MockDomain:
    guest = MockHypervisor().create_domain(memory="16M", vcpus=2)
    guest.vcpu_timeout = 20.0
    return guest


@pytest.fixture
def server(guest: MockDomain) -> Iterator[IoreqServer]:
    with open_backend("mock", domain=guest) as backend, MapCache(backend) as cache:
        yield IoreqServer(guest, cache, buffered=True)


def test_an_idle_server(guest: MockDomain, server: IoreqServer) -> None:
    """Before, while and after it is open."""
    assert server_state(server) == ServerState(
        "<IoreqServer of domain 1, not open>", 1, 0, 0, 0, 0, ()
    )
    with server, server.serving():
        server.claim_ports(0x500, 4)
        guest.port_in(0x500)
        found = server_state(server)
        assert (found.name, found.requests) == ("<IoreqServer of domain 1, open>", 1)
    assert server_state(server).name == "<IoreqServer of domain 1, closed>"


class Disk:
    """A device that looks at its own server while it works."""

    def __init__(self, server: IoreqServer) -> None:
        self.server = server
        self.seen: list[ServerState] = []

    def write(self, offset: int, size: int, value: int) -> None:
        del offset, size, value
        self.seen.append(server_state(self.server))


def test_the_request_that_is_handled_now(guest: MockDomain, server: IoreqServer) -> None:
    """Who waits for it, since when, and whose code runs."""
    before = now()
    disk = Disk(server)
    with server, server.serving():
        server.claim_ports(0x1F0, 8, disk)
        guest.port_out(0x1F4, 7, 2, vcpu=1)
        assert server_state(server).current == ()
    ((job,),) = [each.current for each in disk.seen]
    assert (job.vcpu, job.kind, job.is_read) == (1, "port", False)
    assert (job.address, job.size, job.region) == (0x1F4, 2, "<PORT region 0x1f0..0x1f8>")
    assert before - 1000 <= job.since_ns <= now()
    assert job.calling == "Disk.write"


def test_callbacks(guest: MockDomain, server: IoreqServer) -> None:
    """Those of an INVALIDATE have its request; at the end there is none."""
    seen: list[ServerState] = []

    @server.on_quiesce
    def quiesce() -> None:
        seen.append(server_state(server))

    with server, server.serving():
        ask(guest, server, _request(RequestKind.INVALIDATE))
    (*_, request), (callback,) = seen[0].current, seen[-1].current
    assert request.kind == "invalidate"
    assert (callback.vcpu, callback.kind, callback.address) == (None, "callbacks", None)
    for each in (request, callback):
        assert str(each.calling).endswith("test_callbacks.<locals>.quiesce")


def _request(kind: int) -> Request:
    return Request(0, kind, False, 0x1000, 0, 4, 1, False, False)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (None, None),
        (len, "len"),
        ([].append, "list.append"),
        (partial(len), "partial"),
        (Job, "type"),
        (lambda: None, "<lambda>"),
    ],
)
def test_names_of_what_is_called(server: IoreqServer, function: object, name: str | None) -> None:
    """No code of it runs. A kind of request that is not known has its number."""
    job = Job(_request(99))
    job.calling = function
    found = module._read_job(job)
    assert (found.kind, found.region) == ("type 99", None)
    assert found.calling == name or str(found.calling).endswith(str(name))
    del server


def test_jobs_inside_of_each_other(server: IoreqServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The innermost comes first; too many are left out."""
    monkeypatch.setattr(module, "MAX_JOBS", 2)
    inner = Job(None)
    inner.outer = Job(_request(0))
    inner.outer.outer = Job(_request(1))
    with server:
        connection = server._runtime.connection
        assert connection is not None
        with monkeypatch.context() as patch:
            patch.setattr(module, "_jobs", lambda _: iter((inner, inner.outer, inner)))
            assert [each.kind for each in server_state(server).current] == ["callbacks", "port"]


def test_when_the_process_was_started() -> None:
    """Before now; it is the same each time, but for the ticks of a clock."""
    first, second = process_started_ns(), process_started_ns()
    assert 0 < first <= now() - time.thread_time_ns()
    assert abs(second - first) < 1_000_000_000
