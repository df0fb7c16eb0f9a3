"""Reading a cache or a server without any lock: a program that is stuck may hold all of them.

Other threads continue while this reads. So numbers may be of different moments, and a dictionary
may change while it is copied (in Python without a GIL). Then the copy is made again, up to a
limit; the answer says if it could not be made.

Nothing here calls code of others: no ``repr`` of a backend, a device or a handler, because that
could wait for the thread that is stuck.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Final, ParamSpec, TypeAlias, TypeVar
from weakref import ref

from ..cache import CacheStats, LeaseKind, MapCache
from ..cache.budget import Budget, Reservation
from ..cache.record import LeaseRecord
from ..devicemodel import IoreqServer
from ..devicemodel.dispatch import Job
from ..escape import printable
from ..events import WALL_CLOCK_OFFSET_NS
from ..ioreq import RequestKind
from ..stream import now
from .snapshot import (
    MAX_BYTES,
    MAX_FRAMES,
    MAX_JOBS,
    MAX_LEASES,
    MAX_WATCHED,
    CacheState,
    CurrentRequest,
    LeaseState,
    ServerState,
    Snapshot,
    cut,
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Watchable: TypeAlias = MapCache | IoreqServer

_TRIES: Final = 100
_S: Final = 1_000_000_000
_KINDS: Final = {int(kind): kind.name.lower() for kind in RequestKind}
_STARTTIME: Final = 19
"""Which field of /proc/PID/stat it is, after the command's name."""

# What an answer needs at most, in bytes: of all texts and numbers, apart from those of its parts.
_SNAPSHOT_BYTES, _CACHE_BYTES, _SERVER_BYTES = 16384, 1024, 256
_LEASE_BYTES, _JOB_BYTES, _FRAME_BYTES = 320, 256, 4
_PLAIN_BYTES, _ESCAPED_BYTES = 2, 12


class Watched:
    """A cache or a server, which is not kept alive.

    Args:
        watched: the cache or server.
        forget: called when it has died.

    Attributes:
        name: of a cache, what it is a cache of.
        domid: of a cache, its domain's number, or None.
        get: returns the cache or server, or None.
    """

    def __init__(self, watched: Watchable, forget: Callable[[object], object]) -> None:
        self.name = ""
        self.domid: int | None = None
        if isinstance(watched, MapCache):
            self.name = f"MapCache of {watched.backend!r}"
            domid = getattr(watched.backend, "domid", None)
            self.domid = domid if isinstance(domid, int) else None
        self.get = ref(watched, forget)


class _Room:
    """How many bytes and leases an answer may still have."""

    def __init__(self) -> None:
        self._left = MAX_BYTES - _SNAPSHOT_BYTES
        self.leases = MAX_LEASES

    def take(self, count: int, *texts: str | None) -> bool:
        """Return whether there is room for a part of an answer, and take it."""
        for text in texts:
            if text:
                plain = text.isascii() and text.isprintable()
                count += len(text) * (_PLAIN_BYTES if plain else _ESCAPED_BYTES)
        if count > self._left:
            return False
        self._left -= count
        return True


def read_process(watched: Iterable[Watched], started_ns: int) -> Snapshot:
    """Return what this process's caches and servers hold."""
    room = _Room()
    caches: list[tuple[MapCache, Watched]] = []
    servers: list[ServerState] = []
    omitted = 0
    for each in watched:
        found = each.get()
        if isinstance(found, MapCache):
            if len(caches) < MAX_WATCHED and room.take(_CACHE_BYTES, cut(each.name)):
                caches.append((found, each))
            else:
                omitted += 1
        elif isinstance(found, IoreqServer):
            if len(servers) < MAX_WATCHED and room.take(_SERVER_BYTES, cut(repr(found))):
                servers.append(_read_server(found, room))
            else:
                omitted += 1
    # Leases last: those of one cache do not take the room of the next cache itself.
    states = tuple([_read_cache(cache, each, room) for cache, each in caches])
    return Snapshot(
        os.getpid(),
        cut(printable(" ".join(sys.orig_argv))),
        started_ns,
        now(),
        states,
        tuple(servers),
        omitted,
    )


def process_started_ns() -> int:
    """Return when this process was started.

    Raises:
        OSError: /proc cannot be read.
    """
    fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
    ticks = int(fields[_STARTTIME])
    after_boot = ticks * _S // os.sysconf("SC_CLK_TCK")
    return now() - max(0, time.clock_gettime_ns(time.CLOCK_BOOTTIME) - after_boot)


def tried(
    function: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs
) -> Result | None:
    """Return what a function returns that copies what other threads change, or None."""
    for _ in range(_TRIES):
        try:
            return function(*arguments, **options)
        except RuntimeError as error:  # ... changed size during iteration; ... mutated during ...
            if "during iteration" not in str(error):
                raise
    return None


def _read_cache(cache: MapCache, watched: Watched, room: _Room) -> CacheState:
    table, registry = cache._table, cache._registry  # noqa: SLF001 - stats() takes the lock
    stats = tried(_read_stats, cache)
    records = tried(registry.held)
    generation = table.generation
    states = []
    for record in records or ():
        if not room.leases or not (state := _read_lease(record, generation.sequence, room)):
            break
        room.leases -= 1
        states.append(state)
    return CacheState(
        cut(watched.name),
        watched.domid,
        generation.closed,
        stats,
        tuple(states),
        len(records or ()) - len(states),
        stats is None or records is None,
    )


def _read_stats(cache: MapCache) -> CacheStats:
    """Return the counters, as ``collect_stats`` does it under the lock."""
    table, registry = cache._table, cache._registry  # noqa: SLF001 - stats() takes the lock
    budget, copies = cache._budget, cache._copies  # noqa: SLF001 - stats() takes the lock
    mapped, mappings = _resident(budget)
    copied, copy_mappings = _resident(copies)
    maps = budget.maps + copies.maps
    counted = registry._counted  # noqa: SLF001 - stale_released() changes it
    return CacheStats(
        slow_path_hits=table.slow_path_hits,
        misses=table.misses,
        maps=maps,
        unmaps=max(0, maps - mappings - copy_mappings),
        evictions=table.evictions,
        hole_faults=table.hole_faults,
        invalidations=table.generation.sequence,
        stale_dma_released=counted + len(registry.uncounted),
        stale_dma_held=registry.stale_held(),
        resident_bytes=mapped + copied,
        resident_buckets=len(table.generation.buckets),
        device_leases=registry.count(LeaseKind.DEVICE),
        dma_leases=registry.count(LeaseKind.DMA),
        copied_bytes=copied,
        windows=registry.count(LeaseKind.WINDOW),
    )


def _resident(budget: Budget) -> tuple[int, int]:
    """Return the bytes that are mapped, and how many mappings they are."""
    found = [
        length
        for record, length in [*budget.accounts.items()]
        if not isinstance(record, Reservation) and record.mapped
    ]
    return sum(found), len(found)


def _read_lease(record: LeaseRecord, sequence: int, room: _Room) -> LeaseState | None:
    owner, thread = cut(record.owner), cut(record.thread.name)
    origin = record.origin
    if origin is not None:
        origin = tuple(map(cut, origin[-MAX_FRAMES:]))
    if not room.take(_LEASE_BYTES + _FRAME_BYTES * len(origin or ()), owner, thread, *origin or ()):
        return None
    direction = record.direction
    return LeaseState(
        record.id,
        owner,
        record.kind.value,
        record.address,
        record.address + record.length,
        None if direction is None else direction.value,
        _clock(record.since),
        record.stale_at(sequence),
        thread,
        origin,
    )


def _clock(seconds: float) -> int:
    """Return a time of :func:`time.monotonic` on the events' clock."""
    return int(seconds * _S) + WALL_CLOCK_OFFSET_NS


def _read_server(server: IoreqServer, room: _Room) -> ServerState:
    jobs: list[CurrentRequest] = []
    for job in _jobs(server):
        state = _read_job(job)
        if len(jobs) == MAX_JOBS or not room.take(_JOB_BYTES, state.region, state.calling):
            break
        jobs.append(state)
    return ServerState(
        cut(repr(server)),
        server.domid,
        server.requests,
        server.invalidations,
        server.failures,
        server.lost_answers,
        tuple(jobs),
    )


def _jobs(server: IoreqServer) -> Iterator[Job]:
    """Yield what a server does now, innermost first."""
    connection = server._runtime.connection  # noqa: SLF001 - it is None, or shows what runs
    job = None if connection is None else connection.current
    while job is not None:
        yield job
        job = job.outer


def _read_job(job: Job) -> CurrentRequest:
    request, region = job.request, job.region
    since, calling = _clock(job.since), _name(job.calling)
    if request is None:
        return CurrentRequest(None, "callbacks", None, None, None, since, None, calling)
    return CurrentRequest(
        request.vcpu,
        _KINDS.get(request.kind) or f"type {request.kind}",
        request.is_read,
        request.address,
        request.size,
        since,
        None if region is None else cut(repr(region)),
        calling,
    )


def _name(function: object) -> str | None:
    """Return the name of a handler or callback, without calling code of its own."""
    if isinstance(function, MethodType):
        function = function.__func__
    if isinstance(function, FunctionType | BuiltinFunctionType):
        return cut(function.__qualname__)
    return None if function is None else cut(type(function).__qualname__)
