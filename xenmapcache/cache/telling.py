"""Telling: what a map cache puts into its stream of events."""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

from ..address import PAGE_MASK, PAGE_SHIFT
from ..errors import FaultError, XenMapCacheError
from ..events import (
    WALL_CLOCK_OFFSET_NS,
    BucketDropped,
    BucketMapped,
    BucketReplaced,
    CacheClosed,
    CacheOpened,
    Event,
    HoleFault,
    Invalidated,
    LeaseReleased,
    LeaseTaken,
    MapFailed,
)
from ..mapping import Mapping
from ..stream import EventStream, now
from .info import Invalidation, LeaseKind
from .record import LeaseRecord

_S = 1_000_000_000
_DEVICE = LeaseKind.DEVICE  # CPython 3.11 takes long to find it in the class
_monotonic_ns = clock.monotonic_ns

# As their classes make them, in a third of the time; leases come often.
_make_taken = cast(Callable[[tuple[object, ...]], LeaseTaken], partial(tuple.__new__, LeaseTaken))
_make_released = cast(
    Callable[[tuple[object, ...]], LeaseReleased], partial(tuple.__new__, LeaseReleased)
)


def held(record: LeaseRecord, time: int, sequence: int) -> LeaseTaken:
    """Return the event of a lease."""
    direction, kind = record.direction, record.kind
    values = (
        time,
        record.id,
        kind._value_,
        record.address,
        record.length,
        record.owner,
        None if direction is None else direction._value_,
        record.thread._name,  # type: ignore[attr-defined] # noqa: SLF001 - name() is slow
        record.lost or (kind is not _DEVICE and record.sequence < sequence),
        record.origin,
    )
    return _make_taken(values)


def taken(stream: EventStream, record: LeaseRecord, sequence: int) -> None:
    """Tell of a lease that was taken; called without the lock."""
    stream.tell(held(record, _monotonic_ns() + WALL_CLOCK_OFFSET_NS, sequence), record)


def ended(stream: EventStream, record: LeaseRecord) -> None:
    """Tell that a lease has ended, if it has, and observers know it; called without the lock."""
    if record.told:
        sequence = record.released_at
        if sequence is not None:
            stale = record.lost or (record.kind is not _DEVICE and record.sequence < sequence)
            time = _monotonic_ns() + WALL_CLOCK_OFFSET_NS
            values = time, record.id, stale, record.copied_pages, record.lost_pages
            stream.tell(_make_released(values), record, False)


def moved(stream: EventStream, old: int, new: int) -> None:
    """Tell that a lease shows another address; called without the lock."""
    stream.put(BucketReplaced(now(), old, new))


def mapped(stream: EventStream, mapping: Mapping, began: int | None, former: bool) -> None:
    """Tell that a bucket was mapped; called under the lock.

    Args:
        stream: of the cache.
        mapping: of the bucket.
        began: when its map call began, in ns.
        former: whether it takes the place of another mapping.
    """
    time = now()
    if former:
        dropped(stream, [mapping], "replaced")
    stream.put(_bucket(mapping, time if began is None else began, began and time - began))


def _bucket(mapping: Mapping, time: int, duration: int | None) -> BucketMapped:
    errors = mapping.errors
    holes = 0 if errors is None else (len(errors) - errors.count(0)) << PAGE_SHIFT
    start = mapping.gfn << PAGE_SHIFT
    return BucketMapped(time, start, mapping.length, duration, mapping.address, holes)


def dropped(stream: EventStream, mappings: list[Mapping], reason: str) -> None:
    """Tell that buckets were dropped; called under the lock."""
    time = now()
    for mapping in mappings:
        stream.put(BucketDropped(time, mapping.gfn << PAGE_SHIFT, mapping.length, reason))


def missed(stream: EventStream, error: XenMapCacheError, address: int) -> None:
    """Tell of an access that came to a missing page, or to one that was refused."""
    if isinstance(error, FaultError):
        stream.put(HoleFault(now(), error.address & ~PAGE_MASK))
    else:
        stream.put(MapFailed(now(), address))


def invalidated(stream: EventStream, began: int, report: Invalidation) -> None:
    """Tell of an invalidation; called without the lock."""
    ids = tuple([lease.id for lease in report.dma])
    stream.put(Invalidated(began, report.sequence, report.dropped_buckets, ids, now() - began))
    stream.deliver()


def closed(stream: EventStream) -> None:
    """Tell that a cache was closed; called without the lock."""
    stream.put(CacheClosed(now()))
    stream.deliver()


def snapshot(
    opened: CacheOpened, records: list[LeaseRecord], mappings: list[Mapping], sequence: int
) -> Iterator[Event]:
    """Yield what an observer is to know first."""
    yield opened
    time = now()
    for mapping in mappings:
        yield _bucket(mapping, time, None)
    for record in records:
        since = int(record.since * _S) + WALL_CLOCK_OFFSET_NS
        record.told = True
        # From here on its end is told. If it ended before, and that was not told, nor is this.
        if record.released_at is None or not record.told:
            yield held(record, since, sequence)
        else:
            record.told = False
